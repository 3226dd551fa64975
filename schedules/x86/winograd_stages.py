"""The input and output transforms of a Winograd convolution, for register blocks of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from tvm import ir, tirx
from tvm_lowrank.schedules.transforms.cook_toom import transform_code

from .emitter import Emitter, Index, clamp_high, clamp_low, quotient, remainder
from .epilogue import Epilogue
from .gemm import RegisterBlock
from .straight_line import run
from .winograd_schedule import TileGrid

# Values of a tile that straight-line code of both directions holds at once. Larger tiles go through
# memory between them, by loops: as fast as spilled registers, and quick to compile.
_MOST_VALUES = 36


@dataclass(frozen=True)
class Stages:
    """What the three stages work on.

    Transformed maps are ``(register block, point, channel block, row, lane)``, with one vector of
    space after each point: strides of a power of two would have all points of a tile fall into the
    same lines of the cache.
    """

    grid: TileGrid
    product: RegisterBlock
    lanes: int
    x: tirx.Buffer
    weights: tirx.Buffer
    y: tirx.Buffer
    epilogue: Epilogue

    @property
    def in_blocks(self) -> int:
        """Blocks of input channels."""
        return -(-self.grid.geometry.in_channels // self.lanes)

    @property
    def out_blocks(self) -> int:
        """Blocks of output channels."""
        return -(-self.grid.geometry.out_channels // self.lanes)

    @property
    def groups(self) -> int:
        """Groups of output channels, one a register block."""
        return self.out_blocks // self.product.vectors

    def point_stride(self, channel_blocks: int) -> int:
        """Elements between two points of a register block of a transformed map."""
        return (channel_blocks * self.grid.rows + 1) * self.lanes

    def block_stride(self, channel_blocks: int) -> int:
        """Elements between two register blocks of a transformed map."""
        return self.grid.points * self.point_stride(channel_blocks)


def _place(em: Emitter, grid: TileGrid, tile: Index) -> tuple[Index, Index, Index]:
    """Image, row and column of the first output of a tile."""
    line = em.bind_index(quotient(tile, grid.per_line), "line")
    row = em.bind_index(remainder(line, grid.lines) * grid.tile[0], "row")
    column = em.bind_index(remainder(tile, grid.per_line) * grid.tile[1], "column")
    return quotient(line, grid.lines), row, column


def transform_input(
    em: Emitter,
    stages: Stages,
    source: tuple[Index, Index, int],
    data: tirx.Buffer,
    local: Index,
    scratch: tirx.Buffer,
) -> None:
    """Transform the tiles of a register block into ``data``, as its block ``local``.

    ``source`` holds the register block, its first block of channels and the number of these.
    """
    grid, lanes, (number, first, count) = stages.grid, stages.lanes, source
    geometry, columns = grid.geometry, grid.inputs[1]
    pitch, size = geometry.width * lanes, geometry.height * geometry.width * lanes
    with em.loop(grid.rows, prefix="tile") as t:
        tile = em.bind_index(number * grid.rows + t, "tile")
        if grid.tiles % grid.rows:
            tile = em.bind_index(clamp_high(tile, grid.tiles - 1), "tile")
        image, row, column = _place(em, grid, tile)
        row = em.bind_index(row - geometry.padding[0], "row")
        column = em.bind_index(column - geometry.padding[1], "column")
        base = em.bind_index((image * stages.in_blocks + first) * size, "x")
        target = em.bind_index(
            local * stages.block_stride(stages.in_blocks) + (first * grid.rows + t) * lanes, "v"
        )

        def transform(load: Callable[[Index, Index, Index], ir.Expr]) -> None:
            with em.loop(count, prefix="block") as block:
                start = em.bind_index(base + block * size, "x")
                at = em.bind_index(target + block * (grid.rows * lanes), "v")

                def store_row(i: Index, values: Sequence[ir.Expr]) -> None:
                    for j, value in enumerate(values):
                        point = (i * columns + j) * stages.point_stride(stages.in_blocks)
                        em.store(data, value, at + point)

                _transform(em, grid, "input", scratch, partial(load, start), store_row)

        inside = _all_inside((row, column), grid)
        whole = nullcontext() if inside is None else em.when(inside)
        with whole:
            origin = em.bind_index(row * pitch + column * lanes, "origin")
            transform(
                lambda start, i, j: em.load(stages.x, start + origin + (i * pitch + j * lanes))
            )
        if inside is not None:
            with em.when(tirx.Not(inside)):
                along = [_Reach(em, grid, axis, at) for axis, at in enumerate((row, column))]

                def load(start: Index, i: Index, j: Index) -> ir.Expr:
                    places = [reach.at(index) for reach, index in zip(along, (i, j), strict=True)]
                    at = start + places[0].index * pitch + places[1].index * lanes
                    value = em.load(stages.x, at)
                    for place in places:
                        value = value if place.mask is None else em.masked(value, place.mask)
                    return value

                transform(load)


@dataclass(frozen=True)
class _Position:
    """A position on the map, and 0 if it stands for one that is not on it, else -1."""

    index: Index
    mask: ir.Expr | None


class _Reach:
    """Where the inputs of a tile lie along an axis, those next to the map moved onto it."""

    def __init__(self, em: Emitter, grid: TileGrid, axis: int, origin: Index) -> None:
        self._em, self._origin = em, origin
        self._extent, first, last = _span(grid, axis)
        inputs = range(grid.inputs[axis])
        # Whether some tile has this input off the map.
        self._may_be_off = [first + i < 0 or last + i >= self._extent for i in inputs]
        self._known = [self._find(i) for i in inputs]
        self._last: tuple[ir.Expr, _Position] | None = None

    def at(self, index: Index) -> _Position:
        """The place of an input."""
        if isinstance(index, int):
            return self._known[index]
        if self._last is None or not self._last[0].same_as(index):
            self._last = index, self._find(index)
        return self._last[1]

    def _find(self, index: Index) -> _Position:
        position = self._em.bind_index(self._origin + index, "at")
        if isinstance(index, int) and not self._may_be_off[index]:
            return _Position(position, None)
        moved = clamp_high(clamp_low(position, 0), self._extent - 1)
        moved = self._em.bind_index(moved, "at")
        on_map = tirx.Select(tirx.EQ(position, moved), _int(-1), _int(0))
        return _Position(moved, self._em.bind(on_map, "mask"))


def _int(value: int) -> ir.Expr:
    return tirx.IntImm("int32", value)


def _all_inside(origin: tuple[Index, Index], grid: TileGrid) -> tirx.Expr | None:
    """The condition that the inputs of a tile lie within the map; None if it always holds."""
    inside = None
    for axis, position in enumerate(origin):
        (extent, first, last), reach = _span(grid, axis), grid.inputs[axis]
        conditions = []
        if first < 0:
            conditions.append(tirx.GE(position, 0))
        if last + reach > extent:
            conditions.append(tirx.LE(position, extent - reach))
        for condition in conditions:
            inside = condition if inside is None else tirx.And(inside, condition)
    return inside


def _span(grid: TileGrid, axis: int) -> tuple[int, int, int]:
    """Extent of the map along an axis, and where the inputs of its first and last tile begin."""
    geometry, tiles = grid.geometry, (grid.lines, grid.per_line)[axis]
    first = -geometry.padding[axis]
    last = first + (tiles - 1) * grid.tile[axis]
    return (geometry.height, geometry.width)[axis], first, last


def transform_output(
    em: Emitter,
    stages: Stages,
    target: tuple[Index, Index, int],
    products: tirx.Buffer,
    local: Index,
    scratch: tirx.Buffer,
) -> None:
    """Transform block ``local`` of ``products`` back, apply the epilogue, store what is on the map.

    ``target`` holds the register block, its first block of channels and the number of these.
    """
    grid, lanes, (number, first, count) = stages.grid, stages.lanes, target
    geometry, columns = grid.geometry, grid.inputs[1]
    pitch = geometry.out_width * lanes
    size = geometry.out_height * pitch
    extent: Index = grid.rows
    if grid.tiles % grid.rows:
        extent = clamp_high(grid.tiles - number * grid.rows, grid.rows)
    with em.loop(extent, prefix="tile") as t:
        image, row, column = _place(em, grid, number * grid.rows + t)
        base = em.bind_index(
            (image * stages.out_blocks + first) * size + row * pitch + column * lanes, "y"
        )
        source = em.bind_index(
            local * stages.block_stride(stages.out_blocks) + (first * grid.rows + t) * lanes, "m"
        )
        with em.loop(count, prefix="block") as block:
            at = em.bind_index(source + block * (grid.rows * lanes), "m")
            stride = stages.point_stride(stages.out_blocks)
            channel = em.bind_index((first + block) * lanes, "channel")
            to = em.bind_index(base + block * size, "y")

            def store_row(i: Index, values: Sequence[ir.Expr]) -> None:
                with _on_map(em, row, i, geometry.out_height, grid.tile[0]):
                    for j, value in enumerate(values):
                        with _on_map(em, column, j, geometry.out_width, grid.tile[1]):
                            position = em.bind_index(to + (i * pitch + j * lanes), "y")
                            result = stages.epilogue.apply(value, channel, position)
                            em.store(stages.y, result, position)

            _transform(
                em,
                grid,
                "output",
                scratch,
                lambda i, j: em.load(products, at + (i * columns + j) * stride),
                store_row,
            )


def _on_map(
    em: Emitter, first: Index, offset: Index, extent: int, tile: int
) -> AbstractContextManager[None]:
    """A context for what is done only if ``first + offset`` lies before ``extent``."""
    rest = extent % tile
    if rest == 0 or (isinstance(offset, int) and offset < rest):
        return nullcontext()
    return em.when(tirx.LT(first + offset, extent))


def _transform(
    em: Emitter,
    grid: TileGrid,
    matrix: str,
    scratch: tirx.Buffer,
    load: Callable[[Index, Index], ir.Expr],
    store_row: Callable[[Index, Sequence[ir.Expr]], None],
) -> None:
    """``A @ X @ B.T`` of the tile X of vectors that ``load(i, j)`` loads, row by row.

    A and B are the ``"input"`` or the ``"output"`` matrices along rows and columns of ``grid``.
    ``scratch`` has room for the tile.
    """
    down, across = (
        transform_code(outputs, taps, matrix)
        for outputs, taps in zip(grid.tile, grid.geometry.kernel, strict=True)
    )
    rows, columns = len(down.outputs), across.inputs
    if down.inputs * columns <= _MOST_VALUES:
        by_column = [
            run(em, down, [load(i, j) for i in range(down.inputs)]) for j in range(columns)
        ]
        for i, line in enumerate(zip(*by_column, strict=True)):
            store_row(i, run(em, across, line))
        return
    with em.loop(columns, prefix="j") as j:
        values = run(em, down, [load(i, j) for i in range(down.inputs)])
        for i, value in enumerate(values):
            em.store(scratch, value, (i * columns + j) * em.lanes)
    with em.loop(rows, prefix="i") as i:
        row = [em.load(scratch, (i * columns + j) * em.lanes) for j in range(columns)]
        store_row(i, run(em, across, row))
