"""Convolutions whose records serve each other."""

from __future__ import annotations

import math
from dataclasses import replace

from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Batches whose records serve another that has none.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def other_epilogues(workload: ConvWorkload) -> list[ConvWorkload]:
    """The workload and what differs from it in no more than the epilogue, its own first."""
    epilogues = dict.fromkeys((workload.epilogue, ("bias", "relu"), ()))
    return [ConvWorkload(workload.geometry, workload.in_block, epilogue) for epilogue in epilogues]


def other_batches(workload: ConvWorkload) -> list[ConvWorkload]:
    """The workload at other batches, the nearest first.

    A schedule says how one image is computed, and tasks of several images run in parallel as those
    of one do: what is best for a batch is good for another.
    """
    own = workload.geometry.batch
    batches = sorted({*_BATCHES} - {own}, key=lambda n: abs(math.log2(n / own)))
    return [
        replace(workload, geometry=replace(workload.geometry, batch=batch)) for batch in batches
    ]
