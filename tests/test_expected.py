"""What a choice is expected to lose on other samples."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_lowrank.metrics import Metric, divergence, judge
from tvm_lowrank.planner.expected import drop_of, expected_drop, margins

TOP1 = Metric("top1")


def changed(rng, samples, spread=0.5, shift=0.0):
    """Scores of two classes before and after a change, and labels."""
    labels = rng.integers(0, 2, samples)
    margins = rng.normal(2.0, 1.5, samples)
    after = margins - shift + rng.normal(0.0, spread, samples)
    own = np.eye(2)[labels]
    return own * after[:, None], own * margins[:, None], labels


def expected(outputs, original, labels, metric=TOP1):
    quality = judge(outputs, original, labels, metric)
    return expected_drop(outputs, original, labels, metric, quality)


def test_it_is_true_on_average():
    rng = np.random.default_rng(0)
    truth = judge(*changed(rng, 400_000, shift=0.3), TOP1).drop
    drawn = [expected(*changed(rng, 256, shift=0.3)).drop for _ in range(200)]
    assert np.mean(drawn) == pytest.approx(truth, rel=0.1)


def test_margins_of_further_samples_make_it_steadier():
    """Of few samples the share near the border is a matter of luck; others of them tell it too."""
    rng, found = np.random.default_rng(0), {False: [], True: []}
    truth = judge(*changed(rng, 400_000, shift=0.3), TOP1).drop
    for _ in range(200):
        outputs, original, labels = changed(rng, 128, shift=0.3)
        quality = judge(outputs, original, labels, TOP1)
        _, other, theirs = changed(rng, 1024)
        for more in found:
            further = margins(other, theirs, TOP1) if more else None
            found[more].append(expected_drop(outputs, original, labels, TOP1, quality, further))
    drops = {more: [each.drop for each in each_drawn] for more, each_drawn in found.items()}
    assert np.mean(drops[True]) == pytest.approx(truth, rel=0.1)
    assert np.std(drops[True]) < 0.75 * np.std(drops[False])
    errors = {more: np.mean([each.standard_error for each in found[more]]) for more in found}
    assert errors[True] < errors[False]


def test_choices_of_like_error_differ_less_than_what_is_seen_of_them():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 256)
    own, margins = np.eye(2)[labels], rng.normal(3.0, 1.5, 256)
    original = own * margins[:, None]
    drawn = [own * (margins + rng.normal(-0.05, 0.3, 256))[:, None] for _ in range(200)]
    seen = np.std([judge(outputs, original, labels, TOP1).drop for outputs in drawn])
    assert np.std([expected(outputs, original, labels).drop for outputs in drawn]) < 0.7 * seen


@pytest.mark.parametrize("metric", [TOP1, Metric("disagreement")])
def test_a_network_that_did_not_change_loses_nothing(metric):
    _, original, labels = changed(np.random.default_rng(1), 100)
    found = expected(original, original, labels, metric)
    assert found.drop == found.standard_error == found.cautious == 0.0


def test_few_samples_are_each_others_neighbours():
    outputs, original, labels = changed(np.random.default_rng(2), 5, shift=1.0)
    before = (original.max(1) > 0) * 1.0
    margins = original[np.arange(5), labels]
    changes = outputs[np.arange(5), labels] - margins
    every = (margins[:, None] + changes[None, :] > 0).mean(1)
    assert expected(outputs, original, labels).drop == pytest.approx(100 * (before - every).mean())


def test_probabilities_are_judged_as_scores_are():
    outputs, original, labels = changed(np.random.default_rng(3), 300, shift=0.5)
    soft = [np.exp(y) / np.exp(y).sum(1, keepdims=True) for y in (outputs, original)]
    assert expected(*soft, labels).drop == pytest.approx(expected(outputs, original, labels).drop)


def test_other_metrics_keep_what_was_seen():
    outputs, original, labels = changed(np.random.default_rng(4), 50)
    metric = Metric("output_error")
    quality = judge(outputs, original, labels, metric)
    found = expected_drop(outputs, original, labels, metric, quality)
    assert (found.drop, found.standard_error) == (quality.drop, quality.standard_error)


@pytest.mark.parametrize("metric", [TOP1, Metric("disagreement")])
@pytest.mark.parametrize("spread", [0.4, 0.8])
def test_a_divergence_tells_the_drop_of_scores_that_move_at_random(metric, spread):
    rng = np.random.default_rng(5)
    original = 2.0 * rng.standard_normal((20_000, 10))
    labels = (original + rng.standard_normal(original.shape)).argmax(1)
    outputs = original + spread * rng.standard_normal(original.shape)
    seen = judge(outputs, original, labels, metric).drop
    moved = divergence(outputs, original, True)
    told = drop_of(moved, original, labels, metric, 0)
    assert told == pytest.approx(seen, rel=0.2, abs=0.6)
    assert drop_of(0.0, original, labels, metric, 0) == 0.0


def test_a_divergence_tells_nothing_of_what_counts_no_classes():
    original = np.ones((4, 3))
    for metric in (TOP1, Metric("output_error")):
        with pytest.raises(ValueError, match=metric.name):
            drop_of(0.1, original, None, metric, 0)
