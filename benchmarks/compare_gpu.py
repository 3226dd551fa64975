"""One ONNX network in several runtimes on a GPU, and its layers against cuDNN's."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from cases import BadInput, Case, find_case
from gpu_runtimes import VARIANTS, cudnn_layer
from tvm_lowrank.schedules.kernels import emit
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from zoo import NETWORKS

from tvm_lowrank.cost.timing import time_programs
from tvm_lowrank.cuda import gpu_name
from tvm_lowrank.frontend import load_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import Options, search
from tvm_lowrank.target import parse_target

BATCHES = (1, 128)
OURS = "tvm_lowrank"
# Seconds for one variant, which for torch.compile includes its tuning.
_PATIENCE = 1800


def compare(args: argparse.Namespace) -> list[str]:
    """The sections of the report; `BadInput` where there is no GPU.

    With ``args.rows`` the figures are also written there as JSON.
    """
    if not tvm.cuda(0).exist:
        raise BadInput(
            f"--target {args.target} measures on a GPU, and this machine has none; nothing was "
            "measured"
        )
    cases = [find_case(n, b) for n in args.networks or NETWORKS for b in args.batch or BATCHES]
    heading = (
        f"{gpu_name()}. Medians and minima of single runs in milliseconds by CUDA events (ONNX "
        "Runtime: by the clock), each runtime in a process of its own, one after the other. "
        "*Ratio*: its median over ours; more than 1 is slower than ours. Layers: microseconds of "
        "one of many runs in a row, cuDNN's from a CUDA graph, in the faster of its two layouts."
    )
    print(heading, flush=True)
    sections, rows = [heading], []
    images: dict[str, dict[int, dict[str, Any]]] = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            library = Path(folder) / "model.so"
            plan = _build(case, args, library.parent)
            found = {
                name: measure(name, library if name == OURS else case.path, case.shape)
                for name in VARIANTS
            }
        check(found)
        images.setdefault(case.name, {})[case.batch] = found
        rows.append(
            {
                "network": case.name,
                "batch": case.batch,
                "gpu": gpu_name(),
                "algorithms": list(args.algorithms),
                "runtimes": found,
                "layers": layers(plan),
            }
        )
        sections += [table(str(case), found), layer_table(rows[-1]["layers"])]
        print("\n".join(sections[-2:]), flush=True)
    for name, batches in images.items():
        sections.append(per_image(name, batches))
        print(sections[-1], flush=True)
    if args.rows:
        args.rows.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return sections


def per_image(title: str, batches: Mapping[int, Mapping[str, dict[str, Any] | str]]) -> str:
    """The paper's figure 6: milliseconds an image of each runtime at each batch."""
    lines = [
        f"\n## {title}, milliseconds an image\n",
        f"| runtime | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---" * (1 + len(batches)) + "|",
    ]
    for name in dict.fromkeys(name for found in batches.values() for name in found):
        rows = [(batch, found.get(name)) for batch, found in batches.items()]
        cells = [f"{r['median_ms'] / n:.4f}" if isinstance(r, dict) else "-" for n, r in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _build(case: Case, args: argparse.Namespace, folder: Path) -> Plan:
    """Our library in ``folder``, nothing approximated, kernels tuned on this GPU."""
    options = Options(forms=("dense",), trials=args.trials, algorithms=args.algorithms)
    mod = load_model(case.path, case.batch)
    return search(mod, args.target, options=options, records=args.records, directory=folder)


def measure(name: str, path: Path, shape: Sequence[int]) -> dict[str, Any] | str:
    """What a variant's process answers for a file and the shape of its input, or why it failed."""
    script = Path(__file__).with_name("gpu_runtimes.py")
    command = [sys.executable, str(script), name, str(path), json.dumps(list(shape))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {_PATIENCE} s"
    if done.returncode:
        return ([line for line in done.stderr.splitlines() if line.strip()] or ["failed"])[-1][:200]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check(found: Mapping[str, dict[str, Any] | str]) -> None:
    """Put the error against PyTorch in float32, if that ran, in the place of each output."""
    reference = found.get("torch")
    expected = reference["output"] if isinstance(reference, dict) else None
    for row in found.values():
        if isinstance(row, dict):
            output = row.pop("output")
            row["error"] = None if expected is None else _error(output, expected)


def table(title: str, found: Mapping[str, Mapping[str, Any] | str]) -> str:
    """The rows of a network, with the errors that `check` leaves."""
    lines = [
        f"\n## {title}\n",
        "| runtime | median | minimum | ratio | error | how |",
        "|---|---|---|---|---|---|",
    ]
    mine = found.get(OURS)
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | - | - | - | - | {row} |")
            continue
        ratio = "-" if not isinstance(mine, Mapping) else f"{_ratio(row, mine):.2f}"
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {name} | {row['median_ms']:.3f} | {row['minimum_ms']:.3f} | {ratio} | {error} | "
            f"{row['about']} |"
        )
    return "\n".join(lines)


def _ratio(row: Mapping[str, Any], mine: Mapping[str, Any]) -> float:
    return float(row["median_ms"] / mine["median_ms"])


def layers(plan: Plan) -> list[dict[str, Any]]:
    """The paper's figure 7: microseconds of each distinct convolution, ours and cuDNN's."""
    target = parse_target(plan.target)
    machine, choose = machine_of(target), plan.scheduler()
    found: dict[Any, dict[str, Any]] = {}
    for layer in plan.layers:
        if layer.geometry is None:
            continue
        if layer.geometry in found:
            found[layer.geometry]["times"] += 1
            continue
        schedule = choose(ConvWorkload(layer.geometry, machine.block))
        found[layer.geometry] = {
            "layer": layer.name,
            "shape": str(layer.geometry),
            "geometry": layer.geometry.to_json(),
            "kernel": schedule.kernel,
            "times": 1,
        }
    workloads = [ConvWorkload(geometry, machine.block) for geometry in found]
    programs = [emit(workload, choose(workload), machine) for workload in workloads]
    for row, answer in zip(
        found.values(), time_programs(programs, target, tvm.cuda()), strict=True
    ):
        row["us"] = answer["us"]
        for precision, tf32 in (("float32", False), ("tf32", True)):
            row[f"cudnn_{precision}"] = min(
                _cudnn(row["geometry"], tf32, last) for last in (False, True)
            )
    return list(found.values())


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `layers` as a table."""
    lines = [
        "\n| first layer | so shaped | shape | ours, us | cuDNN float32 | cuDNN TF32 | kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[name]:.1f}" for name in ("us", "cudnn_float32", "cudnn_tf32")]
        lines.append(
            f"| {row['layer']} | {row['times']} | {row['shape']} | {' | '.join(cells)} | "
            f"{row['kernel'].removeprefix('cuda_')} |"
        )
    return "\n".join(lines)


def _cudnn(geometry: dict[str, Any], tf32: bool, channels_last: bool) -> float:
    """Microseconds of cuDNN's convolution, infinite where it has none."""
    try:
        return cudnn_layer(geometry, tf32, channels_last)
    except (RuntimeError, ValueError):
        return math.inf


def _error(output: Sequence[float], expected: Sequence[float]) -> float:
    if len(output) != len(expected):
        return math.nan
    largest = np.abs(expected).max()
    return float(np.abs(np.subtract(output, expected)).max() / largest)
