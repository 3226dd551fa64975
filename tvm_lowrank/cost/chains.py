"""Which stages of a chain of convolutions become one kernel, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86 import fused_space
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvWorkload


class ChainTimer:
    """Measures a chain's single kernels against kernels for its last stages, and for all.

    A chain that records of another machine cover is not measured.

    Parameters
    ----------
    timer : KernelTimer
        Measures, and knows the best schedule of each stage; its records remember.
    trials : int
        Fused schedules tried for each number of stages at most.

    Attributes
    ----------
    chosen : dict
        The schedules that `fuse` gave, by chain.
    """

    def __init__(self, timer: KernelTimer, trials: int) -> None:
        self.timer = timer
        self.trials = trials
        self.chosen: dict[ChainWorkload, FusedSchedule] = {}

    def fuse(self, workload: ChainWorkload) -> FusedSchedule | None:
        """The schedule of one kernel for the last stages of a chain, None if that gains nothing."""
        if "direct" not in self.timer.usable.algorithms:
            return None
        found = self.best(workload).fused
        if found is not None:
            self.chosen[workload] = found
        return found

    def best(self, workload: ChainWorkload) -> ChainSchedule:
        """The fastest kernels for a chain."""
        records, key = self.timer.records, workload.key()
        known = self._read(workload, records.elsewhere(key))
        if records.measured(key) or not known:
            self._measure(workload)
            known = self._read(workload, [schedule for schedule, _ in records.measured(key)])
        return known[0] if known else self._separate(workload)

    def _measure(self, workload: ChainWorkload) -> None:
        """Time all stages alone, the last two in their best kernel, and all in one."""
        measured = [found for found, _ in self.timer.records.measured(workload.key())]
        if not any(found.is_separate for found in self._read(workload, measured)):
            self.timer.time(workload, self._separate(workload))
        candidates = self._space(workload)
        if len(workload.stages) > 2 and workload.last(2).is_promising():
            pair = self.best(workload.last(2))
            if not pair.is_separate:
                alone = self._separate(workload).parts[:-2]
                candidates.append(ChainSchedule((*alone, *pair.parts)))
        for candidate in candidates:
            self.timer.time(workload, candidate)

    def _separate(self, workload: ChainWorkload) -> ChainSchedule:
        return ChainSchedule(tuple(self.timer.choose(stage) for stage in workload.stages))

    def _space(self, workload: ChainWorkload) -> list[ChainSchedule]:
        space = fused_space.fused_space(workload, self.timer.isa)[: self.trials]
        return [ChainSchedule((schedule,)) for schedule in space]

    def _read(
        self, workload: ChainWorkload, records: Sequence[Mapping[str, Any]]
    ) -> list[ChainSchedule]:
        """The schedules among records that this version has."""
        found = []
        for data in records:
            try:
                schedule = ChainSchedule.from_json(data)
                parts = schedule.split(workload)
            except (ValueError, KeyError, TypeError):
                continue
            if all(self._is_legal(*part) for part in parts):
                found.append(schedule)
        return found

    def _is_legal(
        self, workload: ConvWorkload | ChainWorkload, schedule: Schedule | FusedSchedule
    ) -> bool:
        if not isinstance(workload, ChainWorkload) or not isinstance(schedule, FusedSchedule):
            return True  # only a fused last part is taken from here
        return fused_space.is_legal(workload, schedule, self.timer.isa) is None


def choose_chains(
    mod: tvm.IRModule,
    choose: Callable[[ConvWorkload], Schedule],
    timer: KernelTimer,
    trials: int,
) -> dict[ChainWorkload, FusedSchedule]:
    """The chains of a normalised module that `LowerConvolutions` should fuse, and how.

    None on machines without such kernels.
    """
    if not isinstance(timer.isa, VectorISA):
        return {}
    chains = ChainTimer(timer, trials)
    survey(mod, timer.isa, choose, chains.fuse)
    return chains.chosen
