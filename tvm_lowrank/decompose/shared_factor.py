"""Sharing between terms (equation 4): vectors from dictionaries, each convolution computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import als
from tvm_lowrank.decompose.clustering import k_subspaces, order_of
from tvm_lowrank.decompose.cp import QUICK_SWEEPS, SWEEPS, spatial_tensor
from tvm_lowrank.decompose.form import (
    Fitter,
    Form,
    Rank,
    geometry_of,
    pointwise,
    pointwise_after,
    several,
    split_spatial,
    spread_families,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.terms import POLISH_BUDGET, Dictionaries, TermRegression
from tvm_lowrank.geometry import ConvGeometry

# (B, G) that plans choose among.
BRANCHES = ((1, 2), (2, 1), (2, 2), (1, 3), (2, 3))


class SharedFactor(Form):
    """``1x1, C -> A``, ``X x 1, A -> A B``, ``1 x Y, A B -> A B G``, ``1x1, A B G -> F``.

    Rank ``(A, B, G)``: A channel vectors alpha, B vectors beta for each, G vectors gamma for each
    pair. The K = A B G terms of equation 4 that share alpha read one channel, those that also share
    beta read one column filter; both are computed once (grouped convolutions that multiply their
    channels). delta is each term's own: its best value is a least squares fit.
    A kernel with X = 1 or Y = 1 has rank ``(A, B)`` and three stages.
    """

    name = "shared_factor"

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        if geometry.kernel == (1, 1):
            return "1x1 kernel: no terms share a channel"
        return "one input channel: nothing to share" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`: all unit vectors."""
        return _limits(geometry.weight_shape)

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: a few shapes of the tree, the number of its roots by cost."""
        limits = _limits(geometry.weight_shape)
        trees: Sequence[tuple[int, ...]] = BRANCHES if len(limits) == 3 else ((2,), (3,))
        families: list[list[tuple[int, Rank]]] = [
            [
                (self.multiplications(geometry, (roots, *tree)), (roots, *tree))
                for roots in range(multiple, limits[0] + 1, multiple)
            ]
            for tree in trees
            if all(b <= limit for b, limit in zip(tree, limits[1:], strict=True))
        ]
        return spread_families(families, geometry.multiplications, shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`."""
        roots, *branches = several(rank, _limits(geometry.weight_shape), self.name)
        chain, channels = [pointwise(geometry, roots)], roots
        for stage, branch in zip(split_spatial(geometry), branches, strict=True):
            wider = channels * branch
            chain.append(replace(stage, in_channels=channels, out_channels=wider, groups=channels))
            channels = wider
        return [*chain, pointwise_after(chain[-1], geometry.out_channels)]

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`."""
        return _Fitter(weight, moments, refine, seed)


class _Fitter(Fitter):
    """CP with K terms, its vectors clustered level by level, the dictionaries fitted to outputs."""

    def __init__(self, weight: Array, moments: InputMoments | None, refine: bool, seed: int):
        self._problem = TermRegression(weight, moments)
        self._starts = als.OrthogonalTerms(spatial_tensor(self._problem.tensor, False))
        self._refine, self._seed = refine, seed

    def fit(self, rank: Rank) -> list[Array]:
        _, _, x, y = shape = self._problem.shape
        levels = several(rank, _limits(shape), SharedFactor.name)
        terms = unit_vectors(levels) if levels == _limits(shape) else self._clustered(levels)
        outputs = self._problem.finish(terms, POLISH_BUDGET * self._refine)
        spatial = terms.vectors[1:]
        if len(spatial) == 2:
            stages = [spatial[0].reshape(-1, 1, x, 1), spatial[1].reshape(-1, 1, 1, y)]
        else:
            stages = [spatial[0].reshape(-1, 1, x, y)]
        factors = [terms.vectors[0][:, :, None, None], *stages, outputs[:, :, None, None]]
        return [np.ascontiguousarray(factor) for factor in factors]

    def _clustered(self, levels: tuple[int, ...]) -> Dictionaries:
        count = int(np.prod(levels))
        sweeps = SWEEPS if self._refine else QUICK_SWEEPS
        found = als.alternate(self._starts.tensor, self._starts.largest(count), sweeps)
        missing = count - found[0].shape[1]
        outputs, *vectors = (np.pad(factor, ((0, 0), (0, missing))) for factor in found)
        # What a term weighs says how much its vectors matter to a centre.
        return share([v.T for v in vectors], np.linalg.norm(outputs, axis=0), levels, self._seed)


def share(
    vectors: Sequence[Array], strengths: Array, levels: Sequence[int], seed: int = 0
) -> Dictionaries:
    """Dictionaries for K terms with vectors ``(K, dimension)`` a mode, shared as a tree.

    ``levels`` are the branches at each level, their product K. The terms are clustered by their
    first vectors into ``levels[0]`` sets of equal size, each of those by their second vectors, and
    so on: balanced k-means of directions (k-subspaces of dimension 1, so a vector's sign does not
    matter), weighted by the terms' ``strengths``. ValueError where the product is not K.
    """
    count = len(strengths)
    if int(np.prod(levels)) != count:
        raise ValueError(f"levels={tuple(levels)}: a product of {count} was expected")
    groups = [np.arange(count)]
    dictionaries, uses = [], []
    for level, (branch, rows) in enumerate(zip(levels, vectors, strict=True)):
        weighted = rows * strengths[:, None]
        split = []
        for members in groups:
            labels = k_subspaces(weighted[members], branch, 1, seed)
            split += list(members[order_of(labels)].reshape(branch, -1))
        groups = split
        dictionaries.append(np.stack([_direction(weighted[members]) for members in groups]))
        nodes = int(np.prod(levels[: level + 1]))
        uses.append(np.repeat(np.arange(nodes), count // nodes))
    return Dictionaries(dictionaries, uses)


def unit_vectors(levels: Sequence[int]) -> Dictionaries:
    """The tree with all unit vectors at every level, from which any weight is exact."""
    count = int(np.prod(levels))
    dictionaries, uses, nodes = [], [], 1
    for level in levels:
        dictionaries.append(np.tile(np.eye(level), (nodes, 1)))
        nodes *= level
        uses.append(np.repeat(np.arange(nodes), count // nodes))
    return Dictionaries(dictionaries, uses)


def shared_factor(
    weight: Array,
    ranks: tuple[int, ...],
    moments: InputMoments | None = None,
    refine: bool = True,
    seed: int = 0,
) -> tuple[Array, ...]:
    """``(A, C, 1, 1)``, ``(A B, 1, X, 1)``, ``(A B G, 1, 1, Y)``, ``(F, A B G, 1, 1)``.

    ValueError for ranks outside 1..C, 1..X and 1..Y.
    """
    form = SharedFactor()
    return tuple(form.fitter(weight, geometry_of(weight), moments, refine, seed).fit(ranks))


def _direction(vectors: Array) -> Array:
    """The unit vector nearest to the lines through all ``vectors`` (n, d)."""
    return np.ascontiguousarray(np.linalg.eigh(vectors.T @ vectors)[1][:, -1])


def _limits(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, c, x, y = shape
    return (c, x * y) if 1 in (x, y) else (c, x, y)
