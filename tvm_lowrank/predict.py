"""``python -m tvm_lowrank.predict``: what the cost model says of a network, nothing measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tvm_lowrank import demo
from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.learned import LearnedModel
from tvm_lowrank.cost.model import AnalyticModel, CostModel
from tvm_lowrank.cost.sampling import algorithm_class
from tvm_lowrank.cost.trees import find
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.passes.blocked_rewriter import PLAIN_CHANNELS
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.place import network_size
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.target import parse_target

EXAMPLES = """\
example, for a machine that is not at hand, of four cores with AVX2:
  python -m tvm_lowrank.predict net.onnx --target llvm:haswell --peak 200 --bandwidth 20 --threads 4

The peak is what our direct kernels reach of it, all threads together; the bandwidth that of a copy.
Exit codes: 0 done, 2 bad input.
"""


@dataclass(frozen=True)
class Prediction:
    """A layer, the algorithm predicted fastest, and microseconds of it and of the direct one."""

    name: str
    geometry: str
    algorithm: str
    microseconds: float
    direct: float


def predict(layers: Sequence[ConvLayer], model: CostModel, isa: Machine) -> list[Prediction]:
    """What each layer that has a kernel is predicted to take, dense.

    Parameters
    ----------
    layers : list of ConvLayer
    model : CostModel
    isa : Machine
        What the kernels are built for.
    """
    found = []
    for layer in layers:
        if layer.geometry is None:
            continue
        block = 1 if layer.geometry.in_channels <= PLAIN_CHANNELS else isa.block
        workload = ConvWorkload(layer.geometry, block, ("bias", "relu"))
        schedules = [s.to_json() for space in spaces(workload, isa).values() for s in space]
        if not schedules:
            continue
        times = list(zip(model.predict(workload, schedules), schedules, strict=True))
        best, schedule = min(times, key=lambda pair: pair[0])
        direct = [us for us, other in times if other["kernel"] not in ("winograd", "fft")]
        found.append(
            Prediction(
                layer.name,
                str(layer.geometry),
                algorithm_class(schedule),
                float(best),
                float(min(direct, default=best)),
            )
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    make = argparse.ArgumentParser(
        prog="python -m tvm_lowrank.predict",
        description="Predict the time of a network's convolutions on a machine of given figures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("model", nargs="?", metavar="MODEL", help=".onnx or .pt2; the demo network if left out")
    add("--target", default="llvm", help="llvm (this machine), llvm:<mcpu>, or JSON")
    add("--peak", type=float, required=True, metavar="GFLOPS", help="of all threads together")
    add("--bandwidth", type=float, required=True, metavar="GB/S", help="of memory")
    add("--threads", type=int, default=1, metavar="N", help="default: 1")
    add("--batch", type=int, default=1, metavar="N", help="samples a call (default: 1)")
    add("--learned", action="store_true", help="correct the counts by the shipped trees")
    args = make.parse_args(argv)
    try:
        if min(args.peak, args.bandwidth, args.threads) <= 0:
            raise LowRankError("peak, bandwidth and threads must be positive")
        isa = machine_of(parse_target(args.target))
        layers = collect_layers(normalise(load_model(args.model or demo.model_path(), args.batch)))
        size = network_size(layer.geometry for layer in layers)
        roofline = Roofline(args.peak, args.bandwidth, network=machine.beyond(size))
        model: CostModel = AnalyticModel(roofline, isa, args.threads)
        if args.learned:
            trees, complaint = find(None, isa)
            if trees is None:
                raise LowRankError(complaint or f"no trained model for {isa.name} is shipped")
            model = LearnedModel(trees, model)  # type: ignore[arg-type]
        rows = predict(layers, model, isa)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("layer", "shape", "algorithm", "predicted us", "direct us")
    for row in rows:
        times = (f"{row.microseconds:.1f}", f"{row.direct:.1f}")
        table.add_row(row.name, row.geometry, row.algorithm, *times)
    total, direct = sum(row.microseconds for row in rows), sum(row.direct for row in rows)
    table.add_row("all", "", "", f"{total:.1f}", f"{direct:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
