"""Biclustering (section 3.3): N groups of inputs, M groups of outputs, each block of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import als
from tvm_lowrank.decompose.channels import ChannelPoints, Clusters
from tvm_lowrank.decompose.clustering import contiguous, order_of
from tvm_lowrank.decompose.compose import permutation
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
    usable,
)
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import SharedBasis
from tvm_lowrank.decompose.terms import POLISH_BUDGET, Dictionaries, TermRegression
from tvm_lowrank.geometry import ConvGeometry

# Numbers of groups (inputs, outputs) that plans choose among.
GROUPS = ((2, 1), (1, 2), (2, 2), (4, 4))


class Bicluster(Form):
    """Grouped ``1x1, C -> N M K``, depthwise ``X x 1`` and ``1 x Y``, grouped ``1x1 -> F``.

    Rank ``(N, M, K)``: the blocks ``W_kl`` are sums of rank-1 terms, K on average and as many as
    each needs, so long as every group of inputs and of outputs has as many as the others. Channels
    change their order before the first, between the last two and after the last stage: those
    stages are gathers, which `FactorConvolutions` folds into neighbouring layers where it can.

    ``contiguous=True`` slices the channels in order instead of clustering them: the baseline.
    """

    name = "bicluster"
    separable = False
    by_group = False

    def __init__(self, contiguous: bool = False):
        self.contiguous = contiguous

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        x, y = geometry.kernel
        if self.separable and 1 in (x, y):
            return f"{x}x{y} kernel: nothing to separate"
        if (x, y) == (1, 1):
            return "1x1 kernel: linear_combination needs no groups"
        return "one input channel: nothing to project" if geometry.in_channels == 1 else None

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`: one block."""
        return (1, 1, self._limit(geometry.weight_shape, 1, 1))

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: for each share, the few numbers of groups that divide the channels."""
        families: list[list[tuple[int, Rank]]] = []
        for n, m in GROUPS:
            if self._divides(geometry, (n, m)):
                limit = self._limit(geometry.weight_shape, n, m)
                step = max(multiple // math.gcd(multiple, n * m), 1)
                families.append(
                    [
                        (self.multiplications(geometry, (n, m, k)), (n, m, k))
                        for k in range(step, limit + 1, step)
                    ]
                )
        return spread_families(families, geometry.multiplications, shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`; N and M divide C and F."""
        return [stage for stage, _ in self._chain(geometry, rank)]

    def gathers(self, geometry: ConvGeometry, rank: Rank) -> frozenset[int]:
        """See `Form.gathers`."""
        chain = enumerate(self._chain(geometry, rank))
        return frozenset(index for index, (_, gather) in chain if gather)

    def _chain(self, geometry: ConvGeometry, rank: Rank) -> list[tuple[ConvGeometry, bool]]:
        """Stages, and whether each only changes the order of channels."""
        n, m, k = self._parts(rank, geometry.weight_shape)
        inner = n * m * k
        rows, columns = _spatial(geometry, inner)
        if self.separable:
            assert columns is not None
            computed = [
                replace(rows, in_channels=geometry.in_channels, groups=n),
                replace(columns, out_channels=geometry.out_channels, groups=m),
            ]
        else:
            computed = [pointwise(geometry, inner, n), rows]
            computed += [columns] if columns is not None else []
            computed.append(pointwise_after(computed[-1], geometry.out_channels, m))
        chain = [(stage, False) for stage in computed]
        if min(n, m) > 1:
            chain.insert(-1, (pointwise_after(computed[-2], inner), True))
        if n > 1:
            chain.insert(0, (pointwise(geometry, geometry.in_channels), True))
        if m > 1:
            chain.append((pointwise_after(computed[-1], geometry.out_channels), True))
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
        return _Fitter(self, weight, geometry, moments, refine, seed)

    def _parts(self, rank: Rank, shape: tuple[int, ...]) -> tuple[int, int, int]:
        f, c, x, y = shape
        n, m, _ = several(rank, (c, f, c * f * x * y), self.name)
        if c % n or f % m:
            raise ValueError(f"rank={rank!r} of {self.name}: divisors of {c} and {f} were expected")
        n, m, k = several(rank, (c, f, self._limit(shape, n, m)), self.name)
        return n, m, k

    def _limit(self, shape: tuple[int, ...], n: int, m: int) -> int:
        """Terms with which a block is exact."""
        f, c, x, y = shape[0] // m, shape[1] // n, *shape[2:]
        if self.separable:
            return min(c * x, f * y)
        return min(x * y * min(c, f), c * f * (1 if 1 in (x, y) else min(x, y)))

    def _divides(self, geometry: ConvGeometry, split: tuple[int, int]) -> bool:
        c, f = geometry.in_channels // split[0], geometry.out_channels // split[1]
        whole = c * split[0] == geometry.in_channels and f * split[1] == geometry.out_channels
        return whole and min(c, f) > 1


class BiclusterSeparable(Bicluster):
    """Grouped ``X x 1, C -> N M K``, then grouped ``1 x Y, N M K -> F``: blocks are separable."""

    name = "bicluster_separable"
    separable = True


# The regression of a group of outputs, and its blocks, a group of inputs each.
_Split = tuple[TermRegression, list[als.OrthogonalTerms]]


class _Fitter(Fitter):
    """Blocks are fitted alone, then what each group of outputs reads is fitted jointly.

    Clusters, and all that depends on them alone, are worked out once for all K.
    """

    def __init__(
        self,
        form: Bicluster,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ):
        self._form, self._weight = form, np.asarray(weight, np.float64)
        self._refine = refine
        given = usable(moments, weight[0].size)
        self._has_data = given is not None
        self._points = None if form.contiguous else ChannelPoints(self._weight, given, seed=seed)
        if form.separable:
            whole = self._weight.reshape(len(weight), -1, geometry.kernel[1])
            self._basis = SharedBasis(whole, given or InputMoments.identity(geometry))
            self._bases: dict[int, SharedBasis] = {}
        else:
            self._whole = TermRegression(self._weight, given)
            self._split: dict[tuple[int, int], list[_Split]] = {}

    def fit(self, rank: Rank) -> list[Array]:
        f, c = self._weight.shape[:2]
        n, m, k = self._form._parts(rank, self._weight.shape)
        found = Clusters(contiguous(c, n), contiguous(f, m))
        if self._points is not None:
            found = Clusters(self._points.of_inputs(n), self._points.of_outputs(m))
        order_in, order_out = order_of(found.inputs), order_of(found.outputs)
        members = order_in.reshape(n, -1)
        groups = order_out.reshape(m, -1)
        if self._form.separable:
            blocks = self._separable(groups, found.inputs, members, k)
        else:
            if (n, m) not in self._split:
                self._split[n, m] = self._regressions(groups, found.inputs, members)
            budget = POLISH_BUDGET / m * self._refine
            blocks = [
                self._terms(problem, parts, found.inputs, members, k, budget)
                for problem, parts in self._split[n, m]
            ]
        # Each block's chain has its channels by group of inputs; the first stages of all blocks
        # are brought together by group of inputs, the last one by group of outputs.
        by_inputs = np.concatenate([np.arange(n * m * k).reshape(m, n, k)[:, g] for g in range(n)])
        factors = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
        order = by_inputs.reshape(-1)
        factors[:-1] = [factor[order] for factor in factors[:-1]]
        if min(n, m) > 1:
            factors.insert(-1, permutation(np.argsort(order)))
        if n > 1:
            factors.insert(0, permutation(order_in))
        if m > 1:
            factors.append(permutation(np.argsort(order_out)))
        return [np.ascontiguousarray(factor) for factor in factors]

    def _regressions(
        self, groups: np.ndarray, labels: np.ndarray, members: np.ndarray
    ) -> list[_Split]:
        whitened = self._whole.apart(labels) if len(members) > 1 else self._whole
        found = []
        for outputs in groups:
            problem = whitened.of(outputs)
            tensor = spatial_tensor(problem.tensor, False)
            parts = [np.ascontiguousarray(tensor[:, inputs]) for inputs in members]
            found.append((problem, [als.OrthogonalTerms(part) for part in parts]))
        return found

    def _terms(
        self,
        problem: TermRegression,
        blocks: list[als.OrthogonalTerms],
        labels: np.ndarray,
        members: np.ndarray,
        k: int,
        budget: float,
    ) -> list[Array]:
        """CP of each block of one group of outputs; the outputs' factor and the polish jointly."""
        _, c, x, y = self._weight.shape
        sweeps = SWEEPS if self._refine else QUICK_SWEEPS
        parts = []
        for block, inputs in zip(blocks, members, strict=True):
            found = als.alternate(block.tensor, block.largest(k), sweeps)
            channels = np.zeros((c, k))
            channels[inputs] = found[1]
            parts.append([channels, *found[2:]])
        factors = [np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)]
        mask = np.repeat((labels[None] == np.arange(len(members))[:, None]).astype(float), k, 0)
        terms = Dictionaries.apart(factors, mask)
        outputs = problem.finish(terms, budget)
        reduced = np.concatenate(
            [terms.vectors[0][g * k : (g + 1) * k, inputs] for g, inputs in enumerate(members)]
        )
        inner = len(reduced)
        spatial = [terms.vectors[1].reshape(inner, 1, x, -1)]
        if len(terms.vectors) == 3:
            spatial.append(terms.vectors[2].reshape(inner, 1, 1, y))
        return [reduced[:, :, None, None], *spatial, outputs[:, :, None, None]]

    def _separable(
        self, groups: np.ndarray, labels: np.ndarray, members: np.ndarray, k: int
    ) -> list[list[Array]]:
        """SVD of each block in whitened columns; the horizontal factor, and the polish, jointly."""
        _, c, x, _ = self._weight.shape
        if len(members) not in self._bases:
            self._bases[len(members)] = self._basis.apart(np.repeat(labels, x))
        shared = self._bases[len(members)]
        refine, blocks = self._refine and self._has_data, []
        for outputs in groups:
            basis, horizontal = shared.of(outputs).fit_blocks(k, refine)
            vertical = [
                rows[:, inputs]
                for rows, inputs in zip(basis.reshape(-1, k, c, x), members, strict=True)
            ]
            blocks.append([np.concatenate(vertical)[..., None], horizontal[:, :, None, :]])
        return blocks


def _spatial(geometry: ConvGeometry, inner: int) -> tuple[ConvGeometry, ConvGeometry | None]:
    """The depthwise stages of ``inner`` channels; one for a 1-D kernel."""
    depthwise = replace(geometry, in_channels=inner, out_channels=inner, groups=inner)
    parts = split_spatial(depthwise)
    return parts[0], parts[1] if len(parts) > 1 else None


def bicluster_cp(
    weight: Array,
    ranks: tuple[int, int, int],
    moments: InputMoments | None = None,
    refine: bool = True,
    seed: int = 0,
) -> tuple[Array, ...]:
    """Stage weights of `Bicluster` for an OIHW weight; ``ranks`` = (N, M, K).

    ValueError for N or M that do not divide C or F, or K beyond a block's exact rank.
    """
    form = Bicluster()
    return tuple(form.fitter(weight, geometry_of(weight), moments, refine, seed).fit(ranks))
