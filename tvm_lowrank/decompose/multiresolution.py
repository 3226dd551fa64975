"""Multi-resolution (section 4.2): a small kernel at full resolution, the smooth rest at a coarser.

The rest is computed on the input filtered and subsampled by a factor s, and interpolated back:

    y = small * x  +  interpolate(coarse * subsample(filter * x))

Where the layer's stride is a multiple of s nothing is interpolated, and the sum is a convolution
exactly. Else every coarse output stands for u = s / stride pixels an axis, and each of those
*phases* sees the input through a kernel of its own; the error is the mean over the phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose.form import (
    Branch,
    Fitter,
    Form,
    Rank,
    geometry_of,
    several,
    spread,
    spread_families,
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments, relative_error
from tvm_lowrank.decompose.projection import GRAM_JITTER, solve_gram
from tvm_lowrank.decompose.resolutions import (
    SMALLEST,
    Axis,
    axes_of,
    features_of,
    padded,
    sides_of,
)
from tvm_lowrank.geometry import ConvGeometry

# Subsampling factors and spline orders that plans choose among; no kernel is wider than the last.
FACTORS = (2, 4)
ORDERS = (1, 2)
WIDEST = 1 << 16


class MultiResolution(Form):
    """Two branches that are summed; rank ``(k, s, order)``.

    ``k x k, C -> F`` of the kernel's middle; and a depthwise filter of stride s, ``J x J, C -> F``
    on its result, and a depthwise interpolation. J is what the kernel leaves room for. An axis of
    fewer than 5 taps keeps its resolution.
    """

    name = "multiresolution"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        x, y = geometry.kernel
        if max(x, y) < SMALLEST:
            return f"{x}x{y} kernel: too small for two resolutions"
        return "dilated: its taps are apart already" if max(geometry.dilation) > 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`: the small kernel is the whole one."""
        side = max(geometry.kernel)
        for factor in FACTORS:
            if not self._unfit(geometry, (side, factor, 1)):
                return (side, factor, 1)
        return (side, max(geometry.stride), 1)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`; for each factor and order, all sides of the small kernel."""
        families: list[list[tuple[int, Rank]]] = []
        for factor in FACTORS:
            for order in ORDERS:
                sides = range(1, max(geometry.kernel))
                ranks = [(side, factor, order) for side in sides]
                if not self._unfit(geometry, ranks[0]):
                    families.append([(self.multiplications(geometry, r), r) for r in ranks])
        if len(shares) > len(families):
            return spread_families(families, geometry.multiplications, shares)
        # Sides are few and far apart: each family's best at each share, however far below it.
        found = {
            rank for costs in families for rank in spread(costs, geometry.multiplications, shares)
        }
        return sorted(found, key=lambda rank: self.multiplications(geometry, rank))

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`: those of the first branch, then those of the second."""
        return [stage for _, stages in self._branches(geometry, rank) for stage in stages]

    def branches(self, geometry: ConvGeometry, rank: Rank) -> tuple[Branch, ...]:
        """See `Form.branches`."""
        return tuple(branch for branch, _ in self._branches(geometry, rank))

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`; least squares is the optimum, there is nothing to refine."""
        return _Fitter(self, weight, geometry, moments)

    def reconstruct(self, factors: Sequence[Array], geometry: ConvGeometry | None = None) -> Array:
        """The mean of the `phase_kernels`: exact where there is one phase."""
        return self.phase_kernels(factors, geometry).mean(axis=(0, 1))

    def phase_kernels(
        self, factors: Sequence[Array], geometry: ConvGeometry | None = None
    ) -> Array:
        """Kernels ``(u, v, F, C, X, Y)``: output pixel (i, j) is that of [i % u, j % v].

        ValueError without the geometry, which the factors do not tell.
        """
        if geometry is None:
            raise ValueError("the geometry of a multiresolution layer is needed")
        small, low_pass, coarse, *interpolation = factors
        rows, columns = self._axes_of(factors, geometry)
        f, c, x, y = geometry.weight_shape
        found = np.zeros((rows.phases, columns.phases, f, c, x, y))
        middle = (slice(rows.offset, rows.offset + rows.side),
                  slice(columns.offset, columns.offset + columns.side))  # fmt: skip
        found[..., middle[0], middle[1]] += small
        high, wide = low_pass.shape[2:]
        shares = np.ones((f, rows.phases, columns.phases, 1, 1))
        if interpolation:
            ends = interpolation[0].shape[2:]
            shares = interpolation[0].reshape(f, rows.phases, columns.phases, *ends)
        for p, a, i, top in rows.places():
            for q, b, j, left in columns.places():
                seen = coarse[:, :, i, j, None, None] * low_pass[None, :, 0]
                seen = seen * shares[:, p, q, a, b, None, None, None]
                found[p, q, :, :, top : top + high, left : left + wide] += seen
        return found

    def error(
        self, weight: Array, factors: Sequence[Array], geometry: ConvGeometry, moments: InputMoments
    ) -> float:
        """See `Form.error`: the mean over the phases."""
        kernels = self.phase_kernels(factors, geometry).reshape(-1, *geometry.weight_shape)
        return float(np.mean([relative_error(weight, kernel, moments) for kernel in kernels]))

    def _axes_of(self, factors: Sequence[Array], geometry: ConvGeometry) -> tuple[Axis, Axis]:
        """The axes of factors, from their shapes."""
        large = [axis for axis in (2, 3) if geometry.kernel[axis - 2] >= SMALLEST]
        side = max(factors[0].shape[axis] for axis in large)
        length = max(factors[1].shape[axis] for axis in large)
        for factor in (length, (length + 1) // 2):
            for order in ORDERS:
                rank = (side, factor, order)
                if not self._unfit(geometry, rank):
                    shapes = [stage.weight_shape for stage in self.stages(geometry, rank)]
                    if shapes == [factor.shape for factor in factors]:
                        return self._axes(geometry, rank)
        raise ValueError(f"factors of shapes {[f.shape for f in factors]}: not those of {geometry}")

    def _axes(self, geometry: ConvGeometry, rank: Rank) -> tuple[Axis, Axis]:
        """Rows and columns; ValueError where the rank cannot be."""
        if reason := self._unfit(geometry, rank):
            raise ValueError(f"rank={rank!r} of {self.name}: {reason}")
        rows, columns = axes_of(geometry, several(rank, (WIDEST,) * 3, self.name))
        return rows, columns

    def _unfit(self, geometry: ConvGeometry, rank: Rank) -> str:
        """Why a rank cannot be, or nothing."""
        widest = max(geometry.kernel)
        side, factor, order = several(rank, (widest, widest, max(ORDERS)), self.name)
        if factor < 2:
            return "a factor of 2 or more was expected"
        axes = axes_of(geometry, (side, factor, order))
        for axis in axes:
            if axis.factor % axis.stride and axis.stride % axis.factor:
                return f"of factor and stride {axis.stride} one must divide the other"
            if axis.coarse < 1:
                return f"{axis.taps} taps are too few for factor {factor} and order {order}"
        small, far, _ = sides_of(geometry, axes)
        for ends in (small, far):
            for size, (before, after) in zip((geometry.height, geometry.width), ends, strict=True):
                if size + min(before, 0) + min(after, 0) < 1:
                    return "a branch would read nothing but padding"
        return ""

    def _branches(
        self, geometry: ConvGeometry, rank: Rank
    ) -> list[tuple[Branch, list[ConvGeometry]]]:
        g, axes = geometry, self._axes(geometry, rank)
        near, far, counts = sides_of(g, axes)
        small, crop = padded(g, near)
        small = replace(small, kernel=(axes[0].side, axes[1].side))
        found = [(Branch(1, crop), [small])]
        first, crop = padded(g, far)
        c, f = g.in_channels, g.out_channels
        low_pass = replace(
            first,
            out_channels=c,
            groups=c,
            kernel=(len(axes[0].low_pass), len(axes[1].low_pass)),
            stride=(axes[0].factor, axes[1].factor),
        )
        coarse = ConvGeometry(
            c, f, counts[0], counts[1], (axes[0].coarse, axes[1].coarse),
            (axes[0].step, axes[1].step), batch=g.batch,
        )  # fmt: skip
        stages, phases = [low_pass, coarse], (axes[0].phases, axes[1].phases)
        if phases != (1, 1):
            ends = (axes[0].interpolation.shape[1], axes[1].interpolation.shape[1])
            stages.append(
                ConvGeometry(
                    f, f * phases[0] * phases[1], coarse.out_height, coarse.out_width, ends,
                    groups=f, batch=g.batch,
                )
            )  # fmt: skip
        return [*found, (Branch(len(stages), crop, phases), stages)]


class _Fitter(Fitter):
    """Least squares over both kernels jointly, under the moments as each phase sees them."""

    def __init__(
        self,
        form: MultiResolution,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
    ):
        self._form, self._geometry = form, geometry
        f, c, x, y = self._shape = weight.shape
        self._weight = np.asarray(weight, np.float64).reshape(f, c, x * y)
        given = usable(moments, c * x * y)
        self._covariance: Array | None = None
        if given is not None:
            damped = given.covariance + given.damping * np.eye(c * x * y)
            self._covariance = damped.reshape(c, x * y, c, x * y)
            flat = self._weight.reshape(f, -1)
            self._weighted = (flat @ damped).reshape(f, c, x * y)

    def fit(self, rank: Rank) -> list[Array]:
        rows, columns = self._form._axes(self._geometry, rank)
        f, c, _, _ = self._shape
        stages = self._form.stages(self._geometry, rank)
        seen = features_of(rows, columns)
        solved = self._least_squares(seen)
        taps = rows.side * columns.side
        small = solved[:, :, :taps].reshape(stages[0].weight_shape)
        coarse = solved[:, :, taps:].reshape(stages[2].weight_shape)
        low_pass = np.outer(rows.low_pass, columns.low_pass)
        factors = [small, np.tile(low_pass, (c, 1, 1, 1)), coarse]
        if len(stages) == 4:
            shares = np.einsum("pa,qb->pqab", rows.interpolation, columns.interpolation)
            shares = shares.reshape(-1, 1, *shares.shape[2:])
            factors.append(np.tile(shares, (f, 1, 1, 1)))
        return [np.ascontiguousarray(factor) for factor in factors]

    def _least_squares(self, seen: Array) -> Array:
        """Best ``(F, C, q)`` for features ``(phases, q, X Y)``, the same for every channel."""
        f, c, taps = self._weight.shape
        phases, q, _ = seen.shape
        if self._covariance is None:
            gram = np.einsum("pqt,prt->qr", seen, seen) / phases
            cross = (self._weight @ seen.mean(axis=0).T).reshape(f * c, q)
            return _solve(gram, cross).reshape(f, c, q)
        gram = np.zeros((c * q, c * q))
        for phase in seen:
            half = (self._covariance.reshape(-1, taps) @ phase.T).reshape(c, taps, c * q)
            gram += (phase @ half).reshape(c * q, c * q) / phases
        cross = (self._weighted @ seen.mean(axis=0).T).reshape(f, c * q)
        return _solve(gram, cross).reshape(f, c, q)


def multiresolution(
    weight: Array,
    rank: tuple[int, int, int],
    moments: InputMoments | None = None,
    stride: int = 1,
) -> tuple[Array, ...]:
    """``(F, C, k, k)``; ``(C, 1, L, L)``, ``(F, C, J, J)`` and, with u > 1, ``(F u u, 1, e, e)``.

    Small kernel; low-pass filter, coarse kernel and interpolation for an OIHW weight, with ``rank``
    = (k, s, order). The small and the coarse kernel are the joint least squares fit to the outputs,
    on average over the u = s / stride phases. ValueError for a kernel smaller than 5, or a rank
    that it has no room for.
    """
    geometry = replace(geometry_of(weight), stride=(stride, stride))
    return tuple(MultiResolution().fitter(weight, geometry, moments).fit(rank))


def _solve(gram: Array, cross: Array) -> Array:
    """Least squares; the small taps and the coarse patterns may be collinear."""
    gram[np.diag_indices_from(gram)] += GRAM_JITTER * (np.trace(gram) / len(gram) or 1.0)
    return solve_gram(gram, cross)
