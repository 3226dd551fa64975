"""The tunable choices of the Fourier convolution, its tiles, and which schedules are legal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tvm_lowrank.geometry import ConvGeometry

from .accuracy import stated_error
from .gemm import RegisterBlock
from .groups import is_depthwise, merge_groups
from .isa import VectorISA
from .space import canonical_geometry
from .workload import ConvWorkload

# Tiles along both axes, and along one where the kernel has a single tap along the other.
TILES = (8, 16, 32, 64)
LONG_TILES = (32, 64, 128, 256)
_SHORTEST_KERNEL = 3


@dataclass(frozen=True)
class FFTSchedule:
    """The tunable choices of the Fourier convolution.

    - ``tile``: rows and columns of the input that one transform takes (the paper's M + N - 1 of
      overlap-save); 1 along an axis where the kernel is 1;
    - ``rows``: tiles of a register block of the products;
    - ``vectors``: vectors of output channels of a register block, a divisor of their number;
    - ``gauss``: three real products for a complex one, not four multiplications at once: fewer
      operations, half as many weights again;
    - ``blocks``: register blocks that a parallel task takes through input transform, products and
      output transform, in scratch memory of its own; 0 for three stages over the whole map, the
      second one parallel over frequencies and output channels, so that each weight is read once.

    Depthwise convolutions have no products to block: they use ``rows``, ``vectors`` and ``blocks``
    of 1 and no ``gauss``.
    """

    kernel: ClassVar[str] = "fft"

    tile: tuple[int, int]
    rows: int = 1
    vectors: int = 1
    gauss: bool = False
    blocks: int = 1

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self), "tile": list(self.tile)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FFTSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        height, width = data["tile"]
        return cls(
            (height, width), data["rows"], data["vectors"], bool(data["gauss"]), data["blocks"]
        )


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution as a sum of correlations of stride 1, in overlapping tiles.

    With stride s and dilation d, whose greatest common divisor is g, output ``b + (d / g) m`` of
    class b is the sum over phases r of correlations with every (s / g)-th tap from r on, of the
    input at ``b s + r d + step i`` with ``step = s d / g``. Phases of more taps than a tile bears
    are cut into parts, whose inputs lie so many steps further. Phases and parts, the *terms*, are
    summed in the transformed domain, where they look like further input channels.
    """

    points: int
    taps: int
    stride: int
    dilation: int
    extent: int
    outputs: int
    padding: int

    @property
    def classes(self) -> int:
        """Interleaved sets of outputs that share no tile."""
        return self.dilation // math.gcd(self.stride, self.dilation) if self.taps > 1 else 1

    @property
    def step(self) -> int:
        """Elements of the input from one value of a tile to the next."""
        return self.stride * self.classes

    @property
    def phases(self) -> int:
        """Interleaved sets of taps that are correlations of their own."""
        return min(self.taps, self.stride // math.gcd(self.stride, self.dilation))

    @property
    def _interval(self) -> int:
        """Taps of the kernel from one of a phase to the next."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @cached_property
    def reach(self) -> int:
        """Taps of a term, at most."""
        taps = -(-self.taps // self._interval)
        parts = 1
        # More than three quarters of a tile lost to overlap never pay.
        while -(-taps // parts) > max(1, 3 * self.points // 4):
            parts += 1
        return -(-taps // parts)

    @property
    def parts(self) -> int:
        """Pieces of a phase."""
        return -(-self.taps // self._interval // self.reach) if self.reach else 1

    @property
    def terms(self) -> int:
        """Correlations to be summed: phases times parts."""
        return self.phases * self.parts

    @property
    def tile_outputs(self) -> int:
        """Outputs of a tile."""
        return self.points - self.reach + 1

    @property
    def tiles(self) -> int:
        """Tiles of a class; those at the end may overhang the map."""
        of_class = -(-self.outputs // self.classes)
        return -(-of_class // self.tile_outputs)

    def taps_of(self, term: int) -> range:
        """The taps of the kernel that a term uses, maybe fewer than `reach`."""
        phase, part = divmod(term, self.parts)
        first = phase + part * self.reach * self._interval
        end = min(self.taps, phase + (part + 1) * self.reach * self._interval)
        return range(first, max(first, end), self._interval)

    @property
    def is_padded(self) -> bool:
        """Whether some tile reads beyond the map."""
        furthest = (self.phases - 1) * self.dilation + (self.parts - 1) * self.reach * self.step
        last = (self.tiles * self.tile_outputs - self.tile_outputs + self.points - 1) * self.step
        last += (self.classes - 1) * self.stride + furthest
        return self.padding > 0 or last - self.padding >= self.extent


@dataclass(frozen=True)
class FFTGrid:
    """The output map of a batch as a grid of transformed tiles, in register blocks of ``rows``."""

    geometry: ConvGeometry
    axes: tuple[Axis, Axis]
    rows: int
    gauss: bool

    @property
    def is_planar(self) -> bool:
        """Whether tiles are transformed along both axes."""
        return min(axis.points for axis in self.axes) > 1

    @property
    def reals(self) -> int:
        """Real values of a spectrum: where both frequencies are 0 or half of the tile."""
        return 4 if self.is_planar else 2

    @property
    def pairs(self) -> int:
        """Complex values of a spectrum."""
        return (self.axes[0].points * self.axes[1].points - self.reals) // 2

    @property
    def slots(self) -> int:
        """Real vectors that a transformed tile is kept in."""
        return self.reals + (3 if self.gauss else 2) * self.pairs

    @property
    def terms(self) -> int:
        """Correlations summed in the transformed domain."""
        return self.axes[0].terms * self.axes[1].terms

    @property
    def tiles(self) -> int:
        """Tiles of the batch."""
        count = self.geometry.batch
        for axis in self.axes:
            count *= axis.classes * axis.tiles
        return count

    @property
    def blocks(self) -> int:
        """Register blocks; the last may be filled up by repeating the last tile."""
        return -(-self.tiles // self.rows)


def fft_geometry(workload: ConvWorkload, isa: VectorISA) -> ConvGeometry:
    """What the kernel computes: `canonical_geometry` with its groups merged, unless depthwise."""
    geometry = workload.geometry
    if not is_depthwise(geometry):
        geometry = merge_groups(geometry, workload.in_block, isa.lanes)
    return canonical_geometry(geometry)


def axes_of(geometry: ConvGeometry, tile: tuple[int, int]) -> tuple[Axis, Axis]:
    """Rows and columns of a canonical geometry in tiles."""
    extents, outputs = (
        (geometry.height, geometry.width),
        (geometry.out_height, geometry.out_width),
    )
    rows, columns = (
        Axis(
            tile[i],
            taps,
            geometry.stride[i],
            geometry.dilation[i] if taps > 1 else 1,
            extents[i],
            outputs[i],
            geometry.padding[i],
        )
        for i, taps in enumerate(geometry.kernel)
    )
    return rows, columns


def grid_of(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> FFTGrid:
    """The tiles of a schedule."""
    geometry = fft_geometry(workload, isa)
    axes = axes_of(geometry, schedule.tile)
    return FFTGrid(geometry, axes, schedule.rows, schedule.gauss)


def refuse(workload: ConvWorkload, isa: VectorISA) -> str | None:
    """Why no Fourier kernel can compute ``workload``, or None if one can."""
    geometry = workload.geometry
    if workload.in_block not in (1, isa.lanes):
        return f"fft: in_block is {workload.in_block}, expected 1 or {isa.lanes}"
    if workload.in_block == 1 and geometry.in_channels > isa.lanes:
        return f"fft: {geometry.in_channels} channels of a plain map, expected up to {isa.lanes}"
    if workload.in_block == 1 and geometry.groups > 1:
        return f"fft: {geometry.groups} groups of a plain map, expected 1"
    if max(geometry.kernel) < _SHORTEST_KERNEL:
        return f"fft: kernel is {geometry.kernel}, expected {_SHORTEST_KERNEL} or more along one"
    return None


def is_legal(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa)
    if problem:
        return problem
    if min(schedule.rows, schedule.vectors) < 1 or schedule.blocks < 0:
        return "rows and vectors must be positive, blocks not negative"
    geometry = fft_geometry(workload, isa)
    known = TILES if min(geometry.kernel) > 1 else LONG_TILES
    for taps, points in zip(geometry.kernel, schedule.tile, strict=True):
        if (points != 1) if taps == 1 else points not in known:
            return f"tile is {schedule.tile}, expected 1 where the kernel is 1, else of {known}"
    if is_depthwise(geometry):
        if schedule != FFTSchedule(schedule.tile):
            return "depthwise convolutions have rows, vectors and blocks of 1 and no gauss"
        return None
    vectors = -(-geometry.out_channels // geometry.groups // isa.lanes)
    if vectors % schedule.vectors:
        return f"vectors={schedule.vectors} does not divide the {vectors} vectors of a group"
    needed = register_block(workload, schedule, isa).registers
    if needed > isa.registers - 1:
        return f"it needs {needed} of {isa.registers - 1} vector registers"
    return None


def register_block(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> RegisterBlock:
    """The product at a complex frequency, or one of Gauss's three."""
    grid = grid_of(workload, schedule, isa)
    channels = grid.geometry.in_channels // grid.geometry.groups
    parts = 1 if schedule.gauss else 2
    return RegisterBlock(schedule.rows, schedule.vectors, channels, grid.terms, parts)


def error_bound(workload: ConvWorkload, schedule: FFTSchedule) -> float:
    """The stated max|error| / max|result|, as `accuracy.stated_error` defines it.

    Transforms amplify nothing, as they are orthogonal but for their scale; each of their stages, of
    both directions, rounds once more.
    """
    geometry = canonical_geometry(workload.geometry)
    rows, columns = axes_of(geometry, schedule.tile)
    terms = geometry.in_channels // geometry.groups * rows.terms * columns.terms
    stages = 2 * math.log2(rows.points * columns.points)
    return stated_error(terms + stages)
