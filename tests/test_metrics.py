"""Budgets in other units than classes: pitch, decibels, raw outputs, a function of one's own."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_lowrank import tune
from tvm_lowrank.data import Samples, split
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.metrics import (
    Metric,
    check_resolution,
    joined,
    judge,
    metric_of,
    paired_interval,
    resolution,
    wilson_interval,
)
from tvm_lowrank.pitch import cents_of_activations, cents_of_bins, cents_of_hertz, pitch_errors


def activations(centres):
    """Activations of CREPE's bins around centres, which may lie between bins."""
    bins = np.arange(360)
    return np.exp(-0.5 * (bins - np.asarray(centres, float)[:, None]) ** 2).astype(np.float32)


def test_pitch_lies_between_bins():
    centres = np.array([20.0, 100.25, 200.5])
    cents = cents_of_activations(activations(centres))
    assert np.allclose(cents, cents_of_bins(centres), atol=1.0)
    # 440 Hz are 6551.3 cents over 10 Hz.
    assert cents_of_hertz(440.0) == pytest.approx(1200 * np.log2(44))


def test_pitch_is_right_within_fifty_cents():
    # A bin is 20 cents: 2 bins are 40, 3 are 60.
    truth = np.array([100, 100, 100, 100])
    moved = activations([100, 102, 103, 97])
    assert pitch_errors(moved, truth).tolist() == [False, False, True, True]
    hertz = 10 * 2 ** (cents_of_bins(truth) / 1200)
    assert pitch_errors(moved, hertz).tolist() == [False, False, True, True]
    original = activations([100, 100, 100, 103])
    with_labels = judge(moved, original, truth, "pitch")
    assert (with_labels.drop, with_labels.accuracy) == (25.0, 50.0)
    assert with_labels.interval == paired_interval(1, 0, 4)
    alone = judge(moved, original, None, "pitch")
    assert alone.drop == 50.0 and alone.accuracy is None
    assert alone.interval == wilson_interval(2, 4)
    with pytest.raises(LowRankError, match=r"needs outputs \(samples, 360\)"):
        judge(moved[:, :10], original[:, :10], truth, "pitch")


def test_the_resolution_of_pitch_depends_on_labels():
    assert resolution("pitch", 500, True) == resolution("top1", 500)
    assert resolution("pitch", 500, False) == resolution("disagreement", 500)
    with pytest.raises(LowRankError, match="points of pitch"):
        check_resolution(Metric("pitch"), 0.1, 100)
    check_resolution(Metric("psnr"), 0.0, 4)


def test_psnr_is_against_the_originals_output():
    rng = np.random.default_rng(0)
    original = rng.uniform(0, 1, (4, 1, 32, 32)).astype(np.float32)
    original.flat[:2] = 0, 1
    noise = rng.standard_normal(original.shape).astype(np.float32)
    found = judge(original + 0.01 * noise, original, None, "psnr")
    assert found.drop == pytest.approx(1.0, rel=0.05)
    assert found.accuracy == pytest.approx(40.0, abs=0.5)
    assert judge(original, original, None, "psnr").drop == 0.0


def test_raw_outputs_of_several_tensors_count_together():
    boxes, scores = np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.float32)
    both = joined((boxes, scores))
    assert both.shape == (2, 15) and joined([boxes]) is boxes
    moved = both.copy()
    moved[0, -1] += 0.3
    found = judge(moved, both, None, "output_error")
    assert found.drop == pytest.approx(100 * 0.3 / np.sqrt(30), rel=1e-5)


def largest_gap(outputs, labels):
    """A score for `test_a_function_of_ones_own`."""
    assert labels is None or len(labels) == len(outputs)
    return np.sort(outputs, axis=1)[:, -1] - np.sort(outputs, axis=1)[:, -2]


def test_a_function_of_ones_own():
    rng = np.random.default_rng(0)
    original = rng.standard_normal((200, 10)).astype(np.float32)
    metric = metric_of(largest_gap, True, False)
    found = judge(0.5 * original, original, np.zeros(200, int), metric)
    gap = largest_gap(original, None)
    assert found.drop == pytest.approx(gap.mean() / 2, rel=1e-5)
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 * (gap / 2).std(ddof=1) / np.sqrt(200), rel=1e-3)
    assert metric.name.endswith("test_metrics:largest_gap")
    named = metric_of(f"{__name__}:largest_gap", True, False)
    assert judge(original, original, None, named).drop == 0.0
    with pytest.raises(LowRankError, match="one finite score a sample"):
        judge(original, original, None, Metric("mine", lambda outputs, labels: outputs))


def test_defaults_and_names_that_are_none():
    assert metric_of(None, True, False).name == "top1"
    assert metric_of(None, False, False).name == "disagreement"
    assert metric_of(None, False, True).name == "output_error"
    for given, words in (
        ("accuracy", "none of top1, disagreement"),
        ("top1", "needs labels"),
        ("nowhere:f", "cannot be imported"),
        ("math:pi", "not a function"),
    ):
        with pytest.raises(LowRankError, match=words):
            metric_of(given, False, False)


def test_labels_that_are_no_classes_need_a_metric_of_their_own(small):
    mod, inputs = load_model(small), np.zeros((12, 3, 18, 18), np.float32)
    samples = Samples(inputs, np.linspace(100, 200, 12))
    with pytest.raises(LowRankError, match="class indices"):
        split(mod, samples)
    parts = split(mod, samples, class_labels=False)
    assert parts.final.labels.dtype.kind == "f"


def test_the_command_refuses_an_unknown_metric(tmp_path, capsys):
    assert tune.main(["--metric", "loudness", "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "metric 'loudness' is none of" in error and error.count("\n") == 1
