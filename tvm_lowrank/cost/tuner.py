"""Which schedule to measure next: a boosted-tree model of everything measured so far."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.cost.features import features
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Rows of records from which on the model is asked, and their growth until it is trained again.
_LEAST_ROWS = 32
_GROWTH = 1.15
# Schedules of each family that its own order picks before the model is asked.
_FIRST = 2
_TREES = {
    "objective": "reg:squarederror",
    "tree_method": "hist",
    "max_depth": 5,
    "eta": 0.15,
    "nthread": 1,
}
_ROUNDS = 60

Spaces = Mapping[str, Sequence[Any]]


class Tuner:
    """Proposes the schedules of a workload that are worth measuring, one after the other.

    The first few of each family come in the family's own order. The model then picks among the
    rest: gradient-boosted trees that predict the logarithm of a schedule's time over the mean of
    those measured for the same workload at the same place, so records of any machine teach it.

    Parameters
    ----------
    records : TuningRecords
    isa : Machine
    trials : int
        Schedules of a family to measure at most.
    seed : int
        Of the model; the same records and seed propose the same schedules.
    """

    def __init__(self, records: TuningRecords, isa: Machine, trials: int, seed: int = 0) -> None:
        self.records = records
        self.isa = isa
        self.trials = trials
        self.seed = seed
        self._model: Any = None
        self._names: list[str] = []
        self._trained_on = 0

    def propose(self, workload: ConvWorkload, allowed: Spaces) -> Any | None:
        """The schedule to measure next, or None when enough were.

        Parameters
        ----------
        workload : ConvWorkload
        allowed : dict
            Family to its schedules, most promising first.
        """
        key = workload.key()
        times = {
            family: {s: self.records.time(key, s.to_json()) for s in space}
            for family, space in allowed.items()
        }
        tried = {name: [t for t in of.values() if t is not None] for name, of in times.items()}
        first = min(_FIRST, (self.trials + 1) // 2)
        for family, space in allowed.items():
            if len(tried[family]) < min(first, len(space)):
                return next(s for s in space if times[family][s] is None)
        extra = sum(len(found) - first for found in tried.values() if len(found) > first)
        if extra >= self.trials - first:
            return None
        rest = [
            (schedule, position)
            for family, space in allowed.items()
            for position, schedule in enumerate(space)
            if times[family][schedule] is None and len(tried[family]) < self.trials
        ]
        if not rest:
            return None
        scores = self._scores(workload, times, rest)
        return rest[int(np.argmin(scores))][0]

    def _scores(
        self,
        workload: ConvWorkload,
        times: Mapping[str, Mapping[Any, float | None]],
        rest: Sequence[tuple[Any, int]],
    ) -> list[float]:
        """Predicted logarithms of times; the better a family did so far, the lower its own."""
        measured = [
            (schedule, position, math.log(time))
            for of in times.values()
            for position, (schedule, time) in enumerate(of.items())
            if time is not None and math.isfinite(time)
        ]
        self._train()
        pairs = [*((s, p) for s, p, _ in measured), *rest]
        if self._model is None:
            guesses = [0.01 * position for _, position in pairs]
        else:
            guesses = self._predict(
                [self._features(workload, s.to_json(), position) for s, position in pairs]
            )
        misses: dict[str, list[float]] = {}
        for (schedule, _, log_time), guess in zip(measured, guesses, strict=False):
            misses.setdefault(schedule.kernel, []).append(log_time - guess)
        offsets = {family: float(np.mean(values)) for family, values in misses.items()}
        return [
            guess + offsets.get(schedule.kernel, math.inf)
            for (schedule, _), guess in zip(rest, guesses[len(measured) :], strict=True)
        ]

    def _train(self) -> None:
        """Fit the trees again if there is enough that they have not seen."""
        count = len(self.records)
        if count < max(_LEAST_ROWS, _GROWTH * self._trained_on):
            return
        import xgboost

        groups: dict[tuple[Any, ...], list[tuple[dict[str, float], float]]] = {}
        for key, place, schedule, microseconds in self.records.rows():
            row = self._row(key, schedule)
            if row is not None:
                groups.setdefault((key, place), []).append((row, math.log(microseconds)))
        rows, targets = [], []
        for group in groups.values():
            mean = np.mean([log_time for _, log_time in group])
            rows += [row for row, _ in group]
            targets += [log_time - mean for _, log_time in group]
        self._trained_on = count
        if not rows:
            return
        self._names = sorted(set().union(*rows))
        data = xgboost.DMatrix(self._matrix(rows), np.array(targets))
        self._model = xgboost.train({**_TREES, "seed": self.seed}, data, _ROUNDS)

    def _predict(self, rows: list[dict[str, float]]) -> list[float]:
        import xgboost

        return [float(x) for x in self._model.predict(xgboost.DMatrix(self._matrix(rows)))]

    def _matrix(self, rows: Sequence[Mapping[str, float]]) -> np.ndarray:
        return np.array([[row.get(name, 0.0) for name in self._names] for row in rows], np.float32)

    def _features(
        self, workload: ConvWorkload, schedule: Mapping[str, Any], position: int
    ) -> dict[str, float]:
        return features(workload, schedule, position, self.isa.lanes, self.records.threads)

    def _row(self, key: str, schedule: dict[str, Any]) -> dict[str, float] | None:
        """Features of a record, or None if this version knows no such workload or schedule."""
        try:
            workload, positions = _positions(key, self.isa)
        except (ValueError, KeyError, TypeError):
            return None
        position = positions.get(_hashable(schedule))
        return None if position is None else self._features(workload, schedule, position)


@functools.lru_cache(maxsize=4096)
def _positions(key: str, isa: Machine) -> tuple[ConvWorkload, dict[Any, int]]:
    """A workload from its key, and the places of its schedules in their families' spaces."""
    workload = ConvWorkload.from_json(json.loads(key))
    return workload, {
        _hashable(schedule.to_json()): position
        for space in spaces(workload, isa).values()
        for position, schedule in enumerate(space)
    }


def _hashable(schedule: Mapping[str, Any]) -> Any:
    return tuple(sorted((name, str(value)) for name, value in schedule.items()))
