"""Boosted trees on the time of kernels: trained on records, kept as JSON, trained further."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.model import AnalyticModel, CostModel, features
from tvm_lowrank.cost.trees import FILE, Trees, expected, signature
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import Place
from tvm_lowrank.records import TuningRecords, schedule_text
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Fewer rows than this teach nothing; with so much more the trees grow, and when there are twice as
# many as at the last training from scratch, they are trained from scratch.
LEAST_ROWS = 32
_GROWTH = 0.15
_RENEWAL = 2.0
_ROUNDS, _MORE_ROUNDS = 200, 40
_TREES = {
    "objective": "reg:squarederror",
    "tree_method": "hist",
    # The mean of four trees a round, each of other rows and features: picks depend less on chance.
    "num_parallel_tree": 4,
    "max_depth": 4,
    "eta": 0.1,
    "subsample": 0.8,
    "colsample_bytree": 0.6,
    "min_child_weight": 2.0,
    "lambda": 5.0,
    "base_score": 0.0,
    "nthread": 1,
}
# Rows of a place that weigh as much as the belief that it is like all the others.
_PRIOR = 4.0
# Weight of rows of a machine whose figures are not on record: what it could do is a guess.
_DOUBT = 0.02
# A machine of which nothing is known, a thread.
_NOMINAL = Roofline(60.0, 10.0)
# Of a record: its workload, place, schedule and microseconds.
Row = tuple[str, Place, dict[str, Any], float]


class LearnedModel(CostModel):
    """The trees on one machine; see `CostModel`.

    A family of kernels that no record was of is counted, as `AnalyticModel` does; `predict` raises
    LowRankError for a known one with other fields.

    Attributes
    ----------
    rows : int
        Records of this very place that the trees were trained on.
    """

    def __init__(self, trees: Trees, analytic: AnalyticModel, place: Place | None = None) -> None:
        self.trees = trees
        self.analytic = analytic
        # What is shipped of this place calibrates it until it has measured itself.
        names = [str(place), str(place._replace(shipped=True))] if place else []
        known = next((name for name in names if name in trees.offsets), "")
        self._offset = trees.offsets.get(known, 0.0)
        self.rows = trees.counts.get(known, 0)

    def predict(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """See `CostModel.predict`."""
        offsets = np.full(len(schedules), self._offset)
        known = []
        for index, schedule in enumerate(schedules):
            fields = self.trees.families.get(schedule["kernel"])
            if fields is None:
                continue  # never seen: counted only
            if fields != sorted(schedule):
                raise LowRankError(
                    f"the cost model knows kernel {schedule['kernel']!r} with {fields}, not with "
                    f"{sorted(schedule)}; train it again with python -m tvm_lowrank.tune --survey"
                )
            known.append(index)
        if known:
            rows = [features(workload, schedules[index], self.analytic) for index in known]
            offsets[known] += _evaluate(self.trees, rows)
        return self.analytic.predict(workload, schedules) * np.exp(offsets)


def train(
    records: TuningRecords,
    isa: Machine,
    seed: int = 0,
    before: Trees | None = None,
    keep: Callable[[str, Place], bool] = lambda _key, _place: True,
) -> Trees | None:
    """Trees trained on all records of an instruction set, whatever machine measured them.

    Parameters
    ----------
    records : TuningRecords
    isa : Machine
    seed : int
        The same records and seed give the same trees.
    before : Trees, optional
        Returned as they are if there is not enough that they have not seen; else they grow, or are
        trained from scratch if records have doubled.
    keep : callable
        Which records to train on, by the key of their workload and their place.

    Returns
    -------
    Trees or None
        None if there are too few records.
    """
    import xgboost

    rows = _rows(records, isa, keep)
    counts = Counter(str(place) for _, _, place, _, _ in rows)
    seen = before.counts if before else {}
    fresh = sum(max(0, count - seen.get(place, 0)) for place, count in counts.items())
    if fresh < max(LEAST_ROWS, _GROWTH * before.rows if before else 0):
        return before
    models = _models(records, isa, {place for _, _, place, _, _ in rows})
    table = [
        features(workload, schedule, models[place]) for _, workload, place, schedule, _ in rows
    ]
    bases = [
        math.log(models[place].predict(workload, [schedule])[0])
        for _, workload, place, schedule, _ in rows
    ]
    targets = np.array([math.log(us) for *_, us in rows]) - np.array(bases)
    names, known = sorted(set().union(*table)), before
    if known is not None and (
        len(rows) >= _RENEWAL * known.first_rows or not {*known.names}.issuperset(names)
    ):
        known = None
    if known is not None:
        names = known.names
    # What is nearly the best of its workload has to be told apart, what is slow only to be known.
    best: dict[Any, float] = {}
    for key, _, place, _, us in rows:
        best[key, place] = min(us, best.get((key, place), math.inf))
    doubts = {place: 1.0 if machine.figures(records, isa, place) else _DOUBT for place in models}
    weights = np.array([doubts[place] * best[key, place] / us for key, _, place, _, us in rows])
    weights /= max(doubts.values())
    places = [str(place) for _, _, place, _, _ in rows]
    sure = np.array([doubts[place] == 1.0 for _, _, place, _, _ in rows])
    if known is None:
        offsets = _offsets(targets, places, sure)
    else:  # what the trees know of places stays; new ones are calibrated on what they predict
        rest = targets - _evaluate(known, table)
        offsets = {**_offsets(rest, places, sure), **known.offsets}
    data = xgboost.DMatrix(
        _matrix(table, names), targets - np.array([offsets[p] for p in places]), weight=weights
    )
    booster = xgboost.train(
        {**_TREES, "seed": seed},
        data,
        _ROUNDS if known is None else _MORE_ROUNDS,
        xgb_model=None if known is None else known.booster,
    )
    families = {} if known is None else dict(known.families)
    for _, _, _, schedule, _ in rows:
        families[schedule["kernel"]] = sorted(schedule)
    if known is None:
        return Trees(isa.name, names, families, offsets, counts, len(rows), len(rows), booster)
    counts = Counter({**known.counts, **counts})
    total = known.rows + fresh
    return Trees(isa.name, names, families, offsets, counts, total, known.first_rows, booster)


def renew(
    records: TuningRecords,
    isa: Machine,
    folder: Path | None,
    seed: int,
    before: Trees | None,
) -> Trees | None:
    """Train on what was measured since, and keep the trees in a folder if they are new.

    Trees that know not all kernels of this version are not kept: `Trees.load` would refuse them.
    """
    trees = train(records, isa, seed, before)
    if folder is None or trees is None or trees is before:
        return trees
    if trees.families == expected(isa, trees.families):
        trees.save(folder / FILE)
    return trees


def _rows(
    records: TuningRecords, isa: Machine, keep: Callable[[str, Place], bool]
) -> list[tuple[str, ConvWorkload, Place, dict[str, Any], float]]:
    """Records of single convolutions in this version's kernels, as their races settled them."""
    known, rows = signature(isa), []
    parsed: dict[str, ConvWorkload | None] = {}
    settled: dict[tuple[str, Place], dict[str, float]] = {}
    for key, place, schedule, us in records.rows():
        current = known.get(schedule.get("kernel", "")) == sorted(schedule)
        if not current or not keep(key, place):
            continue
        if key not in parsed:
            try:
                parsed[key] = ConvWorkload.from_json(json.loads(key))
            except (ValueError, KeyError, TypeError):
                parsed[key] = None
        workload = parsed[key]
        if workload is not None:
            if (key, place) not in settled:
                settled[key, place] = records.settled(key, place)
            us = settled[key, place].get(schedule_text(schedule), us)
            rows.append((key, workload, place, schedule, us))
    return rows


def _models(records: TuningRecords, isa: Machine, places: set[Place]) -> dict[Place, AnalyticModel]:
    """The analytic model of each place, with nominal figures where none are on record."""
    return {place: analytic_of(records, isa, place) for place in places}


def analytic_of(records: TuningRecords, isa: Machine, place: Place) -> AnalyticModel:
    """The analytic level for a place, by the figures of `roofline_of`."""
    return AnalyticModel(roofline_of(records, isa, place), isa, place.threads)


def roofline_of(records: TuningRecords, isa: Machine, place: Place) -> Roofline:
    """Figures on record of a place, or of a nominal machine of as many threads."""
    found = machine.figures(records, isa, place)
    return found or Roofline(_NOMINAL.gflops * place.threads * isa.lanes / 16, _NOMINAL.gigabytes)


def _offsets(targets: np.ndarray, places: Sequence[str], sure: np.ndarray) -> dict[str, float]:
    """The median of each place's targets, drawn to that of all where there are few; "" is all.

    Where some machines' figures are on record, all are those: only they say how far counts are off.
    """
    everywhere = float(np.median(targets[sure] if sure.any() else targets))
    offsets = {"": everywhere}
    for place in set(places):
        own = targets[[other == place for other in places]]
        share = len(own) / (len(own) + _PRIOR)
        offsets[place] = everywhere + share * (float(np.median(own)) - everywhere)
    return offsets


def _evaluate(trees: Trees, rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    import xgboost

    return np.asarray(trees.booster.predict(xgboost.DMatrix(_matrix(rows, trees.names))), float)


def _matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    return np.array([[row.get(name, 0.0) for name in names] for row in rows], np.float32)
