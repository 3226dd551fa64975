"""Splitting data and judging outputs: the plain parts of the planner."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_lowrank.data import Samples, split
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.metrics import (
    check_resolution,
    divergence,
    judge,
    paired_interval,
    resolution,
    wilson_interval,
)
from tvm_lowrank.planner import Options, search


@pytest.fixture(scope="module")
def mod(small):
    return load_model(small)


def numbered(count):
    """Samples that carry their number, and labels equal to it."""
    inputs = np.zeros((count, 3, 18, 18), np.float32)
    inputs += np.arange(count, dtype=np.float32)[:, None, None, None]
    return Samples(inputs, np.arange(count))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(count=st.integers(4, 60), seed=st.integers(0, 5))
def test_parts_are_disjoint_and_keep_their_labels(mod, count, seed):
    parts = split(mod, numbered(count), seed=seed)
    seen = [part.inputs[:, 0, 0, 0].astype(int) for part in (parts.fit, parts.select, parts.final)]
    for part, numbers in zip((parts.fit, parts.select, parts.final), seen, strict=True):
        assert len(part) >= 1 and np.array_equal(part.labels, numbers)
    assert sorted(np.concatenate(seen)) == list(range(count))
    again = split(mod, numbered(count), seed=seed)
    assert np.array_equal(again.fit.labels, parts.fit.labels)


def test_given_evaluation_data_is_used_whole_and_for_nothing_else(mod):
    parts = split(mod, numbered(20), numbered(7), seed=1)
    assert len(parts.final) == 7 and len(parts.fit) == len(parts.select) == 10
    assert not set(parts.fit.labels) & set(parts.select.labels)


def test_what_recovery_trains_on_neither_chooses_nor_judges(mod):
    whole = numbered(60)
    kept = split(mod, whole, spare=True)
    trained, final = kept.unlabelled[:, 0, 0, 0], kept.final.labels
    assert len(trained) == 20 + 10 and len(final) == 10
    assert not {*trained} & {*final, *kept.select.labels}
    # A few other inputs leave all that judged before.
    others = 1000 + numbered(5).inputs
    given = split(mod, whole, spare=True, unlabelled=others)
    assert np.array_equal(given.final.labels, split(mod, whole).final.labels)
    assert [*given.unlabelled[:, 0, 0, 0]] == [*given.fit.labels, *range(1000, 1005)]


@pytest.mark.parametrize("final", [None, numbered(7)])
def test_many_unlabelled_inputs_fit_and_leave_the_data_to_choose_and_judge(mod, final):
    whole, others = numbered(60), 1000 + numbered(600).inputs
    # What is judged on, or chosen by, is not fitted to even if it is given twice.
    known = whole.inputs[:9] if final is None else final.inputs
    parts = split(mod, whole, final, unlabelled=np.concatenate([others[:300], known, others[300:]]))
    assert not parts.alike and parts.fit.labels is None and len(parts.fit) == 512
    assert sorted(parts.unlabelled[:, 0, 0, 0]) == [*range(1000, 1600)]
    assert len(parts.select) == (30 if final is None else 60)
    assert len(parts.final) == (30 if final is None else 7)
    if final is None:
        assert sorted([*parts.select.labels, *parts.final.labels]) == [*range(60)]


def test_unlabelled_inputs_are_checked_and_refused_without_data(mod):
    with pytest.raises(LowRankError, match=r"unlabelled data .*shape"):
        split(mod, numbered(60), spare=True, unlabelled=np.zeros((5, 3, 4, 4), np.float32))
    with pytest.raises(LowRankError, match="unlabelled inputs fit factors"):
        search(mod, options=Options(recover=1.0), unlabelled=numbered(60).inputs)


def test_judging_counts_what_it_says():
    original = np.eye(4, dtype=np.float32)
    outputs = original.copy()
    outputs[0] = [0, 2, 0, 0]
    labels = np.array([0, 1, 2, 0])
    found = judge(outputs, original, labels, "top1")
    assert (found.accuracy, found.drop, found.agreement) == (50.0, 25.0, 75.0)
    assert judge(outputs, original, None, "disagreement").drop == 25.0
    error = judge(outputs, original, None, "output_error")
    assert error.drop == pytest.approx(100 * np.sqrt(5) / 2) and error.standard_error == 0
    low, high = paired_interval(1, 0, 4)
    assert found.standard_error == pytest.approx((high - low) / 2 / 1.96, rel=1e-3)


@pytest.mark.parametrize("metric", ["top1", "disagreement"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(samples=st.integers(4, 20000), share=st.floats(0.01, 0.99))
def test_a_refused_budget_is_accepted_with_what_the_message_asks_for(metric, samples, share):
    least = resolution(metric, samples)
    check_resolution(metric, least, samples)
    with pytest.raises(LowRankError) as refusal:
        check_resolution(metric, share * least, samples)
    enough = int(re.search(r"(\d+) evaluation samples, or", str(refusal.value)).group(1))
    check_resolution(metric, share * least, enough)


def test_the_resolution_of_a_thousand_samples():
    assert resolution("top1", 1000) == pytest.approx(0.277, abs=5e-4)
    assert resolution("disagreement", 1000) == pytest.approx(0.383, abs=5e-4)
    check_resolution("output_error", 0.0, 4)
    with pytest.raises(LowRankError, match=r"give max_drop of 0\.28 or more, or lossless"):
        check_resolution("top1", 0.0, 1000)


def test_intervals_cover_the_true_drop_as_often_as_they_say():
    rng, samples, lost, gained = np.random.default_rng(0), 300, 0.04, 0.02
    counts = rng.multinomial(samples, [lost, gained, 1 - lost - gained], size=3000)
    for interval, true in (
        (lambda row: paired_interval(row[0], row[1], samples), 100 * (lost - gained)),
        (lambda row: wilson_interval(row[0] + row[1], samples), 100 * (lost + gained)),
    ):
        bounds = np.array([interval(row) for row in counts])
        covered = ((bounds[:, 0] <= true) & (true <= bounds[:, 1])).mean()
        assert 0.935 < covered < 0.98


def test_intervals_say_something_where_nothing_changed():
    low, high = paired_interval(0, 0, 1000)
    assert low == pytest.approx(-high) and 0.1 < high < 0.4
    low, high = wilson_interval(0, 1000)
    assert low == pytest.approx(0) and high == pytest.approx(
        100 * 1.96**2 / (1000 + 1.96**2), rel=1e-3
    )
    assert paired_interval(1, 0, 1)[1] <= 100 and wilson_interval(1, 1)[1] <= 100
    outputs = np.eye(4, dtype=np.float32)
    labels = np.array([0, 1, 2, 0])
    turned = outputs[[1, 1, 2, 3]]
    assert judge(turned, outputs, labels, "top1").interval == paired_interval(1, 0, 4)
    assert judge(turned, outputs, None, "disagreement").interval == wilson_interval(1, 4)
    assert judge(turned, outputs, None, "output_error").interval is None


def test_divergence_of_logits_is_that_of_their_probabilities():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    expected = (p * np.log(p / q)).sum(1).mean()
    assert divergence(b, a, True) == pytest.approx(expected)
    assert divergence(q, p, True) == pytest.approx(expected)
    assert divergence(a, a, True) == pytest.approx(0)
    assert divergence(2 * a, a, False) == pytest.approx(1.0)
