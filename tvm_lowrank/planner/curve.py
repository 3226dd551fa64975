"""The speed/accuracy curve of a network: choices of one candidate a layer, tried on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm_lowrank.data import DataSplit
from tvm_lowrank.metrics import Metric, Quality, divergence, judge
from tvm_lowrank.planner import allocate
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.expected import (
    Expected,
    counts_classes,
    drop_of,
    expected_drop,
    margins,
)
from tvm_lowrank.planner.refit import Refitter
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.planner.survey import Report

# Makes a choice whose factors are trained for a share of the time allowed.
Trainer = Callable[[Choice, float], Choice]

# Shares of the time for recovery that two choices get, and the drop over the budget up to which the
# first of them is sought, and the second if the first made up for nearly all of its drop.
_SHARES = (0.5, 0.5)
_HOPEFUL, _MOST_HOPEFUL = 3.0, 6.0
# Points tried at most, and of choices to be trained; the ratio of two times that are not worth
# telling apart, and the share of a limit that is as good as all of it.
_POINTS, _POINTS_TO_TRAIN = 7, 2
_SAME, _USED = 1.02, 0.9
# A guess goes so many times as far as what is known at most, and stays off the ends of its bracket
# by this share, the first by this factor; steps by which it is found.
_EXTRAPOLATED, _MARGIN, _NEAR, _HALVINGS = 4.0, 0.2, 1.01, 12
# What refitting must leave of how far the outputs move at most to be worth its time.
_WORTH = 0.9
# What a step back from a choice that misses the budget on other samples adds to its time, and how
# much longer each further step is.
_STEP, _LONGER = 0.06, 2.0


@dataclass(frozen=True, eq=False)
class Point:
    """A choice, the measured time of its kernels, and its quality on the selection samples.

    ``expected`` is what that quality lets expect on others, ``divergence`` how far the outputs
    moved on average.
    """

    choice: Choice
    microseconds: float
    quality: Quality
    expected: Expected
    divergence: float
    refitted: bool = False
    recovered: bool = False


class Curve:
    """Finds choices by the time they may take and tries them on a network whose weights are inputs.

    Parameters
    ----------
    segments : Segments
        Runs the network with the weights of choices.
    candidates : mapping
        For each layer what it may become, fastest first, the dense form last.
    dense : mapping
        The dense candidates of layers that may be refitted though no form changes them.
    sensitivity : mapping
        See `tvm_lowrank.planner.sensitivity`.
    split : DataSplit
        Factors are refitted on its ``fit`` samples, where that helps; choices are tried on its
        ``select`` samples.
    metric, max_drop
        The budget.
    train : callable, optional
        Recovers a choice.
    """

    def __init__(
        self,
        segments: Segments,
        candidates: Mapping[str, Sequence[Candidate]],
        dense: Mapping[str, Candidate],
        sensitivity: Mapping[str, float],
        split: DataSplit,
        metric: Metric,
        max_drop: float,
        seed: int,
        report: Report,
        train: Trainer | None = None,
    ) -> None:
        self.segments = segments
        self.candidates, self.dense, self.sensitivity = candidates, dense, sensitivity
        self.split, self.metric, self.max_drop = split, metric, max_drop
        self.seed = seed
        self.report, self.train = report, train
        options = {name: [candidate] for name, candidate in dense.items()}
        for name, found in candidates.items():
            options[name] = [*options.get(name, ()), *found]
        self.refitter = Refitter(segments, options, split.fit.inputs, seed)
        self.points: list[Point] = []
        self._step = _STEP
        # Whether refitting helps on these samples; None until it was tried.
        self._refits: bool | None = None
        self.original = segments.run(split.select.inputs)
        known, labels = counts_classes(metric, split.select.labels), split.fit.labels
        self._further = None
        if split.alike and known and (labels is not None or metric.name == "disagreement"):
            self._further = margins(segments.run(split.fit.inputs), labels, metric)
        self.fastest = sum(options[0].cost_us for options in candidates.values())
        self.slowest = sum(options[-1].cost_us for options in candidates.values())

    def search(self) -> Point | None:
        """The fastest point found that keeps the budget, or None.

        With recovery, choices are trained that miss the budget by so much as may be made up for.
        """
        self._seek(self.max_drop, _POINTS)
        if self.train is not None:
            self._recover(self.train)
        return min(self._kept(), key=_time, default=None)

    def _seek(self, limit: float, most: int) -> None:
        """Try choices until the fastest that promises to keep ``limit`` is found.

        A bracket of the time that the convolutions may take is narrowed to 2 %, or until hardly
        anything of the limit is left.
        """
        low, high = self._bracket(limit)
        end = len(self.points) + most
        while high > _SAME * low and len(self.points) < end:
            middle = self._guess(low, high, limit)
            choice = self._choice(middle)
            spent = allocate.microseconds(choice)
            point = self._tried(spent)
            if point is None and spent < self.slowest:
                point = self._try(choice)
            if point is None or point.expected.cautious <= limit:
                high = min(spent, middle)
                if point is not None and point.expected.cautious >= _USED * limit:
                    return
            else:
                low = middle

    def _bracket(self, limit: float) -> tuple[float, float]:
        """The fastest time known to keep a limit, or that of no form changed, after the slowest
        known not to, or the least time there is.
        """
        known = [p for p in self.points if not p.recovered]
        within = [p.microseconds for p in known if p.expected.cautious <= limit]
        high = min(within, default=self.slowest)
        beyond = [p.microseconds for p in known if p.expected.cautious > limit]
        return max((us for us in beyond if us < high), default=self.fastest), high

    def _guess(self, low: float, high: float, limit: float) -> float:
        """A time within a bracket at which the limit should be reached.

        At first where the sensitivities let expect it, if the metric counts classes. Then the drop
        is taken to grow with what the choice is expected to change (`_change`): along a line
        between the nearest points on either side, from the dense network on.
        """
        begin, end = self._bracket(limit)
        drops = {p.microseconds: p.expected.cautious for p in self.points if not p.recovered}
        foreseen, wanted = self._change, limit
        if drops:
            unchanged, kept = self._change(end), max(drops.get(end, 0.0), 0.0)
            if begin in drops:
                share = (limit - kept) / (drops[begin] - kept)
                wanted = unchanged + share * (self._change(begin) - unchanged)
            else:
                wanted = unchanged * min(limit / max(kept, 1e-9), _EXTRAPOLATED)
        elif counts_classes(self.metric, self.split.select.labels):
            foreseen = self._drop
        else:
            return math.sqrt(low * high)
        # Off the ends of the bracket; the dense network, one of the first, may be near.
        inner = (high / low) ** _MARGIN if drops else _NEAR
        fast, slow = low * inner, high / inner
        for _ in range(_HALVINGS):
            middle = math.sqrt(fast * slow)
            fast, slow = (middle, slow) if foreseen(middle) > wanted else (fast, middle)
        return slow

    def _divergence(self, microseconds: float) -> float:
        """How far the choice for a time is expected to move the outputs, by the sensitivities."""
        if microseconds >= self.slowest:
            return 0.0
        choice = self._choice(microseconds)
        return sum(c.error * self.sensitivity.get(n, 0.0) for n, c in choice.items())

    def _change(self, microseconds: float) -> float:
        """What the drop of the choice for a time should be proportional to.

        Samples that are lost less those that are won grow with the divergence; an error, or the
        share of samples that change at all, with its root.
        """
        moved = self._divergence(microseconds)
        return moved if self.metric.cancels else math.sqrt(moved)

    def _drop(self, microseconds: float) -> float:
        """What the choice for a time is expected to lose by the sensitivities; see `drop_of`."""
        moved = self._divergence(microseconds)
        return drop_of(moved, self.original, self.split.select.labels, self.metric, self.seed)

    def _recover(self, train: Trainer) -> None:
        """Train the fastest choice that is not hopelessly over the budget, then another.

        Which other the first tells: one that keeps the budget if as large a share of its drop is
        made up for.
        """
        limit, missed = _HOPEFUL * self.max_drop, 0.0
        for share in _SHARES:
            self._seek(limit, _POINTS_TO_TRAIN)
            best = min(self._kept(), key=_time, default=None)
            fastest = math.inf if best is None else best.microseconds
            trained = {p.microseconds for p in self.points if p.recovered}
            left = [p for p in self.points if p.microseconds not in trained]
            left = sorted((p for p in left if missed < p.microseconds < fastest), key=_time)
            hopeful = [p for p in left if p.expected.cautious <= limit] or left[-1:]
            if not hopeful:
                return
            before = hopeful[0]
            after = self.judge(train(before.choice, share), before.microseconds, recovered=True)
            missed = 0.0 if self.keeps(after) else after.microseconds
            remains = after.expected.cautious / max(before.expected.cautious, 1e-9)
            limit = self.max_drop / min(max(remains, 1 / _MOST_HOPEFUL), 1.0)

    def step_back(self, point: Point) -> Point | None:
        """A point that takes a little longer: tried before and within the budget, or a new one.

        Each call goes twice as far as the one before, but not beyond half of what is gained.
        """
        slower = [kept for kept in self._kept() if kept.microseconds > point.microseconds]
        nearest = min(slower, key=_time, default=None)
        limit = min((1 + self._step) * point.microseconds, (point.microseconds + self.slowest) / 2)
        self._step *= _LONGER
        # Where layers are few, no choice may be so near: then one with less of the gain.
        halves = [
            self.slowest - share * (self.slowest - point.microseconds) for share in (0.5, 0.25)
        ]
        for microseconds in (limit, *halves):
            if nearest is not None and nearest.microseconds <= microseconds:
                return nearest
            choice = self._choice(microseconds)
            spent = allocate.microseconds(choice)
            if point.microseconds < spent < self.slowest:
                found = self._tried(spent) or self._try(choice)
                return found if nearest is None or self.keeps(found) else nearest
        return nearest

    def keeps(self, point: Point) -> bool:
        """Whether the point promises to keep the budget."""
        return point.expected.cautious <= self.max_drop

    def judge(self, choice: Choice, microseconds: float, recovered: bool = False) -> Point:
        """A choice with its quality on the selection samples, kept as a point of the curve."""
        point = self._judged(choice, microseconds, recovered=recovered)
        self.points.append(point)
        return point

    def _judged(
        self, choice: Choice, microseconds: float, refitted: bool = False, recovered: bool = False
    ) -> Point:
        outputs = self.segments.run(self.split.select.inputs, weights_of(choice))
        labels = self.split.select.labels
        quality = judge(outputs, self.original, labels, self.metric)
        expected = expected_drop(
            outputs, self.original, labels, self.metric, quality, self._further
        )
        moved = divergence(outputs, self.original, self.metric.of_classes)
        return Point(choice, microseconds, quality, expected, moved, refitted, recovered)

    def to_json(self) -> tuple[dict[str, Any], ...]:
        """Every point, slowest first, as a plan keeps them."""
        return tuple(
            {
                "microseconds": point.microseconds,
                "dense_us": self.slowest,
                "drop": point.quality.drop,
                "expected_drop": point.expected.drop,
                "interval": None if (i := point.quality.interval) is None else list(i),
                "agreement": point.quality.agreement,
                "samples": point.quality.samples,
                "rewritten": sum(c.form != "dense" for c in point.choice.values()),
                "keeps": self.keeps(point),
                "refitted": point.refitted,
                "recovered": point.recovered,
            }
            for point in sorted(self.points, key=lambda point: -point.microseconds)
        )

    def _kept(self) -> list[Point]:
        return [p for p in self.points if self.keeps(p) and p.microseconds < self.slowest]

    def _choice(self, microseconds: float) -> Choice:
        return allocate.for_time(self.candidates, self.sensitivity, microseconds)

    def _tried(self, microseconds: float) -> Point | None:
        """The point of the choice for a time, untrained, if there is one."""
        same = (p for p in self.points if p.microseconds == microseconds and not p.recovered)
        return next(same, None)

    def _try(self, choice: Choice) -> Point:
        """A point for a choice, refitted if that helps.

        Where samples are few, fits in sequence follow their accidents, and what one layer makes up
        for costs the next as much. The first choice is judged both ways, and tells for all.
        """
        microseconds, plain = allocate.microseconds(choice), None
        whole = {**self.dense, **choice}
        if not self._refits:
            plain = self._judged(whole, microseconds)
        if self._refits is not False:
            point = self._refitted(whole, microseconds)
            if plain is not None:
                self._refits = point.divergence < _WORTH * plain.divergence
        if not self._refits:
            assert plain is not None
            point = plain
        self.points.append(point)
        return point

    def _refitted(self, choice: Choice, microseconds: float) -> Point:
        stage = f"refitting, point {len(self.points) + 1}"
        fitted = self.refitter.refit(choice, lambda done, total: self.report(stage, done, total))
        return self._judged(fitted, microseconds, refitted=True)


def _time(point: Point) -> float:
    return point.microseconds


def weights_of(choice: Choice) -> dict[str, tuple[Any, Any]]:
    """What `Segments.run` takes to compute what the choice computes."""
    return {name: (candidate.weight, candidate.bias) for name, candidate in choice.items()}
