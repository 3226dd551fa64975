"""Times relative to a kernel that is always the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_lowrank.cost import pace
from tvm_lowrank.cost.pace import Pacer, paced


class Machine:
    """``slower`` says, turn by turn, how many times as long as usual everything takes."""

    def __init__(self, slower, usual=1.0):
        self.slower, self.usual, self.turns = iter(slower), usual, 0
        self.pacer = Pacer(lambda: 1e-3 * self.usual)
        self.pacer._measure = lambda: 1e-3 * self.turn()

    def turn(self):
        self.turns += 1
        return next(self.slower)

    def kernel(self, *us):
        """Takes the one after the other of these microseconds, as slow as everything else."""
        series = iter(us)
        return lambda: 1e-6 * next(series) * self.turn()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(pace, "_PAUSE", 0.0)


@pytest.mark.parametrize(
    ("us", "found", "spread", "apart"),
    [
        ((4.0, 4.2), 4.1, 0.05, 0.05),
        ((4.2, 4.0), 4.1, 0.05, 0.05),
        ((4.0, 5.0, 4.1), 4.1, 0.025, 0.25),
        ((4.0, 5.0, 9.0), 5.0, 0.25, 1.25),
    ],
)
def test_a_third_time_is_taken_where_two_disagree(us, found, spread, apart):
    machine = Machine(itertools.repeat(1.0))
    wanted = {"us": found, "pace": 1000.0, "spread": spread, "apart": apart}
    assert paced(machine.kernel(*us), machine.pacer) == pytest.approx(wanted)
    assert machine.turns == 2 * len(us) + 1


def test_a_machine_that_gets_slower_little_by_little_changes_no_time():
    machine = Machine(1 + 0.01 * turn for turn in range(100))
    found = paced(machine.kernel(4.0, 4.0), machine.pacer)
    # The pacer's nearer time is the one before, a hundredth faster.
    assert found["us"] == pytest.approx(4.0, rel=0.011) and found["pace"] == 1000.0


def test_a_slow_moment_is_waited_for():
    machine = Machine(itertools.chain([1.5] * 20, itertools.repeat(1.0)))
    found = paced(machine.kernel(4.0, 4.0), machine.pacer)
    assert found == pytest.approx({"us": 4.0, "pace": 1000.0, "spread": 0.0, "apart": 0.0})
    assert machine.turns == 20 + 5


def test_what_was_measured_in_a_slow_moment_does_not_count():
    # Before and after the first minimum the pacer is slow, which the kernel is not.
    machine = Machine(itertools.chain([1.5, 1.0, 1.5], itertools.repeat(1.0)))
    machine.pacer.settled = lambda _: machine.pacer.look()
    found = paced(machine.kernel(4.0, 4.0, 4.2), machine.pacer)
    assert found["us"] == pytest.approx(4.1) and found["apart"] == pytest.approx(0.05)


def test_a_machine_that_stays_slow_is_measured_all_the_same(monkeypatch):
    monkeypatch.setattr(pace, "_PATIENCE", 0.0)
    machine = Machine(itertools.repeat(2.0), usual=1.0)
    found = paced(machine.kernel(4.0, 4.4, 4.1), machine.pacer)
    assert found["us"] == pytest.approx(8.2) and found["pace"] == 2000.0
    # In the end that is what is usual.
    for _ in range(31):
        machine.pacer.settled(0.0)
    assert machine.pacer.is_calm(2e-3) and not machine.pacer.is_calm(2.3e-3)


def test_the_least_time_is_found():
    machine = Machine(itertools.cycle([1.3, 1.1, 1.2]))
    assert machine.pacer.least(0.01) == pytest.approx(1.1e-3)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 5.0), st.floats(1.0, 1e4))
def test_times_are_those_of_the_stated_pace(factor, us):
    machine = Machine(itertools.repeat(factor), usual=factor)
    found = paced(machine.kernel(us, us), machine.pacer)
    assert found["us"] / found["pace"] == pytest.approx(us / 1000.0)
