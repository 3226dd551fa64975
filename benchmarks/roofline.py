"""Each convolution kernel of a network against what the machine can do, and their sum."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from cases import BadInput, Case, Parser, check_folder, check_positive, find_case, names
from lossless import Built, build_lossless
from machine import cache_bytes, describe, disturbance
from probes import compile_kernel, peak_gflops, read_gigabytes
from tvm import relax, tirx
from tvm_lowrank.passes.graph import op_name
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.schedules.kernels import REDUCED, Schedule, emit
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from zoo import NETWORKS, cache_folder

from tvm_lowrank import LowRankError, load
from tvm_lowrank.planner import ALGORITHMS
from tvm_lowrank.target import host_target, require_kernels
from tvm_lowrank.threads import physical_cores, set_threads

# Calls take turns among copies of a kernel's weights that together take at least this, or as much
# as the weights of the network: then they come from where they come from in the network.
_ROTATED = 64 << 20
_MOST_COPIES = 1024
_SECONDS = 0.2
_LEAST_RUNS = 20
_WIDE = 64


@dataclass(frozen=True)
class Kernel:
    """A kernel of the network, called ``count`` times.

    ``us`` and ``median_us`` are the least and the median microseconds of a run, ``moved`` the bytes
    of its arguments.
    """

    workload: ConvWorkload
    schedule: Schedule
    count: int
    us: float
    median_us: float
    moved: int

    @property
    def gflops(self) -> float:
        """Operations of the direct algorithm over the time."""
        return 2e-3 * self.workload.geometry.multiplications / self.median_us

    def share(self, peak: float, gigabytes: float) -> float:
        """Time that the higher roof allows, over the time taken."""
        compute = 2e-3 * self.workload.geometry.multiplications / peak
        memory = 1e-3 * self.moved / gigabytes
        return max(compute, memory) / self.median_us


@dataclass(frozen=True)
class Other:
    """A kernel that is no single convolution, with its times as in `Kernel`."""

    name: str
    count: int
    us: float
    median_us: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = Parser(prog="roofline.py", description=__doc__)
    add = make.add_argument
    add("network", metavar="NETWORK", help=f"an .onnx file, or of {', '.join(NETWORKS)}")
    add("--batch", type=int, default=1, metavar="N", help="default: 1")
    add("--threads", type=int, default=physical_cores(), help="default: all physical cores")
    among = ", ".join((*ALGORITHMS, *REDUCED))
    add("--algorithms", default=",".join(ALGORITHMS), metavar="A,B", help=among)
    add("--trials", type=int, default=4, help="schedules tried a kernel (default: 4)")
    add("--records", type=Path, help="tuning records (default: in the cache folder)")
    add("--markdown", type=Path, metavar="FILE", help="also write the table there")
    return make


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        args = parser().parse_args(argv)
        algorithms = names("--algorithms", args.algorithms, (*ALGORITHMS, *REDUCED))
        check_positive(args, "threads", "trials")
        check_folder(args.markdown)
        case = find_case(args.network, args.batch)
    except BadInput as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    set_threads(args.threads)
    try:
        require_kernels(host_target(), algorithms)
        text = _measure(case, algorithms, args)
    except LowRankError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def _measure(case: Case, algorithms: tuple[str, ...], args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory(prefix="roofline-") as folder:
        records = args.records or cache_folder() / "records.jsonl"
        built = build_lossless(
            case.path, case.batch, args.threads, args.trials, algorithms, records, Path(folder)
        )
        whole = _whole(built.library, case, args.threads)
    return _report(case, built, whole, args.threads)


def _report(case: Case, built: Built, whole: tuple[float, float], threads: int) -> str:
    target = host_target()
    weights = 4 * sum(layer.geometry.weight_count for layer in built.plan.layers if layer.geometry)
    rotated = max(_ROTATED, weights)
    peak = peak_gflops(target, threads)
    near = read_gigabytes(target, threads, rotated)
    beyond = max(2 * cache_bytes(), 256 << 20)
    far = read_gigabytes(target, threads, beyond)
    kernels = _kernels(built, target, rotated)
    others = _others(built, target, rotated)
    lines = [
        f"# {case}\n",
        f"{describe()}, {threads} threads. Multiply-adds from registers: {peak:.0f} GF/s. Reading:",
        f"{near:.1f} GB/s from {rotated >> 20} MB (what the weights are rotated through),",
        f"{far:.1f} GB/s from {beyond >> 20} MB. GF/s are of the direct algorithm's operations,",
        "whatever the kernel computes, over the median time of single runs. *Roof*: what the peak,",
        "or reading weights and maps at the former speed, would take, over that time.\n",
    ]
    warning = disturbance()
    lines += [f"**Beware: {warning}.**\n"] if warning else []
    lines += ["| calls | convolution | kernel | us | median us | GF/s | roof |"]
    lines.append("|---|---|---|---|---|---|---|")
    for kernel in kernels:
        lines.append(
            f"| {kernel.count} | {_workload(kernel.workload)} | {_schedule(kernel.schedule)} | "
            f"{kernel.us:.1f} | {kernel.median_us:.1f} | {kernel.gflops:.0f} | "
            f"{100 * kernel.share(peak, near):.0f} % |"
        )
    for other in others:
        lines.append(
            f"| {other.count} | | {other.name} | {other.us:.1f} | {other.median_us:.1f} | | |"
        )
    wide = [
        kernel
        for kernel in kernels
        if min(kernel.workload.geometry.in_channels, kernel.workload.geometry.out_channels) >= _WIDE
    ]
    calls = [kernel for kernel in wide for _ in range(kernel.count)]
    if calls:
        lines.append(
            f"\nMedian over the {len(calls)} calls of {_WIDE} channels and more: "
            f"{statistics.median(kernel.gflops for kernel in calls):.0f} GF/s, "
            f"{100 * statistics.median(kernel.share(peak, near) for kernel in calls):.0f} % of the "
            "roof."
        )
    everything = [*kernels, *others]
    for name, spent, total in (
        ("Minima", whole[0], sum(kernel.count * kernel.us for kernel in everything)),
        ("Medians", whole[1], sum(kernel.count * kernel.median_us for kernel in everything)),
    ):
        lines.append(
            f"\n{name}: whole network {spent:.3f} ms, sum of all kernels {1e-3 * total:.3f} ms, "
            f"whole / sum {1e3 * spent / total:.2f}."
        )
    lines.append(f"\nThe network: {built.calls}.")
    return "\n".join(lines)


def _kernels(built: Built, target: tvm.target.Target, rotated: int) -> list[Kernel]:
    """The kernels of the lowered network in the order of their first calls, timed."""
    isa, pick = isa_of(target), built.plan.scheduler()
    workloads = survey(built.plan.factor(built.mod), isa, pick, built.plan.fuser())
    kernels = []
    for workload, count in Counter(workloads).items():
        schedule = pick(workload)
        func = emit(workload, schedule, isa)
        shapes = [tuple(int(n) for n in param.shape) for param in func.params]
        moved = 4 * sum(math.prod(shape) for shape in shapes)
        times = _cold_us(compile_kernel(func, target), func, rotated)
        kernels.append(Kernel(workload, schedule, count, *times, moved))
    return kernels


def _others(built: Built, target: tvm.target.Target, rotated: int) -> list[Other]:
    """The other kernels of the lowered network, timed: chains, pooling, copies, conversions."""
    lowered = built.plan.apply(built.mod)
    calls: Counter[str] = Counter()

    def visit(expr: relax.Expr) -> None:
        if op_name(expr) in ("call_tir", "call_tir_inplace"):
            calls[expr.args[0].name_hint] += 1

    relax.analysis.post_order_visit(lowered["main"], visit)
    found = []
    for name, count in calls.items():
        if not name.startswith("lowrank_conv2d"):
            func = lowered[name]
            found.append(Other(name, count, *_cold_us(compile_kernel(func, target), func, rotated)))
    return found


def _cold_us(run: Any, func: tirx.PrimFunc, rotated: int) -> tuple[float, float]:
    """Least and median microseconds of runs, each with other weights if it has any."""
    noise = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) * 0.1
    shapes = [tuple(int(n) for n in parameter.shape) for parameter in func.params]
    first = [tvm.runtime.tensor(np.resize(noise, shape)) for shape in shapes]
    weights = [i for i, parameter in enumerate(func.params) if parameter.name.startswith("weights")]
    size = sum(4 * math.prod(shapes[i]) for i in weights)
    rotation = [first]
    for _ in range(min(math.ceil(rotated / size), _MOST_COPIES) - 1 if weights else 0):
        fresh = {i: tvm.runtime.tensor(np.resize(noise, shapes[i])) for i in weights}
        rotation.append([fresh.get(i, tensor) for i, tensor in enumerate(first)])
    spent: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    for arguments in itertools.cycle(rotation):
        start = time.perf_counter()
        run(*arguments)
        spent.append(time.perf_counter() - start)
        if len(spent) >= _LEAST_RUNS and time.perf_counter() > deadline:
            break
    return 1e6 * min(spent), 1e6 * statistics.median(spent)


def _whole(library: Path, case: Case, threads: int) -> tuple[float, float]:
    """Least and median milliseconds of the whole network."""
    network = load(library, threads)
    x = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    tensors = [network.tensor(x)]
    spent: list[float] = []
    deadline = time.perf_counter() + 10 * _SECONDS
    while len(spent) < _LEAST_RUNS or time.perf_counter() < deadline:
        start = time.perf_counter()
        network.call(tensors)
        spent.append(time.perf_counter() - start)
    return 1e3 * min(spent), 1e3 * statistics.median(spent)


def _workload(workload: ConvWorkload) -> str:
    return " ".join([str(workload.geometry), *(f"+{step}" for step in workload.epilogue)])


def _schedule(schedule: Schedule) -> str:
    choices = schedule.to_json()
    kernel = choices.pop("kernel")
    return f"{kernel} " + " ".join(f"{name}={value}" for name, value in choices.items())


if __name__ == "__main__":
    sys.exit(main())
