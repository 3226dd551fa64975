"""What a chain of kernels takes on a GPU: a map between two of one layout is turned by neither.

A kernel of maps with channels last has them turned where its neighbours have not (`cuda.turn`), and
its time counts that. The stages of a form follow each other, so that such a chain would be counted
far too slow by the sum of its stages' times; what its first stage reads and its last one writes is
turned, as for the one layer that it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tvm_lowrank.cost.alike import other_epilogues
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.cuda import turn
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.cuda.epilogue import map_shape
from tvm_lowrank.schedules.cuda.few_channels import splits
from tvm_lowrank.schedules.family import Machine, Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# The kind of maps that are NCHW; all others are of `turn`.
FIRST = ""
# Share of a kernel's time that turning takes at most, where it is predicted and not on record.
_MOST = 0.9


@dataclass(frozen=True)
class Time:
    """Microseconds of a kernel, and of what turns its input and its output among them."""

    us: float
    reading: float = 0.0
    writing: float = 0.0


def kind_of(schedule: Schedule) -> str:
    """The kind of the maps that a schedule's kernel works on."""
    last = getattr(schedule, "channels_last", False) or hasattr(schedule, "kind")
    return str(getattr(schedule, "kind", turn.PLAIN)) if last else FIRST


def joined(
    isa: Machine,
    records: TuningRecords,
    workloads: Sequence[ConvWorkload],
    times: Sequence[Iterable[tuple[float, Schedule]]],
) -> float:
    """Microseconds of kernels that follow each other, on a GPU in the layouts that take the least.

    Infinite where one has no kernel.

    Parameters
    ----------
    isa : Machine
    records : TuningRecords
        Have the times of a GPU's kernels without turning.
    workloads : sequence of ConvWorkload
    times : sequence
        Microseconds and schedules of each, fastest first.
    """
    if not isinstance(isa, CudaArch):
        return sum(next((us for us, _ in of), math.inf) for of in times)
    return total([_fastest(isa, records, w, of) for w, of in zip(workloads, times, strict=True)])


def unturned(
    arch: CudaArch,
    records: TuningRecords,
    workload: ConvWorkload,
    schedule: Schedule,
    microseconds: float,
) -> float:
    """Microseconds of a schedule that works on maps with channels last, without turning any.

    On record, whatever the epilogue, or else what the whole takes less what turning should.
    """
    data = schedule.to_json()
    for other in other_epilogues(workload):
        if (known := records.alone(other.key(), data)) is not None:
            return min(known, microseconds)
    turning = turn.of_convolution(workload, arch, kind_of(schedule))
    return microseconds - min(turning, _MOST * microseconds)


def _fastest(
    arch: CudaArch,
    records: TuningRecords,
    workload: ConvWorkload,
    times: Iterable[tuple[float, Schedule]],
) -> dict[str, Time]:
    """The fastest kernel of each kind of maps."""
    found: dict[str, Time] = {}
    for us, schedule in times:
        kind = kind_of(schedule)
        if kind not in found:
            own = us if kind == FIRST else unturned(arch, records, workload, schedule, us)
            found[kind] = _time(workload, us, us - own, kind, arch)
    return found


def _time(workload: ConvWorkload, us: float, turning: float, kind: str, arch: CudaArch) -> Time:
    if kind == FIRST:
        return Time(us)
    g = workload.geometry
    reading = turn.predict((g.batch, g.in_channels, g.height, g.width), arch, kind)
    # What splits pixels reads NCHW.
    parts = (0.0 if splits(workload) else reading, turn.predict(map_shape(g), arch, kind))
    whole = turn.of_convolution(workload, arch, kind)
    return Time(us, *(turning * part / whole for part in parts))


def total(stages: Sequence[Mapping[str, Time]]) -> float:
    """Microseconds of a chain, each stage in the layout with which all take the least.

    ``stages`` are the fastest kernels of each by the kind of maps; infinite where one has none.
    """
    least: dict[str, tuple[float, float]] = {FIRST: (0.0, 0.0)}  # and of it, what turns the output
    for times in stages:
        before = min((us for us, _ in least.values()), default=math.inf)
        after: dict[str, tuple[float, float]] = {}
        for kind, time in times.items():
            us = before + time.us
            if kind != FIRST and kind in least:
                known, writing = least[kind]
                us = min(us, known - writing + time.us - time.reading)
            after[kind] = us, time.writing
        least = after
    return min((us for us, _ in least.values()), default=math.inf)
