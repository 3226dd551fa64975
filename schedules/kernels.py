"""All families of convolution kernels behind one face: space, emit, weights, JSON.

This is what planner, tuner and lowering know of kernels; the machine at hand (`machine.machine_of`)
decides which families there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tvm_lowrank.geometry import ConvGeometry

from .cuda.arch import CudaArch
from .cuda.kernels import FAMILIES as CUDA_FAMILIES
from .cuda.program import Program
from .family import KernelFamily, Machine, Schedule
from .x86.kernels import FAMILIES as X86_FAMILIES
from .x86.workload import ConvWorkload

# By the name in a schedule's JSON; no two machines share one.
FAMILIES: dict[str, KernelFamily] = {**X86_FAMILIES, **CUDA_FAMILIES}
# Algorithms that round to fewer digits than float32 has: only where they are asked for.
REDUCED = ("tf32", "half", "bfloat16")
ALGORITHMS = tuple(
    name
    for name in dict.fromkeys(family.algorithm for family in FAMILIES.values())
    if name not in REDUCED
)

# The stated error up to which an algorithm counts as exact; the direct one always does.
EXACT = 1e-6


def families_of(machine: Machine) -> dict[str, KernelFamily]:
    """The families that compute on a machine, by name."""
    return CUDA_FAMILIES if isinstance(machine, CudaArch) else X86_FAMILIES


def refuse(
    workload: ConvWorkload, machine: Machine, algorithms: Collection[str] = ALGORITHMS
) -> str:
    """Why no family of these algorithms can compute the workload; empty if one can."""
    reasons = []
    for family in families_of(machine).values():
        if family.algorithm in algorithms:
            reason = family.refuse(workload, machine)
            if reason is None:
                return ""
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or f"no kernel of {', '.join(algorithms)}"


def spaces(
    workload: ConvWorkload,
    machine: Machine,
    algorithms: Collection[str] = ALGORITHMS,
    exact: bool = False,
) -> dict[str, list[Any]]:
    """The schedules of every family that can compute the workload, by the family's name.

    With ``exact``, those that `is_exact` alone; a family that has none is left out.
    """
    key: Any = machine  # a frozen dataclass, which the protocol does not say
    found = {
        name: list(_space(name, workload, key))
        for name, family in families_of(machine).items()
        if family.algorithm in algorithms and family.refuse(workload, machine) is None
    }
    if exact:
        found = {name: [s for s in space if is_exact(workload, s)] for name, space in found.items()}
    return {name: space for name, space in found.items() if space}


@functools.lru_cache(maxsize=4096)
def _space(name: str, workload: ConvWorkload, machine: Machine) -> tuple[Any, ...]:
    """The space of one family, kept: a tuner asks for it before each measurement."""
    return tuple(families_of(machine)[name].space(workload, machine))


def default_schedule(workload: ConvWorkload, machine: Machine) -> Any:
    """The schedule that nothing measured speaks against; ValueError if no family can compute it."""
    found = spaces(workload, machine, ("direct",)) or spaces(workload, machine)
    if not found:
        raise ValueError(refuse(workload, machine))
    return next(iter(found.values()))[0]


def emit(workload: ConvWorkload, schedule: Schedule, machine: Machine) -> Any:
    """Build the kernel of a schedule; ValueError if it is not legal for the workload."""
    return FAMILIES[schedule.kernel].emit(workload, schedule, machine)


def pack_weights(
    weight: np.ndarray, workload: ConvWorkload, schedule: Schedule, machine: Machine
) -> np.ndarray:
    """Lay out an OIHW weight as the kernel of the schedule reads it."""
    return FAMILIES[schedule.kernel].pack(weight, workload, schedule, machine)


def error_bound(workload: ConvWorkload, schedule: Schedule) -> float:
    """The stated max|error| / max|result| of a kernel, as `accuracy.stated_error` defines it."""
    return FAMILIES[schedule.kernel].error_bound(workload, schedule)


def is_exact(workload: ConvWorkload, schedule: Schedule) -> bool:
    """Whether a kernel computes the definition's own sum, or states an error below `EXACT`."""
    return algorithm_of(schedule) == "direct" or error_bound(workload, schedule) <= EXACT


@functools.lru_cache(maxsize=4096)
def weight_bytes(workload: ConvWorkload, schedule: Schedule, machine: Machine) -> int:
    """Bytes of the weights as the kernel keeps them: padded, transformed."""
    kernel = emit(workload, schedule, machine)
    if isinstance(kernel, Program):
        return kernel.weight_bytes
    return 4 * math.prod(int(extent) for extent in kernel.params[1].shape)


def has_kernel(workload: ConvWorkload, schedule: Mapping[str, Any], machine: Machine) -> bool:
    """Whether the family of a schedule, given as JSON values, computes a workload on a machine."""
    family = families_of(machine).get(str(schedule.get("kernel")))
    return family is not None and family.refuse(workload, machine) is None


def lacking(machine: Machine, algorithms: Collection[str]) -> dict[str, str]:
    """The algorithms among those named that a machine has no kernels of, each with the reason.

    Only those that round are looked at: the others have kernels everywhere, or pass.
    """
    probe = ConvWorkload(ConvGeometry(64, 64, 14, 14, (3, 3)), machine.block, ("bias",))
    reasons = {name: refuse(probe, machine, (name,)) for name in algorithms if name in REDUCED}
    return {name: reason for name, reason in reasons.items() if reason}


def algorithm_of(schedule: Schedule) -> str:
    """The name users know of what a schedule belongs to."""
    return FAMILIES[schedule.kernel].algorithm


def schedule_from_json(data: Mapping[str, Any]) -> Any:
    """Rebuild a schedule of any family; ValueError if its ``kernel`` is unknown."""
    name = data.get("kernel")
    if name not in FAMILIES:
        raise ValueError(f"kernel {name!r} is unknown; known are {', '.join(FAMILIES)}")
    return FAMILIES[name].read(data)


def predict(workload: ConvWorkload, schedule: Schedule, machine: Machine) -> float | None:
    """Microseconds of a kernel by its family's model of the machine, None if it has no model."""
    model = FAMILIES[schedule.kernel].predict
    return None if model is None else model(workload, schedule, machine)
