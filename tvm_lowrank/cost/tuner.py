"""Which schedule to measure next: a boosted-tree model of everything measured so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.cost.guide import Guide
from tvm_lowrank.cost.learned import LearnedModel, analytic_of, train
from tvm_lowrank.cost.model import CostModel
from tvm_lowrank.cost.trees import Trees
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Schedules of each family that its own order picks before the model is asked.
_FIRST = 2
# Records of this very place from which on the model alone picks what is measured.
TRUSTED_ROWS = 500

Spaces = Mapping[str, Sequence[Any]]


class Tuner:
    """Proposes the schedules of a workload that are worth measuring, one after the other.

    With a guide, what it picks: ``trials`` in all. Without one, the first few of each family come
    in the family's own order, and the cost model then picks among the rest: boosted trees that
    records of any machine teach. If it is to be trusted and knows enough of this place, it picks
    alone: half as many as a family would have been allowed, whatever the family.

    Parameters
    ----------
    records : TuningRecords
    isa : Machine
    trials : int
        Schedules of a workload to measure at most; of a family, without a guide.
    seed : int
        Of the model; the same records and seed propose the same schedules.
    trees : Trees, optional
        Trained before, on these or other records.
    trust : bool
        Let the model pick alone from `TRUSTED_ROWS` records of this place on.
    guide : Guide, optional
    """

    def __init__(
        self,
        records: TuningRecords,
        isa: Machine,
        trials: int,
        seed: int = 0,
        trees: Trees | None = None,
        trust: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self.records = records
        self.isa = isa
        self.trials = trials
        self.seed = seed
        self.trees = trees
        self.trust = trust
        self.guide = guide
        self._seen = 0

    @property
    def model(self) -> CostModel:
        """The cost model of this place: the trees, or operations and bytes without them."""
        place = self.records.here
        analytic = analytic_of(self.records, self.isa, place)
        return analytic if self.trees is None else LearnedModel(self.trees, analytic, place)

    def is_trusted(self) -> bool:
        """Whether the model is to pick alone and knows this place well enough."""
        model = self.model
        known = isinstance(model, LearnedModel) and model.rows >= TRUSTED_ROWS
        return self.trust and known

    def propose(self, workload: ConvWorkload, allowed: Spaces, brief: bool = False) -> Any | None:
        """The schedule to measure next, or None when enough were.

        Parameters
        ----------
        workload : ConvWorkload
        allowed : dict
            Family to its schedules, most promising first.
        brief : bool
            Let a guide measure half as many: for one of many convolutions that may be chosen.
        """
        times = self._times(workload, allowed)
        if self.is_trusted():
            return self._trusted(workload, times)
        if self.guide is not None:
            return self.guide.next(workload, times, self._most(brief))
        tried = {name: [t for t in of.values() if t is not None] for name, of in times.items()}
        first = min(_FIRST, (self.trials + 1) // 2)
        for family, space in allowed.items():
            if len(tried[family]) < min(first, len(space)):
                return next(s for s in space if times[family][s] is None)
        extra = sum(len(found) - first for found in tried.values() if len(found) > first)
        if extra >= self.trials - first:
            return None
        rest = [
            schedule
            for family, space in allowed.items()
            for schedule in space
            if times[family][schedule] is None and len(tried[family]) < self.trials
        ]
        if not rest:
            return None
        scores = self._scores(workload, times, rest)
        return rest[int(np.argmin(scores))]

    def ahead(self, workload: ConvWorkload, allowed: Spaces, brief: bool = False) -> list[Any]:
        """Schedules that `propose` will give, as far as a guide can tell; see there."""
        if self.is_trusted() or self.guide is None:
            return []
        return self.guide.ahead(workload, self._times(workload, allowed), self._most(brief))

    def _most(self, brief: bool) -> int:
        return (self.trials + 1) // 2 if brief else self.trials

    def _times(self, workload: ConvWorkload, allowed: Spaces) -> dict[str, dict[Any, float | None]]:
        """Of each family, its schedules with their microseconds here, None if not measured."""
        key = workload.key()
        return {
            family: {s: self.records.time(key, s.to_json()) for s in space}
            for family, space in allowed.items()
        }

    def _trusted(
        self, workload: ConvWorkload, times: Mapping[str, Mapping[Any, float | None]]
    ) -> Any | None:
        """The best predicted schedule that was not measured, if fewer were than are worth it."""
        known = {schedule: time for of in times.values() for schedule, time in of.items()}
        ran = [time for time in known.values() if time is not None and math.isfinite(time)]
        rest = [schedule for schedule, time in known.items() if time is None]
        if len(ran) >= (self.trials + 1) // 2 or not rest:
            return None
        return rest[self.model.pick(workload, [schedule.to_json() for schedule in rest])]

    def _scores(
        self,
        workload: ConvWorkload,
        times: Mapping[str, Mapping[Any, float | None]],
        rest: Sequence[Any],
    ) -> list[float]:
        """Predicted logarithms of times; the better a family did so far, the lower its own."""
        measured = [
            (schedule, math.log(time))
            for of in times.values()
            for schedule, time in of.items()
            if time is not None and math.isfinite(time)
        ]
        self._train()
        schedules = [*(schedule for schedule, _ in measured), *rest]
        model = self.model
        guesses = np.log(model.predict(workload, [schedule.to_json() for schedule in schedules]))
        misses: dict[str, list[float]] = {}
        for (schedule, log_time), guess in zip(measured, guesses, strict=False):
            misses.setdefault(schedule.kernel, []).append(log_time - guess)
        offsets = {family: float(np.mean(values)) for family, values in misses.items()}
        return [
            guess + offsets.get(schedule.kernel, math.inf)
            for schedule, guess in zip(rest, guesses[len(measured) :], strict=True)
        ]

    def _train(self) -> None:
        """Train the trees further if there is enough that they have not seen."""
        if len(self.records) >= 1.15 * self._seen:
            self._seen = len(self.records)
            self.trees = train(self.records, self.isa, self.seed, self.trees)
