"""The benchmark of the cost model: what is regret, and what the paper's formula picks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import LARGE, SMALL, Place
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.report import svg

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import regret
import regret_page
import rules_of_thumb

PLACE = Place("chip", 2)
DIRECT = {"kernel": "direct", "tile": 7, "vectors": 2}


def winograd(size):
    return {"kernel": "winograd", "tile": [size, size], "rows": 4, "vectors": 2, "blocks": 1}


def fourier(size):
    return {"kernel": "fft", "tile": [size, size], "rows": 1, "vectors": 2, "blocks": 0}


def workload(kernel=3, size=32):
    pad = (kernel // 2,) * 4
    geometry = ConvGeometry(64, 64, size, size, (kernel, kernel), padding=pad)
    return ConvWorkload(geometry, 16, ("bias",))


def layer(*races):
    schedules = [DIRECT, winograd(2), {**winograd(2), "rows": 8}, winograd(4)]
    return regret.Layer(workload(), schedules, np.array([30.0, 15.0, 12.0, 10.0]), races)


@pytest.mark.parametrize(
    ("scores", "algorithm", "schedule"),
    [([9, 9, 9, 1], 0.0, 0.0), ([9, 1, 2, 9], 0.2, 0.5), ([1, 9, 9, 9], 2.0, 2.0)],
)
def test_regret_is_the_time_over_the_best(scores, algorithm, schedule):
    """An algorithm counts with its best schedule, a schedule with its own time."""
    assert layer().algorithm_regret(np.array(scores)) == pytest.approx(algorithm)
    assert layer().schedule_regret(np.array(scores)) == pytest.approx(schedule)


def test_algorithms_that_ran_in_turns_are_told_apart_by_that():
    raced = layer({"direct": 20.0, "winograd 2x2": 12.0, "winograd 4x4": 13.0})
    for scores, algorithm in (([9, 9, 9, 1], 1 / 12), ([9, 1, 2, 9], 0.0), ([1, 9, 9, 9], 2 / 3)):
        assert raced.algorithm_regret(np.array(scores)) == pytest.approx(algorithm)
    assert raced.schedule_regret(np.array([9, 1, 2, 9])) == pytest.approx(0.5)
    assert raced.race_regrets() == []


def test_of_several_races_the_least_times_judge_and_each_is_judged_by_the_others():
    calm = {"direct": 20.0, "winograd 2x2": 12.0, "winograd 4x4": 13.0}
    disturbed = {"direct": 21.0, "winograd 2x2": 15.0, "winograd 4x4": 12.5}
    raced = layer(calm, disturbed)
    assert raced.algorithm_regret(np.array([9, 9, 9, 1])) == pytest.approx(0.5 / 12)
    assert raced.race_regrets() == [pytest.approx(2.5 / 12.5), pytest.approx(1 / 12)]
    assert layer(calm, disturbed, calm).race_regrets() == [
        pytest.approx(0.0),
        pytest.approx(1 / 12),
        pytest.approx(0.0),
    ]


def test_the_error_of_a_network_is_that_of_its_picks():
    scores = {"learned": [np.array([90.0, 16.0, 18.0, 20.0])]}
    judged = regret.Judged("net", PLACE, [layer()], scores, [0])
    assert judged.network_error("learned") == pytest.approx(16 / 15 - 1)


def test_what_a_budget_of_measurements_loses():
    scores = {"learned": [np.array([90.0, 16.0, 18.0, 20.0])]}
    table = regret_page.budgets(
        [regret.Judged("net", PLACE, [layer()], scores, [0], 8, {"learned": (3, 0.1)})]
    )
    assert table[-1] == (
        "| net | 8 | 50% | 50.0% (12.5%) | 20.0% (25.0%) | 0.0% (50.0%) | 10.0% (37.5%) | - |"
    )


def test_a_network_is_judged_where_networks_of_its_size_were_timed(tmp_path):
    """By default at the one place there is."""
    wide = ConvGeometry(1024, 1024, 7, 7, (3, 3), padding=(1, 1, 1, 1))
    path = tmp_path / "records.jsonl"
    networks = {"narrow": {workload().geometry}, "wide": {wide}}
    for size, found in ((SMALL, [SMALL, SMALL]), (LARGE, [SMALL, LARGE])):
        here = TuningRecords(path, "avx512", 2, machine="chip", network=size)
        for geometry in (wide, workload().geometry):
            asked = ConvWorkload(geometry, 16, ("bias",))
            for schedule in one_of_each(asked):
                here.add(asked.key(), schedule, 10.0)
        records = TuningRecords(path, "avx512", 2, machine="chip")
        judged = regret._judge(records, AVX512, PLACE, networks, 0)
        assert [each.name for each in judged] == [*networks]
        assert [each.place.network for each in judged] == found


def one_of_each(asked):
    return {
        regret.algorithm_class(schedule.to_json()): schedule.to_json()
        for space in spaces(asked, AVX512).values()
        for schedule in space
    }.values()


def test_only_layers_measured_in_every_algorithm_are_judged():
    assert not layer().has_choice(AVX512)
    classes = one_of_each(workload())
    whole = regret.Layer(workload(), [*classes], np.ones(len(classes)))
    assert whole.has_choice(AVX512)


def test_the_papers_formula_knows_no_winograd_and_turns_to_fourier_for_large_kernels():
    schedules = [DIRECT, winograd(4), fourier(8), fourier(32)]
    picks = [int(np.argmin(rules_of_thumb.paper(workload(k), schedules))) for k in (3, 11)]
    assert picks[0] != 1 and picks[1] == 3
    assert np.isinf(rules_of_thumb.paper(workload(), schedules)[1])


def test_a_scatter_places_points_on_its_diagonal():
    parts = svg.scatter([(1.0, 1.0), (100.0, 100.0)], 10, 20, 100, "across", "up")
    circles = [part for part in parts if part.startswith("<circle")]
    assert 'cx="10.0" cy="120.0"' in circles[0] and 'cx="110.0" cy="20.0"' in circles[1]


def test_bars_are_as_long_as_their_values():
    parts = svg.bars({"a": {"x": 50.0, "y": 100.0}}, ("x", "y"), 0, 0, 200)
    widths = [part.split('width="')[1].split('"')[0] for part in parts if part.startswith("<rect")]
    assert widths == ["100.0", "200.0"]
