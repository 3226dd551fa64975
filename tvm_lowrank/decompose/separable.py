"""Separable filters: vertical X x 1 filters, then horizontal 1 x Y ones."""

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
    single,
    single_ranks,
    split_spatial,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import SharedBasis, weight_basis
from tvm_lowrank.geometry import ConvGeometry


class Separable(Form):
    """``X x 1, C -> K`` along the rows, then ``1 x Y, K -> F`` along the columns.

    The paper's rank-K chain (section 3.1, equation 2) with its ``alpha beta`` and ``gamma delta``
    pairs left whole: two dense 1-D convolutions instead of four thin ones.
    """

    name = "separable"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        x, y = geometry.kernel
        return f"{x}x{y} kernel: nothing to separate" if 1 in (x, y) else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        return _limit(geometry.weight_shape)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`; the first stage still runs over all columns of a strided layer."""
        return single_ranks(self, geometry, multiple, _limit(geometry.weight_shape), shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`; ``rank`` is from 1 to min(C X, F Y)."""
        inner = single(rank, _limit(geometry.weight_shape), self.name)
        rows, columns = split_spatial(geometry)
        return [replace(rows, out_channels=inner), replace(columns, in_channels=inner)]

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`."""
        return _Fitter(weight, moments, refine)


class _Fitter(LosingFitter):
    def __init__(self, weight: Array, moments: InputMoments | None, refine: bool):
        f, c, x, y = self._shape = weight.shape
        # Features are one column of taps; they are seen at Y shifts.
        self._weight = np.asarray(weight, np.float64).reshape(f, c * x, y)
        given = usable(moments, c * x * y)
        self._refine = refine
        self._shared = None if given is None else SharedBasis(self._weight, given)
        self._basis = weight_basis(self._weight) if given is None else None

    def fit_and_lose(self, rank: Rank) -> tuple[list[Array], float | None]:
        inner = single(rank, _limit(self._shape), Separable.name)
        (_, c, x, _), lost = self._shape, None
        if self._shared is not None:
            columns, rows, _, lost = self._shared.fit(inner, refine=self._refine)
        else:
            assert self._basis is not None
            columns = np.ascontiguousarray(self._basis[:, :inner].T)
            rows = np.tensordot(self._weight, columns, axes=(1, 1)).transpose(0, 2, 1)
        return [columns.reshape(inner, c, x, 1), np.ascontiguousarray(rows)[:, :, None, :]], lost


def separable(
    weight: Array, rank: int, moments: InputMoments | None = None, refine: bool = True
) -> tuple[Array, Array]:
    """Vertical ``(K, C, X, 1)`` and horizontal ``(F, K, 1, Y)`` factors of an OIHW weight.

    Without moments: the truncated SVD of the weight read as ``(C X, F Y)``, which is optimal
    (Jaderberg, Vedaldi and Zisserman 2014, scheme 2; Tai et al. 2016). With moments: that SVD in
    whitened columns, least squares for the horizontal factor, then refinement of both.
    ValueError for a rank outside 1..min(C X, F Y) or a kernel with X = 1 or Y = 1.
    """
    fitter = Separable().fitter(weight, geometry_of(weight), moments, refine)
    vertical, horizontal = fitter.fit(rank)
    return vertical, horizontal


def _limit(shape: tuple[int, ...]) -> int:
    f, c, x, y = shape
    return min(c * x, f * y)
