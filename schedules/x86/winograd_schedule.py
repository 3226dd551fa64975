"""The tunable choices of the Winograd convolution, and which of them are legal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm_lowrank.schedules.transforms import tile_grid
from tvm_lowrank.schedules.transforms.cook_toom import MOST_POINTS, cook_toom

from tvm_lowrank.geometry import ConvGeometry

from .accuracy import stated_error
from .gemm import RegisterBlock
from .isa import VectorISA
from .space import canonical_geometry
from .workload import ConvWorkload

_LONGEST_KERNEL = 7


@dataclass(frozen=True)
class WinogradSchedule:
    """The tunable choices of the Winograd convolution.

    - ``tile``: rows and columns of the output that one transform yields: (m, m') of
      F(m x m', r x r'); 1 along an axis where the kernel is 1;
    - ``rows``: tiles of a register block of the products;
    - ``vectors``: vectors of output channels of a register block, a divisor of their number;
    - ``blocks``: register blocks that a parallel task takes through input transform, products and
      output transform, in scratch memory of its own; 0 for three stages over the whole map, the
      second one parallel over points and output channels, so that each weight is read once.
    """

    kernel: ClassVar[str] = "winograd"

    tile: tuple[int, int]
    rows: int
    vectors: int
    blocks: int = 1

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self), "tile": list(self.tile)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WinogradSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        height, width = data["tile"]
        return cls((height, width), data["rows"], data["vectors"], data["blocks"])


@dataclass(frozen=True)
class TileGrid(tile_grid.TileGrid):
    """The tiles of a batch in register blocks of ``rows``."""

    rows: int

    @property
    def blocks(self) -> int:
        """Register blocks; the last may be filled up by repeating the last tile."""
        return -(-self.tiles // self.rows)


def grid_of(workload: ConvWorkload, schedule: WinogradSchedule) -> TileGrid:
    """The tiles of a schedule."""
    return TileGrid(canonical_geometry(workload.geometry), schedule.tile, schedule.rows)


def refuse(workload: ConvWorkload, isa: VectorISA) -> str | None:
    """Why no Winograd kernel can compute ``workload``, or None if one can."""
    geometry = canonical_geometry(workload.geometry)
    if geometry.groups != 1:
        return f"winograd: groups is {geometry.groups}, expected 1"
    if workload.in_block != isa.lanes:
        return f"winograd: in_block is {workload.in_block}, expected {isa.lanes}"
    if geometry.stride != (1, 1):
        return f"winograd: stride is {geometry.stride}, expected (1, 1)"
    if geometry.dilation != (1, 1):
        return f"winograd: dilation is {geometry.dilation}, expected (1, 1)"
    if geometry.kernel == (1, 1) or max(geometry.kernel) > _LONGEST_KERNEL:
        return f"winograd: kernel is {geometry.kernel}, expected 2 to {_LONGEST_KERNEL} along one"
    return None


def is_legal(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa)
    if problem:
        return problem
    if min(*schedule.tile, schedule.rows, schedule.vectors) < 1 or schedule.blocks < 0:
        return "tile, rows and vectors must be positive, blocks not negative"
    grid = grid_of(workload, schedule)
    for taps, outputs in zip(grid.geometry.kernel, schedule.tile, strict=True):
        if taps == 1 and outputs > 1:
            return f"tile is {schedule.tile}, expected 1 where the kernel is 1"
    if max(grid.inputs) > MOST_POINTS:
        return f"tiles read {grid.inputs} inputs, expected at most {MOST_POINTS} along an axis"
    vectors = -(-grid.geometry.out_channels // isa.lanes)
    if vectors % schedule.vectors:
        return f"vectors={schedule.vectors} does not divide the {vectors} vectors of the output"
    registers = register_block(workload, schedule).registers
    if registers > isa.registers - 1:
        return f"it needs {registers} of {isa.registers - 1} vector registers"
    return None


def register_block(workload: ConvWorkload, schedule: WinogradSchedule) -> RegisterBlock:
    """The inner product of a schedule."""
    return RegisterBlock(schedule.rows, schedule.vectors, workload.geometry.in_channels)


def amplification(geometry: ConvGeometry, tile: tuple[int, int]) -> float:
    """How much the transforms amplify rounding errors; see `Transform.amplification`."""
    product = 1.0
    for outputs, taps in zip(tile, geometry.kernel, strict=True):
        product *= cook_toom(outputs, taps).amplification
    return product


def error_bound(workload: ConvWorkload, schedule: WinogradSchedule) -> float:
    """The stated max|error| / max|result|, as `accuracy.stated_error` defines it."""
    geometry = canonical_geometry(workload.geometry)
    return stated_error(geometry.in_channels, amplification(geometry, schedule.tile))
