"""What the tests of the x86 kernels share: targets, blocked layouts, a reference convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86.isa import AVX512_BF16, VectorISA, isa_of
from tvm_lowrank.schedules.x86.packing import pack_channels
from tvm_lowrank.schedules.x86.pairs import round_bits
from tvm_lowrank.schedules.x86.workload import ConvWorkload, parse_step

from tvm_lowrank.build import compile_module
from tvm_lowrank.geometry import ConvGeometry

CPUS = {"avx512": "skylake-avx512", "avx2": "haswell", "generic": "x86-64"}
BF16 = "cooperlake"
TOLERANCE = 1e-5


def target(name: str) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": CPUS[name]})


@functools.cache
def _host_features() -> frozenset[str]:
    host = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    has = tvm.target.codegen.llvm_cpu_has_features
    names = ("avx512f", "avx512bf16", "avx2", "fma")
    return frozenset(name for name in names if has(name, host))


def runnable_isa(name: str) -> VectorISA:
    """The instruction set, or a skipped test if this machine cannot run its code."""
    needed = {"avx512": {"avx512f"}, "avx2": {"avx2", "fma"}, "generic": set()}[name]
    missing = needed - _host_features()
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    return isa_of(target(name))


def bfloat16_isa() -> VectorISA:
    """AVX-512 with products of bfloat16, or a skipped test if this machine cannot run its code."""
    if "avx512bf16" not in _host_features():
        pytest.skip("this CPU lacks avx512bf16")
    return AVX512_BF16


def build(func: tvm.tirx.PrimFunc, isa: VectorISA) -> tvm.runtime.Module:
    """As libraries are built; `test_x86_pipeline` compares that with TVM's default pipeline."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    cpu = {"kind": "llvm", "mcpu": BF16} if isa.bfloat16 else target(isa.name)
    return compile_module(module, tvm.target.Target(cpu)).mod


def run(func: tvm.tirx.PrimFunc, isa: VectorISA, inputs: list[np.ndarray], out_shape) -> np.ndarray:
    """Compile and call; the output starts as NaN, so that what is not written shows."""
    tensors = [tvm.runtime.tensor(array) for array in inputs]
    out = tvm.runtime.tensor(np.full(out_shape, np.nan, "float32"))
    build(func, isa)["main"](*tensors, out)
    return out.numpy()


def block(x: np.ndarray, size: int) -> np.ndarray:
    """NCHW to channel blocks, zeros beyond C; unchanged for size 1."""
    if size == 1:
        return np.ascontiguousarray(x, "float32")
    n, c, h, w = x.shape
    blocks = -(-c // size)
    padded = np.zeros((n, blocks * size, h, w), "float32")
    padded[:, :c] = x
    return np.ascontiguousarray(padded.reshape(n, blocks, size, h, w).transpose(0, 1, 3, 4, 2))


def unblock(y: np.ndarray, channels: int) -> np.ndarray:
    n, blocks, h, w, lanes = y.shape
    return y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * lanes, h, w)[:, :channels]


def windows(x: np.ndarray, geometry: ConvGeometry, fill: float = 0.0) -> np.ndarray:
    """Every tap's view of the padded input: (X, Y, N, C, OH, OW), float64."""
    top, left, bottom, right = geometry.padding
    padded = np.pad(
        x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill
    )
    rows, columns = geometry.out_height, geometry.out_width
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    return np.array(
        [
            [
                padded[:, :, i * dh :, j * dw :][
                    :, :, : (rows - 1) * sh + 1 : sh, : (columns - 1) * sw + 1 : sw
                ]
                for j in range(geometry.kernel[1])
            ]
            for i in range(geometry.kernel[0])
        ]
    )


def reference_convolution(x, weight, geometry: ConvGeometry) -> np.ndarray:
    views = windows(x, geometry)
    rows, columns, n, c, h, w = views.shape
    groups = geometry.groups
    views = views.reshape(rows, columns, n, groups, c // groups, h, w)
    split = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
    y = np.einsum("xyngchw,gfcxy->ngfhw", views, split, optimize=True)
    return y.reshape(n, geometry.out_channels, h, w)


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-30))


def reference_activation(y: np.ndarray, name: str, numbers: tuple[float, ...] = ()) -> np.ndarray:
    """An activation in float64."""
    y = y.astype(np.float64)
    if name == "relu":
        return np.maximum(y, 0)
    if name == "clip":
        return np.clip(y, *numbers)
    if name == "leaky_relu":
        return np.where(y > 0, y, numbers[0] * y)
    if name == "hard_sigmoid":
        return np.clip(y / 6 + 0.5, 0, 1)
    if name == "hard_swish":
        return y * np.clip(y + 3, 0, 6) / 6
    if name == "tanh":
        return np.tanh(y)
    if name == "gelu":
        return y * np.vectorize(math.erfc, otypes=[float])(-y / math.sqrt(2)) / 2
    sigmoid = np.exp(np.minimum(y, 0)) / (1 + np.exp(-np.abs(y)))
    return {"sigmoid": sigmoid, "silu": y * sigmoid}[name]


def apply_steps(
    y: np.ndarray, steps: tuple[str, ...], isa: VectorISA, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The result of an epilogue on an NCHW map in float64, with its random operands, packed."""
    operands = []
    for step in steps:
        name, numbers = parse_step(step)
        if name == "gate":
            gate = rng.standard_normal((*y.shape[:2], 1, 1)).astype("float32")
            operands.append(block(gate, isa.lanes))
            y = y * gate
        elif name == "residual":
            residual = rng.standard_normal(y.shape).astype("float32")
            operands.append(block(residual, isa.lanes))
            y = y + residual
        elif name == "prelu":
            slopes = rng.uniform(-0.5, 1.5, y.shape[1]).astype("float32")
            operands.append(pack_channels(slopes, isa))
            y = np.where(y < 0, slopes[:, None, None] * y, y)
        elif name in ("bias", "affine"):
            vectors = [
                rng.standard_normal(y.shape[1]).astype("float32")
                for _ in range(2 if name == "affine" else 1)
            ]
            operands += [pack_channels(vector, isa) for vector in vectors]
            columns = [vector[:, None, None] for vector in vectors]
            y = y * columns[0] + columns[1] if name == "affine" else y + columns[0]
        else:
            y = reference_activation(y, name, numbers)
    return y, operands


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest values of bfloat16, as float32."""
    bits = round_bits(values) << 16
    return bits.astype(np.uint32).view(np.float32).reshape(values.shape)


class Case:
    """Random data for a workload, the kernel's arguments, and the float64 result.

    ``make`` makes the factors from standard-normal values.
    """

    def __init__(
        self,
        workload: ConvWorkload,
        schedule: Schedule,
        isa: VectorISA,
        make: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    ) -> None:
        geometry = workload.geometry
        rng = np.random.default_rng(0)
        maps = (geometry.batch, geometry.in_channels, geometry.height, geometry.width)
        self.x, self.weight = (
            make(rng.standard_normal(shape).astype("float32"))
            for shape in (maps, geometry.weight_shape)
        )
        channels = geometry.out_channels
        self.out_shape = (
            geometry.batch,
            -(-channels // isa.lanes),
            geometry.out_height,
            geometry.out_width,
            isa.lanes,
        )
        packed = kernels.pack_weights(self.weight, workload, schedule, isa)
        self.inputs = [block(self.x, workload.in_block), packed]
        y = reference_convolution(self.x, self.weight, geometry)
        self.expected, operands = apply_steps(y, workload.epilogue, isa, rng)
        self.inputs += operands
