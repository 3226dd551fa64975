"""Operators that have no kernel here: TVM's loops for them, shared among the threads."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import ForKind

# Iterations of a block that are worth starting the other threads for, and tasks that are enough for
# any number of threads.
_LEAST_WORK = 1 << 15
_TASKS = 128


def share_loops(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same function with the outer loops of its large blocks run by all threads.

    What is scheduled already, by MetaSchedule for example, stays as it is, and so does what has
    shapes that are not known, or no blocks.
    """
    try:
        schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
        loops = [schedule.get(loop) for block in blocks for loop in schedule.get_loops(block)]
        if any(loop.kind != ForKind.SERIAL for loop in loops):
            return func
        for block in blocks:
            _share(schedule, block)
        shared = schedule.mod["main"]
    except (s_tir.ScheduleError, RuntimeError, ValueError, AttributeError):
        return func
    return shared


def _share(schedule: s_tir.Schedule, block: Any) -> None:
    loops, variables = schedule.get_loops(block), schedule.get(block).iter_vars
    extents = [_extent(schedule.get(loop).extent) for loop in loops]
    if None in extents or len(variables) != len(loops):
        return
    sizes = [extent for extent in extents if extent is not None]
    if math.prod(sizes) < _LEAST_WORK:
        return
    # Loops over independent values come before those of a reduction.
    outer, tasks = [], 1
    for loop, size, variable in zip(loops, sizes, variables, strict=True):
        if tasks >= _TASKS or variable.iter_type != tirx.IterVar.DataPar:
            break
        outer.append(loop)
        tasks *= size
    if tasks > 1:
        schedule.parallel(schedule.fuse(*outer))


def _extent(extent: Any) -> int | None:
    return int(extent) if isinstance(extent, tirx.IntImm) else None
