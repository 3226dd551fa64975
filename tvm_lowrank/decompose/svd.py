"""Fully connected layers: data-aware SVD of a ``matmul`` weight, into two thin ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    Rank,
    pointwise_after,
    single,
    single_ranks,
)
from tvm_lowrank.decompose.linear_combination import LinearCombination
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.geometry import ConvGeometry


class SVD(Form):
    """``C -> K``, then ``K -> F``: a fully connected layer as two thin ones.

    Such a layer reads each weight once a sample, so memory is its objective: see
    `Form.keeps_memory`. As a convolution it is as large as its input (1x1 of one pixel, or X x Y of
    the map that was flattened before it), and its first stage is too.
    """

    name = "svd"
    keeps_memory = True

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        if geometry.kernel != (geometry.height, geometry.width) or any(geometry.padding):
            return "several output pixels: not fully connected"
        return "one output: nothing to factor" if geometry.out_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        return _limit(geometry)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`; shares of the multiplications are shares of the weights here."""
        return single_ranks(self, geometry, multiple, _limit(geometry), shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`; ``rank`` is from 1 to min(F, C X Y)."""
        first = replace(geometry, out_channels=single(rank, _limit(geometry), self.name))
        return [first, pointwise_after(first, geometry.out_channels)]

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`; the closed form is the optimum, there is nothing to refine."""
        return LinearCombination().fitter(weight, geometry, moments, refine)


def _limit(geometry: ConvGeometry) -> int:
    f, c, x, y = geometry.weight_shape
    return min(f, c * x * y)


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
