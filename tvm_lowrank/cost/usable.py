"""Which schedules a convolution may take, of its kernels' spaces and of what is on record."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from tvm_lowrank.cost.alike import other_batches, other_epilogues
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import (
    FAMILIES,
    REDUCED,
    Schedule,
    algorithm_of,
    emit,
    is_exact,
    schedule_from_json,
    spaces,
)
from tvm_lowrank.schedules.x86.workload import ConvWorkload


class Usable:
    """The schedules that may be taken for convolutions on one machine.

    Records may hold others: of algorithms that are not allowed, or of kernels that another version
    of the package had.

    Parameters
    ----------
    isa : Machine
    records : TuningRecords
    algorithms : collection of str
        Families to choose among; a convolution that none of them can compute takes any.
    exact : bool
        Leave out kernels whose stated error exceeds `kernels.EXACT`.
    """

    def __init__(
        self, isa: Machine, records: TuningRecords, algorithms: Collection[str], exact: bool
    ) -> None:
        self.isa = isa
        self.records = records
        self.algorithms = tuple(algorithms)
        self.exact = exact
        self._known: dict[tuple[str, str], Schedule | None] = {}

    def allowed(self, workload: ConvWorkload) -> dict[str, list[Any]]:
        """The schedules of each family of the allowed algorithms; empty where none computes it."""
        return spaces(workload, self.isa, self.algorithms, self.exact)

    def spaces(self, workload: ConvWorkload) -> dict[str, list[Any]]:
        """The allowed families, or all of them where none of those can compute the workload."""
        return self.allowed(workload) or spaces(workload, self.isa)

    def best(self, workload: ConvWorkload) -> tuple[float, Schedule | None]:
        """Microseconds of the fastest schedule measured here, infinite without one, and it."""
        for data, microseconds in self.records.measured(workload.key()):
            schedule = self._usable(workload, data)
            if schedule is not None:
                return microseconds, schedule
        return math.inf, None

    def measured(self, workload: ConvWorkload) -> list[tuple[float, Schedule]]:
        """Microseconds here and schedule of all that ran, whatever the epilogue, fastest first."""
        found: dict[Schedule, float] = {}
        for other in other_epilogues(workload):
            for data, microseconds in self.records.measured(other.key()):
                schedule = self._usable(other, data)
                if schedule is not None:
                    found[schedule] = min(microseconds, found.get(schedule, math.inf))
        return sorted(((us, s) for s, us in found.items()), key=lambda pair: pair[0])

    def elsewhere(self, workload: ConvWorkload) -> Schedule | None:
        """What was found best on other machines, or for another batch.

        None where an algorithm that rounds is asked for and was not tried there: it may be better.
        """
        if self._untried(workload, self._best_elsewhere(workload)):
            return None
        usable = (self._usable(workload, data) for data in self._best_elsewhere(workload))
        return next(filter(None, usable), None)

    def is_complete(self, workload: ConvWorkload) -> bool:
        """Whether all algorithms that round and are asked for were tried, here or elsewhere."""
        here = (data for data, _ in self.records.measured(workload.key()))
        return not self._untried(workload, chain(here, self._best_elsewhere(workload)))

    def may_take(self, workload: ConvWorkload, schedule: Schedule) -> bool:
        """Whether a legal schedule is among those that may be taken for a workload."""
        return self._is_allowed(workload, schedule) or not self.allowed(workload)

    def _untried(self, workload: ConvWorkload, schedules: Iterable[Mapping[str, Any]]) -> set[str]:
        """The algorithms that round, are asked for, have kernels, and none of the schedules."""
        if not any(name in self.algorithms for name in REDUCED):
            return set()
        asked = {FAMILIES[family].algorithm for family in self.allowed(workload)} & {*REDUCED}
        known = (FAMILIES.get(str(data.get("kernel"))) for data in schedules)
        return asked - {family.algorithm for family in known if family is not None}

    def _best_elsewhere(self, workload: ConvWorkload) -> Iterator[Mapping[str, Any]]:
        yield from self.records.elsewhere(workload.key())
        if isinstance(self.isa, CudaArch):
            return  # how blocks are best cut depends on how many there are
        for other in other_batches(workload):
            yield from [data for data, _ in self.records.measured(other.key())]
            yield from self.records.elsewhere(other.key())

    def _usable(self, workload: ConvWorkload, data: Mapping[str, Any]) -> Schedule | None:
        """A schedule of the records, or None: not allowed, or not of this version's kernels."""
        key = (workload.key(), json.dumps(data, sort_keys=True))
        if key not in self._known:
            try:
                schedule = schedule_from_json(data)
                emit(workload, schedule, self.isa)
            except (ValueError, TypeError, KeyError):
                schedule = None
            self._known[key] = schedule
        schedule = self._known[key]
        if schedule is None or not self.may_take(workload, schedule):
            return None
        return schedule

    def _is_allowed(self, workload: ConvWorkload, schedule: Schedule) -> bool:
        if self.exact and not is_exact(workload, schedule):
            return False
        return algorithm_of(schedule) in self.algorithms
