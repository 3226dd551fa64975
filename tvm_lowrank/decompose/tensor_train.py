"""Tensor train: 1x1 in, X x 1, 1 x Y, 1x1 out, all dense; ends that save nothing are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    Rank,
    check_weight,
    geometry_of,
    pointwise,
    pointwise_after,
    several,
    split_spatial,
    spread_families,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import SharedBasis, seen_through
from tvm_lowrank.geometry import ConvGeometry

# The middle rank as a share of what the outer ones allow.
MIDDLE = 0.6


class TensorTrain(Form):
    """``1x1, C -> K1``, ``X x 1, K1 -> K2``, ``1 x Y, K2 -> K3``, ``1x1, K3 -> F``.

    Rank ``(K1, K2, K3)``. With ``K1 = C`` or ``K3 = F`` that end is left out; with both it is
    `separable`. Which ends to keep is a matter of cost: see `partition`.
    """

    name = "tensor_train"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        x, y = geometry.kernel
        if 1 in (x, y):
            return f"{x}x{y} kernel: tucker2 is the same chain"
        return "one input channel: nothing to project" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        c, f, (x, y) = geometry.in_channels, geometry.out_channels, geometry.kernel
        return c, min(c * x, f * y), f

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: either end cut or both, the middle rank in proportion to them."""
        c, f, (x, y) = geometry.in_channels, geometry.out_channels, geometry.kernel
        inner = range(multiple, c, multiple)
        balanced = [(k, max(multiple, round(f * k / c / multiple) * multiple)) for k in inner]
        cuts = (
            [(k, last) for k, last in balanced if last < f],
            [(k, f) for k in inner],
            [(c, k) for k in range(multiple, f, multiple)],
        )
        families: list[list[tuple[int, Rank]]] = []
        for cut in cuts:
            costs: list[tuple[int, Rank]] = []
            for first, last in cut:
                room = min(first * x, last * y)
                middle = max(multiple, round(MIDDLE * room / multiple) * multiple)
                if middle <= room:
                    rank = (first, middle, last)
                    costs.append((self.multiplications(geometry, rank), rank))
            families.append(costs)
        return spread_families(families, geometry.multiplications, shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`: two to four stages."""
        first, middle, last = _ranks(rank, geometry.weight_shape)
        rows, columns = split_spatial(geometry)
        chain = [
            replace(rows, in_channels=first, out_channels=middle),
            replace(columns, in_channels=middle, out_channels=last),
        ]
        if first < geometry.in_channels:
            chain.insert(0, pointwise(geometry, first))
        if last < geometry.out_channels:
            chain.append(pointwise_after(chain[-1], geometry.out_channels))
        return chain

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`."""
        return _Fitter(weight, geometry, moments, refine)


class _Fitter(Fitter):
    """First the channels (as Tucker-2), then the rows under the moments of what is left of them.

    The last two stages are then fitted anew, jointly, given the first two.
    """

    def __init__(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
    ):
        f, c, x, y = self._shape = weight.shape
        self._weight = np.asarray(weight, np.float64)
        self._moments = usable(moments, c * x * y) or InputMoments.identity(geometry)
        self._refine = refine
        self._channels = SharedBasis(self._weight.reshape(f, c, x * y), self._moments)
        self._columns = SharedBasis(self._weight.reshape(f, c * x, y), self._moments)

    def fit(self, rank: Rank) -> list[Array]:
        first, middle, last = _ranks(rank, self._shape)
        f, c, x, y = self._shape
        factors = []
        if first < c:
            reduce, core, *_ = self._channels.fit(first, None, self._refine)
            seen = seen_through(self._moments, reduce, x * y)
            inner = SharedBasis(core.reshape(f, first * x, y), seen)
            rows, *_ = inner.fit(middle, last, self._refine)
            factors.append(reduce[:, :, None, None])
            whole = np.tensordot(rows.reshape(middle, first, x), reduce, axes=(1, 0))
            columns, mixing = self._columns.given(
                whole.transpose(0, 2, 1).reshape(middle, c * x), last
            )
        else:
            rows, columns, mixing, _ = self._columns.fit(middle, last, self._refine)
        factors += [rows.reshape(middle, first, x, 1), columns[:, :, None, :]]
        if mixing is not None:
            factors.append(mixing[:, :, None, None])
        return [np.ascontiguousarray(factor) for factor in factors]


def tensor_train(
    weight: Array,
    ranks: tuple[int, int, int],
    moments: InputMoments | None = None,
    refine: bool = True,
) -> tuple[Array, ...]:
    """``(K1, C, 1, 1)``, ``(K2, K1, X, 1)``, ``(K3, K2, 1, Y)``, ``(F, K3, 1, 1)``.

    The first is left out where K1 = C, the last where K3 = F. ValueError for ranks outside 1..C,
    1..min(K1 X, K3 Y) and 1..F, or a kernel with X = 1 or Y = 1.
    """
    return tuple(TensorTrain().fitter(weight, geometry_of(weight), moments, refine).fit(ranks))


def partition(
    weight: Array,
    geometry: ConvGeometry,
    share: float,
    moments: InputMoments | None = None,
    multiple: int = 1,
) -> Rank | None:
    """The ranks that promise least error within a share of the dense multiplications.

    "Partition the coordinate space in the most efficient manner" (section 3.2): the error of a
    chain is at most the sum of what each unfolding loses (C against the rest, C X against Y F, F
    against the rest), so those three spectra, in whitened channels, tell which modes to cut and
    how far. ``(C, K2, F)`` cuts only the middle (`separable`), and so on. None where nothing fits.
    """
    form = TensorTrain()
    check_weight(weight, geometry)
    f, c, x, y = weight.shape
    given = usable(moments, c * x * y) or InputMoments.identity(geometry)
    channels = given.channel_covariance(c, x * y) + given.damping * np.eye(c)
    tensor = np.tensordot(np.linalg.cholesky(channels).T, weight, axes=(1, 1))
    lost_first = _tails(tensor.reshape(c, -1))
    lost_middle = _tails(tensor.transpose(0, 2, 1, 3).reshape(c * x, f * y))
    lost_last = _tails(tensor.transpose(1, 0, 2, 3).reshape(f, -1))
    best: tuple[float, Rank] | None = None
    for first in _multiples(c, multiple):
        for last in _multiples(f, multiple):
            ends = float(lost_first[first] + lost_last[last])
            if best is not None and ends >= best[0]:
                continue
            limit = min(first * x, last * y)
            empty, one = (
                form.multiplications(geometry, (first, k, last)) for k in (1, min(2, limit))
            )
            each = max(one - empty, 1)
            middle = int((share * geometry.multiplications - empty) // each) + 1
            middle = min(middle, limit) // multiple * multiple
            if (
                middle >= 1
                and (found := ends + float(lost_middle[middle])) < (best or (np.inf,))[0]
            ):
                best = found, (first, middle, last)
    return None if best is None else best[1]


def _multiples(full: int, multiple: int) -> list[int]:
    return [*range(multiple, full, multiple), full]


def _tails(unfolding: Array) -> Array:
    """Energy lost at each rank from 0 to the number of rows."""
    values = np.linalg.eigvalsh(unfolding @ unfolding.T)[::-1].clip(0)
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _ranks(rank: Rank, shape: tuple[int, ...]) -> tuple[int, int, int]:
    f, c, x, y = shape
    outer = several(rank, (c, min(c * x, f * y), f), TensorTrain.name)
    first, middle, last = several(outer, (c, min(outer[0] * x, outer[2] * y), f), TensorTrain.name)
    return first, middle, last
