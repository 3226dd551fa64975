"""The paper's figures 3 to 5 for a network of ours: original against transformed.

    python benchmarks/figures.py --batches 1 2 8 32 128 --markdown docs/figures.md

Time per image against batch size, and what each layer takes at a large and at a small batch. The
forms and ranks are those of a plan (of `tune`, at any batch); kernels are tuned for each batch.
Figures are SVG files, with --png also bitmaps. An interrupted run goes on from the records in the
folder of -o.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
from machine import disturbance, processor
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.passes.pipeline import factor, normalise

from tvm_lowrank import demo
from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import records_for
from tvm_lowrank.data import Samples, input_shape, read_npz
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.place import network_size
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import Options, search
from tvm_lowrank.planner.verify import take_turns
from tvm_lowrank.report import svg
from tvm_lowrank.target import parse_target, require_runnable, target_key
from tvm_lowrank.threads import set_threads

VARIANTS = ("original", "transformed")


@dataclass(frozen=True)
class Measured:
    """One batch: milliseconds an image, and microseconds an image of every layer's kernels."""

    batch: int
    milliseconds: dict[str, float]
    layers: dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help=".onnx, or .pt2 of any batch; "
        "the demo network if left out")  # fmt: skip
    add("--plan", type=Path, metavar="plan.json", help="of tune; searched for if left out")
    add("--data", type=Path, metavar="X.npz", help="for that search, inputs and labels")
    add("--target", default=None, help="default: the plan's, or this machine's")
    add("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], metavar="N")
    add("--breakdown", type=int, nargs="*", default=[128, 1], metavar="N", help="default: 128 1")
    add("--trials", type=int, default=4, metavar="N", help="schedules a family (default: 4)")
    add("--threads", type=int, metavar="N")
    add("--max-drop", type=float, default=1.0, metavar="POINTS", help="for that search")
    add("-o", "--output", type=Path, default=Path("figures"), metavar="DIR")
    add("--markdown", type=Path, metavar="FILE", help="the page, its figures beside it; "
        "default: figures.md in DIR")  # fmt: skip
    add("--png", action="store_true", help="figures as PNG too (needs resvg-py)")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/figures.py", *given])
    try:
        _run(args, command)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, command: str) -> None:
    if min(args.batches + args.breakdown) < 1 or args.trials < 1:
        raise LowRankError("batches and trials must be positive numbers")
    if args.png and find_spec("resvg_py") is None:
        raise LowRankError("PNG files are drawn by resvg; install it: pip install resvg-py")
    args.output.mkdir(parents=True, exist_ok=True)
    threads = set_threads(args.threads)
    plan = Plan.load(args.plan) if args.plan else _search(args)
    target = parse_target(args.target or plan.target)
    require_runnable(target)
    if warning := disturbance():
        print(f"warning: {warning}", file=sys.stderr)
    size = network_size(layer.geometry for layer in collect_layers(normalise(_load(args, 1))))
    records = records_for(args.output / "records.jsonl", target, threads, True, network=size)
    timers = {
        "original": KernelTimer(target, records, args.trials, ("direct",)),
        "transformed": KernelTimer(target, records, args.trials),
    }
    found = []
    for batch in sorted({*args.batches, *args.breakdown}):
        print(f"batch {batch}", flush=True)
        found.append(_measure(args, plan, batch, timers, threads))
    title = f"{_name(args)}: {processor()}, {threads} threads, built for {target_key(target)}"
    curve = [each for each in found if each.batch in args.batches]
    drawn = {"time-per-image": _curves(curve, title)}
    for each in found:
        if each.batch in args.breakdown:
            drawn[f"layers-batch{each.batch}"] = _bars(each, title)
    tables = _tables(found, args)
    print("\n".join([title, "", *(line for part in tables.values() for line in part)]))
    page = args.markdown or args.output / "figures.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# The paper's figures 3 to 5, for {_name(args)}", "", f"Written by `{command}`."]
    lines += [_READ.format(cpu=processor(), threads=threads, target=target_key(target))]
    for name, text in drawn.items():
        path = page.with_name(f"{page.stem}-{name}.svg")
        path.write_text(text, encoding="utf-8")
        if args.png:
            path.with_suffix(".png").write_bytes(_bitmap(text))
        lines += [f"![{name}]({path.name})", "", *tables[name]]
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


_READ = """
{cpu}, {threads} threads, built for `{target}`. *Original* is the network in tuned direct kernels;
*transformed* has the forms and ranks of one plan, whatever the batch, with kernels chosen for each
batch among all algorithms. In the network a large batch runs in pieces whose maps stay in the
caches; the tables of layers time each on the whole batch at once.
"""


def _name(args: argparse.Namespace) -> str:
    return args.model.stem if args.model else "the demo network"


def _bitmap(drawing: str) -> bytes:
    """An SVG drawing as a PNG file, at twice its size."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=drawing, zoom=2))


def _search(args: argparse.Namespace) -> Plan:
    data, final = (read_npz(args.data), None) if args.data else (None, None)
    if data is None and args.model is None:
        data, final = Samples(*demo.calibration()), Samples(*demo.evaluation())
    if data is None:
        raise LowRankError("a plan or data to make one is needed; give --plan or --data")
    records = args.output / "records.jsonl"
    options = Options(max_drop=args.max_drop, threads=args.threads)
    plan = search(_load(args, 1), args.target, data, final, options, records)
    plan.save(args.output / "plan.json")
    return plan


def _load(args: argparse.Namespace, batch: int) -> Any:
    """The model for another batch, also where its ONNX file states one."""
    path = args.model or demo.model_path()
    if path.suffix != ".onnx":
        mod = load_model(path, batch)
        if (stated := input_shape(mod)[0]) != batch:
            raise LowRankError(f"{path} is for batch {stated}; export it with a dynamic one")
        return mod
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [*model.graph.input, *model.graph.output]:
        if value.name not in weights:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    return load_model(model, batch)


def _at_batch(plan: Plan, batch: int, target: Any) -> Plan:
    """The plan's forms and ranks for another batch, without schedules."""
    layers = tuple(
        replace(
            layer,
            geometry=layer.geometry and layer.geometry.with_batch(batch),
            stages=tuple(stage.with_batch(batch) for stage in layer.stages),
        )
        for layer in plan.layers
    )
    moved = replace(plan.for_target(target), layers=layers)
    return replace(moved, schedules=(), fused=())


def _measure(
    args: argparse.Namespace,
    plan: Plan,
    batch: int,
    timers: dict[str, KernelTimer],
    threads: int,
) -> Measured:
    mod = normalise(_load(args, batch))
    layers: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="figures-") as folder:
        paths = []
        for variant, timer in timers.items():
            moved = _at_batch(plan, batch, timer.target)
            if variant == "original":
                moved = replace(moved, factors={}, transformed=False)
            factored = factor(mod, moved.chains())
            schedules = {}
            for workload in survey(factored, timer.isa, timer.choose):
                timer.microseconds(workload)
                schedules[workload] = timer.choose(workload)
            moved = replace(
                moved, schedules=tuple((w.to_json(), s.to_json()) for w, s in schedules.items())
            )
            for layer in moved.layers:
                if layer.geometry is not None and not timer.refuse([layer.geometry]):
                    dense = variant == "original" or not moved.transformed
                    stages = (layer.geometry,) if dense or not layer.stages else layer.stages
                    us = timer.chain(stages) / batch
                    layers.setdefault(layer.name, {})[variant] = us
            library = Path(folder) / f"{variant}.so"
            paths.append(export(compile_module(moved.lower(factored), timer.target), library))
        shape = input_shape(_load(args, batch))
        latencies = take_turns(paths, shape, threads)
    times = {v: t.minimum_ms / batch for v, t in zip(VARIANTS, latencies, strict=True)}
    return Measured(batch, times, layers)


def _tables(found: Sequence[Measured], args: argparse.Namespace) -> dict[str, list[str]]:
    """The lines of each figure's table, by the figure's name."""
    rule = "|---|---|---|---|"
    lines = ["Milliseconds an image, the least of runs in turns:", ""]
    lines += ["| batch | original | transformed | ratio |", rule]
    for each in found:
        if each.batch in args.batches:
            old, new = (each.milliseconds[variant] for variant in VARIANTS)
            lines.append(f"| {each.batch} | {old:.3f} | {new:.3f} | {old / new:.2f} |")
    tables = {"time-per-image": [*lines, ""]}
    for each in found:
        if each.batch in args.breakdown:
            lines = [f"Microseconds an image of each layer's kernels at batch {each.batch}:", ""]
            lines += ["| layer | original | transformed | ratio |", rule]
            for name, times in each.layers.items():
                old, new = (times[variant] for variant in VARIANTS)
                lines.append(f"| {name} | {old:.1f} | {new:.1f} | {old / new:.2f} |")
            tables[f"layers-batch{each.batch}"] = [*lines, ""]
    return tables


def _curves(found: Sequence[Measured], title: str) -> str:
    series = {
        variant: [(float(each.batch), each.milliseconds[variant]) for each in found]
        for variant in VARIANTS
    }
    parts = [svg.text(70, 18, title)]
    parts += svg.lines(series, 70, 44, 420, 280, "batch size", "milliseconds an image")
    return svg.document(640, 384, parts)


def _bars(each: Measured, title: str) -> str:
    parts = [svg.text(10, 18, f"{title}: microseconds an image at batch {each.batch}")]
    parts += svg.bars(each.layers, VARIANTS, 160, 34, 420)
    return svg.document(760, 60 + svg.BAR_HEIGHT * len(each.layers), parts)


if __name__ == "__main__":
    sys.exit(main())
