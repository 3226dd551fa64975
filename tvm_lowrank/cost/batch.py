"""A folder of compiled kernels that travels to the machine that can measure them, and back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost import measure_batch
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.passes.lower import survey
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda.program import Program
from tvm_lowrank.schedules.family import Machine, Schedule
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Candidates that are compiled and linked together.
_A_LIBRARY = 16
# Shares of a dense layer's multiplications at which the stages of each form are measured.
_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Candidate:
    """A workload with one of its schedules."""

    workload: ConvWorkload
    schedule: Schedule


def candidates_of(
    mod: tvm.IRModule, timer: KernelTimer, forms: Sequence[str], trials: int
) -> list[Candidate]:
    """What is worth measuring of a network: its layers, and stages that could replace them.

    Parameters
    ----------
    mod : tvm.IRModule
        The network.
    timer : KernelTimer
        Names the target and the algorithms; what it has on record is left out.
    forms : sequence of str
        Names of `FORMS` whose stages are included, at three ranks a layer.
    trials : int
        Schedules of each family of kernels for each workload at most.
    """
    normalised, machine = normalise(mod), timer.isa
    workloads = dict.fromkeys(survey(normalised, machine, timer.choose))
    for layer in collect_layers(normalised):
        if layer.geometry is None or timer.refuse([layer.geometry]):
            continue
        for chain in _chains(layer.geometry, timer, forms):
            workloads.update(dict.fromkeys(timer.workloads(chain)))
    known = {
        (key, json.dumps(schedule, sort_keys=True))
        for key, place, schedule, _ in timer.records.rows()
        if not place.shipped
    }
    found = []
    for workload in workloads:
        spaces = kernels.spaces(workload, machine, timer.usable.algorithms)
        for schedule in (s for space in spaces.values() for s in space[:trials]):
            data = json.dumps(schedule.to_json(), sort_keys=True)
            if (workload.key(), data) not in known:
                found.append(Candidate(workload, schedule))
    return found


def _chains(
    geometry: ConvGeometry, timer: KernelTimer, forms: Sequence[str]
) -> Iterable[tuple[ConvGeometry, ...]]:
    """The stages of each form at the ranks whose operations come nearest to `_SHARES`."""

    def work(stages: Sequence[ConvGeometry]) -> float:
        return sum(stage.multiplications for stage in stages)

    for name in forms:
        form = FORMS[name]
        if form.refuse(geometry):
            continue
        ranks = form.ranks(geometry, timer.isa.lanes)
        chains = [tuple(form.stages(geometry, rank)) for rank in ranks]
        chains = [chain for chain in chains if not timer.refuse(chain)]
        for share in _SHARES if chains else ():
            yield min(chains, key=lambda chain: abs(work(chain) - share * work([geometry])))


def export_batch(
    candidates: Sequence[Candidate], target: tvm.target.Target, threads: int, folder: Path
) -> None:
    """Compile candidates and write them with the script that measures them.

    ``folder`` must not hold a batch yet; it is complete once ``manifest.json`` is there.

    Raises
    ------
    LowRankError
        There is nothing to measure, the folder holds a batch, or a library cannot be built.
    """
    if not candidates:
        raise LowRankError("nothing to export: the records hold times of everything already")
    if (folder / measure_batch.MANIFEST).exists():
        raise LowRankError(f"{folder} holds a batch already; choose another folder")
    machine = machine_of(target)
    entries: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(candidates), _A_LIBRARY):
        library = f"kernels{start // _A_LIBRARY}.so"
        functions: dict[str, Any] = {}
        for candidate in candidates[start : start + _A_LIBRARY]:
            program = _program(candidate, machine)
            names = _names(program, len(entries))
            functions |= program.named(names)
            entries.append(_entry(candidate, program, names, library))
        export(compile_module(tvm.IRModule(functions), target), folder / library)
    shutil.copyfile(measure_batch.__file__, folder / measure_batch.SCRIPT)
    manifest = {
        "format": measure_batch.FORMAT,
        "device": "cuda" if target.kind.name == "cuda" else "cpu",
        "target": dict(json.loads(str(target))),
        "isa": machine.name,
        "threads": threads,
        "candidates": entries,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    manifest["batch"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(json.dumps(manifest, indent=1))
    Path(file.name).rename(folder / measure_batch.MANIFEST)


def _names(program: Program, number: int) -> list[str]:
    """Names for the kernels of a candidate; those that turn maps alike have the same."""
    return [
        f"turn_{tvm_ffi.structural_hash(stage.func) % 2**64:x}"
        if stage.turns
        else f"c{number}_{index}"
        for index, stage in enumerate(program.stages)
    ]


def _program(candidate: Candidate, machine: Machine) -> Program:
    """The kernels of a candidate; those of a processor are one."""
    made = kernels.emit(candidate.workload, candidate.schedule, machine)
    return made if isinstance(made, Program) else Program.of_function(made)


def _entry(
    candidate: Candidate, program: Program, names: list[str], library: str
) -> dict[str, Any]:
    return {
        "library": library,
        "workload": candidate.workload.to_json(),
        "schedule": candidate.schedule.to_json(),
        **program.to_json(names),
    }


def import_results(folder: Path, path: Path) -> tuple[int, int]:
    """Append the results of a measured batch to a file of records.

    Results that the file holds already are left out, so importing twice changes nothing.

    Returns
    -------
    (int, int)
        Times that were added, and candidates without a result.

    Raises
    ------
    LowRankError
        The folder holds no batch or no results of it, or they are damaged.
    """
    try:
        manifest = json.loads((folder / measure_batch.MANIFEST).read_text())
        if manifest["format"] != measure_batch.FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {measure_batch.FORMAT}")
        # Without its end, the last line is of a run that was interrupted.
        whole = (folder / measure_batch.RESULTS).read_text().rpartition("\n")[0]
        results = [json.loads(line) for line in whole.splitlines()]
        results = [result for result in results if result["batch"] == manifest["batch"]]
        entries = manifest["candidates"]
        measured = {int(result["index"]): result for result in results}
        machines = {str(result["machine"]) for result in results if result["us"] is not None}
        if not machines:
            raise ValueError("no candidate was measured")
        times = [
            (entries[index], _microseconds(r), r.get("alone")) for index, r in measured.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LowRankError(
            f"{folder} holds no measured batch ({error}); run measure.py in it first"
        ) from error
    if len(machines) > 1:
        raise LowRankError(
            f"{folder} was measured on {', '.join(sorted(machines))}; measure each copy on one"
        )
    (machine,) = machines
    threads = 1 if manifest["device"] == "cuda" else int(manifest["threads"])
    path.parent.mkdir(parents=True, exist_ok=True)
    records = TuningRecords(path, manifest["isa"], threads, machine=machine)
    added = 0
    for entry, us, alone in times:
        key = ConvWorkload.from_json(entry["workload"]).key()
        if records.time(key, entry["schedule"]) is None:
            records.add(key, entry["schedule"], us, alone=alone)
            added += 1
    return added, len(entries) - len(measured)


def _microseconds(result: dict[str, Any]) -> float:
    """The time of a result, infinite for a failed candidate; ValueError if it is no time."""
    us = math.inf if result["us"] is None else float(result["us"])
    if not us > 0:
        raise ValueError(f"a time of {result['us']}")
    return us
