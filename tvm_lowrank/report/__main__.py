"""``python -m tvm_lowrank.report``: a plan as a table, or layers of a network as drawings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from tvm_lowrank import demo
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.data import read_npz
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.report import render
from tvm_lowrank.report.curve import draw_curve
from tvm_lowrank.report.layer import write
from tvm_lowrank.target import host_target

EXAMPLES = """\
examples:
  python -m tvm_lowrank.report out
      the plan that tune wrote into out, as tables, and its curve of speed and accuracy as SVG
  python -m tvm_lowrank.report resnet.onnx --layer conv3 conv7 --data images.npz -o drawings
      filters, errors of all forms and clusters of two layers, as SVG

Exit codes: 0 done, 2 bad input.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(
        prog="python -m tvm_lowrank.report",
        description="Show a plan, or draw what every form makes of a layer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("model", nargs="?", help="a folder of tune, or .onnx or .pt2; the demo network if left out")
    add("--layer", nargs="+", metavar="NAME", help="convolutions to draw: conv0, conv1, ...")
    add(
        "--data", type=Path, metavar="X.npz", help="inputs to fit by; without, to the weights alone"
    )
    add("--share", type=float, default=0.25, help="of the operations, for the filters shown")
    add("--samples", type=int, default=256, help="of the data that are read (default: 256)")
    add("-o", "--output", type=Path, default=Path("drawings"), metavar="DIR")
    return make


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.layer:
            _draw(options)
        else:
            path = Path(options.model or "out")
            if not path.is_dir():
                raise LowRankError(f"{path} is no folder of tune; name one, or a layer by --layer")
            plan = Plan.load(path / "plan.json")
            Console().print(render(plan))
            if plan.curve:
                drawn = path / "curve.svg"
                drawn.write_text(draw_curve(plan), encoding="utf-8")
                print(drawn)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(options: argparse.Namespace) -> None:
    mod = normalise(load_model(options.model or demo.model_path()))
    layers = collect_layers(mod)
    known = {layer.name: layer for layer in layers if layer.geometry is not None}
    unknown = [name for name in options.layer if name not in known]
    if unknown:
        raise LowRankError(f"no layer {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in options.layer]
    moments = {}
    if options.data:
        inputs = read_npz(options.data).inputs[: options.samples]
        timer = KernelTimer(host_target(), TuningRecords(None, "report", 1), trials=1)
        segments = Segments(mod, layers, timer)
        moments = input_moments(segments, chosen, inputs, 0)
    for layer in chosen:
        assert layer.geometry is not None
        weight = layer.weight.astype(np.float64)
        given = moments.get(layer.name)
        for path in write(layer.name, weight, layer.geometry, given, options.output, options.share):
            print(path)


if __name__ == "__main__":
    sys.exit(main())
