"""Linear combination of filters: K full filters, then 1x1 sums of them (an SVD for 1x1 kernels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    LosingFitter,
    Rank,
    geometry_of,
    pointwise_after,
    single,
    single_ranks,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.geometry import ConvGeometry


class LinearCombination(Form):
    """``X x Y, C -> K`` with the stride, padding and dilation, then ``1 x 1, K -> F``."""

    name = "linear_combination"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        return "one output channel: nothing to combine" if geometry.out_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        return _limit(geometry)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`; K multiplications cost ``C X Y + F`` an output pixel."""
        return single_ranks(self, geometry, multiple, _limit(geometry), shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`; ``rank`` is from 1 to min(F, C X Y)."""
        filters = single(rank, _limit(geometry), self.name)
        first = replace(geometry, out_channels=filters)
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
        return _Fitter(weight, moments)


class _Fitter(LosingFitter):
    """Reduced-rank regression: project the outputs on the leading eigenvectors of ``W S W'``."""

    def __init__(self, weight: Array, moments: InputMoments | None):
        self._weight = np.asarray(weight, np.float64)
        flat = self._weight.reshape(len(weight), -1)
        self._limit = min(flat.shape)
        given = usable(moments, flat.shape[1])
        self._values, self._vectors = _leading(flat, given)

    def fit_and_lose(self, rank: Rank) -> tuple[list[Array], float | None]:
        limit = single(rank, self._limit, LinearCombination.name)
        kept = self._vectors[:, :limit]
        factors = [
            np.tensordot(kept.T, self._weight, axes=1),
            np.ascontiguousarray(kept)[:, :, None, None],
        ]
        return factors, float(self._values[limit:].sum())


def linear_combination(
    weight: Array, rank: int, moments: InputMoments | None = None
) -> tuple[Array, Array]:
    """Filters ``(K, C, X, Y)`` and sums ``(F, K, 1, 1)`` nearest to an OIHW weight.

    The error in the output's variance is the smallest that the rank allows: reduced-rank
    regression (Izenman 1975); without moments, the truncated SVD of ``(F, C X Y)``. For a 1x1
    kernel it is the SVD of the layer; with X x Y, the paper's "linear combination of filters"
    (section 5.1.2). ValueError for a rank outside 1..min(F, C X Y) or F = 1.
    """
    filters, sums = LinearCombination().fitter(weight, geometry_of(weight), moments).fit(rank)
    return filters, sums


def _leading(flat: Array, moments: InputMoments | None) -> tuple[Array, Array]:
    """Eigenvalues of ``W S W'`` of a weight (F, D) that may differ from 0, and their vectors.

    The larger ones first; where outputs outnumber inputs, from those of a (D, D) matrix. S is
    damped.
    """
    outputs, inputs = flat.shape
    if outputs <= inputs:
        seen = flat @ flat.T
        if moments is not None:
            seen = flat @ moments.covariance @ flat.T + moments.damping * seen
        values, vectors = np.linalg.eigh(seen)
        return values[::-1], vectors[:, ::-1]
    if moments is not None:
        flat = flat @ np.linalg.cholesky(moments.covariance + moments.damping * np.eye(inputs))
    values, vectors = np.linalg.eigh(flat.T @ flat)
    # Orthogonal already, but for rounding where they are short.
    return values[::-1], np.linalg.qr(flat @ vectors[:, ::-1])[0]


def _limit(geometry: ConvGeometry) -> int:
    f, c, x, y = geometry.weight_shape
    return min(f, c * x * y)
