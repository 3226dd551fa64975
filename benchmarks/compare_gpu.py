"""One ONNX network in several runtimes on a GPU, and its layers against cuDNN's."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cudnn_layers
import numpy as np
import tvm
from cases import BadInput, Case, find_case
from gpu_runtimes import PRECISIONS
from tvm_lowrank.passes.lower import lower, survey
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import emit
from tvm_lowrank.schedules.machine import machine_of
from zoo import NETWORKS, cache_folder

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost import layouts
from tvm_lowrank.cost.guide import guide_for
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.measure_batch import time_candidate
from tvm_lowrank.cost.predicting import PredictingTimer, records_for
from tvm_lowrank.cost.trees import find
from tvm_lowrank.cuda import gpu_name, prepare_compiler
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.target import is_measurable, parse_target

BATCHES = (1, 128)
OURS = "tvm_lowrank"
_LIBRARY, _KERNELS, _LAYERS = "model.so", "layers.so", "layers.json"
# Seconds for one variant, which for torch.compile includes its tuning.
_PATIENCE = 1800


def build_only(args: argparse.Namespace) -> None:
    """Fill ``args.libraries``; a machine without a GPU can, by records and predictions."""
    for case in _cases(args):
        for algorithms in _sets(args):
            folder = _folder(case, algorithms, args.libraries)
            _build(case, args, algorithms, folder)
            print(f"{case}: {folder / _LIBRARY}", flush=True)


def compare(args: argparse.Namespace) -> list[str]:
    """The sections of the report; `BadInput` where there is no GPU.

    With ``args.rows`` the figures are also added to the JSON list in that file.
    """
    if not tvm.cuda(0).exist:
        raise BadInput(
            f"--target {args.target} measures on a GPU, and this machine has none; nothing was "
            "measured"
        )
    heading = (
        f"{gpu_name()}. Medians and minima of single runs in milliseconds by CUDA events (ONNX "
        "Runtime: by the clock), each runtime in a process of its own, one after the other. "
        "*Ratio*: its median over ours; more than 1 is slower than ours. Layers: microseconds of "
        "one of many runs in a row, cuDNN's from a CUDA graph, in the faster of its two layouts; "
        "turning maps from one layout to another is in none of them."
    )
    print(heading, flush=True)
    sections = [heading]
    images: dict[str, dict[int, dict[str, Any]]] = {}
    kept = args.rows is not None and args.rows.exists()
    rows = json.loads(args.rows.read_text(encoding="utf-8")) if kept else []
    for case in _cases(args):
        with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
            parent = args.libraries or Path(scratch)
            folders = {tried: _folder(case, tried, parent) for tried in _sets(args)}
            for tried, folder in folders.items():
                _build(case, args, tried, folder)
            # Runtimes that tune for minutes come last, and ours stays if they are cut off.
            ours = {
                tried: (measure_all({OURS: folder / _LIBRARY}, case.shape)[OURS], layers(folder))
                for tried, folder in folders.items()
            }

            def made(
                peers: Mapping[str, dict[str, Any] | str],
                case: Case = case,
                ours: Mapping[tuple[str, ...], tuple[Any, list[dict[str, Any]]]] = ours,
            ) -> list[dict[str, Any]]:
                """The rows of a case."""
                return [
                    {
                        "network": case.name,
                        "batch": case.batch,
                        "gpu": gpu_name(),
                        "algorithms": list(tried),
                        "runtimes": check({OURS: answer, **peers}),
                        "layers": by_layer,
                    }
                    for tried, (answer, by_layer) in ours.items()
                ]

            def tell(peers: Mapping[str, dict[str, Any] | str], made: Any = made) -> None:
                _write(args.rows, [*rows, *made(peers)])

            peers = measure_all(dict.fromkeys(args.against, case.path), case.shape, tell)
        for row in made(peers):
            rows.append(row)
            images.setdefault(case.name, {}).setdefault(case.batch, row["runtimes"])
            title = f"{case}, kernels: {', '.join(row['algorithms'])}"
            sections += [table(title, row["runtimes"]), layer_table(row["layers"])]
            print("\n".join(sections[-2:]), flush=True)
        _write(args.rows, rows)
    for name, batches in images.items():
        sections.append(per_image(name, batches))
        print(sections[-1], flush=True)
    return sections


def measure_all(
    files: Mapping[str, Path],
    shape: Sequence[int],
    tell: Callable[[dict[str, dict[str, Any] | str]], None] = lambda _: None,
) -> dict[str, dict[str, Any] | str]:
    """The answer of each variant, printed, and with those before it told, as soon as it is there.

    The last of them may take minutes, in which the others must not get lost.
    """
    found: dict[str, dict[str, Any] | str] = {}
    for name, path in files.items():
        found[name] = answer = measure(name, path, shape)
        said = answer if isinstance(answer, str) else f"{answer['median_ms']:.3f} ms"
        print(f"{name}: {said}", flush=True)
        tell(found)
    return found


def _write(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _cases(args: argparse.Namespace) -> list[Case]:
    return [find_case(n, b) for n in args.networks or NETWORKS for b in args.batch or BATCHES]


def _sets(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """The sets of algorithms that libraries of ours are built of."""
    return [tuple(args.algorithms), *map(tuple, args.also)]


def _folder(case: Case, algorithms: Sequence[str], parent: Path) -> Path:
    return parent / "-".join([f"{case.path.stem}-batch{case.batch}-gpu", *algorithms])


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


def _build(case: Case, args: argparse.Namespace, algorithms: Sequence[str], folder: Path) -> None:
    """Leave in ``folder``, unless it is there, our library and one with each distinct layer.

    Nothing is approximated; kernels are tuned on this GPU, or predicted where there is none.
    """
    if (folder / _LAYERS).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = parse_target(args.target)
    prepare_compiler(target)
    machine = machine_of(target)
    path = args.records or cache_folder() / "records.jsonl"
    records = records_for(path, target, 1, True)
    make = KernelTimer if is_measurable(target) else PredictingTimer
    trees, _ = find(None, machine)
    guide = guide_for(records, machine)
    timer = make(target, records, args.trials, algorithms, trees=trees, guide=guide)
    mod = normalise(load_model(case.path, case.batch))
    for workload in dict.fromkeys(survey(mod, machine, timer.choose)):
        if timer.known(workload) is None:
            timer.microseconds(workload)
    chosen = {workload: timer.choose(workload) for workload in survey(mod, machine, timer.choose)}
    chosen = layouts.settle(mod, timer, chosen)
    used = {workload.geometry: schedule for workload, schedule in chosen.items()}
    found: dict[Any, dict[str, Any]] = {}
    functions: dict[str, Any] = {}
    for layer in collect_layers(mod):
        if layer.geometry is None or timer.refuse([layer.geometry]):
            continue
        if layer.geometry in found:
            found[layer.geometry]["times"] += 1
            continue
        (workload,) = timer.workloads([layer.geometry])
        schedule = used[layer.geometry]
        program = emit(workload, schedule, machine)
        names = [f"layer{len(found)}_{index}" for index in range(len(program.stages))]
        functions |= program.named(names)
        found[layer.geometry] = {
            "layer": layer.name,
            "times": 1,
            "shape": str(layer.geometry),
            "geometry": layer.geometry.to_json(),
            "schedule": schedule.to_json(),
            "program": program.to_json(names),
        }
    export(compile_module(lower(mod, machine, chosen.__getitem__), target), folder / _LIBRARY)
    export(compile_module(tvm.IRModule(functions), target), folder / _KERNELS)
    (folder / _LAYERS).write_text(json.dumps(list(found.values())), encoding="utf-8")


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


def check(found: Mapping[str, dict[str, Any] | str]) -> dict[str, dict[str, Any] | str]:
    """The answers, with the error against PyTorch in float32, if that ran, for each output."""
    reference = found.get("torch")
    expected = reference["output"] if isinstance(reference, dict) else None
    checked: dict[str, dict[str, Any] | str] = {}
    for name, answer in found.items():
        if isinstance(answer, str):
            checked[name] = answer
            continue
        error = None if expected is None else _error(answer["output"], expected)
        kept = {key: value for key, value in answer.items() if key != "output"}
        checked[name] = {**kept, "error": error}
    return checked


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


def layers(folder: Path) -> list[dict[str, Any]]:
    """The paper's figure 7: microseconds of each distinct convolution, ours and cuDNN's."""
    module = tvm.runtime.load_module(str(folder / _KERNELS))
    rows = json.loads((folder / _LAYERS).read_text(encoding="utf-8"))
    for row in rows:
        answer = time_candidate(module, row.pop("program"), tvm.cuda())
        row["us"] = answer.get("alone", answer["us"])
        for precision, us in cudnn_layers.times(gpu_name(), row["geometry"]).items():
            row[f"cudnn_{precision}"] = us
    return list(rows)


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `layers` as a table."""
    lines = [
        "\n| first layer | so shaped | shape | ours, us | "
        + " | ".join(f"cuDNN {label}" for label in PRECISIONS.values())
        + " | kernel |",
        "|---" * (5 + len(PRECISIONS)) + "|",
    ]
    for row in rows:
        names = [f"cudnn_{precision}" for precision in PRECISIONS]
        # Rows that are older than a column have none.
        cells = [f"{row[name]:.1f}" if name in row else "-" for name in ("us", *names)]
        lines.append(
            f"| {row['layer']} | {row['times']} | {row['shape']} | {' | '.join(cells)} | "
            f"{row['schedule']['kernel'].removeprefix('cuda_')} |"
        )
    return "\n".join(lines)


def _error(output: Sequence[float], expected: Sequence[float]) -> float:
    if len(output) != len(expected):
        return math.nan
    largest = np.abs(expected).max()
    return float(np.abs(np.subtract(output, expected)).max() / largest)
