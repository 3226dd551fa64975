"""Kernels of transformed convolutions (Winograd and others) against the direct kernel.

``python benchmarks/transformed.py [LAYER ...]`` with layers written ``C-F@SIZEkX``, where sizes of
map and kernel may be oblong (``512x1``), and ``s2`` or ``g64`` behind add a stride or groups.
Warm figures repeat a call; cold ones find their weights outside of the second-level cache, as calls
inside a network do. Both are minima of single calls that take turns.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from cases import BadInput, names
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.x86.isa import VectorISA, isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import host_target
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.threads import processor, set_threads

LAYERS = (
    "64-64@56k3",
    "128-128@28k3",
    "256-256@14k3",
    "512-512@7k3",
    "512-512@14k3",
    "512-512@28k3",
    "256-256@56k3",
    "64-64@224k3",
    "128-128@28k5",
    "64-192@27k5",
    "64-64@56k7",
    "32-32@112k11",
    "128-128@512x1k64x1",
    "256-256@28k31g256",
    "96-256@28k1x3",
    "256-96@28k3x1",
)
# Copies of the weights that calls go through in turn hold at least this much.
_COLD_BYTES = 64 << 20
_MOST_COPIES = 64
_PAUSE = 0.02
_SIZE = r"(\d+)(?:x(\d+))?"
_LAYER = re.compile(rf"(\d+)-(\d+)@{_SIZE}k{_SIZE}(?:s(\d+))?(?:g(\d+))?")


@dataclass
class Kernel:
    """A compiled kernel, its arguments, and the least seconds of a call so far."""

    schedule: Any
    function: Any
    x: tvm.runtime.Tensor
    weights: list[tvm.runtime.Tensor]
    y: tvm.runtime.Tensor
    warm: float = field(default=float("inf"))
    cold: float = field(default=float("inf"))

    def call(self, weights: tvm.runtime.Tensor) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        self.function(self.x, weights, self.y)
        return time.perf_counter() - start

    def take_turn(self, calls: int) -> None:
        """Call with the same weights, then with each copy of them."""
        self.warm = min(self.warm, *(self.call(self.weights[0]) for _ in range(calls)))
        self.cold = min(self.cold, *(self.call(weights) for weights in self.weights))


def prepare(
    workload: ConvWorkload,
    schedule: Any,
    isa: VectorISA,
    target: tvm.target.Target,
    most_copies: int = _MOST_COPIES,
) -> Kernel:
    """Compile a schedule and make its arguments, the same data for every schedule."""
    geometry = workload.geometry
    function = kernels.emit(workload, schedule, isa).with_attr("global_symbol", "main")
    module = tvm.compile(tvm.IRModule({"main": function}), target=target)
    rng = np.random.default_rng(0)
    blocks = -(-geometry.out_channels // isa.lanes)
    shape: tuple[int, ...] = (1, geometry.in_channels, geometry.height, geometry.width)
    if workload.in_block > 1:
        shape = (1, -(-shape[1] // isa.lanes), *shape[2:], isa.lanes)
    x = rng.standard_normal(shape)
    weight = rng.standard_normal(geometry.weight_shape).astype("float32")
    packed = kernels.pack_weights(weight, workload, schedule, isa)
    copies = min(most_copies, max(2, 1 + _COLD_BYTES // packed.nbytes))
    y = np.zeros((1, blocks, geometry.out_height, geometry.out_width, isa.lanes), "float32")
    return Kernel(
        schedule,
        module["main"],
        tvm.runtime.tensor(x.astype("float32")),
        [tvm.runtime.tensor(packed) for _ in range(copies)],
        tvm.runtime.tensor(y),
    )


def geometry_of(layer: str) -> ConvGeometry:
    """The convolution with "same" padding that a layer's text names."""
    match = _LAYER.fullmatch(layer)
    if match is None:
        raise BadInput(f"layer must be written C-F@SIZEkX, with s or g behind, not {layer!r}")
    channels, outputs, height, width, rows, columns, stride, groups = match.groups()
    kernel = (int(rows), int(columns or rows))
    padding = (kernel[0] // 2, kernel[1] // 2, (kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    return ConvGeometry(
        int(channels),
        int(outputs),
        int(height),
        int(width or height),
        kernel,
        stride=(int(stride or 1),) * 2,
        padding=padding,
        groups=int(groups or 1),
    )


def nnpack(geometry: ConvGeometry) -> Callable[[], float]:
    """Seconds of a call of NNPACK through PyTorch, which transforms the weights each time.

    It knows stride 1 and one group only, and kernels of up to 16 taps a side.
    """
    if geometry.stride != (1, 1) or geometry.groups > 1 or max(geometry.kernel) > 16:
        raise BadInput(f"NNPACK has no kernel for {geometry}; name other layers")
    import torch

    if not torch.backends.nnpack.is_available():  # asking initialises it
        raise BadInput("this build of PyTorch has no NNPACK")
    rng = np.random.default_rng(0)
    shapes = ((1, geometry.in_channels, geometry.height, geometry.width), geometry.weight_shape)
    x, weight = (torch.from_numpy(rng.standard_normal(s).astype("float32")).clone() for s in shapes)
    bias, padding = torch.zeros(geometry.out_channels), list(geometry.padding[:2])
    call = torch._nnpack_spatial_convolution

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            call(x, weight, bias, padding)
        return time.perf_counter() - start

    with torch.inference_mode():
        expected = torch.nn.functional.conv2d(x, weight, bias, padding=padding)
        if not torch.allclose(call(x, weight, bias, padding), expected, atol=1e-2, rtol=1e-3):
            raise RuntimeError(f"NNPACK computes something else for {geometry}")
    return seconds


def compare(
    layer: str,
    target: tvm.target.Target,
    algorithms: Sequence[str],
    schedules: int,
    rounds: int,
    beside_nnpack: bool,
) -> None:
    """Print the ratios of a layer's transformed kernels to the best direct one."""
    isa = isa_of(target)
    workload = ConvWorkload(geometry_of(layer), isa.lanes)
    chosen = [
        schedule
        for name, found in kernels.spaces(workload, isa, ("direct", *algorithms)).items()
        for schedule in found[: 2 if kernels.FAMILIES[name].algorithm == "direct" else schedules]
    ]
    timed = [prepare(workload, schedule, isa, target) for schedule in chosen]
    peer = nnpack(workload.geometry) if beside_nnpack else None
    of_peer = float("inf")
    for _ in range(rounds):
        for kernel in timed:
            kernel.take_turn(4)
        if peer:
            time.sleep(_PAUSE)  # TVM's threads wait actively for a while
            of_peer = min(of_peer, *(peer() for _ in range(6)))
    direct = [k for k in timed if kernels.algorithm_of(k.schedule) == "direct"]
    warm, cold = (min(getattr(k, name) for k in direct) for name in ("warm", "cold"))
    expected = direct[0].y.numpy()
    rate = 2e-9 * workload.geometry.multiplications / warm
    print(f"\n{layer}: direct {1e3 * warm:.3f} ms ({rate:.0f} GF/s), cold {1e3 * cold:.3f} ms")
    print("| schedule | warm | cold | difference |\n|---|---|---|---|")
    for kernel in timed[len(direct) :]:
        difference = np.abs(kernel.y.numpy() - expected).max() / np.abs(expected).max()
        text = ", ".join(f"{k} {v}" for k, v in kernel.schedule.to_json().items())
        ratios = f"{warm / kernel.warm:.2f} | {cold / kernel.cold:.2f}"
        print(f"| {text} | {ratios} | {difference:.1e} |", flush=True)
    if peer:
        best = min(timed, key=lambda kernel: kernel.cold)
        algorithm = kernels.algorithm_of(best.schedule)
        print(
            f"\nNNPACK {1e3 * of_peer:.3f} ms: {of_peer / best.cold:.2f} times the best here "
            f"({1e3 * best.cold:.3f} ms with cold weights, {algorithm})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="*", default=LAYERS)
    parser.add_argument("--algorithms", default="winograd,fft", help="beside the direct one")
    parser.add_argument("--schedules", type=int, default=4, help="of each family, best first")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nnpack", action="store_true", help="beside NNPACK, of PyTorch")
    args = parser.parse_args()
    algorithms = names("--algorithms", args.algorithms, kernels.ALGORITHMS)
    set_threads(args.threads)
    if args.nnpack:
        import torch

        torch.set_num_threads(args.threads)
    target = host_target()
    print(f"{args.threads} threads, {processor()}, compiled for {target.attrs['mcpu']}")
    for layer in args.layers:
        compare(layer, target, algorithms, args.schedules, args.rounds, args.nnpack)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"transformed.py: {error}")
