"""The search along the curve, on a network that is made up: its drop is known for every choice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tvm_lowrank.data import DataSplit, Samples
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.metrics import Metric
from tvm_lowrank.planner import allocate
from tvm_lowrank.planner import curve as module
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.curve import Curve

GEOMETRY = ConvGeometry(1, 2, 1, 1, (1, 1))
SAMPLES = 4000


def candidate(form, us, error):
    weight = np.full((2, 1, 1, 1), error / 2, np.float32)
    return Candidate(form, 0, (GEOMETRY,), (weight,), np.zeros(2), error, us, us)


class Trial:
    """Gets a share of the samples wrong: the sum of the weights it is given."""

    def run(self, inputs, weights=None):
        wrong = sum(float(w.sum()) for w, _ in (weights or {}).values())
        outputs = np.tile(np.float32([1, 0]), (len(inputs), 1))
        outputs[: round(wrong * len(inputs))] = [0, 1]
        return outputs


@pytest.fixture
def made(monkeypatch):
    """A curve of eight layers, each as it is or, faster, with 1 % of the samples wrong."""

    fits = SimpleNamespace(refit=lambda choice, report: choice, calls=0)

    def refit(choice, report):
        fits.calls += 1
        return fits.refit(choice, report)

    counted = SimpleNamespace(refit=refit)
    monkeypatch.setattr(module, "Refitter", lambda *_: counted)
    # "dense" keeps the candidate's weight as it is: no form has to reconstruct it.
    samples = Samples(np.zeros((SAMPLES, 1)), np.zeros(SAMPLES, int))
    options = {
        f"conv{i}": [candidate("dense", 50.0 - i, 0.01), candidate("dense", 100.0 + i, 0.0)]
        for i in range(8)
    }
    split = DataSplit(samples, samples, samples)

    def make(max_drop, train=None):
        return Curve(
            Trial(), options, {}, dict.fromkeys(options, 1.0), split,
            Metric("top1"), max_drop, 0, lambda *step: None, train,
        )  # fmt: skip

    make.fits = fits
    return make


def test_the_fastest_choice_within_the_budget_is_found(made):
    curve = made(3.3)
    found = curve.search()
    # Three layers lose 3 points; a fourth would be over, half a standard error included.
    assert found.quality.drop == pytest.approx(3.0, abs=0.05)
    assert len(curve.points) <= 7
    just = found.microseconds - 1.0
    faster = curve.judge(allocate.for_time(curve.candidates, curve.sensitivity, just), just)
    assert not curve.keeps(faster)
    times = [point["microseconds"] for point in curve.to_json()]
    assert times == sorted(times, reverse=True)
    assert {point["keeps"] for point in curve.to_json()} == {True, False}


def test_refits_that_do_not_help_are_left_out(made):
    """The first choice is judged with and without, the others without; here a refit does harm."""
    made.fits.refit = lambda choice, report: worse(choice)
    curve = made(3.3)
    found = curve.search()
    assert made.fits.calls == 1 and len(curve.points) > 1
    assert found.quality.drop == pytest.approx(3.0, abs=0.05)
    assert not any(point["refitted"] for point in curve.to_json())


def test_refits_that_help_are_kept(made):
    made.fits.refit = lambda choice, report: halved(choice, 1.0)
    curve = made(2.2)
    found = curve.search()
    assert made.fits.calls == len(curve.points)
    # Four layers lose 4 points as they are, 2 refitted.
    assert found.refitted and found.quality.drop == pytest.approx(2.0, abs=0.05)


def test_nothing_within_the_budget_is_none(made):
    assert made(0.2).search() is None


def test_a_step_back_takes_what_was_tried(made):
    curve = made(3.3)
    found, tried = curve.search(), len(curve.points)
    slower = curve.step_back(found)
    assert slower.microseconds > found.microseconds and curve.keeps(slower)
    kept = [p.microseconds for p in curve.points if curve.keeps(p)]
    if any(us > found.microseconds for us in kept[:tried]):
        assert slower.microseconds == min(us for us in kept if us > found.microseconds)


def of_one_layer(curve):
    """Leaves a curve one layer, of 100 us; its faster choices: 40 us at 2 %, 60 at 1 %."""
    curve.candidates = {
        "conv0": [
            candidate("dense", 40.0, 0.02),
            candidate("dense", 60.0, 0.01),
            candidate("dense", 100.0, 0.0),
        ]
    }
    curve.slowest = 100.0
    return [{"conv0": each} for each in curve.candidates["conv0"][:2]]


def test_a_step_back_goes_no_further_than_what_was_tried(made):
    """Where no choice is near enough, one that kept the budget comes before half of the gain."""
    curve = made(3.3)
    fast, kept = of_one_layer(curve)
    tried = [curve.judge(choice, us) for choice, us in ((fast, 40.0), (kept, 60.0))]
    assert curve.step_back(tried[0]) is tried[1]
    assert len(curve.points) == 2


def test_a_step_back_tries_nothing_twice(made):
    """What a trained choice falls back to may have been tried before it was trained."""
    curve = made(0.5)
    fast, slower = of_one_layer(curve)
    tried = curve.judge(slower, 60.0)
    trained = curve.judge(fast, 40.0, recovered=True)
    assert not curve.keeps(tried)
    assert curve.step_back(trained) is tried
    assert curve.points == [tried, trained]


def scaled(choice, factor):
    return {
        name: candidate("dense", c.measured_us, factor * float(c.factors[0].sum()))
        for name, c in choice.items()
    }


def halved(choice, share):
    """Training that takes away half of what is wrong."""
    return scaled(choice, 0.5)


def worse(choice):
    return scaled(choice, 1.2)


def test_trained_choices_are_points_that_have_to_keep_the_budget(made):
    shares = []

    def train(choice, share):
        shares.append(share)
        return halved(choice, share)

    curve = made(2.2, train)
    found, alone = curve.search(), made(2.2).search()
    assert sum(shares) == pytest.approx(1.0) and len(shares) == 2
    assert found.recovered and found.microseconds < alone.microseconds
    assert curve.keeps(found)
    assert [point["recovered"] for point in curve.to_json()].count(True) == 2


def test_training_in_vain_is_dropped(made):
    curve = made(2.2, lambda choice, share: choice)
    found = curve.search()
    assert not found.recovered and found.microseconds == made(2.2).search().microseconds
    trained = [point for point in curve.points if point.recovered]
    # The second choice trained is slower than the first, which missed the budget.
    assert trained[1].microseconds > trained[0].microseconds


def test_steps_back_are_slower_each_time_and_end(made):
    curve, times = made(3.3), []
    point = curve.search()
    while point is not None and len(times) < 10:
        times.append(point.microseconds)
        point = curve.step_back(point)
    assert point is None and len(times) > 1
    assert times == sorted(set(times)) and times[-1] < curve.slowest
