"""Fully connected layers: data-aware SVD of a ``matmul`` weight, into two thin ones."""

from __future__ import annotations

import numpy as np

from tvm_lowrank.decompose.form import single
from tvm_lowrank.decompose.linear_combination import LinearCombination
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.geometry import ConvGeometry


def svd(weight: Array, rank: int, moments: InputMoments | None = None) -> tuple[Array, Array]:
    """Factors ``(C, K)`` and ``(K, F)`` of a weight ``(C, F)``, for ``x @ weight``.

    With moments of x (C inputs) the error in the output's variance is the smallest that the rank
    allows (reduced-rank regression, Izenman 1975), without them it is the truncated SVD. ValueError
    for a weight that is not a matrix, or a rank outside 1..min(C, F).
    """
    if weight.ndim != 2:
        raise ValueError(f"weight {weight.shape}: a matrix (C, F) was expected")
    inputs, outputs = weight.shape
    kept = single(rank, min(inputs, outputs), "svd")
    if outputs == 1:
        return np.array(weight, np.float64), np.ones((1, 1))
    geometry = ConvGeometry(inputs, outputs, 1, 1, (1, 1))
    fitter = LinearCombination().fitter(weight.T[:, :, None, None], geometry, moments)
    filters, sums = fitter.fit(kept)
    return np.ascontiguousarray(filters[:, :, 0, 0].T), np.ascontiguousarray(sums[:, :, 0, 0].T)


def weights_kept(shape: tuple[int, int], rank: int) -> int:
    """Number of weights of both factors, which is also their multiplications a row of inputs."""
    return rank * sum(shape)


def rank_within(shape: tuple[int, int], share: float, multiple: int = 1) -> int | None:
    """The largest rank, a multiple of the vector width, that keeps at most a share of the weights.

    Weight memory is the objective here: a fully connected layer reads each weight once a sample.
    None where no such rank saves anything.
    """
    limit = min(int(share * shape[0] * shape[1]) // sum(shape), min(shape))
    rank = limit // multiple * multiple
    return rank if rank >= 1 and weights_kept(shape, rank) < shape[0] * shape[1] else None
