"""Two resolutions along each axis of a kernel: which taps each sees, and from which padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvm_lowrank.decompose.moments import Array
from tvm_lowrank.geometry import ConvGeometry

# A kernel has two resolutions along axes of so many taps.
SMALLEST = 5


@dataclass(frozen=True)
class Axis:
    """Both branches along one axis of a kernel of X ``taps``.

    ``order`` 1 filters by means of s values and repeats coarse outputs, 2 filters by a hat of
    2 s - 1 values and interpolates linearly.
    """

    taps: int
    side: int
    factor: int
    order: int
    stride: int

    @property
    def offset(self) -> int:
        """The tap at which the small kernel starts."""
        return (self.taps - self.side) // 2

    @property
    def phases(self) -> int:
        """Output pixels for each coarse one (u)."""
        return max(self.factor // self.stride, 1)

    @property
    def step(self) -> int:
        """Stride of the coarse convolution."""
        return max(self.stride // self.factor, 1)

    @property
    def low_pass(self) -> Array:
        """Weights of the filter before subsampling; their sum is 1."""
        box = np.full(self.factor, 1 / self.factor)
        return box if self.order == 1 else np.convolve(box, box)

    @property
    def interpolation(self) -> Array:
        """``(u, 1 or 2)``: what a pixel takes of its coarse output, and of the next."""
        if self.phases == 1 or self.order == 1:
            return np.ones((self.phases, 1))
        part = np.arange(self.phases) / self.phases
        return np.stack([1 - part, part], axis=1)

    @property
    def _shift(self) -> int:
        """Taps by which the window of the last phase lies behind that of the first."""
        return self.stride * (self.phases - 1)

    @property
    def _around(self) -> int:
        """Taps that one coarse tap sees, all phases together."""
        ahead = self._shift if self.interpolation.shape[1] == 2 else 0
        return len(self.low_pass) + self._shift + ahead

    @property
    def coarse(self) -> int:
        """Coarse taps (J): as many as see no tap outside of the kernel; 0 where one sees too many.

        Moments are those of the kernel's taps, so nothing is known of others.
        """
        return max(0, (self.taps - self._around) // self.factor + 1)

    @property
    def origin(self) -> int:
        """Where the first coarse tap's filter starts in the kernel, for phase 0."""
        spare = self.taps - self._around - self.factor * (self.coarse - 1)
        return self._shift + spare // 2

    def places(self) -> list[tuple[int, int, int, int]]:
        """``(phase, neighbour, coarse tap, first tap of its filter in the kernel)``."""
        return [
            (phase, end, tap, self.factor * (tap + end) - self.stride * phase + self.origin)
            for phase, ends in enumerate(self.interpolation)
            for end, share in enumerate(ends)
            for tap in range(self.coarse)
            if share
        ]

    def patterns(self) -> Array:
        """``(u, J, X)``: the kernel through which each phase sees each coarse tap."""
        found = np.zeros((self.phases, self.coarse, self.taps))
        filtered = self.low_pass
        for phase, end, tap, first in self.places():
            share = self.interpolation[phase, end]
            found[phase, tap, first : first + len(filtered)] += share * filtered
        return found


def axes_of(geometry: ConvGeometry, rank: tuple[int, ...]) -> list[Axis]:
    """Rows and columns for a rank ``(k, s, order)``; a short axis keeps its resolution."""
    side, factor, order = rank
    return [
        Axis(taps, min(side, taps), factor, order, stride)
        if taps >= SMALLEST
        else Axis(taps, taps, 1, 1, stride)
        for taps, stride in zip(geometry.kernel, geometry.stride, strict=True)
    ]


def sides_of(
    geometry: ConvGeometry, axes: Sequence[Axis]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int]]:
    """Of each axis: padding before and after of both branches, and pixels of the coarse map.

    Padding is negative where the input is cut.
    """
    size, before = (geometry.height, geometry.width), geometry.padding[:2]
    out = (geometry.out_height, geometry.out_width)
    near, far, counts = [], [], []
    for axis, n, pad, pixels in zip(axes, size, before, out, strict=True):
        start = pad - axis.offset
        near.append((start, axis.stride * (pixels - 1) + axis.side - start - n))
        outputs = -(-pixels // axis.phases) + axis.interpolation.shape[1] - 1
        counts.append(axis.step * (outputs - 1) + axis.coarse)
        start = pad - axis.origin
        reach = axis.factor * (counts[-1] - 1) + len(axis.low_pass)
        far.append((start, reach - start - n))
    return near, far, counts


def features_of(rows: Axis, columns: Axis) -> Array:
    """``(phases, q, X Y)``: the taps of the small kernel, then those of the coarse one."""
    unit = np.eye(rows.taps * columns.taps).reshape(rows.taps, columns.taps, -1)
    small = unit[rows.offset :, columns.offset :][: rows.side, : columns.side]
    small = small.reshape(rows.side * columns.side, -1)
    coarse = np.einsum("pix,qjy->pqijxy", rows.patterns(), columns.patterns())
    coarse = coarse.reshape(rows.phases * columns.phases, rows.coarse * columns.coarse, -1)
    return np.concatenate([np.broadcast_to(small, (len(coarse), *small.shape)), coarse], axis=1)


def padded(
    geometry: ConvGeometry, ends: Sequence[tuple[int, int]]
) -> tuple[ConvGeometry, tuple[int, int, int, int]]:
    """The layer with this padding of each axis; what is negative is cut from the input instead."""
    (top, bottom), (left, right) = ends
    crop = (max(-top, 0), max(-left, 0), max(-bottom, 0), max(-right, 0))
    padding = (max(top, 0), max(left, 0), max(bottom, 0), max(right, 0))
    cut = replace(
        geometry,
        height=geometry.height - crop[0] - crop[2],
        width=geometry.width - crop[1] - crop[3],
        padding=padding,
    )
    return cut, crop
