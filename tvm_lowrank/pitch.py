"""Pitch from the activations of CREPE, and how many of them are off.

Kim, Salamon, Li and Bello, "CREPE: A Convolutional Representation for Pitch Estimation" (2018).
"""

from __future__ import annotations

import numpy as np

from tvm_lowrank.errors import LowRankError

# The network has a sigmoid for each of 360 bins of 20 cents; cents are over 10 Hz.
BINS = 360
BIN_CENTS = 20.0
FIRST_CENTS = 1997.3794084376191
# Raw pitch accuracy counts a pitch as right within half a semitone.
TOLERANCE_CENTS = 50.0
# The pitch is the mean of the bins near the largest, weighted by their activations.
_REACH = 4


def cents_of_bins(bins: np.ndarray) -> np.ndarray:
    """Centres of bins, in cents over 10 Hz."""
    return BIN_CENTS * np.asarray(bins, np.float64) + FIRST_CENTS


def cents_of_hertz(frequencies: np.ndarray) -> np.ndarray:
    """Frequencies in cents over 10 Hz."""
    return 1200.0 * np.log2(np.asarray(frequencies, np.float64) / 10.0)


def cents_of_activations(activations: np.ndarray) -> np.ndarray:
    """Pitch (samples,) of activations (samples, 360), in cents over 10 Hz.

    Raises
    ------
    LowRankError
        There are not 360 activations.
    """
    if activations.ndim != 2 or activations.shape[1] != BINS:
        raise LowRankError(
            f"metric 'pitch' needs outputs (samples, {BINS}), the activations of CREPE's bins, not "
            f"{activations.shape}"
        )
    nearest = activations.argmax(1)[:, None]
    bins = np.arange(BINS)[None]
    weights = np.where(np.abs(bins - nearest) <= _REACH, activations, 0.0).astype(np.float64)
    total = np.maximum(weights.sum(1), 1e-30)
    return np.asarray((weights * cents_of_bins(bins)).sum(1) / total)


def pitch_errors(activations: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which samples are more than 50 cents off, as (samples,) of bool.

    ``truth`` are other activations (samples, 360), bins (integers) or frequencies in Hz.
    """
    truth = np.asarray(truth)
    if truth.ndim == 2:
        cents = cents_of_activations(truth)
    else:
        cents = cents_of_bins(truth) if truth.dtype.kind in "iu" else cents_of_hertz(truth)
    return np.asarray(np.abs(cents_of_activations(activations) - cents) > TOLERANCE_CENTS)
