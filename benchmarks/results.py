"""Tunes the networks at hand, keeps their figures in results.json and writes docs/results.md."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor
from networks import NETWORKS, Network
from peers import Timing, take_turns

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.data import Samples, input_shape
from tvm_lowrank.deploy import load
from tvm_lowrank.frontend import load_model
from tvm_lowrank.metrics import resolution
from tvm_lowrank.planner import Options, search
from tvm_lowrank.target import host_target, parse_target, target_key
from tvm_lowrank.threads import set_threads

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
ROWS = Path(__file__).with_name("results.json")
CHECKED = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks to measure again (default: all)")
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    threads = set_threads()
    machine = f"{processor()}, {threads} threads, target `{target_key(host_target())}`"
    rows: dict[str, dict[str, Any]] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for network in NETWORKS:
        if args.names and network.name not in args.names:
            continue
        if network.missing:
            print(f"{network.name}: skipped, {network.missing}")
            continue
        row = _measure(network, args, threads)
        rows[network.name] = {"machine": machine, **row}
        ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        DOCS.write_text(_page(list(rows.values())), encoding="utf-8")
    return 0


def _measure(network: Network, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    print(f"== {network.name}", flush=True)
    mod = load_model(network.model)
    data, final = network.data()
    judged = len(final[0]) if final is not None else len(data[0]) // 3
    max_drop = max(args.max_drop, resolution("top1", judged))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, dense = Path(folder) / "model.so", Path(folder) / "lossless.so"
        plan = search(
            mod,
            data=Samples(*data),
            final=None if final is None else Samples(*final),
            options=Options(max_drop=max_drop, seed=args.seed),
            records=Path(folder) / "records.jsonl",
            directory=Path(folder),
        )
        seconds = time.perf_counter() - start
        export(compile_module(plan.dense().apply(mod), parse_target(plan.target)), dense)
        error = _against_onnxruntime(network, dense, data[0], threads)
        jobs = {
            "transformed": ("tvm", path),
            "dense": ("tvm", dense),
            "onnxruntime": ("onnxruntime", network.model),
            "openvino": ("openvino", network.model),
        }
        timings = take_turns(jobs, input_shape(mod), threads)
    latency = {
        name: timing.median_ms if isinstance(timing, Timing) else timing
        for name, timing in timings.items()
    }
    print(plan.result, latency, f"dense error {error:.1e}, {seconds:.0f} s", flush=True)
    return {
        "name": network.name,
        "max_drop": max_drop,
        "latency": latency,
        "error": error,
        "seconds": seconds,
        "result": plan.result,
        "transformed": plan.transformed,
        "reason": plan.reason,
        "forms": dict(sorted(Counter(layer.form for layer in plan.layers).items())),
    }


def _against_onnxruntime(network: Network, dense: Path, inputs: np.ndarray, threads: int) -> float:
    """Largest relative difference of the dense library from ONNX Runtime over 100 inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(network.model), providers=["CPUExecutionProvider"])
    name, built, worst = session.get_inputs()[0].name, load(dense, threads), 0.0
    for x in inputs[:CHECKED]:
        expected = session.run(None, {name: x[None]})[0]
        worst = max(worst, float(np.abs(built(x[None]) - expected).max() / np.abs(expected).max()))
    return worst


def _page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make results` (`benchmarks/results.py`). Latencies are medians in",
        "milliseconds, batch 1, float32, each runtime in a process of its own, the processes",
        "taking turns. *Dense* is the network as it is, in tuned direct kernels.",
        "Accuracy is of the built library on samples that neither fitted factors nor chose among",
        "plans (they may reject a plan: see [architecture](architecture.md)). Where no peer was",
        "measured, dense and transformed took turns in one process.",
        "",
        "| network | dense | transformed | speed-up | ONNX Runtime | OpenVINO f32 | top-1 before | "
        "after | budget | samples | agreement | weights | dense against ONNX Runtime | tuning |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        result, latency = row["result"], row["latency"]
        speedup = latency["dense"] / latency["transformed"]
        cells = [
            row["name"],
            _ms(latency["dense"]),
            _ms(latency["transformed"]),
            f"{speedup:.2f}x" if row["transformed"] else "original kept",
            _ms(latency["onnxruntime"]),
            _ms(latency["openvino"]),
            f"{result['accuracy_before']:.2f} %",
            f"{result['accuracy_after']:.2f} %",
            f"{row['max_drop']:.3g}",
            str(result["samples"]),
            f"{result['agreement']:.1f} %",
            f"{result['weight_bytes_before'] / 1e6:.2f} -> "
            f"{result['weight_bytes_after'] / 1e6:.2f} MB",
            f"{row['error']:.0e}",
            f"{row['seconds']:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "*Dense against ONNX Runtime*: the largest difference over the largest output, the",
    ]
    lines += [f"worst of {CHECKED} inputs. *Tuning*: the whole search, from no records.", ""]
    lines += ["## Forms chosen", ""]
    for row in rows:
        text = ", ".join(f"{count} {form}" for form, count in row["forms"].items())
        reason = "" if row["transformed"] else f" ({row['reason']})"
        lines.append(f"- {row['name']}: {text}{reason}")
    lines += ["", "## Machine", ""]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        names = ", ".join(row["name"] for row in rows if row["machine"] == machine)
        lines.append(f"- {names}: {machine}")
    return "\n".join(lines) + "\n"


def _ms(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
