"""What is worth measuring, by a model that stays the same from one search to the next."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tvm_lowrank.cost.learned import LearnedModel, roofline_of, train
from tvm_lowrank.cost.model import AnalyticModel
from tvm_lowrank.cost.trees import Trees, find
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.shipped import shipped_records

# Predictions are good to about this factor (the 95th percentile of the regret of the algorithm).
MARGIN = 1.15
# A family whose best schedule is behind the best of all by more is not looked at any further.
PLAUSIBLE = 1.3
# Schedules of a family, in its own order, that are predicted at all: that takes time too. On a GPU
# all are: there the order says less, and compiling a candidate takes longer.
_CONSIDERED = 12


class Guide:
    """Picks the few kernels of a convolution, and the chains, that are worth measuring.

    The trees are those that every search on this instruction set begins with, and learn nothing
    from what a search measures. So a search that starts again from its own records comes to the
    same choices and measures nothing.

    Parameters
    ----------
    trees : Trees
    records : TuningRecords
        Name the machine, and hold its figures once they are measured.
    isa : Machine
    """

    def __init__(self, trees: Trees, records: TuningRecords, isa: Machine) -> None:
        self.trees = trees
        self.records = records
        self.isa = isa
        # What this machine takes over what is predicted, by the layers of `calibrate`.
        self._level = 1.0
        self._known: dict[tuple[Any, ...], dict[Any, float]] = {}

    def predictions(
        self, workload: ConvWorkload, allowed: Mapping[str, Sequence[Any]]
    ) -> dict[Any, float]:
        """Microseconds of the first schedules of each family for a workload, fastest first."""
        place = self.records.here
        roofline = roofline_of(self.records, self.isa, place)
        key = (workload, tuple(allowed), place, roofline)
        if key not in self._known:
            analytic = AnalyticModel(roofline, self.isa, place.threads)
            model = LearnedModel(self.trees, analytic, place)
            most = None if isinstance(self.isa, CudaArch) else _CONSIDERED
            schedules = [s for space in allowed.values() for s in space[:most]]
            self._known[key] = {s: us for us, s in model.ranked(workload, schedules)}
        return self._known[key]

    def next(
        self, workload: ConvWorkload, times: Mapping[str, Mapping[Any, float | None]], most: int
    ) -> Any | None:
        """The schedule to measure next, None when enough were.

        First the best predicted of each family that may hold the best of all; then, up to ``most``
        in all, what is predicted best in the light of what its family took so far.

        Parameters
        ----------
        workload : ConvWorkload
        times : dict
            Of each family, its schedules with their microseconds, infinite if they failed, None
            if they were not measured.
        most : int
        """
        predicted = self.predictions(workload, {family: [*of] for family, of in times.items()})
        known = {schedule: times[schedule.kernel][schedule] for schedule in predicted}
        rest = [schedule for schedule, us in known.items() if us is None]
        misses: dict[str, list[float]] = {}
        best: dict[str, float] = {}
        for s, us in known.items():
            if us is not None and math.isfinite(us):
                misses.setdefault(s.kernel, []).append(math.log(us / predicted[s]))
                best[s.kernel] = min(us, best.get(s.kernel, us))
        limit = PLAUSIBLE * next(iter(predicted.values()))
        for schedule in rest:
            if schedule.kernel not in best and predicted[schedule] <= limit:
                return schedule
        # What is far from the best was measured for something else, or proved wrong: it counts as
        # one look.
        near = {family for family, us in best.items() if us <= PLAUSIBLE * min(best.values())}
        looks = sum(len(found) if family in near else 1 for family, found in misses.items())
        left = [schedule for schedule in rest if schedule.kernel in near]
        if not best:  # nothing ran yet: whatever is left, also of what was not predicted
            untried = (s for of in times.values() for s, us in of.items() if us is None)
            return next(iter(rest), next(untried, None))
        if looks >= most or not left:
            return None
        offsets = {family: math.exp(statistics.fmean(misses[family])) for family in near}
        return min(left, key=lambda schedule: predicted[schedule] * offsets[schedule.kernel])

    def ahead(
        self, workload: ConvWorkload, times: Mapping[str, Mapping[Any, float | None]], most: int
    ) -> list[Any]:
        """The schedules that `next` will give if each takes what is predicted."""
        allowed = {family: [*of] for family, of in times.items()}
        predicted = self.predictions(workload, allowed)
        known = {family: dict(of) for family, of in times.items()}
        found: list[Any] = []
        schedule = self.next(workload, known, most)
        while schedule is not None and schedule in predicted:
            known[schedule.kernel][schedule] = predicted[schedule]
            found.append(schedule)
            schedule = self.next(workload, known, most)
        return found

    def calibrate(self, pairs: Sequence[tuple[float, float]]) -> None:
        """Learn this machine's level from predicted and measured microseconds of some layers."""
        ratios = [measured / predicted for predicted, measured in pairs]
        self._level = statistics.median(ratios) if ratios else 1.0

    def expected(
        self, workload: ConvWorkload, allowed: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[float, Any]]:
        """Microseconds that schedules of the workload should take here, fastest first."""
        for schedule, us in self.predictions(workload, allowed).items():
            yield self._level * us, schedule


def guide_for(records: TuningRecords, isa: Machine, shipped: bool = True) -> Guide | None:
    """The guide of an instruction set: by the model that ships for it, else by shipped records.

    None where neither ships, or ``shipped`` is false and there is no model.
    """
    trees, _ = find(None, isa)
    if trees is None and shipped:
        known = TuningRecords(None, isa.name, records.threads, shipped=shipped_records(isa.name))
        trees = train(known, isa)
    return None if trees is None else Guide(trees, records, isa)
