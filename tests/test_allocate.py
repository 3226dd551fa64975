"""Choosing one candidate a layer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.planner.allocate import choose, for_time, microseconds, total_harm
from tvm_lowrank.planner.candidates import Candidate

GEOMETRY = ConvGeometry(1, 1, 1, 1, (1, 1))


def candidate(us, error):
    zero = np.zeros((1, 1, 1, 1), np.float32)
    form = "dense" if error == 0 else "separable"
    return Candidate(form, 0, (GEOMETRY,), (zero,), np.zeros(1), error, us, us)


options = st.lists(
    st.lists(
        st.tuples(st.floats(1, 50), st.floats(0.001, 0.5)).map(lambda p: candidate(*p)),
        min_size=1,
        max_size=4,
    ).map(lambda lossy: [*lossy, candidate(60.0, 0.0)]),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers=options, share=st.floats(0, 1))
def test_no_choice_within_the_time_does_less_harm(layers, share):
    """Against all choices there are; times that are whole steps apart may be rounded."""
    named = {f"conv{i}": c for i, c in enumerate(layers)}
    sensitivity = {name: 1.0 + i for i, name in enumerate(named)}
    fastest = sum(min(c.measured_us for c in candidates) for candidates in named.values())
    budget = fastest + share * (60.0 * len(named) - fastest)
    choice = for_time(named, sensitivity, budget)
    assert microseconds(choice) <= budget + 1e-6 or microseconds(choice) == pytest.approx(fastest)
    every = [dict(zip(named, each, strict=True)) for each in itertools.product(*named.values())]
    rounding = len(named) / 8192 * budget
    within = [other for other in every if microseconds(other) <= budget - rounding]
    least = min((total_harm(other, sensitivity) for other in within), default=np.inf)
    assert total_harm(choice, sensitivity) <= least + 1e-9


def test_gaps_between_the_choices_of_relaxation_are_filled():
    """The middle candidate is above the line between the others: no price ever makes it best."""
    named = {"a": [candidate(10, 0.4), candidate(35, 0.35), candidate(60, 0)]}
    prices = np.logspace(-9, 3, 200)
    assert {microseconds(choose(named, {"a": 1.0}, price)) for price in prices} == {10.0, 60.0}
    assert microseconds(for_time(named, {"a": 1.0}, 50.0)) == 35.0


def test_unlimited_time_leaves_everything_dense():
    named = {"a": [candidate(1, 0.1), candidate(60, 0)], "b": [candidate(2, 0.2), candidate(60, 0)]}
    choice = for_time(named, {"a": 1.0, "b": 1.0}, 1e9)
    assert all(c.form == "dense" for c in choice.values())


def test_every_price_is_between_the_extremes():
    named = {"a": [candidate(1, 0.4), candidate(30, 0.01), candidate(60, 0)]}
    times = [microseconds(choose(named, {"a": 1.0}, price)) for price in (0, 1e-3, 1e3)]
    assert all(a >= b for a, b in itertools.pairwise(times))
    assert times[0] == 60 and times[-1] == 1
