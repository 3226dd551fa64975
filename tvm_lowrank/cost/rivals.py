"""Schedules of one convolution whose times come near each other, run in turns to tell them apart.

A machine that others share is slower than at other times for seconds or minutes, so of two
schedules that were measured one after the other the slower one may have won. Run in turns, both
meet the same machine. These times choose only, they price nothing: a search that goes on from its
records prices what the first one priced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tvm_lowrank.cost.alike import other_epilogues
from tvm_lowrank.records import in_order, near_fastest
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

if TYPE_CHECKING:
    from tvm_lowrank.cost.measure import KernelTimer


def ranked(timer: KernelTimer, workload: ConvWorkload) -> list[Schedule]:
    """The schedules measured here, fastest first; those near the fastest as they came in turns."""
    return in_order(timer.usable.measured(workload), lambda near: _raced(timer, workload, near))


def compare(timer: KernelTimer, workloads: Iterable[ConvWorkload]) -> None:
    """Run the schedules near the fastest of each convolution in turns, unless they have been.

    Convolutions that differ in their epilogue only count as one.
    """
    for workload in {(w.geometry, w.in_block): w for w in workloads}.values():
        found = timer.usable.measured(workload)
        near = near_fastest(found)
        if len(near) > 1 and _raced(timer, workload, near) is None:
            # Their times are on record under an epilogue that may not be this one's.
            own = next(w for w in other_epilogues(workload) if timer.records.measured(w.key()))
            race(timer, own, near, [us for us, _ in found[: len(near)]])


def race(
    timer: KernelTimer,
    workload: ConvWorkload,
    schedules: Sequence[Schedule],
    known: Sequence[float],
    calm: bool = False,
) -> None:
    """Run schedules in turns, and put their times on record.

    What does not run so, as several may take more memory than one, keeps its ``known`` time. With
    ``calm`` times are kept only if the machine was about as fast as it ever was before and after:
    else other work on it made kernels wait for what they do not wait for alone.
    """
    if calm and not timer.is_calm():
        return
    times = timer.asker.in_turns(workload, schedules) or known
    if calm and not timer.is_calm():
        return
    data = [schedule.to_json() for schedule in schedules]
    timer.records.add_race(workload.key(), [*zip(data, times, strict=True)])


def _raced(
    timer: KernelTimer, workload: ConvWorkload, schedules: Sequence[Schedule]
) -> list[float] | None:
    """Microseconds of schedules when they ran in turns, whatever the epilogue."""
    data = [schedule.to_json() for schedule in schedules]
    found = (timer.records.race(w.key(), data) for w in other_epilogues(workload))
    return next((times for times in found if times is not None), None)
