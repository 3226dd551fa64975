"""What a choice is expected to lose on other samples than those that it is tried on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_lowrank.metrics import Metric, Quality, log_probabilities

# Samples of like margin whose changes are taken for each other's, and the share of all of them
# that is enough where there are many.
_NEIGHBOURS = 32
_SHARE = 16


@dataclass(frozen=True)
class Expected:
    """A drop in the unit of the metric, and its standard error over samples (0 if unknown).

    The error is that of other samples whose margins change alike: it is less than that of the
    drop seen, and than the whole error, to which the changes seen add theirs.
    """

    drop: float
    standard_error: float

    @property
    def cautious(self) -> float:
        """The drop and half its standard error: of many choices the best looking one is lucky."""
        return self.drop + self.standard_error / 2


def expected_drop(
    outputs: np.ndarray,
    original: np.ndarray,
    labels: np.ndarray | None,
    metric: Metric,
    quality: Quality,
) -> Expected:
    """The drop that a network's outputs let expect, with less luck in it than in the drop seen.

    Of a few hundred samples only a handful changes class, so the drop that is counted on them goes
    up and down from one choice to the next. But all of them tell how far margins (the logarithm of
    the right class's probability over the best other's) move. Each sample is given, in turn, the
    changes of those of the nearest margins in place of its own, and the drop is the mean over all
    of these. It is that of the samples seen if changes do not depend on the sample.

    Parameters
    ----------
    outputs, original : np.ndarray
        Class scores (samples, ...) of the changed and the original network.
    labels : np.ndarray or None
        The right class of each sample; for ``disagreement`` it is the original's.
    metric : Metric
        Other metrics than of classes keep the drop that was seen.
    quality : Quality
        Of the same outputs.
    """
    if not metric.of_classes or (metric.name == "top1" and labels is None):
        return Expected(quality.drop, quality.standard_error)
    flat, reference = (np.asarray(y, np.float64).reshape(len(y), -1) for y in (outputs, original))
    right = reference.argmax(1) if metric.name == "disagreement" else np.asarray(labels)
    before = _margins(reference, right)
    change = _margins(flat, right) - before
    # Of equal margins in an order that has nothing to do with how the samples changed.
    shuffled = np.random.default_rng(0).permutation(len(before))
    order = shuffled[np.argsort(before[shuffled], kind="stable")]
    before, change = before[order], change[order]
    count = len(before)
    size = min(count, max(_NEIGHBOURS, count // _SHARE))
    first = np.clip(np.arange(count) - size // 2, 0, count - size)
    others = change[first[:, None] + np.arange(size)]
    lost = (before > 0) - (before[:, None] + others > 0).mean(1)
    return Expected(
        100.0 * float(lost.mean()), 100.0 * float(lost.std()) / math.sqrt(max(count, 1))
    )


def _margins(outputs: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each sample, how far the right class is ahead of the best other, in logarithms."""
    scores, rows = np.array(log_probabilities(outputs)), np.arange(len(outputs))
    own = scores[rows, right].copy()
    scores[rows, right] = -np.inf
    return np.asarray(own - scores.max(1))
