"""Tunes every network at hand and writes docs/results.md."""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from networks import NETWORKS, Network
from peers import take_turns

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.data import Samples, input_shape
from tvm_lowrank.deploy import load
from tvm_lowrank.frontend import load_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import Options, search
from tvm_lowrank.target import host_target, parse_target, target_key
from tvm_lowrank.threads import set_threads

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
CHECKED = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks (default: all)")
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=DOCS)
    args = parser.parse_args()
    threads = set_threads()
    rows, skipped = [], []
    for network in NETWORKS:
        if args.names and network.name not in args.names:
            continue
        if network.missing:
            skipped.append(f"{network.name}: skipped, {network.missing}")
            print(skipped[-1])
            continue
        rows.append(_measure(network, args, threads))
        args.output.write_text(_page(rows, skipped, threads, args), encoding="utf-8")
    return 0


def _measure(network: Network, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    print(f"== {network.name}", flush=True)
    mod = load_model(network.model)
    data, final = network.data()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, dense = Path(folder) / "model.so", Path(folder) / "lossless.so"
        plan = search(
            mod,
            data=Samples(*data),
            final=None if final is None else Samples(*final),
            options=Options(max_drop=args.max_drop, seed=args.seed),
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
        latency = take_turns(jobs, input_shape(mod), threads)
    print(plan.result, latency, f"dense error {error:.1e}, {seconds:.0f} s", flush=True)
    return {
        "name": network.name,
        "plan": plan,
        "latency": latency,
        "error": error,
        "seconds": seconds,
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


def _page(
    rows: list[dict[str, Any]], skipped: list[str], threads: int, args: argparse.Namespace
) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make results` (`benchmarks/results.py`). Latencies are medians in",
        f"milliseconds, batch 1, float32, {threads} threads, each runtime in a process of its own,",
        "the processes taking turns. *Dense* is the same network with the same kernels, nothing",
        f"approximated. The budget is {args.max_drop} point of top-1, on samples that neither",
        "fitted factors nor chose the plan.",
        "",
        f"Machine: {_processor()}, {threads} cores, target `{target_key(host_target())}`,",
        f"Python {platform.python_version()}.",
        "",
        "| network | dense | transformed | speed-up | ONNX Runtime | OpenVINO f32 | top-1 before | "
        "after | samples | agreement | weights | dense against ONNX Runtime | tuning |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plan: Plan = row["plan"]
        result, latency = plan.result, row["latency"]
        speedup = latency["dense"] / latency["transformed"]
        cells = [
            row["name"],
            _ms(latency["dense"]),
            _ms(latency["transformed"]),
            f"{speedup:.2f}x" if plan.transformed else "original kept",
            _ms(latency["onnxruntime"]),
            _ms(latency["openvino"]),
            f"{result['accuracy_before']:.2f} %",
            f"{result['accuracy_after']:.2f} %",
            str(result["samples"]),
            f"{result['agreement']:.1f} %",
            f"{result['weight_bytes_before'] / 1e6:.2f} -> "
            f"{result['weight_bytes_after'] / 1e6:.2f} MB",
            f"{row['error']:.0e}",
            f"{row['seconds']:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Forms chosen", ""]
    for row in rows:
        plan = row["plan"]
        counts: dict[str, int] = {}
        for layer in plan.layers:
            counts[layer.form] = counts.get(layer.form, 0) + 1
        text = ", ".join(f"{count} {form}" for form, count in sorted(counts.items()))
        reason = "" if plan.transformed else f" ({plan.reason})"
        lines.append(f"- {row['name']}: {text}{reason}")
    lines += [f"- {line}" for line in skipped]
    return "\n".join(lines) + "\n"


def _ms(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
