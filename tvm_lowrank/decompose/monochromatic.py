"""Monochromatic filters: groups of filters that see few directions of the input channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose.clustering import k_subspaces, order_of
from tvm_lowrank.decompose.compose import permutation
from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    Rank,
    geometry_of,
    pointwise,
    pointwise_after,
    several,
    split_spatial,
    spread,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import REFINE_BUDGET, SharedBasis, seen_through
from tvm_lowrank.geometry import ConvGeometry

# Numbers of directions a group that are looked at, and middle ranks as multiples of those.
DIRECTIONS = 32
MIDDLES = (0.5, 0.75, 1.0, 1.5, 2.0)


class Monochromatic(Form):
    """``1x1, C -> G r``, then ``X x Y`` in G groups of r inputs and F / G filters each.

    Rank ``(G, r)``: the filters are clustered into G groups of equal size whose members see the
    same r directions of the channels ("colours" of a first layer; section 5.1.1 has r = 1 and
    ``C' = G`` directions). The last stage brings the filters back to their order; with G = 1 or
    G = F there is none.
    """

    name = "monochromatic"
    separable = False
    by_group = False

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        if self.separable and 1 in geometry.kernel:
            x, y = geometry.kernel
            return f"{x}x{y} kernel: nothing to separate"
        if geometry.kernel == (1, 1):
            return "1x1 kernel: linear_combination needs no groups"
        return "one input channel: nothing to project" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`."""
        c, f, (x, y) = geometry.in_channels, geometry.out_channels, geometry.kernel
        return (1, c, min(c * x, f * y)) if self.separable else (1, c)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: two or more groups, whole vectors of transformed channels."""
        found: set[Rank] = set()
        for groups in range(2, geometry.out_channels + 1):
            if geometry.out_channels % groups:
                continue
            costs = [
                (self.multiplications(geometry, rank), rank)
                for rank in self._ranks_of(geometry, groups, multiple)
            ]
            found.update(spread(costs, geometry.multiplications, shares))
        # Of the ranks near each share, the fewest groups and the most.
        kept: dict[Rank, int] = {}
        for share in shares:
            near = sorted(
                (rank[0], rank)
                for rank in found
                if isinstance(rank, tuple) and 0.7 * share < self._share(geometry, rank) <= share
            )
            for _, rank in near[:1] + near[-1:]:
                kept[rank] = self.multiplications(geometry, rank)
        return sorted(kept, key=lambda rank: kept[rank])[-10:]

    def _share(self, geometry: ConvGeometry, rank: Rank) -> float:
        return self.multiplications(geometry, rank) / geometry.multiplications

    def _ranks_of(self, geometry: ConvGeometry, groups: int, multiple: int) -> list[Rank]:
        """Ranks of ``groups`` groups: whole vectors of channels after each stage."""
        c, size = geometry.in_channels, geometry.out_channels // groups
        x, y = geometry.kernel
        step = multiple // math.gcd(multiple, groups)
        directions = _thinned(range(step, c, step))
        if not self.separable:
            return [(groups, r) for r in directions]
        return [
            (groups, r, k)
            for r in directions
            for k in sorted({max(step, round(r * part / step) * step) for part in MIDDLES})
            if k <= min(r * x, size * y)
        ]

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`."""
        groups, directions, *middle = self._parts(rank, geometry.weight_shape)
        grouped = replace(geometry, in_channels=groups * directions, groups=groups)
        chain = [pointwise(geometry, groups * directions), grouped]
        if middle:
            rows, columns = split_spatial(grouped)
            channels = groups * middle[0]
            chain[1:] = [
                replace(rows, out_channels=channels),
                replace(columns, in_channels=channels),
            ]
        if _reorders(geometry.out_channels, groups):
            chain.append(pointwise_after(chain[-1], geometry.out_channels))
        return chain

    def gathers(self, geometry: ConvGeometry, rank: Rank) -> frozenset[int]:
        """See `Form.gathers`: the last stage, where filters change their order."""
        groups = self._parts(rank, geometry.weight_shape)[0]
        last = len(self.stages(geometry, rank)) - 1
        return frozenset({last} if _reorders(geometry.out_channels, groups) else ())

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`."""
        return _Fitter(self, weight, geometry, moments, refine, seed)

    def _parts(self, rank: Rank, shape: tuple[int, ...]) -> tuple[int, ...]:
        f, c, x, y = shape
        limits = (f, c, min(c * x, f * y)) if self.separable else (f, c)
        parts = several(rank, limits, self.name)
        if f % parts[0]:
            raise ValueError(f"rank={rank!r} of {self.name}: {parts[0]} does not divide {f}")
        if self.separable:
            room = min(parts[1] * x, f // parts[0] * y)
            several(parts, (f, c, room), self.name)
        return parts


class MonochromaticSeparable(Monochromatic):
    """As `Monochromatic`, with ``X x 1`` and ``1 x Y`` for each group: rank ``(G, r, K)``."""

    name = "monochromatic_separable"
    separable = True


class _Fitter(Fitter):
    """Cluster the filters in whitened channels, then fit each cluster as if it were a layer."""

    def __init__(
        self,
        form: Monochromatic,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ):
        f, c, x, y = self._shape = weight.shape
        self._form, self._refine, self._seed = form, refine, seed
        self._weight = np.asarray(weight, np.float64)
        self._moments = usable(moments, c * x * y) or InputMoments.identity(geometry)
        channels = self._moments.channel_covariance(c, x * y) + self._moments.damping * np.eye(c)
        lower = np.linalg.cholesky(channels)
        self._whitened = np.einsum("fct,cd->fdt", self._weight.reshape(f, c, x * y), lower)
        self._shared = SharedBasis(self._weight.reshape(f, c, x * y), self._moments)

    def fit(self, rank: Rank) -> list[Array]:
        f, _, x, y = self._shape
        groups, directions, *middle = self._form._parts(rank, self._shape)
        labels = np.arange(f)
        if groups < f:
            labels = k_subspaces(self._whitened, groups, directions, self._seed)
        order = order_of(labels)
        colours, spatial, columns = [], [], []
        for members in order.reshape(groups, -1):
            size = len(members)
            shared = self._shared.of(members)
            basis, core, *_ = shared.fit(directions, None, self._refine, REFINE_BUDGET / groups)
            if middle:
                seen = seen_through(self._moments, basis, x * y)
                inner = SharedBasis(core.reshape(size, directions * x, y), seen)
                rows, horizontal, *_ = inner.fit(middle[0], refine=self._refine)
                spatial.append(rows.reshape(middle[0], directions, x, 1))
                columns.append(horizontal[:, :, None, :])
            else:
                spatial.append(core.reshape(size, directions, x, y))
            colours.append(basis[:, :, None, None])
        parts = [colours, spatial, columns] if middle else [colours, spatial]
        factors = [np.concatenate(part) for part in parts]
        if _reorders(f, groups):
            factors.append(permutation(np.argsort(order)))
        return [np.ascontiguousarray(factor) for factor in factors]


def monochromatic(
    weight: Array,
    ranks: tuple[int, int],
    moments: InputMoments | None = None,
    refine: bool = True,
    seed: int = 0,
) -> tuple[Array, ...]:
    """``(G r, C, 1, 1)``, ``(F, r, X, Y)`` in G groups, and the filters' order ``(F, F, 1, 1)``.

    Each cluster's r directions and its filters are fitted to the outputs (reduced-rank regression
    in whitened channels, then refined). ValueError for G that does not divide F or r > C.
    """
    form = Monochromatic()
    return tuple(form.fitter(weight, geometry_of(weight), moments, refine, seed).fit(ranks))


def _thinned(values: Sequence[int]) -> list[int]:
    """At most `DIRECTIONS` of increasing values, evenly spread in their logarithms."""
    if len(values) <= DIRECTIONS:
        return list(values)
    places = np.geomspace(1, len(values), DIRECTIONS).round().astype(int) - 1
    return [values[place] for place in np.unique(places)]


def _reorders(filters: int, groups: int) -> bool:
    return 1 < groups < filters
