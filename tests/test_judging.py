"""How races between built libraries are decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tvm_lowrank.metrics import Metric
from tvm_lowrank.planner.judging import Judge
from tvm_lowrank.planner.verify import Latency

PATHS = [Path(name) for name in ("original.so", "dense.so", "attempt.so")]


def judge_of(races, predicted=False):
    """A judge whose races have these medians, and the list of those that were run."""
    left, run = iter(races), []

    def race(entries):
        run.append([path for _, path in entries])
        return [Latency(ms, ms, 1) for ms in next(left)]

    nothing: Any = None
    bench: Any = SimpleNamespace(predicted=predicted, race=race)
    plans: Any = dict.fromkeys(PATHS)
    made = Judge(nothing, nothing, (), bench, Path(), Path(), nothing, plans=plans)
    return made, run


def test_a_race_that_is_won_is_run_once():
    made, run = judge_of([(30.0, 25.0, 22.0)])
    assert [found.median_ms for found in made._contest(0.98, *PATHS)] == [30.0, 25.0, 22.0]
    assert run == [PATHS]


@pytest.mark.parametrize("second", [(31.0, 26.0, 23.0), (29.0, 24.0, 27.0)])
def test_a_race_that_is_lost_is_run_again_and_the_lesser_times_count(second):
    first = (30.0, 25.0, 28.0)
    made, run = judge_of([first, second])
    found = [latency.median_ms for latency in made._contest(0.98, *PATHS)]
    assert found == [min(pair) for pair in zip(first, second, strict=True)]
    assert run == [PATHS, PATHS]


def test_predicted_times_are_not_asked_for_twice():
    made, run = judge_of([(30.0, 25.0, 28.0)], predicted=True)
    assert made._contest(0.98, *PATHS)[2].median_ms == 28.0
    assert len(run) == 1


class Named(Judge):
    """A judge of plans that are (name, bytes, relative error of the outputs), and never built."""

    def _build(self, plan, path):
        self.plans[path] = plan
        return path

    def _outputs(self, path):
        return np.full((4, 2), 1.0 + self.plans[path].error)

    def _finish(self, plan, built, before, after, slow, fast):
        return plan.name, round(after.drop, 6), fast.median_ms


@dataclass
class Fake:
    name: str
    kernel_weight_bytes: int
    error: float
    transformed: bool = True
    reason: str = ""
    curve: tuple[Any, ...] = ()

    @property
    def schedules(self):
        return self.name

    def rounding(self):
        return []


def unchanged(races, most_bytes, error=0.0):
    """What a judge makes of direct kernels of 30 bytes, others of 20, and direct ones of 10."""
    plans = {
        ("plain", False): Fake("direct", 30, 0.0),
        ("timer", True): Fake("winograd", 20, error),
        ("plain", True): Fake("smaller", 10, 0.0),
    }
    made, run = judge_of(races)
    options = SimpleNamespace(max_drop=1.0, max_weight_bytes=most_bytes, lossless=True)
    survey = SimpleNamespace(options=options, plain="plain", timer="timer")
    assembler: Any = SimpleNamespace(
        survey=survey,
        metric=Metric("output_error"),
        plan=lambda _, timer="timer", bounded=True: plans[timer, bounded],
    )
    made.bench.prepare = lambda: None
    split: Any = SimpleNamespace(final=SimpleNamespace(labels=None))
    judge = Named(assembler, split, (), made.bench, Path(), Path(), made.report)
    return judge.conclude(None), len(run)


@pytest.mark.parametrize(
    ("races", "most_bytes", "error", "expected"),
    [
        ([(9.0, 5.0)], None, 0.0, (("winograd", 0.0, 5.0), 1)),
        ([(9.0, 9.5), (9.0, 6.0)], None, 0.0, (("winograd", 0.0, 6.0), 2)),
        ([(9.0, 9.5), (9.0, 9.3)], None, 0.0, (("direct", 0.0, 9.0), 2)),
        ([(9.0, 5.0)], None, 0.02, (("direct", 0.0, 9.0), 1)),
        ([(9.0, 9.5), (9.0, 9.3)], 30, 0.0, (("direct", 0.0, 9.0), 2)),
        ([(9.0, 9.5), (9.0, 9.3)], 29, 0.0, (("winograd", 0.0, 9.3), 2)),
        ([(9.0, 5.0)], 29, 0.005, (("winograd", 0.5, 5.0), 1)),
        ([(9.0, 5.0), (9.0, 12.0)], 29, 0.02, (("smaller", 0.0, 12.0), 2)),
    ],
)
def test_direct_kernels_are_returned_that_win_or_keep_the_budget_but_only_within_the_bytes(
    races, most_bytes, error, expected
):
    assert unchanged(races, most_bytes, error) == expected
