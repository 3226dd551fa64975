"""The speed/accuracy curve of a network: choices of one candidate a layer, tried on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_lowrank.data import DataSplit
from tvm_lowrank.metrics import Quality, judge
from tvm_lowrank.planner import allocate
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import sensitivities
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.refit import refit
from tvm_lowrank.planner.survey import Report
from tvm_lowrank.planner.trial import TrialNetwork

# Samples on which sensitivities are taken, and points of the curve that are tried with factors as
# they were fitted layer by layer and with factors refitted in sequence.
_PROBE_SAMPLES = 64
_POINTS = 8
_REFIT_POINTS = 4


@dataclass(frozen=True)
class Point:
    """A choice, the measured time of its kernels, and its quality on the selection samples."""

    choice: Choice
    microseconds: float
    quality: Quality


class Curve:
    """Finds choices by the time they may take and tries them on a network whose weights are inputs.

    Parameters
    ----------
    trial, observer : TrialNetwork
        The network, the second with exposed convolution inputs.
    candidates : mapping
        For each layer what it may become, fastest first, the dense form last.
    split : DataSplit
        Factors are refitted on its ``fit`` samples, choices tried on its ``select`` samples.
    metric, max_drop
        The budget.
    """

    def __init__(
        self,
        trial: TrialNetwork,
        observer: TrialNetwork,
        candidates: Mapping[str, Sequence[Candidate]],
        split: DataSplit,
        metric: str,
        max_drop: float,
        seed: int,
        report: Report,
    ) -> None:
        self.trial, self.observer = trial, observer
        self.candidates, self.split = candidates, split
        self.metric, self.max_drop, self.seed, self.report = metric, max_drop, seed, report
        self.points: list[Point] = []
        self.original = trial.run(split.select.inputs)
        self.sensitivity = sensitivities(
            trial,
            candidates,
            split.select.inputs[:_PROBE_SAMPLES],
            self.original[:_PROBE_SAMPLES],
            metric != "output_error",
            lambda done: report("sensitivity of layers", done, len(candidates)),
        )
        self.fastest = sum(options[0].measured_us for options in candidates.values())
        self.slowest = sum(options[-1].measured_us for options in candidates.values())

    def search(self) -> Point | None:
        """The fastest point found that keeps the budget, or None.

        First with factors as they were fitted, which costs one run of the network a point; then
        from the fastest of those towards faster ones with factors refitted in sequence.
        """
        within = self._bisect(self.slowest, _POINTS, refitted=False)
        self._bisect(within, _REFIT_POINTS, refitted=True)
        kept = [p for p in self.points if self._keeps(p) and p.microseconds < self.slowest]
        return min(kept, key=lambda point: point.microseconds, default=None)

    def step_back(self, point: Point) -> Point | None:
        """A refitted point that saves three quarters of the time, or less; None if none does."""
        for share in (0.75, 0.5, 0.25):
            budget = self.slowest - share * (self.slowest - point.microseconds)
            choice = allocate.for_time(self.candidates, self.sensitivity, budget)
            if point.microseconds < allocate.microseconds(choice) < self.slowest:
                return self._try(budget, refitted=True)
        return None

    def _bisect(self, high: float, steps: int, refitted: bool) -> float:
        """The least time in [fastest, high] found to keep the budget, or ``high``."""
        low = time = self.fastest
        for _ in range(steps):
            if self._keeps(self._try(time, refitted)):
                high = time
            else:
                low = time
            if high <= low:
                break
            time = (low + high) / 2
        return high

    def _keeps(self, point: Point) -> bool:
        return point.quality.cautious_drop <= self.max_drop

    def _try(self, microseconds: float, refitted: bool) -> Point:
        choice = allocate.for_time(self.candidates, self.sensitivity, microseconds)
        inputs = self.split.select.inputs
        if refitted:
            choice = refit(self.observer, choice, self.split.fit.inputs, self.seed)
        weights = {n: (c.weight, c.bias) for n, c in choice.items() if c.form != "dense"}
        outputs = self.trial.run(inputs, weights)
        quality = judge(outputs, self.original, self.split.select.labels, self.metric)
        point = Point(choice, allocate.microseconds(choice), quality)
        self.points.append(point)
        self.report("choosing", len(self.points), max(_POINTS + _REFIT_POINTS, len(self.points)))
        return point
