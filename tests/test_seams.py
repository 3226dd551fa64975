"""Chains on a GPU: maps between kernels of one layout are not turned."""

from __future__ import annotations

import itertools
import math

import pytest
from cuda_support import SM90
from hypothesis import given
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda import turn

from tvm_lowrank.cost.predicting import PredictingTimer
from tvm_lowrank.cost.seams import FIRST, Time, joined, kind_of, total, unturned
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

KINDS = (FIRST, turn.PLAIN, turn.TF32, turn.HALF)
STAGES = (
    ConvGeometry(64, 32, 14, 14, (1, 1), batch=32),
    ConvGeometry(32, 32, 14, 14, (3, 3), padding=(1, 1, 1, 1), batch=32),
    ConvGeometry(32, 64, 14, 14, (1, 1), batch=32),
)


@st.composite
def stages(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        times = {}
        for kind in draw(st.sets(st.sampled_from(KINDS), min_size=1)):
            alone = draw(st.floats(1, 100))
            turning = [0.0 if kind == FIRST else draw(st.floats(0, 50)) for _ in range(2)]
            times[kind] = Time(alone + sum(turning), *turning)
        found.append(times)
    return found


@given(stages())
def test_the_layouts_are_those_that_take_least_together(stages):
    def taken(kinds):
        us = sum(times[kind].us for times, kind in zip(stages, kinds, strict=True))
        for index, (one, other) in enumerate(itertools.pairwise(kinds)):
            if one == other != FIRST:
                us -= stages[index][one].writing + stages[index + 1][other].reading
        return us

    assert total(stages) == pytest.approx(min(map(taken, itertools.product(*stages))))


def test_a_chain_without_a_kernel_takes_for_ever():
    assert total([{FIRST: Time(1.0)}, {}]) == math.inf


@pytest.fixture
def timer():
    records = TuningRecords(None, "sm_90", 1, machine="a card")
    algorithms = ("direct", "half")
    return PredictingTimer(parse_target("cuda:sm_90"), records, 4, algorithms)


def test_times_on_record_tell_what_a_chain_saves(timer):
    workloads = timer.workloads(STAGES)
    spaces = [kernels.spaces(w, SM90, ("half",)) for w in workloads]
    last = [s for space in spaces for s in [next(iter(space["cuda_last_half"]))]]
    assert {kind_of(schedule) for schedule in last} == {turn.HALF}
    for workload, schedule in zip(workloads, last, strict=True):
        timer.records.add(workload.key(), schedule.to_json(), 30.0, alone=10.0)
    times = [[(30.0, schedule)] for schedule in last]
    # Of 20 us each that turn the maps of three kernels, those of the outermost two maps are left.
    first, end = workloads[0], workloads[-1]
    parts = [turn.predict((32, c, 14, 14), SM90, turn.HALF) for c in (64, 32, 32, 64)]
    shares = 20 * parts[0] / (parts[0] + parts[1]), 20 * parts[3] / (parts[2] + parts[3])
    assert joined(SM90, timer.records, workloads, times) == pytest.approx(30 + sum(shares))
    for alone in (first, end):
        assert joined(SM90, timer.records, [alone], times[:1]) == 30


def test_a_chain_takes_no_longer_than_its_stages_apart(timer):
    apart = [timer.chain([stage]) for stage in STAGES]
    assert timer.chain(STAGES) <= sum(apart)
    assert timer.chain(STAGES) > max(apart)
    assert timer.recorded(STAGES) == timer.chain(STAGES)
    assert timer.within(STAGES, 1.0) == timer.chain(STAGES)  # nothing guides it


def test_a_guide_expects_what_a_chain_saves(timer, monkeypatch):
    class Guide:
        def expected(self, workload, spaces):
            return [(30.0, next(iter(spaces["cuda_last_half"])))]

    monkeypatch.setattr(PredictingTimer, "guide", Guide())
    expected = timer.expected(STAGES)
    assert 30 < expected < 90
    assert timer.within(STAGES, expected / 2) == math.inf and timer.recorded(STAGES) is None
    assert timer.within(STAGES, expected) == timer.recorded(STAGES)


def test_turning_is_predicted_where_no_time_without_it_is_on_record(timer):
    workload, records = timer.workloads(STAGES)[1], timer.records
    schedule = next(iter(kernels.spaces(workload, SM90, ("half",))["cuda_last_half"]))
    turning = turn.of_convolution(workload, SM90, turn.HALF)
    for us, own in ((3 * turning, 2 * turning), (turning, 0.1 * turning)):
        assert unturned(SM90, records, workload, schedule, us) == pytest.approx(own)
    records.add(workload.key(), schedule.to_json(), 3 * turning, alone=1.5 * turning)
    known = unturned(SM90, records, workload, schedule, 3 * turning)
    assert known == pytest.approx(1.5 * turning, abs=1e-3)  # a record keeps three decimals
