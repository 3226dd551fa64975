"""Cuts the output map into register tiles and says which kernel columns each may use."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Index, clamp_high, clamp_low, quotient


@dataclass(frozen=True)
class TileGroup:
    """Consecutive register tiles that run the same code.

    ``first`` is the index of the first tile in its line, ``count`` the number of tiles and
    ``width`` the number of pixels of each. All pixels use the kernel columns from ``full[0]`` to
    before ``full[1]``; ``partial`` lists the further columns ``(kw, pixels)`` that only these
    pixels of the tile use, because the others would read padding.
    """

    first: int
    count: int
    width: int
    full: tuple[int, int]
    partial: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Tiling:
    """The output map as ``lines`` lines of ``per_line`` register tiles.

    A line is one row cut into tiles, or, for tiles of several whole rows, the whole map.
    """

    lines: int
    per_line: int
    groups: tuple[TileGroup, ...]

    @property
    def count(self) -> int:
        """Number of register tiles."""
        return self.lines * self.per_line


def tiling(geometry: ConvGeometry, tile: int, rows: int = 1) -> Tiling:
    """Cut the output map of ``geometry`` into tiles of ``tile`` pixels of ``rows`` rows each.

    The last tile of a line is smaller if ``tile``, or ``rows``, does not divide the map. Tiles of
    several rows must span the width and have no padding around them (ValueError).
    """
    if rows == 1:
        per_line = -(-geometry.out_width // tile)
        return Tiling(geometry.out_height, per_line, _groups_of_row(_row(geometry), tile))
    if tile != geometry.out_width:
        raise ValueError(f"tiles of {rows} rows must be {geometry.out_width} wide, not {tile}")
    if any(geometry.padding):
        raise ValueError(f"tiles of {rows} rows need a padded input, not {geometry.padding}")
    whole, rest = divmod(geometry.out_height, rows)
    full = (0, geometry.kernel[1])
    groups = [TileGroup(0, whole, rows * tile, full, ())] if whole else []
    if rest:
        groups.append(TileGroup(whole, 1, rest * tile, full, ()))
    return Tiling(1, whole + bool(rest), tuple(groups))


@dataclass(frozen=True)
class _Row:
    """What of a convolution matters to the tiles of a row: its extents across."""

    outputs: int
    inputs: int
    kernel: int
    stride: int
    dilation: int
    padding: int


def _row(g: ConvGeometry) -> _Row:
    return _Row(g.out_width, g.width, g.kernel[1], g.stride[1], g.dilation[1], g.padding[1])


@functools.lru_cache(maxsize=1 << 14)
def _groups_of_row(row: _Row, tile: int) -> tuple[TileGroup, ...]:
    """The groups of one row from left to right.

    Kept: rows of few kinds are cut for every number of channels.
    """
    groups: list[TileGroup] = []
    for index in range(-(-row.outputs // tile)):
        start = index * tile
        width = min(tile, row.outputs - start)
        full, partial = _columns(row, start, width)
        last = groups[-1] if groups else None
        if last and (last.width, last.full, last.partial) == (width, full, partial):
            groups[-1] = TileGroup(last.first, last.count + 1, width, full, partial)
        else:
            groups.append(TileGroup(index, 1, width, full, partial))
    return tuple(groups)


def _columns(
    row: _Row, start: int, width: int
) -> tuple[tuple[int, int], tuple[tuple[int, tuple[int, ...]], ...]]:
    """The kernel columns of the tile of ``width`` pixels at ``start``, as in `TileGroup`."""
    users = []
    for kw in range(row.kernel):
        shift = kw * row.dilation - row.padding
        users.append(
            tuple(
                pixel
                for pixel in range(width)
                if 0 <= (start + pixel) * row.stride + shift < row.inputs
            )
        )
    # Each pixel uses a range of columns, so those that all use are a range too.
    shared = [kw for kw, pixels in enumerate(users) if len(pixels) == width]
    full = (shared[0], shared[-1] + 1) if shared else (0, 0)
    partial = tuple((kw, pixels) for kw, pixels in enumerate(users) if 0 < len(pixels) < width)
    return full, partial


def kernel_rows(geometry: ConvGeometry, row: Index) -> tuple[Index, Index]:
    """The kernel rows ``low <= kh < high`` that do not fall on padding at output row ``row``."""
    rows, stride, dilation = geometry.kernel[0], geometry.stride[0], geometry.dilation[0]
    top = geometry.padding[0]
    low: Index = 0
    high: Index = rows
    if top > 0:
        low = quotient(clamp_low(top - row * stride + dilation - 1, 0), dilation)
    if (geometry.out_height - 1) * stride + (rows - 1) * dilation - top >= geometry.height:
        beyond = geometry.height - 1 + top + dilation - row * stride
        high = clamp_high(quotient(clamp_low(beyond, 0), dilation), rows)
    return low, high
