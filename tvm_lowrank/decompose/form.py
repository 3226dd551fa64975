"""The contract of a form: which chain of convolutions replaces one, at which ranks, fitted how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tvm_lowrank.cost.operations import multiplications
from tvm_lowrank.decompose.compose import compose
from tvm_lowrank.decompose.moments import (
    Array,
    InputMoments,
    relative_error,
    undamped_error,
)
from tvm_lowrank.geometry import ConvGeometry

Rank: TypeAlias = int | tuple[int, ...]

# Shares of the dense convolution's multiplications at which ranks are offered.
SHARES = (1 / 8, 1 / 5, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True)
class Branch:
    """Part of a form's graph: some of its stages one after the other, from the layer's input on.

    ``crop`` rows and columns of the input (top, left, bottom, right) are left out first. Of the
    last stage's F u v channels, ``shuffle`` = (u, v), each u v in a row become u x v pixels of one;
    what then lies beyond the layer's output is cut.
    """

    stages: int
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    shuffle: tuple[int, int] = (1, 1)


class Fitter(ABC):
    """Fits one weight at several ranks; what the ranks share is computed once."""

    @abstractmethod
    def fit(self, rank: Rank) -> list[Array]:
        """One OIHW float64 weight a stage, in the order of `Form.stages`; ValueError: bad rank."""

    def fit_and_lose(self, rank: Rank) -> tuple[list[Array], float | None]:
        """`fit`, and what its factors lose where that falls out of the fit, else None.

        ``tr(D (S + d I) D')``, D what is missing of the weight, S + d I the damped moments that it
        is fitted under (`InputMoments.damping`).
        """
        return self.fit(rank), None


class LosingFitter(Fitter):
    """A `Fitter` of which every fit may tell what its factors lose."""

    def fit(self, rank: Rank) -> list[Array]:
        """The factors alone."""
        return self.fit_and_lose(rank)[0]

    @abstractmethod
    def fit_and_lose(self, rank: Rank) -> tuple[list[Array], float | None]:
        """See `Fitter`."""


class Form(ABC):
    """A way to replace a convolution by a chain of cheaper ones. Stateless."""

    name: str
    # Whether weights kept are what the form saves, and time only must not grow.
    keeps_memory = False
    # Whether it may be applied to each group of a grouped convolution (see `grouped.Grouped`).
    by_group = True

    def refuse(self, geometry: ConvGeometry) -> str | None:
        """Why the form cannot replace this convolution, or None where it can."""
        if geometry.groups == 1:
            return self._refuse_ungrouped(geometry)
        if geometry.groups == geometry.in_channels:
            return "groups = channels: depthwise"
        return f"groups = {geometry.groups}: grouped"

    @abstractmethod
    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        """`refuse` for groups = 1."""

    @abstractmethod
    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """A rank at which any weight is reproduced exactly."""

    def ranks(
        self, geometry: ConvGeometry, multiple: int, shares: Sequence[float] = SHARES
    ) -> list[Rank]:
        """Useful ranks, cheapest first, that save multiplications; none where the form is refused.

        Every map between two stages has a multiple of ``multiple`` (the vector width) channels, or
        as many as the layer's own input or output: lanes that hold no channel cost as much as
        those that do. For each of ``shares`` of the dense multiplications, the most expensive
        within it. ValueError unless ``multiple`` is positive.
        """
        if multiple < 1:
            raise ValueError(f"multiple={multiple}: a positive vector width was expected")
        return [] if self.refuse(geometry) else self._ranks(geometry, multiple, shares)

    @abstractmethod
    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """`ranks` of a layer that is not refused."""

    @abstractmethod
    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """The chain; it equals the dense convolution with the reconstructed weight exactly.

        No stage but the last has a bias. ValueError where the rank cannot be. A form of several
        `branches` lists the stages of one after those of the other.
        """

    def fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None = None,
        refine: bool = True,
        seed: int = 0,
    ) -> Fitter:
        """A `Fitter` of the OIHW ``weight``; without moments it is fitted to the weight alone.

        ``refine=False`` leaves out the iterations that lower the error after the closed form.
        ``seed`` is that of the clustering, where a form has any: the factors depend on nothing
        else. ValueError where `refuse` gives a reason, or for a weight of another shape.
        """
        if reason := self.refuse(geometry):
            raise ValueError(reason)
        check_weight(weight, geometry)
        return self._fitter(weight, geometry, moments, refine, seed)

    @abstractmethod
    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """`fitter` of a weight that fits a layer that is not refused."""

    def branches(self, geometry: ConvGeometry, rank: Rank) -> tuple[Branch, ...]:
        """The branches whose results are summed: one chain, unless a form says otherwise."""
        return (Branch(len(self.stages(geometry, rank))),)

    def values_moved(self, geometry: ConvGeometry, rank: Rank) -> int:
        """Values read and written beside the stages: cropping, shuffling, and the branches' sum."""
        branches = self.branches(geometry, rank)
        outputs = geometry.batch * geometry.out_channels * geometry.out_height * geometry.out_width
        inputs = geometry.batch * geometry.in_channels * geometry.height * geometry.width
        moved = 3 * (len(branches) - 1) * outputs
        for branch in branches:
            moved += 2 * inputs * any(branch.crop) + 2 * outputs * (branch.shuffle != (1, 1))
        return moved

    def reconstruct(self, factors: Sequence[Array], geometry: ConvGeometry | None = None) -> Array:
        """The dense OIHW weight that the factors stand for.

        ``geometry`` is the layer's, for forms whose factors do not tell it.
        """
        return compose(factors)

    def error(
        self, weight: Array, factors: Sequence[Array], geometry: ConvGeometry, moments: InputMoments
    ) -> float:
        """Share of the output's variance that the factors lose (see `moments.relative_error`)."""
        return relative_error(weight, self.reconstruct(factors, geometry), moments)

    def fit(
        self,
        fitter: Fitter,
        rank: Rank,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments,
    ) -> tuple[list[Array], Array, float]:
        """Factors by a fitter of the weight, the dense weight they stand for, and their `error`."""
        factors, lost = fitter.fit_and_lose(rank)
        whole = self.reconstruct(factors, geometry)
        if lost is None:
            return factors, whole, self.error(weight, factors, geometry, moments)
        return factors, whole, undamped_error(weight, whole, moments, lost)

    def gathers(self, geometry: ConvGeometry, rank: Rank) -> frozenset[int]:
        """Stages that only reorder channels: 1x1 weights of zeros and ones, no multiplications."""
        return frozenset()

    def multiplications(self, geometry: ConvGeometry, rank: Rank) -> int:
        """Multiplications of the chain by the direct algorithm, gathers left out."""
        skipped = self.gathers(geometry, rank)
        stages = enumerate(self.stages(geometry, rank))
        return multiplications([stage for index, stage in stages if index not in skipped])


def spread(
    costs: Sequence[tuple[int, Rank]], dense: int, shares: Sequence[float] = SHARES
) -> list[Rank]:
    """For each share the most expensive rank within that share of ``dense``; cheapest first.

    ``costs`` are pairs of multiplications and rank.
    """
    chosen: dict[Rank, int] = {}
    for share in shares:
        within = [(cost, rank) for cost, rank in costs if cost <= share * dense]
        if within:
            cost, rank = max(within, key=lambda pair: pair[0])
            chosen[rank] = cost
    return sorted(chosen, key=lambda rank: chosen[rank])


def spread_families(
    families: Sequence[Sequence[tuple[int, Rank]]], dense: int, shares: Sequence[float] = SHARES
) -> list[Rank]:
    """As `spread` for ranks in families (numbers of groups, shapes of a tree); cheapest first.

    With few shares every family has a rank for each, with many the families take turns, those
    left out that are exhausted long before the share.
    """
    chosen: dict[Rank, int] = {}
    for turn, share in enumerate(shares):
        best = []
        for costs in families:
            within = [(cost, rank) for cost, rank in costs if cost <= share * dense]
            if within:
                best.append(max(within, key=lambda pair: pair[0]))
        useful = [pair for pair in best if pair[0] > 0.8 * share * dense] or best
        if len(shares) > len(families) and useful:
            useful = [useful[turn % len(useful)]]
        chosen |= {rank: cost for cost, rank in useful}
    return sorted(chosen, key=lambda rank: chosen[rank])


def single_ranks(
    form: Form,
    geometry: ConvGeometry,
    multiple: int,
    limit: int,
    shares: Sequence[float],
) -> list[Rank]:
    """`Form._ranks` of a form with one rank, below the full rank ``limit``."""
    costs: list[tuple[int, Rank]] = []
    for rank in range(multiple, limit, multiple):
        cost = form.multiplications(geometry, rank)
        if cost >= geometry.multiplications:
            break
        costs.append((cost, rank))
    return spread(costs, geometry.multiplications, shares)


def single(rank: Rank, limit: int, form: str) -> int:
    """``rank`` as an integer in 1..limit, else ValueError."""
    if isinstance(rank, tuple) or not 1 <= rank <= limit:
        raise ValueError(f"rank={rank!r} of {form}: an integer from 1 to {limit} was expected")
    return int(rank)


def several(rank: Rank, limits: Sequence[int], form: str) -> tuple[int, ...]:
    """``rank`` as integers from 1 to each limit, else ValueError."""
    parts = rank if isinstance(rank, tuple) else (rank,)
    if len(parts) != len(limits) or not all(
        1 <= part <= limit for part, limit in zip(parts, limits, strict=True)
    ):
        bounds = ", ".join(f"1..{limit}" for limit in limits)
        raise ValueError(f"rank={rank!r} of {form}: integers from {bounds} were expected")
    return tuple(int(part) for part in parts)


def pointwise(geometry: ConvGeometry, outputs: int, groups: int = 1) -> ConvGeometry:
    """A 1x1 convolution of the input of ``geometry``."""
    return ConvGeometry(
        geometry.in_channels,
        outputs,
        geometry.height,
        geometry.width,
        (1, 1),
        groups=groups,
        batch=geometry.batch,
    )


def pointwise_after(stage: ConvGeometry, outputs: int, groups: int = 1) -> ConvGeometry:
    """A 1x1 convolution of the output of ``stage``."""
    return ConvGeometry(
        stage.out_channels,
        outputs,
        stage.out_height,
        stage.out_width,
        (1, 1),
        groups=groups,
        batch=stage.batch,
    )


def split_spatial(geometry: ConvGeometry) -> list[ConvGeometry]:
    """A convolution as one along the rows and one along the columns; itself if it is 1-D."""
    (x, y), (top, left, bottom, right) = geometry.kernel, geometry.padding
    if 1 in (x, y):
        return [geometry]
    rows = replace(
        geometry,
        kernel=(x, 1),
        stride=(geometry.stride[0], 1),
        padding=(top, 0, bottom, 0),
        dilation=(geometry.dilation[0], 1),
    )
    columns = replace(
        geometry,
        height=rows.out_height,
        kernel=(1, y),
        stride=(1, geometry.stride[1]),
        padding=(0, left, 0, right),
        dilation=(1, geometry.dilation[1]),
    )
    return [rows, columns]


def check_weight(weight: Array, geometry: ConvGeometry) -> None:
    """ValueError unless the weight has the geometry's OIHW shape."""
    if weight.shape != geometry.weight_shape:
        raise ValueError(f"weight {weight.shape}: {geometry.weight_shape} was expected")


def geometry_of(weight: Array) -> ConvGeometry:
    """A stand-in geometry for a weight that is decomposed outside any network.

    ValueError unless the weight is a 4-D OIHW array.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight {weight.shape}: a 4-D OIHW array was expected")
    f, c, x, y = weight.shape
    return ConvGeometry(c, f, x, y, (x, y))


def usable(moments: InputMoments | None, size: int) -> InputMoments | None:
    """The moments, or None where they say nothing; ValueError where they are of another layer."""
    if moments is None:
        return None
    if len(moments.mean) != size:
        raise ValueError(f"moments of {len(moments.mean)} inputs for a weight of {size}")
    return None if moments.is_identity else moments
