"""How far a changed network is from the original, in the unit in which the budget is given."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.pitch import pitch_errors

# The least noise that PSNR tells from none: 200 dB.
_NO_NOISE = 1e-10
# The 97.5th percentile of the standard normal distribution.
_NORMAL_95 = 1.959963984540054

# What a budget can be in. The first that the data allows is the default of a classifier.
BUILT_IN = ("top1", "disagreement", "output_error", "pitch", "psnr")
# Counted per sample as right or wrong, so that few samples tell little.
_COUNTED = ("top1", "disagreement", "pitch")

# Outputs (samples, ...) and labels (samples,) or None to a score a sample, higher is better.
Scorer = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """What ``max_drop`` counts.

    - ``top1``: points of top-1 accuracy lost (needs labels);
    - ``disagreement``: per cent of samples whose class is not the original's;
    - ``pitch``: points of raw pitch accuracy lost, for CREPE: pitch within 50 cents of the label's
      (an integer is a bin of 20 cents, anything else Hz), without labels of the original's pitch;
    - ``output_error``: ||y - y0|| / ||y0|| over all outputs in per cent, for detectors and other
      networks whose raw outputs count;
    - ``psnr``: root of the mean squared difference from the original's output in per cent of that
      output's range, for images: 1 is a peak signal-to-noise ratio of 40 dB, 0.1 is 60 dB;
    - any other: a user's function of outputs and labels that gives each sample a score (higher is
      better); what is lost of the mean score.
    """

    name: str
    scorer: Scorer | None = None

    @property
    def of_classes(self) -> bool:
        """Whether outputs are class scores, so that their divergence is one of probabilities."""
        return self.name in ("top1", "disagreement")

    @property
    def cancels(self) -> bool:
        """Whether samples that are won make up for others that are lost.

        So it is for ``pitch`` only with labels; without, every change counts.
        """
        return self.name not in ("disagreement", "output_error", "psnr")


def metric_of(given: str | Scorer | None, labelled: bool, synthetic: bool) -> Metric:
    """The metric of a search.

    Parameters
    ----------
    given : str or callable, optional
        A name of `BUILT_IN`, ``"module:function"``, or the function itself. By default ``top1``
        with labels, ``disagreement`` without, ``output_error`` for noise in place of data.
    labelled : bool
        Whether the samples that choose and judge have labels.
    synthetic : bool
        Whether noise stands for data.

    Raises
    ------
    LowRankError
        No such metric or function, or ``top1`` without labels.
    """
    if given is None:
        default = "top1" if labelled else "disagreement"
        return Metric("output_error" if synthetic else default)
    if not isinstance(given, str):
        name = getattr(given, "__qualname__", type(given).__qualname__)
        return Metric(f"{getattr(given, '__module__', '')}:{name}", given)
    if ":" in given:
        return Metric(given, _imported(given))
    if given not in BUILT_IN:
        raise LowRankError(
            f"metric {given!r} is none of {', '.join(BUILT_IN)}; name one of them or "
            "'module:function'"
        )
    if given == "top1" and not labelled:
        raise LowRankError("metric 'top1' needs labels; give them, or use 'disagreement'")
    return Metric(given)


def _imported(name: str) -> Scorer:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise LowRankError(
            f"metric {name!r} cannot be imported ({error}); name 'module:function' of a module "
            "that Python finds"
        ) from error
    if not callable(found):
        raise LowRankError(f"metric {name!r} is not a function")
    return found


@dataclass(frozen=True)
class Quality:
    """A network judged on samples against the original's outputs.

    ``drop`` is in the unit of the `Metric` named ``metric``, ``interval`` its 95 % confidence
    interval over samples (None where the metric has none). ``accuracy`` is top-1 or raw pitch
    accuracy in per cent (None without labels), decibels for ``psnr`` (200 for equal outputs), the
    mean of a user's scores.
    ``agreement`` is the share of samples with the original's class (largest output) in per cent,
    ``output_error`` is ||y - y0|| / ||y0||, both always.
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


def judge(
    outputs: np.ndarray, original: np.ndarray, labels: np.ndarray | None, metric: Metric | str
) -> Quality:
    """Compare outputs (samples, ...) with the original network's on the same samples.

    Raises
    ------
    LowRankError
        A user's function does not give one finite score a sample, or outputs are no pitches.
    """
    metric = Metric(metric) if isinstance(metric, str) else metric
    flat, reference = outputs.reshape(len(outputs), -1), original.reshape(len(original), -1)
    chosen, expected = flat.argmax(1), reference.argmax(1)
    agreement = 100.0 * float((chosen == expected).mean())
    scale = float(np.linalg.norm(reference.astype(np.float64)))
    error = float(np.linalg.norm(flat.astype(np.float64) - reference)) / max(scale, 1e-30)
    accuracy, interval = None, None
    if metric.of_classes and labels is not None:
        accuracy = 100.0 * float((chosen == labels).mean())
    if metric.scorer is not None:
        before, after = (_scores(metric, y, labels) for y in (original, outputs))
        drop, accuracy = float((before - after).mean()), float(after.mean())
        interval = _mean_interval(before - after)
    elif metric.name == "top1":
        drop, interval = _lost(expected == labels, chosen == labels)
    elif metric.name == "disagreement":
        drop = 100.0 - agreement
        interval = wilson_interval(int((chosen != expected).sum()), len(outputs))
    elif metric.name == "pitch":
        if labels is None:
            wrong = pitch_errors(flat, reference)
            drop, interval = (
                100.0 * float(wrong.mean()),
                wilson_interval(int(wrong.sum()), len(flat)),
            )
        else:
            right = ~pitch_errors(flat, labels)
            drop, interval = _lost(~pitch_errors(reference, labels), right)
            accuracy = 100.0 * float(right.mean())
    elif metric.name == "psnr":
        drop = 100.0 * _noise(flat, reference)
        accuracy = -20.0 * math.log10(max(drop / 100.0, _NO_NOISE))
    else:
        drop = 100.0 * error
    return Quality(metric.name, drop, accuracy, agreement, error, len(outputs), interval)


def _lost(before: np.ndarray, after: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Points lost, and their interval, of samples that were and are right or wrong."""
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return 100.0 * (lost - gained) / len(before), paired_interval(lost, gained, len(before))


def _noise(flat: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference over the range of the reference."""
    reach = float(reference.max() - reference.min())
    square = float(((flat.astype(np.float64) - reference) ** 2).mean())
    return math.sqrt(square) / max(reach, 1e-30)


def _scores(metric: Metric, outputs: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    assert metric.scorer is not None
    scores = np.asarray(metric.scorer(outputs, labels), np.float64)
    if scores.shape != (len(outputs),) or not np.isfinite(scores).all():
        raise LowRankError(
            f"metric {metric.name} gave scores of shape {scores.shape} for {len(outputs)} samples; "
            "it must give one finite score a sample"
        )
    return scores


def _mean_interval(differences: np.ndarray) -> tuple[float, float]:
    mean = float(differences.mean())
    reach = _NORMAL_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return mean - reach, mean + reach


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


def resolution(metric: Metric | str, samples: int, labelled: bool = True) -> float:
    """The least drop, in points, that ``samples`` samples can tell from none.

    The upper bound of the 95 % interval of a network that changed on no sample: 0.28 points of
    ``top1`` for 1,000 samples. 0 for metrics that count no samples as right or wrong.
    """
    name = metric if isinstance(metric, str) else metric.name
    if name == "top1" or (name == "pitch" and labelled):
        return paired_interval(0, 0, samples)[1]
    return wilson_interval(0, samples)[1] if name in _COUNTED else 0.0


def check_resolution(
    metric: Metric | str, max_drop: float, samples: int, labelled: bool = True
) -> None:
    """Refuse a budget that the evaluation samples cannot resolve.

    Raises
    ------
    LowRankError
        ``max_drop`` is less than `resolution`; the message says how many samples would do.
    """
    least = resolution(metric, samples, labelled)
    if max_drop >= least:
        return
    ways = [f"max_drop of {math.ceil(100 * least) / 100:.2f} or more", "or lossless"]
    if max_drop > 0:
        # Both intervals of no change shrink as one over the samples and at most 4 more.
        enough = math.ceil((samples + 4) * least / max_drop)
        ways.insert(1, f"{enough} evaluation samples")
    name = metric if isinstance(metric, str) else metric.name
    raise LowRankError(
        f"max_drop is {max_drop:g} points of {name}, but {samples} evaluation samples cannot "
        f"tell a drop below {least:.2f} points from none; give {', '.join(ways)}"
    )


def joined(outputs: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """One array (samples, ...) of a network's outputs: several are flattened and put in a row."""
    if isinstance(outputs, np.ndarray):
        return outputs
    if len(outputs) == 1:
        return outputs[0]
    return np.concatenate([y.reshape(len(y), -1) for y in outputs], axis=1)


def divergence(outputs: np.ndarray, original: np.ndarray, classifier: bool) -> float:
    """Mean over samples of how far outputs moved.

    For a classifier the Kullback-Leibler divergence of the class probabilities from the original's
    (a softmax is applied unless the outputs are probabilities already); otherwise the squared
    relative output error.
    """
    flat, reference = (np.asarray(y, np.float64).reshape(len(y), -1) for y in (outputs, original))
    if not classifier:
        return float(((flat - reference) ** 2).sum() / max((reference**2).sum(), 1e-30))
    p, q = log_probabilities(reference), log_probabilities(flat)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def log_probabilities(outputs: np.ndarray) -> Any:
    """Of class scores (samples, classes): a softmax unless they are probabilities already."""
    if (outputs >= 0).all() and np.allclose(outputs.sum(1), 1.0, atol=1e-3):
        return np.log(np.maximum(outputs, 1e-12))
    shifted = outputs - outputs.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
