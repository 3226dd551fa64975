"""CP: sums of rank-1 terms, run as 1x1, X x 1 depthwise, 1 x Y depthwise, 1x1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import als
from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    Rank,
    geometry_of,
    pointwise,
    pointwise_after,
    single,
    single_ranks,
    split_spatial,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.terms import POLISH_BUDGET, Dictionaries, TermRegression
from tvm_lowrank.geometry import ConvGeometry

SWEEPS = 60
QUICK_SWEEPS = 6


class CP(Form):
    """``1x1, C -> K``, depthwise ``X x 1`` and ``1 x Y``, ``1x1, K -> F`` (equation 2, Table 1).

    A stage whose kernel would be 1x1 is left out.
    """

    name = "cp"
    joint = False  # one spatial factor of X Y numbers instead of two of X and Y

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        if geometry.kernel == (1, 1):
            return "1x1 kernel: linear_combination is the same chain"
        if self.joint and 1 in geometry.kernel:
            x, y = geometry.kernel
            return f"{x}x{y} kernel: cp is the same chain"
        return "one input channel: nothing to project" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank` and `als.OrthogonalTerms`."""
        return _limit(geometry.weight_shape, self.joint)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`; K multiplications cost ``C + X / D + Y / D^2 + F / D^2`` a pixel."""
        return single_ranks(
            self, geometry, multiple, _limit(geometry.weight_shape, self.joint), shares
        )

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`."""
        terms = single(rank, _limit(geometry.weight_shape, self.joint), self.name)
        spatial = replace(geometry, in_channels=terms, out_channels=terms, groups=terms)
        parts = [spatial] if self.joint else split_spatial(spatial)
        first, last = pointwise(geometry, terms), pointwise_after(parts[-1], geometry.out_channels)
        return [first, *parts, last]

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`; ``refine=False`` also takes fewer sweeps of least squares."""
        return _Fitter(weight, moments, refine, self.joint)


class CP3(CP):
    """Three-way CP: ``1x1, C -> K``, depthwise ``X x Y``, ``1x1, K -> F``."""

    name = "cp3"
    joint = True


class _Fitter(Fitter):
    def __init__(self, weight: Array, moments: InputMoments | None, refine: bool, joint: bool):
        self._problem = TermRegression(weight, moments)
        self._starts = als.OrthogonalTerms(spatial_tensor(self._problem.tensor, joint))
        self._refine = refine
        self._limit = _limit(weight.shape, joint)
        self._name = CP3.name if joint else CP.name

    def fit(self, rank: Rank) -> list[Array]:
        terms = single(rank, self._limit, self._name)
        sweeps = SWEEPS if self._refine else QUICK_SWEEPS
        factors = als.alternate(self._starts.tensor, self._starts.largest(terms), sweeps)
        dictionaries = Dictionaries.apart(factors[1:])
        outputs = self._problem.finish(dictionaries, POLISH_BUDGET * self._refine)
        return to_stages(dictionaries, outputs, self._problem.shape)


def cp(
    weight: Array,
    rank: int,
    moments: InputMoments | None = None,
    refine: bool = True,
) -> tuple[Array, ...]:
    """``(K, C, 1, 1)``, ``(K, 1, X, 1)``, ``(K, 1, 1, Y)``, ``(F, K, 1, 1)`` of an OIHW weight.

    All K terms of equation 2 jointly: alternating least squares from orthogonal terms, with
    error-preserving correction (see `als.alternate`); with moments in whitened channels, followed
    by descent on the output error. ValueError for a rank outside 1..`CP.full_rank`.
    """
    return tuple(CP().fitter(weight, geometry_of(weight), moments, refine).fit(rank))


def cp3(
    weight: Array,
    rank: int,
    moments: InputMoments | None = None,
    refine: bool = True,
) -> tuple[Array, ...]:
    """As `cp` with one depthwise factor ``(K, 1, X, Y)`` in the middle."""
    return tuple(CP3().fitter(weight, geometry_of(weight), moments, refine).fit(rank))


def greedy_cp(
    weight: Array, rank: int, moments: InputMoments | None = None, sweeps: int = 30
) -> tuple[Array, ...]:
    """As `cp`, term by term: the best rank-1 term of what is left (equation 3), subtracted.

    Each term is found by alternating least squares and never changed again. Taking one away may
    leave a tensor of higher rank, so that on the weights of deep layers this converges slowly, and
    on three terms that lean the same way it needs many more (see the tests); it is here as what the
    paper describes.
    """
    geometry = geometry_of(weight)
    if reason := CP().refuse(geometry):
        raise ValueError(reason)
    terms = single(rank, _limit(geometry.weight_shape, False), CP.name)
    problem = TermRegression(weight, moments)
    left = spatial_tensor(problem.tensor, False).copy()
    found: list[list[Array]] = []
    for _ in range(terms):
        # The columns of the factors, one term wide.
        term = als.alternate(left, als.OrthogonalTerms(left).largest(1), sweeps, tolerance=1e-6)
        left -= als.terms_to_tensor(term)
        found.append(term)
    factors = [np.concatenate(columns, axis=1) for columns in zip(*found, strict=True)]
    dictionaries = Dictionaries.apart(factors[1:])
    problem.to_inputs(dictionaries)
    return tuple(to_stages(dictionaries, factors[0], weight.shape))


def spatial_tensor(tensor: Array, joint: bool) -> Array:
    """``(F, C, X, Y)``, or ``(F, C, X Y)`` where one is 1 or ``joint`` asks for it."""
    f, c, x, y = tensor.shape
    if joint or 1 in (x, y):
        return tensor.reshape(f, c, x * y)
    return tensor


def to_stages(terms: Dictionaries, outputs: Array, shape: tuple[int, ...]) -> list[Array]:
    """Stage weights of a chain whose terms each have vectors of their own."""
    rank, (_, _, x, y) = outputs.shape[1], shape
    if len(terms.vectors) == 3:
        spatial = [
            terms.vectors[1].reshape(rank, 1, x, 1),
            terms.vectors[2].reshape(rank, 1, 1, y),
        ]
    else:
        spatial = [terms.vectors[1].reshape(rank, 1, x, y)]
    chain = [terms.vectors[0][:, :, None, None], *spatial, outputs[:, :, None, None]]
    return [np.ascontiguousarray(factor) for factor in chain]


def _limit(shape: tuple[int, ...], joint: bool) -> int:
    f, c, x, y = shape
    pairs = c * f if joint or 1 in (x, y) else c * f * min(x, y)
    return min(x * y * min(c, f), pairs)
