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

from tvm_lowrank.cost.timing import time_program
from tvm_lowrank.cuda import gpu_name
from tvm_lowrank.frontend import load_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import Options, search
from tvm_lowrank.target import parse_target

BATCHES = (1, 128)
_OURS = "tvm_lowrank"
# Seconds for one variant, which for torch.compile includes its tuning.
_PATIENCE = 1800


def compare(args: argparse.Namespace) -> list[str]:
    """The sections of the report; `BadInput` where there is no GPU."""
    if not tvm.cuda(0).exist:
        raise BadInput(
            f"--target {args.target} measures on a GPU, and this machine has none; nothing was "
            "measured"
        )
    cases = [find_case(n, b) for n in args.networks or NETWORKS for b in args.batch or BATCHES]
    sections = [
        f"{gpu_name()}. Medians and minima of single runs in milliseconds by CUDA events (ONNX "
        "Runtime: by the clock), each runtime in a process of its own, one after the other. "
        "*Ratio*: its median over ours; more than 1 is slower than ours."
    ]
    print(sections[0], flush=True)
    images: dict[str, dict[int, dict[str, Any]]] = {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            library = Path(folder) / "model.so"
            plan = _build(case, args, library.parent)
            found = {
                name: _measure(name, library if name == _OURS else case.path, case)
                for name in VARIANTS
            }
        images.setdefault(case.name, {})[case.batch] = found
        sections += [table(str(case), found), layers(plan)]
        print("\n".join(sections[-2:]), flush=True)
    for name, batches in images.items():
        sections.append(per_image(name, batches))
        print(sections[-1], flush=True)
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


def _measure(name: str, path: Path, case: Case) -> dict[str, Any] | str:
    """What a variant's process answers, or why it failed."""
    script = Path(__file__).with_name("gpu_runtimes.py")
    command = [sys.executable, str(script), name, str(path), json.dumps(case.shape)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {_PATIENCE} s"
    if done.returncode:
        return ([line for line in done.stderr.splitlines() if line.strip()] or ["failed"])[-1][:200]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(title: str, found: dict[str, dict[str, Any] | str]) -> str:
    """The rows of a network; the error is against PyTorch in float32."""
    lines = [
        f"\n## {title}\n",
        "| runtime | median | minimum | ratio | error | how |",
        "|---|---|---|---|---|---|",
    ]
    mine, reference = found.get(_OURS), found.get("torch")
    for name, row in found.items():
        if isinstance(row, str):
            lines.append(f"| {name} | - | - | - | - | {row} |")
            continue
        ratio = "-" if not isinstance(mine, dict) else f"{row['median_ms'] / mine['median_ms']:.2f}"
        error = "-"
        if isinstance(reference, dict):
            error = f"{_error(row['output'], reference['output']):.0e}"
        lines.append(
            f"| {name} | {row['median_ms']:.3f} | {row['minimum_ms']:.3f} | {ratio} | {error} | "
            f"{row['about']} |"
        )
    return "\n".join(lines)


def layers(plan: Plan) -> str:
    """The paper's figure 7: microseconds of each convolution, ours and cuDNN's."""
    target = parse_target(plan.target)
    machine = machine_of(target)
    lines = [
        "\n| layer | shape | ours, us | cuDNN float32 | cuDNN TF32 | algorithm |",
        "|---|---|---|---|---|---|",
    ]
    for layer in plan.layers:
        if layer.geometry is None:
            continue
        workload = ConvWorkload(layer.geometry, machine.block)
        schedule = plan.scheduler()(workload)
        mine = time_program(emit(workload, schedule, machine), target, tvm.cuda())["us"]
        theirs = [_cudnn(layer.geometry.to_json(), tf32) for tf32 in (False, True)]
        cells = [f"{mine:.1f}", *theirs, ", ".join(layer.algorithms)]
        lines.append(f"| {layer.name} | {layer.geometry} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cudnn(geometry: dict[str, Any], tf32: bool) -> str:
    try:
        return f"{cudnn_layer(geometry, tf32):.1f}"
    except Exception as error:
        return str(error).splitlines()[0][:60]


def _error(output: Sequence[float], expected: Sequence[float]) -> float:
    if len(output) != len(expected):
        return math.nan
    largest = np.abs(expected).max()
    return float(np.abs(np.subtract(output, expected)).max() / largest)
