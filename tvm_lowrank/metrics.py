"""How far a changed network is from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tvm_lowrank.errors import LowRankError

# The 97.5th percentile of the standard normal distribution.
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Quality:
    """A network judged on samples against the original's outputs.

    ``metric`` says what ``drop`` is: points of ``top1`` accuracy lost, ``disagreement`` with the
    original's class in points, or relative ``output_error`` in per cent. ``accuracy`` is top-1 in
    per cent, None without labels; ``output_error`` is ||y - y0|| / ||y0|| always. ``interval`` is
    the 95 % confidence interval of ``drop`` over samples, None for ``output_error``.
    """

    metric: str
    drop: float
    accuracy: float | None
    agreement: float
    output_error: float
    samples: int
    interval: tuple[float, float] | None = None

    @property
    def standard_error(self) -> float:
        """Of ``drop``, in its unit: what half the width of ``interval`` is 1.96 of; 0 without."""
        if self.interval is None:
            return 0.0
        low, high = self.interval
        return (high - low) / (2 * _NORMAL_95)

    @property
    def cautious_drop(self) -> float:
        """``drop`` and half its standard error.

        Among many choices the one that looks best on few samples is partly the luckiest; without
        this allowance most of them fail on other samples.
        """
        return self.drop + self.standard_error / 2


def judge(
    outputs: np.ndarray, original: np.ndarray, labels: np.ndarray | None, metric: str
) -> Quality:
    """Compare outputs (samples, classes) with the original network's on the same samples."""
    flat, reference = outputs.reshape(len(outputs), -1), original.reshape(len(original), -1)
    chosen, expected = flat.argmax(1), reference.argmax(1)
    agreement = 100.0 * float((chosen == expected).mean())
    scale = float(np.linalg.norm(reference.astype(np.float64)))
    error = float(np.linalg.norm(flat.astype(np.float64) - reference)) / max(scale, 1e-30)
    accuracy = None if labels is None else 100.0 * float((chosen == labels).mean())
    interval = None
    if metric == "top1":
        drop = 100.0 * float((expected == labels).mean()) - (accuracy or 0.0)
        lost = int(((expected == labels) & (chosen != labels)).sum())
        gained = int(((expected != labels) & (chosen == labels)).sum())
        interval = paired_interval(lost, gained, len(outputs))
    elif metric == "disagreement":
        drop = 100.0 - agreement
        interval = wilson_interval(int((chosen != expected).sum()), len(outputs))
    else:
        drop = 100.0 * error
    return Quality(metric, drop, accuracy, agreement, error, len(outputs), interval)


def paired_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval, in points, of a drop in accuracy seen on the same samples.

    ``lost`` samples were right before and are wrong now, ``gained`` the other way round. Only those
    tell the two networks apart, so the interval is far narrower than that of either accuracy.
    Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
    Based on Paired Data" (2012).
    """
    size = samples + 2
    worse, better = (lost + 1) / size, (gained + 1) / size
    drop = worse - better
    reach = _NORMAL_95 * math.sqrt((worse + better - drop**2) / size)
    return 100.0 * max(drop - reach, -1.0), 100.0 * min(drop + reach, 1.0)


def wilson_interval(count: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval, in points, of a share of which ``count`` of ``samples`` were seen.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    share, square = count / samples, _NORMAL_95**2
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    variance = share * (1 - share) / samples + square / (4 * samples**2)
    reach = _NORMAL_95 * math.sqrt(variance) / (1 + square / samples)
    return 100.0 * max(centre - reach, 0.0), 100.0 * min(centre + reach, 1.0)


def resolution(metric: str, samples: int) -> float:
    """The least drop, in points, that ``samples`` samples can tell from none.

    The upper bound of the 95 % interval of a network that changed on no sample: 0.28 points of
    ``top1`` for 1,000 samples. 0 for ``output_error``, which needs no counting.
    """
    if metric == "top1":
        return paired_interval(0, 0, samples)[1]
    return wilson_interval(0, samples)[1] if metric == "disagreement" else 0.0


def check_resolution(metric: str, max_drop: float, samples: int) -> None:
    """Refuse a budget that the evaluation samples cannot resolve.

    Raises
    ------
    LowRankError
        ``max_drop`` is less than `resolution`; the message says how many samples would do.
    """
    least = resolution(metric, samples)
    if max_drop >= least:
        return
    ways = [f"max_drop of {math.ceil(100 * least) / 100:.2f} or more", "or lossless"]
    if max_drop > 0:
        # Both intervals of no change shrink as one over the samples and at most 4 more.
        enough = math.ceil((samples + 4) * least / max_drop)
        ways.insert(1, f"{enough} evaluation samples")
    raise LowRankError(
        f"max_drop is {max_drop:g} points of {metric}, but {samples} evaluation samples cannot "
        f"tell a drop below {least:.2f} points from none; give {', '.join(ways)}"
    )


def divergence(outputs: np.ndarray, original: np.ndarray, classifier: bool) -> float:
    """Mean over samples of how far outputs moved.

    For a classifier the Kullback-Leibler divergence of the class probabilities from the original's
    (a softmax is applied unless the outputs are probabilities already); otherwise the squared
    relative output error.
    """
    flat, reference = (np.asarray(y, np.float64).reshape(len(y), -1) for y in (outputs, original))
    if not classifier:
        return float(((flat - reference) ** 2).sum() / max((reference**2).sum(), 1e-30))
    p, q = _log_probabilities(reference), _log_probabilities(flat)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_probabilities(outputs: np.ndarray) -> np.ndarray:
    if (outputs >= 0).all() and np.allclose(outputs.sum(1), 1.0, atol=1e-3):
        return np.log(np.maximum(outputs, 1e-12))
    shifted = outputs - outputs.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
