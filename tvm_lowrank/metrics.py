"""How far a changed network is from the original."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quality:
    """A network judged on samples against the original's outputs.

    ``metric`` says what ``drop`` is: points of ``top1`` accuracy lost, ``disagreement`` with the
    original's class in points, or relative ``output_error`` in per cent. ``accuracy`` is top-1 in
    per cent, None without labels; ``output_error`` is ||y - y0|| / ||y0|| always.
    """

    metric: str
    drop: float
    accuracy: float | None
    agreement: float
    output_error: float
    samples: int

    @property
    def standard_error(self) -> float:
        """Of ``drop``, in its unit: samples whose class changed come and go by chance."""
        if self.metric == "output_error":
            return 0.0
        changed = max(1.0 - self.agreement / 100.0, 1.0 / self.samples)
        return 100.0 * float(np.sqrt(changed / self.samples))

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
    if metric == "top1":
        drop = 100.0 * float((expected == labels).mean()) - (accuracy or 0.0)
    elif metric == "disagreement":
        drop = 100.0 - agreement
    else:
        drop = 100.0 * error
    return Quality(metric, drop, accuracy, agreement, error, len(outputs))


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
