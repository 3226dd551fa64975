"""Do layers take in a network what they are priced at? Each is timed in it, kernel by kernel.

    python benchmarks/in_network.py resnet50 vgg16 --markdown docs/in-network.md

A search prices the kernels of a network of more than 16 MiB of weights with these in memory, where
the other layers leave them. The last column is what they take as in a small network, by the same
schedules: with their weights in some cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from cases import BadInput, Case, Parser, check_folder, check_positive, find_case
from lossless import Built, build_lossless
from machine import describe, disturbance
from tvm import relax
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from zoo import NETWORKS, cache_folder

from tvm_lowrank import LowRankError
from tvm_lowrank.build import compile_module
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import records_for
from tvm_lowrank.place import LARGE, SMALL
from tvm_lowrank.planner import ALGORITHMS
from tvm_lowrank.target import host_target
from tvm_lowrank.threads import apart_from_pool, physical_cores, set_threads

_RUNS, _FIRST = 60, 5
_KERNELS = "lowrank_conv2d"


@dataclass(frozen=True)
class Layer:
    """Kernels of a network that are alike: microseconds of each in it, and by themselves."""

    workload: ConvWorkload
    kernel: str
    inside: list[float]
    large: float
    small: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    make = Parser(
        prog="in_network.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("networks", nargs="+", metavar="NETWORK", help=f".onnx, or of {', '.join(NETWORKS)}")
    add("--threads", type=int, default=physical_cores(), help="default: all physical cores")
    add("--trials", type=int, default=4, help="schedules tried a kernel (default: 4)")
    add("--records", type=Path, help="tuning records (default: in the cache folder)")
    add("--markdown", type=Path, metavar="FILE", help="also write the page there")
    given = sys.argv[1:] if argv is None else argv
    try:
        args = make.parse_args(given)
        check_positive(args, "threads", "trials")
        check_folder(args.markdown)
        cases = [find_case(name, 1) for name in args.networks]
        set_threads(args.threads)
        parts = [_section(case, args) for case in cases]
    except (BadInput, LowRankError) as error:
        print(f"in_network: {error}", file=sys.stderr)
        return 2
    warning = disturbance()
    head = ["# What layers take in their network\n"]
    head.append(f"Written by `python benchmarks/in_network.py {' '.join(given)}`.\n")
    head.append(_READ.format(machine=describe(), threads=args.threads, runs=_RUNS))
    head += [f"**Beware: {warning}.**\n"] if warning else []
    text = "\n".join([*head, *parts])
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return 0


_READ = """{machine}, {threads} threads. Nothing approximated, each kernel called by itself, as it
is before kernels are merged. *In the network*: the least of {runs} runs, and the mean of the calls
that are alike. *Large*, *small*: what a search has on record for networks of more than 16 MiB of
weights and of less, in microseconds, and over what they take in the network. On record is what a
kernel takes on the machine at its fastest, so shares below one that are all alike are the
machine's. What memory bounds varies most on machines that share it, as this one may; the first
layer also finds its maps in memory, which no search prices.
"""


def _section(case: Case, args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="in-network-") as folder:
        path = args.records or cache_folder() / "records.jsonl"
        built = build_lossless(
            case.path, case.batch, args.threads, args.trials, ALGORITHMS, path, Path(folder)
        )
    layers = _layers(built, case, path, args.threads)
    count = sum(layer.geometry.weight_count for layer in built.plan.layers if layer.geometry)
    lines = [f"\n## {case}, {4 * count / 2**20:.0f} MiB of weights\n"]
    if not layers:
        return "\n".join([*lines, "Every convolution is part of a kernel of several.\n"])
    lines.append("| calls | convolution | kernel | in the network | large | | small | |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for layer in layers:
        inside = statistics.fmean(layer.inside)
        lines.append(
            f"| {len(layer.inside)} | {layer.workload.geometry} | {layer.kernel} | {inside:.1f} | "
            f"{layer.large:.1f} | {layer.large / inside:.2f} | "
            f"{layer.small:.1f} | {layer.small / inside:.2f} |"
        )
    calls = [layer for layer in layers for _ in layer.inside]
    inside = sum(sum(layer.inside) for layer in layers)
    large, small = sum(layer.large for layer in calls), sum(layer.small for layer in calls)
    lines.append(
        f"| {len(calls)} | all | | {inside:.1f} | {large:.1f} | "
        f"{large / inside:.2f} | {small:.1f} | {small / inside:.2f} |"
    )
    return "\n".join(lines) + "\n"


def _layers(built: Built, case: Case, records: Path, threads: int) -> list[Layer]:
    """The network's convolutions in the order of their first calls."""
    target = host_target()
    timers = {
        size: KernelTimer(target, records_for(records, target, threads, True, network=size))
        for size in (LARGE, SMALL)
    }
    pick = built.plan.scheduler()
    workloads = survey(built.plan.factor(built.mod), timers[LARGE].isa, pick, built.plan.fuser())
    inside: dict[ConvWorkload, list[float]] = {}
    for workload, us in zip(workloads, _inside(built, case, target), strict=True):
        inside.setdefault(workload, []).append(us)
    for timer in timers.values():
        timer.roofline()
    found = []
    for workload, times in inside.items():
        schedule = pick(workload)
        large, small = (
            timer.time_of(workload, schedule) or timer.time(workload, schedule)
            for timer in timers.values()
        )
        found.append(Layer(workload, schedule.kernel, times, large, small))
    return found


def _inside(built: Built, case: Case, target: tvm.target.Target) -> list[float]:
    """The least microseconds of each call of a convolution's kernel, in the network's order."""
    executable = compile_module(built.plan.apply(built.mod), target, merged=False)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    x = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    tensor, runs, start = tvm.runtime.tensor(x), list[list[float]](), 0.0

    def watch(_func: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
        nonlocal start
        if not before and name.startswith(_KERNELS):
            runs[-1].append(1e6 * (time.perf_counter() - start))
        start = time.perf_counter()
        return 0

    machine["main"](tensor)  # starts the pool
    with apart_from_pool():
        machine.set_instrument(watch)
        for _ in range(_FIRST + _RUNS):
            runs.append([])
            machine["main"](tensor)
    return [min(calls) for calls in zip(*runs[_FIRST:], strict=True)]


if __name__ == "__main__":
    sys.exit(main())
