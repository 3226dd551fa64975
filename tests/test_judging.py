"""How races between built libraries are decided."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tvm_lowrank.planner.judging import Judge
from tvm_lowrank.planner.verify import Latency

PATHS = [Path(name) for name in ("original.so", "dense.so", "attempt.so")]


def judge(races, predicted=False):
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
    made, run = judge([(30.0, 25.0, 22.0)])
    assert [found.median_ms for found in made._contest(*PATHS, 0.98)] == [30.0, 25.0, 22.0]
    assert run == [PATHS]


@pytest.mark.parametrize("second", [(31.0, 26.0, 23.0), (29.0, 24.0, 27.0)])
def test_a_race_that_is_lost_is_run_again_and_the_lesser_times_count(second):
    first = (30.0, 25.0, 28.0)
    made, run = judge([first, second])
    found = [latency.median_ms for latency in made._contest(*PATHS, 0.98)]
    assert found == [min(pair) for pair in zip(first, second, strict=True)]
    assert run == [PATHS, PATHS]


def test_predicted_times_are_not_asked_for_twice():
    made, run = judge([(30.0, 25.0, 28.0)], predicted=True)
    assert made._contest(*PATHS, 0.98)[2].median_ms == 28.0
    assert len(run) == 1
