"""Tucker-2: 1x1 into fewer channels, a small X x Y core, 1x1 out (or the core straight to F)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.cost.operations import multiplications
from tvm_lowrank.decompose.form import (
    SHARES,
    Fitter,
    Form,
    LosingFitter,
    Rank,
    geometry_of,
    pointwise,
    pointwise_after,
    spread,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import SharedBasis, weight_basis
from tvm_lowrank.geometry import ConvGeometry

MIRROR_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 0.65, 0.8)
BALANCED_SHARES = (1 / 8, 1 / 4, 2 / 5, 3 / 5)


class Tucker2(Form):
    """``1x1, C -> K1``, then ``X x Y, K1 -> K2``, then ``1x1, K2 -> F``; rank ``(K1, K2)``.

    With ``K2 = F`` the last stage is left out: `linear_combination`'s mirror image, whose core
    keeps all its outputs and, at stride 1, its Winograd.
    """

    name = "tucker2"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        if geometry.kernel == (1, 1):
            return "1x1 kernel: linear_combination is the same chain"
        return "one input channel: nothing to project" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        return geometry.in_channels, geometry.out_channels

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: pairs ``(K1, F)`` and pairs near ``K1 / C = K2 / F``."""
        c, f, dense = geometry.in_channels, geometry.out_channels, geometry.multiplications
        inner = range(multiple, c, multiple)
        mirror: list[Rank] = [(k, f) for k in inner]
        balanced: list[Rank] = []
        for k in inner:
            outer = max(multiple, round(f * k / c / multiple) * multiple)
            if outer < f and outer <= k * geometry.kernel[0] * geometry.kernel[1]:
                balanced.append((k, outer))
        chosen: dict[Rank, int] = {}
        given = tuple(shares) != SHARES
        for pairs, own in ((mirror, MIRROR_SHARES), (balanced, BALANCED_SHARES)):
            costs = [(multiplications(self.stages(geometry, p)), p) for p in pairs]
            lookup = {rank: cost for cost, rank in costs}
            chosen |= {
                rank: lookup[rank] for rank in spread(costs, dense, shares if given else own)
            }
        return sorted(chosen, key=lambda rank: chosen[rank])

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`: two stages for ``(K1, F)``, else three."""
        inner, outer = _pair(rank, geometry.weight_shape)
        core = replace(geometry, in_channels=inner, out_channels=outer)
        chain = [
            pointwise(geometry, inner),
            core,
        ]
        if outer < geometry.out_channels:
            chain.append(pointwise_after(core, geometry.out_channels))
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
        return _Fitter(weight, moments, refine)


class _Fitter(LosingFitter):
    def __init__(self, weight: Array, moments: InputMoments | None, refine: bool):
        f, c, x, y = self._shape = weight.shape
        self._weight = np.asarray(weight, np.float64)
        given = usable(moments, c * x * y)
        flat = self._weight.reshape(f, c, x * y)
        self._refine = refine
        self._shared = None if given is None else SharedBasis(flat, given)
        self._basis = weight_basis(flat) if given is None else None

    def fit_and_lose(self, rank: Rank) -> tuple[list[Array], float | None]:
        inner, outer = _pair(rank, self._shape)
        (f, c, x, y), lost = self._shape, None
        if self._shared is not None:
            reduce, core, expand, lost = self._shared.fit(inner, outer, self._refine)
            core = core.reshape(outer, inner, x, y)
        elif outer < f:
            reduce, core, expand = _weight_only(self._weight, inner, outer)
        else:
            assert self._basis is not None
            reduce, expand = np.ascontiguousarray(self._basis[:, :inner].T), None
            core = np.tensordot(self._weight, reduce, axes=(1, 1)).transpose(0, 3, 1, 2)
        factors = [reduce.reshape(inner, c, 1, 1), np.ascontiguousarray(core)]
        if expand is not None:
            factors.append(expand.reshape(f, outer, 1, 1))
        return factors, lost


def tucker2(
    weight: Array,
    ranks: tuple[int, int],
    moments: InputMoments | None = None,
    refine: bool = True,
) -> tuple[Array, ...]:
    """Factors ``(K1, C, 1, 1)``, ``(K2, K1, X, Y)``, ``(F, K2, 1, 1)``; the last only if K2 < F.

    Without moments: higher-order orthogonal iteration by tensorly (Kim et al. 2016), or the
    optimal SVD where K2 = F. With moments: the input basis from the whitened unfolding, the core
    and the output basis by reduced-rank regression given it, then refinement of the three.
    ValueError for ranks outside 1..C and 1..min(F, K1 X Y), or a 1x1 kernel.
    """
    return tuple(Tucker2().fitter(weight, geometry_of(weight), moments, refine).fit(ranks))


def _weight_only(weight: Array, inner: int, outer: int) -> tuple[Array, Array, Array]:
    """Reduce ``(K1, C)``, core ``(K2, K1, X, Y)``, expand ``(F, K2)`` by tensorly."""
    from tensorly.decomposition import partial_tucker  # slow to import, seldom needed

    if not weight.any():
        zeros = np.zeros((outer, inner, *weight.shape[2:]))
        return np.eye(inner, weight.shape[1]), zeros, np.eye(len(weight), outer)
    (core, (expand, reduce)), _ = partial_tucker(
        weight, rank=[outer, inner], modes=[0, 1], svd="truncated_svd", random_state=0
    )
    return np.ascontiguousarray(reduce.T), core, np.ascontiguousarray(expand)


def _pair(rank: Rank, shape: tuple[int, ...]) -> tuple[int, int]:
    f, c, x, y = shape
    if isinstance(rank, tuple) and len(rank) == 2:
        inner, outer = rank
        if 1 <= inner <= c and outer >= 1 and (outer <= min(f, inner * x * y) or outer == f):
            return int(inner), int(outer)
    raise ValueError(
        f"rank={rank!r} of tucker2: a pair from 1..{c} and 1..{f} was expected, "
        f"the second at most {x * y} times the first unless it is {f}"
    )
