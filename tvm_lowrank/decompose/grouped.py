"""Grouped convolutions: a form applied to each group, its stages side by side as grouped ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tvm_lowrank.decompose.form import Branch, Fitter, Form, Rank
from tvm_lowrank.decompose.moments import Array, InputMoments, output_energy
from tvm_lowrank.geometry import ConvGeometry

# Depthwise kernels of fewer taps a side are as cheap as what could replace them.
DEPTHWISE_TAPS = 5


class Grouped(Form):
    """A form for convolutions of any number of groups; with one group it is the form itself.

    All groups have the same rank, so that the stages of all of them are one grouped convolution
    each. Forms that reorder channels across the layer take one group only (`Form.by_group`).
    """

    def __init__(self, form: Form):
        self.form = form
        self.name, self.keeps_memory, self.by_group = form.name, form.keeps_memory, form.by_group

    def __getattr__(self, name: str) -> Any:
        """What the form has beside the contract."""
        return getattr(self.form, name)

    def refuse(self, geometry: ConvGeometry) -> str | None:
        """See `Form.refuse`."""
        groups = geometry.groups
        small = max(geometry.kernel) < DEPTHWISE_TAPS and groups == geometry.in_channels
        if groups == 1 or small or not self.by_group:
            return self.form.refuse(geometry)
        reason = self.form.refuse(_part(geometry))
        return f"in each of {groups} groups: {reason}" if reason else None

    def _refuse_ungrouped(self, geometry: ConvGeometry) -> str | None:
        return self.form._refuse_ungrouped(geometry)

    def full_rank(self, geometry: ConvGeometry) -> Rank:
        """See `Form.full_rank`: that of a group."""
        return self.form.full_rank(_part(geometry))

    def _ranks(self, geometry: ConvGeometry, multiple: int, shares: Sequence[float]) -> list[Rank]:
        """See `Form.ranks`: whole vectors of channels of all groups together."""
        each = multiple // math.gcd(multiple, geometry.groups)
        return self.form.ranks(_part(geometry), each, shares)

    def stages(self, geometry: ConvGeometry, rank: Rank) -> list[ConvGeometry]:
        """See `Form.stages`."""
        return [_whole(s, geometry.groups) for s in self.form.stages(_part(geometry), rank)]

    def branches(self, geometry: ConvGeometry, rank: Rank) -> tuple[Branch, ...]:
        """See `Form.branches`."""
        return self.form.branches(_part(geometry), rank)

    def gathers(self, geometry: ConvGeometry, rank: Rank) -> frozenset[int]:
        """See `Form.gathers`."""
        return self.form.gathers(_part(geometry), rank)

    def _fitter(
        self,
        weight: Array,
        geometry: ConvGeometry,
        moments: InputMoments | None,
        refine: bool,
        seed: int,
    ) -> Fitter:
        """See `Form.fitter`; the moments have one covariance a group."""
        if geometry.groups == 1:
            return self.form.fitter(weight, geometry, moments, refine, seed)
        part, count = _part(geometry), geometry.groups
        return _Fitter(
            [
                self.form.fitter(own, part, _moments_of(moments, group, count), refine, seed)
                for group, own in enumerate(np.split(np.asarray(weight), count))
            ]
        )

    def reconstruct(self, factors: Sequence[Array], geometry: ConvGeometry | None = None) -> Array:
        """See `Form.reconstruct`."""
        if geometry is None or geometry.groups == 1:
            return self.form.reconstruct(factors, geometry)
        parts = _split(factors, geometry.groups)
        return np.concatenate([self.form.reconstruct(own, _part(geometry)) for own in parts])

    def error(
        self, weight: Array, factors: Sequence[Array], geometry: ConvGeometry, moments: InputMoments
    ) -> float:
        """See `Form.error`: lost variance of all groups over the variance of all."""
        if geometry.groups == 1:
            return self.form.error(weight, factors, geometry, moments)
        part, count, lost, energy = _part(geometry), geometry.groups, 0.0, 0.0
        parts = zip(np.split(np.asarray(weight), count), _split(factors, count), strict=True)
        for group, (own, fitted) in enumerate(parts):
            given = _moments_of(moments, group, count) or moments
            whole = output_energy(own, given)
            error = self.form.error(own, fitted, part, given)
            lost += error * whole if whole > 0 else error
            energy += whole
        return lost / energy if energy > 0 else lost


class _Fitter(Fitter):
    def __init__(self, parts: list[Fitter]):
        self._parts = parts

    def fit(self, rank: Rank) -> list[Array]:
        fitted = [part.fit(rank) for part in self._parts]
        return [np.concatenate(same) for same in zip(*fitted, strict=True)]


def _part(geometry: ConvGeometry) -> ConvGeometry:
    """One group as a convolution of its own."""
    groups = geometry.groups
    return replace(
        geometry,
        in_channels=geometry.in_channels // groups,
        out_channels=geometry.out_channels // groups,
        groups=1,
    )


def _whole(stage: ConvGeometry, groups: int) -> ConvGeometry:
    """The stages of all groups as one."""
    return replace(
        stage,
        in_channels=stage.in_channels * groups,
        out_channels=stage.out_channels * groups,
        groups=stage.groups * groups,
    )


def _split(factors: Sequence[Array], groups: int) -> list[list[Array]]:
    """The factors of each group."""
    return [list(own) for own in zip(*(np.split(f, groups) for f in factors), strict=True)]


def _moments_of(moments: InputMoments | None, group: int, groups: int) -> InputMoments | None:
    if moments is None or moments.is_identity:
        return None
    if moments.groups != groups:
        raise ValueError(f"moments of {moments.groups} groups for a weight of {groups}")
    return moments.group(group)
