"""Which stages of a chain of convolutions become one kernel, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.schedules.kernels import Schedule, algorithm_of
from tvm_lowrank.schedules.x86 import fused_space
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvWorkload


class ChainTimer:
    """Measures a chain's single kernels against kernels for its last stages, and for all.

    A chain that records of another machine cover is not measured. Stages that round are in a kernel
    for several only where the timer may take such.

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
        found = self.best(workload).fused
        if found is not None:
            self.chosen[workload] = found
        return found

    def best(self, workload: ChainWorkload) -> ChainSchedule:
        """The fastest kernels for a chain."""
        records, key = self.timer.records, workload.key()
        known = self._read(workload, records.elsewhere(key))
        if records.measured(key) or not self._is_complete(workload, known):
            self._measure(workload)
            known = self._read(workload, [schedule for schedule, _ in records.measured(key)])
        return known[0] if known else self._separate(workload)

    def _is_complete(self, workload: ChainWorkload, known: Sequence[ChainSchedule]) -> bool:
        """Whether schedules on record tell the best, those that round among them if they may be."""
        if not known or any(found.fused is not None and found.fused.rounds for found in known):
            return bool(known)
        return not self._space(workload, bfloat16=True)

    def _measure(self, workload: ChainWorkload) -> None:
        """Time all stages alone, the last two in their best kernel, and all in one."""
        measured = [found for found, _ in self.timer.records.measured(workload.key())]
        separate = self._separate(workload)
        known = [found for found in self._read(workload, measured) if found.is_separate]
        if not any(_algorithms(found) == _algorithms(separate) for found in known):
            self.timer.time(workload, separate)
        candidates = [*self._space(workload), *self._space(workload, bfloat16=True)]
        if len(workload.stages) > 2 and workload.last(2).is_promising():
            pair = self.best(workload.last(2))
            if not pair.is_separate:
                alone = separate.parts[:-2]
                candidates.append(ChainSchedule((*alone, *pair.parts)))
        for candidate in candidates:
            self.timer.time(workload, candidate)

    def _separate(self, workload: ChainWorkload) -> ChainSchedule:
        return ChainSchedule(tuple(self.timer.choose(stage) for stage in workload.stages))

    def _space(self, workload: ChainWorkload, bfloat16: bool = False) -> list[ChainSchedule]:
        threads = self.timer.records.threads
        space = fused_space.fused_space(workload, self.timer.isa, bfloat16, threads)
        return [
            ChainSchedule((schedule,))
            for schedule in space[: self.trials]
            if self._may_take(workload, schedule)
        ]

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
            if all(self._may_take(*part) for part in parts):
                found.append(schedule)
        return found

    def _may_take(
        self, workload: ConvWorkload | ChainWorkload, schedule: Schedule | FusedSchedule
    ) -> bool:
        if not isinstance(workload, ChainWorkload):
            return self.timer.usable.may_take(workload, schedule)
        if fused_space.is_legal(workload, schedule, self.timer.isa) is not None:
            return False
        stages = zip(workload.stages, schedule.stages, strict=True)
        return all(self.timer.usable.may_take(stage, tiles) for stage, tiles in stages)


def _algorithms(schedule: ChainSchedule) -> list[str]:
    return [algorithm_of(part) for part in schedule.parts if not isinstance(part, FusedSchedule)]


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
