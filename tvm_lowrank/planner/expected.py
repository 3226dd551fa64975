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
# Samples that are moved at random, however often each.
_MOVED = 4096


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
    further: np.ndarray | None = None,
) -> Expected:
    """The drop that a network's outputs let expect, with less luck in it than in the drop seen.

    Of a few hundred samples only a handful changes class, so the drop that is counted on them goes
    up and down from one choice to the next. But all of them tell how far margins (the logarithm of
    the right class's probability over the best other's) move. Each sample is given, in turn, the
    changes of those of the nearest margins in place of its own, and the drop is the mean over all
    of these. It is that of the samples seen if changes do not depend on the sample.

    How many samples are near the border, which decides most, other samples of the original network
    tell too: they are given the changes of those seen.

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
    further : np.ndarray, optional
        `margins` of the original network on more samples, on which the changed one was not run.
    """
    right = _right(original, labels, metric)
    if right is None:
        return Expected(quality.drop, quality.standard_error)
    before = _margins(original, right)
    change = _margins(outputs, right) - before
    # Of equal margins in an order that has nothing to do with how the samples changed.
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(before))
    order = shuffled[np.argsort(before[shuffled], kind="stable")]
    before, change = before[order], change[order]
    count = len(before)
    size = min(count, max(_NEIGHBOURS, count // _SHARE))
    places = np.arange(count)
    if further is not None:
        low, high = (np.searchsorted(before, further, side) for side in ("left", "right"))
        places = np.concatenate([places, rng.integers(low, high + 1)])
        before = np.concatenate([before, further])
    first = np.clip(places - size // 2, 0, count - size)
    others = change[first[:, None] + np.arange(size)]
    lost = (before > 0) - (before[:, None] + others > 0).mean(1)
    return Expected(
        100.0 * float(lost.mean()), 100.0 * float(lost.std()) / math.sqrt(max(len(lost), 1))
    )


def margins(original: np.ndarray, labels: np.ndarray | None, metric: Metric) -> np.ndarray | None:
    """By how much each sample's right class is ahead in the original network, in logarithms.

    None where the metric counts no classes; parameters as of `expected_drop`.
    """
    right = _right(original, labels, metric)
    return None if right is None else _margins(original, right)


def drop_of(
    divergence: float, original: np.ndarray, labels: np.ndarray | None, metric: Metric, seed: int
) -> float:
    """The drop that so large a divergence of class probabilities lets expect, before any is seen.

    All scores are taken to move at random, independently and alike, with a variance v of which the
    divergence is about ``v (1 - sum p^2) / 2`` on average; the drop is that of many such moves.

    Parameters
    ----------
    divergence : float
        See `tvm_lowrank.metrics.divergence`.
    original : np.ndarray
        Class scores (samples, ...) of the original network.
    labels : np.ndarray or None
        See `expected_drop`.
    metric : Metric
        Of classes; ValueError otherwise (see `counts_classes`).
    seed : int
        Of the moves; they are the same for every divergence.
    """
    right = _right(original, labels, metric)
    if right is None:
        raise ValueError(f"metric {metric.name}: one that counts classes was expected")
    scores = _logarithms(original)
    doubt = float((1.0 - (np.exp(scores) ** 2).sum(1)).mean())
    deviation = math.sqrt(2.0 * max(divergence, 0.0) / max(doubt, 1e-12))
    rng, moves = np.random.default_rng(seed), max(1, _MOVED // len(scores))
    before, kept = (scores.argmax(1) == right).mean(), 0.0
    for _ in range(moves):
        moved = scores + deviation * rng.standard_normal(scores.shape)
        kept += float((moved.argmax(1) == right).mean()) / moves
    return 100.0 * (float(before) - kept)


def counts_classes(metric: Metric, labels: np.ndarray | None) -> bool:
    """Whether a drop is a share of samples whose class is right."""
    return metric.of_classes and (metric.name != "top1" or labels is not None)


def _right(original: np.ndarray, labels: np.ndarray | None, metric: Metric) -> np.ndarray | None:
    """The right class of each sample; None where the metric counts no classes."""
    if not counts_classes(metric, labels):
        return None
    if metric.name == "disagreement":
        found: np.ndarray = original.reshape(len(original), -1).argmax(1)
        return found
    return np.asarray(labels)


def _margins(outputs: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each sample, how far the right class is ahead of the best other, in logarithms."""
    scores, rows = _logarithms(outputs), np.arange(len(outputs))
    own = scores[rows, right].copy()
    scores[rows, right] = -np.inf
    return np.asarray(own - scores.max(1))


def _logarithms(outputs: np.ndarray) -> np.ndarray:
    """Of class probabilities (samples, classes), in an array of its own."""
    flat = np.asarray(outputs, np.float64).reshape(len(outputs), -1)
    return np.array(log_probabilities(flat))
