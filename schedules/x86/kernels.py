"""The families of convolution kernels, behind one face: space, emit, weights, JSON."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from tvm import tirx

from . import (
    convolution,
    depthwise,
    fft,
    fft_schedule,
    fft_space,
    packing,
    winograd,
    winograd_schedule,
    winograd_space,
)
from .accuracy import stated_error
from .depthwise import DepthwiseSchedule
from .fft_schedule import FFTSchedule
from .isa import VectorISA
from .winograd_schedule import WinogradSchedule
from .workload import ConvSchedule, ConvWorkload


class Schedule(Protocol):
    """The tunable choices of one family: a frozen dataclass that is JSON too.

    ``kernel`` is the name of its family in `FAMILIES`.
    """

    kernel: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values, with ``kernel`` among them."""
        ...


@dataclass(frozen=True)
class KernelFamily:
    """One way to compute convolutions.

    - ``algorithm``: the name users know (``direct``, ``winograd``, ``fft``);
    - ``refuse(workload, isa)``: why it cannot compute the workload, or None;
    - ``space(workload, isa)``: its legal schedules, most promising first; not empty unless refused;
    - ``emit(workload, schedule, isa)``: the kernel, with parameters x, packed weights, the buffers
      of the epilogue's steps, y;
    - ``pack(weight, workload, schedule, isa)``: the OIHW float32 weight as the kernel reads it;
    - ``read(json)``: the inverse of the schedule's ``to_json``;
    - ``error_bound(workload, schedule)``: the stated max|error| / max|result| without an epilogue,
      for standard-normal data.
    """

    algorithm: str
    refuse: Callable[[ConvWorkload, VectorISA], str | None]
    space: Callable[[ConvWorkload, VectorISA], list[Any]]
    emit: Callable[[ConvWorkload, Any, VectorISA], tirx.PrimFunc]
    pack: Callable[[np.ndarray, ConvWorkload, Any, VectorISA], np.ndarray]
    read: Callable[[Mapping[str, Any]], Any]
    error_bound: Callable[[ConvWorkload, Any], float]


def _direct_error(workload: ConvWorkload, schedule: Any) -> float:
    _, channels, rows, columns = workload.geometry.weight_shape
    return stated_error(channels * rows * columns)


# The stated error up to which an algorithm counts as exact; the direct one always does.
EXACT = 1e-6

FAMILIES: dict[str, KernelFamily] = {
    ConvSchedule.kernel: KernelFamily(
        "direct",
        convolution.refuse,
        convolution.space,
        convolution.emit,
        packing.pack_weights,
        ConvSchedule.from_json,
        _direct_error,
    ),
    DepthwiseSchedule.kernel: KernelFamily(
        "direct",
        depthwise.refuse,
        depthwise.space,
        depthwise.emit,
        depthwise.pack,
        DepthwiseSchedule.from_json,
        _direct_error,
    ),
    WinogradSchedule.kernel: KernelFamily(
        "winograd",
        winograd_schedule.refuse,
        winograd_space.space,
        winograd.emit,
        winograd.pack,
        WinogradSchedule.from_json,
        winograd_schedule.error_bound,
    ),
    FFTSchedule.kernel: KernelFamily(
        "fft",
        fft_schedule.refuse,
        fft_space.space,
        fft.emit,
        fft.pack,
        FFTSchedule.from_json,
        fft_schedule.error_bound,
    ),
}
ALGORITHMS = tuple(dict.fromkeys(family.algorithm for family in FAMILIES.values()))


def refuse(workload: ConvWorkload, isa: VectorISA, algorithms: Collection[str] = ALGORITHMS) -> str:
    """Why no family of these algorithms can compute the workload; empty if one can."""
    reasons = []
    for family in FAMILIES.values():
        if family.algorithm in algorithms:
            reason = family.refuse(workload, isa)
            if reason is None:
                return ""
            reasons.append(reason)
    return "; ".join(reasons) or f"no kernel of {', '.join(algorithms)}"


def spaces(
    workload: ConvWorkload,
    isa: VectorISA,
    algorithms: Collection[str] = ALGORITHMS,
    exact: bool = False,
) -> dict[str, list[Any]]:
    """The schedules of every family that can compute the workload, by the family's name.

    With ``exact``, those that `is_exact` alone; a family that has none is left out.
    """
    found = {
        name: family.space(workload, isa)
        for name, family in FAMILIES.items()
        if family.algorithm in algorithms and family.refuse(workload, isa) is None
    }
    if exact:
        found = {name: [s for s in space if is_exact(workload, s)] for name, space in found.items()}
    return {name: space for name, space in found.items() if space}


def default_schedule(workload: ConvWorkload, isa: VectorISA) -> Any:
    """The schedule that nothing measured speaks against; ValueError if no family can compute it."""
    found = spaces(workload, isa, ("direct",)) or spaces(workload, isa)
    if not found:
        raise ValueError(refuse(workload, isa))
    return next(iter(found.values()))[0]


def emit(workload: ConvWorkload, schedule: Schedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel of a schedule; ValueError if it is not legal for the workload."""
    return FAMILIES[schedule.kernel].emit(workload, schedule, isa)


def pack_weights(
    weight: np.ndarray, workload: ConvWorkload, schedule: Schedule, isa: VectorISA
) -> np.ndarray:
    """Lay out an OIHW weight as the kernel of the schedule reads it."""
    return FAMILIES[schedule.kernel].pack(weight, workload, schedule, isa)


def error_bound(workload: ConvWorkload, schedule: Schedule) -> float:
    """The stated max|error| / max|result| of a kernel, as `accuracy.stated_error` defines it."""
    return FAMILIES[schedule.kernel].error_bound(workload, schedule)


def is_exact(workload: ConvWorkload, schedule: Schedule) -> bool:
    """Whether a kernel computes the definition's own sum, or states an error below `EXACT`."""
    return algorithm_of(schedule) == "direct" or error_bound(workload, schedule) <= EXACT


@functools.lru_cache(maxsize=4096)
def weight_bytes(workload: ConvWorkload, schedule: Schedule, isa: VectorISA) -> int:
    """Bytes of the weights as the kernel keeps them: padded, transformed."""
    return 4 * math.prod(int(extent) for extent in emit(workload, schedule, isa).params[1].shape)


def algorithm_of(schedule: Schedule) -> str:
    """The name users know of what a schedule belongs to."""
    return FAMILIES[schedule.kernel].algorithm


def schedule_from_json(data: Mapping[str, Any]) -> Any:
    """Rebuild a schedule of any family; ValueError if its ``kernel`` is unknown."""
    name = data.get("kernel")
    if name not in FAMILIES:
        raise ValueError(f"kernel {name!r} is unknown; known are {', '.join(FAMILIES)}")
    return FAMILIES[name].read(data)
