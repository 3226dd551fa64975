"""Direct convolution of bfloat16 factors with float32 sums, by the instructions of AVX512-BF16.

A pair of neighbouring channels, rounded, takes the place of one float32 value: the loops are those
of the direct convolution with half as many channels, on a copy of the input that holds its padding.
Maps between kernels stay float32. TVM has no name for the two instructions that it takes, and turns
its own bfloat16 vectors into integers; so both are functions of LLVM code that the kernel imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from tvm import ir, tirx

from tvm_lowrank.geometry import ConvGeometry

from . import space as direct
from .bfloat16_schedule import (
    Bfloat16Schedule,
    computed,
    is_legal,
    paired,
    parts_of,
    slab_of,
    tiling_of,
)
from .convolution import Nest, Place, emit_tile, store_values, within
from .emitter import Emitter, Index, LoopKind, clamp_high, quotient, remainder
from .epilogue import Epilogue
from .groups import merge_groups, merge_weight
from .isa import VectorISA
from .workload import ConvWorkload

# Smaller copies are made by one thread: starting the others costs more.
_SERIAL_BYTES = 1 << 15

# Functions of 16 pairs, in vectors of float32: sums of products, and what rounds two vectors. LLVM
# puts their code where they are called.
_DOT, _ROUND = "lowrank_bfloat16_dot", "lowrank_bfloat16_round"
_CODE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @{_DOT}(<16 x float> %sum, <16 x float> %a, <16 x float> %b) {{
  %c = bitcast <16 x float> %a to <32 x bfloat>
  %d = bitcast <16 x float> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %c, <32 x bfloat> %d)
  ret <16 x float> %r
}}
define <16 x float> @{_ROUND}(<16 x float> %first, <16 x float> %second) {{
  %c = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %second, <16 x float> %first)
  %r = bitcast <32 x bfloat> %c to <16 x float>
  ret <16 x float> %r
}}
"""  # noqa: E501


class PairEmitter(Emitter):
    """An `Emitter` whose products are of pairs.

    ``multiply_add`` and ``rounded`` must stand within `instructions`.
    """

    @contextmanager
    def instructions(self) -> Iterator[None]:
        """Emit what the ``with`` block emits where the functions that it calls are known."""
        with self._scope() as body:
            yield
        code = ir.StringImm(_CODE)
        self._emit(tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", code, _seq(body)))

    def multiply_add(self, accumulator: tirx.Buffer, a: ir.Expr, b: ir.Expr) -> None:
        """Add both products of each lane's pairs to ``accumulator``."""
        self.store(accumulator, self._call(_DOT, self.value_of(accumulator), a, b))

    def rounded(self, first: ir.Expr, second: ir.Expr) -> ir.Expr:
        """The values of two vectors one after the other as pairs, each rounded to nearest."""
        return self.bind(self._call(_ROUND, first, second), "pairs")

    def _call(self, name: str, *values: ir.Expr) -> ir.Expr:
        return tirx.call_pure_extern(f"float32x{self.lanes}", name, *values)


def _seq(stmts: list[tirx.Stmt]) -> tirx.Stmt:
    return stmts[0] if len(stmts) == 1 else tirx.SeqStmt(stmts)


@dataclass(frozen=True)
class _Source:
    """The map that is rounded: ``geometry`` is the convolution's own."""

    geometry: ConvGeometry
    width: int  # columns of the copy
    x: tirx.Buffer
    lanes: int

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.geometry.in_channels // self.lanes)

    @property
    def pairs(self) -> int:
        """Blocks of pairs."""
        return -(-self.blocks // 2)

    @property
    def step(self) -> tuple[int, int]:
        """Rows and columns from one that is copied to the next."""
        return self.geometry.stride if self.geometry.kernel == (1, 1) else (1, 1)

    @property
    def size(self) -> int:
        """Elements of a block of an image."""
        return self.geometry.height * self.geometry.width * self.lanes


def emit(workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Parameters and maps are those of the direct convolution; the weights are `pack`'s.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    given, lanes = workload.geometry, isa.lanes
    out_blocks = -(-given.out_channels // lanes)
    em = PairEmitter(isa)
    x_shape = (given.batch, -(-given.in_channels // lanes), given.height, given.width, lanes)
    x = em.argument("x", x_shape)
    packed = _packed_shape(workload, schedule, isa)
    weights = em.argument("weights", packed)
    y_shape = (given.batch, out_blocks, given.out_height, given.out_width, lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * lanes, y_shape)
    y = em.argument("y", y_shape)
    source = _Source(given, paired(workload, isa).geometry.width, x, lanes)
    geometry = computed(workload, isa)
    kernel = _Kernel(em, source, geometry, schedule, packed[0], weights, epilogue, y)
    if schedule.order == "rows":
        kernel.by_rows()
    else:
        kernel.by_channels(paired(workload, isa).geometry.height)
    return em.finish()


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA
) -> np.ndarray:
    """Round an OIHW weight and lay it out as pairs of input channels.

    Returns float32, whose bits are the pairs, of shape ``(tiles, blocks, X, Y, lanes, vectors *
    lanes)``: a tile is ``schedule.vectors`` vectors of output channels, and ``blocks`` are those of
    the pairs of its group. Channels beyond C and F are zero.

    Raises ValueError if the weight does not have the shape the workload's geometry gives.
    """
    geometry, lanes = workload.geometry, isa.lanes
    if weight.shape != geometry.weight_shape:
        raise ValueError(f"weight has shape {weight.shape}, expected {geometry.weight_shape}")
    merged = merge_groups(geometry, 2 * lanes, lanes)
    tiles, blocks, rows, columns, _, width = _packed_shape(workload, schedule, isa)
    padded = np.zeros((tiles * width, 2 * blocks * lanes, rows, columns), np.float32)
    outputs, inputs = merged.weight_shape[:2]
    padded[:outputs, :inputs] = merge_weight(weight, geometry, merged)
    bits = round_bits(padded).reshape(tiles, width, blocks, lanes, 2, rows, columns)
    pairs = bits[:, :, :, :, 0] | bits[:, :, :, :, 1] << 16
    return np.ascontiguousarray(pairs.transpose(0, 2, 4, 5, 3, 1)).view(np.float32)


def round_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest and to even, as uint32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _packed_shape(
    workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA
) -> tuple[int, int, int, int, int, int]:
    geometry, width = paired(workload, isa).geometry, schedule.vectors * isa.lanes
    tiles = geometry.groups * -(-geometry.out_channels // geometry.groups // width)
    blocks = -(-geometry.in_channels // geometry.groups // isa.lanes)
    return tiles, blocks, *geometry.kernel, isa.lanes, width


@dataclass(frozen=True)
class _Kernel:
    """The loops of a kernel. ``geometry`` is that of pairs, which ``schedule`` cuts into tiles."""

    em: PairEmitter
    source: _Source
    geometry: ConvGeometry
    schedule: Bfloat16Schedule
    groups: int  # of output channels, each with register tiles of its own
    weights: tirx.Buffer
    epilogue: Epilogue
    y: tirx.Buffer

    def by_channels(self, height: int) -> None:
        """Round the whole map, of ``height`` rows, then compute it by groups of channels."""
        em, source, geometry, schedule = self.em, self.source, self.geometry, self.schedule
        line = source.width * em.lanes
        maps = geometry.batch * source.pairs
        copy = em.workspace(maps * height * line)
        small = 4 * maps * height * line < _SERIAL_BYTES
        kind: LoopKind = "serial" if small else "parallel"
        with (
            em.loop(1 if small else maps * height, kind, prefix="row") as outer,
            em.instructions(),
            em.loop(maps * height if small else 1, start=outer, prefix="row") as row,
        ):
            of = em.bind_index(quotient(row, height), "map")
            image = em.bind_index(quotient(of, source.pairs), "image")
            block = em.bind_index(remainder(of, source.pairs), "block")
            _round_row(em, source, (image, block, remainder(row, height)), copy, row * line)
        nest = self._nest(geometry, copy)
        tiles = tiling_of(geometry, schedule)
        chunks = -(-tiles.count // schedule.chunk)
        tasks = self.groups * geometry.batch * chunks
        with em.loop(tasks, "parallel", prefix="task") as task, em.instructions():
            group = em.bind_index(quotient(task, geometry.batch * chunks), "group")
            place = remainder(task, geometry.batch * chunks)
            image = em.bind_index(quotient(place, chunks), "image")
            first = em.bind_index(remainder(place, chunks) * schedule.chunk, "first")
            self._tiles(nest, (image, group), (first, schedule.chunk, tiles.count), (image, 0, 0))

    def by_rows(self) -> None:
        """In each task round a part of the map, then compute it for all channels."""
        em, source, geometry, schedule = self.em, self.source, self.geometry, self.schedule
        tiles, parts = tiling_of(geometry, schedule), parts_of(geometry, schedule)
        chunk = min(schedule.chunk, parts)
        chunks = -(-parts // chunk)
        rows, columns = slab_of(geometry, schedule)
        slab = replace(geometry, height=rows, width=columns, batch=1)
        tasks = geometry.batch * chunks
        with em.loop(tasks, "parallel", prefix="task") as task, em.instructions():
            # Made by every task: a thread gets the same memory again, which is still in its cache.
            copy = em.workspace(source.pairs * rows * columns * em.lanes)
            nest = self._nest(slab, copy)
            image = em.bind_index(quotient(task, chunks), "image")
            first = em.bind_index(remainder(task, chunks) * chunk, "first")
            lines = 0 if columns < geometry.width else first * schedule.rows
            pixels = first * schedule.tile if columns < geometry.width else 0
            corner = tuple(
                em.bind_index(at * step, "at")
                for at, step in zip((lines, pixels), geometry.stride, strict=True)
            )
            self._round_slab(image, corner, (rows, columns), copy)
            of_line = tiles.per_line if tiles.lines > 1 else 1
            begin = em.bind_index(first * of_line, "tile")
            with em.loop(self.groups, prefix="group") as group:
                span = (begin, chunk * of_line, tiles.count)
                self._tiles(nest, (image, group), span, (0, lines, pixels))

    def _nest(self, geometry: ConvGeometry, copy: tirx.Buffer) -> Nest:
        reduction = direct.reduction_of(geometry, self.em.lanes)
        return Nest(
            geometry, self.schedule.tiles, self.em.lanes, *reduction, self.em.lanes, copy,
            self.weights,
        )  # fmt: skip

    def _tiles(
        self,
        nest: Nest,
        of: tuple[Index, Index],
        span: tuple[Index, int, int],
        origin: tuple[Index, Index, Index],
    ) -> None:
        """Register tiles ``span``: first, how many, and how many the map has.

        ``of`` is their image and group of output channels, ``origin`` the image, row and column of
        the output that the copy in ``nest`` begins with.
        """
        em, geometry, schedule = self.em, self.geometry, self.schedule
        tiles, (first, chunk, count) = tiling_of(geometry, schedule), span
        extent: Index = chunk
        if count % chunk:
            extent = clamp_high(count - first, chunk)
        with em.loop(extent, prefix="tile") as number:
            tile = em.bind_index(first + number, "tile")
            line = em.bind_index(quotient(tile, tiles.per_line), "line")
            index = em.bind_index(remainder(tile, tiles.per_line), "tile")
            for part in tiles.groups:
                at = part.first if part.count == 1 else index
                row = line if schedule.rows == 1 else at * schedule.rows
                column = at * schedule.tile if schedule.rows == 1 else 0
                place = Place(*of, row, column, 0)
                read = Place(origin[0], of[1], row - origin[1], column - origin[2], 0)
                condition = None
                if len(tiles.groups) > 1:
                    condition = within(index, part, tiles.per_line)
                with em.when(condition) if condition is not None else _always():
                    values = emit_tile(em, nest, part, read)
                    store_values(em, values, (geometry, place), self.epilogue, self.y)

    def _round_slab(
        self,
        image: Index,
        corner: tuple[Index, ...],
        extents: tuple[int, int],
        copy: tirx.Buffer,
    ) -> None:
        """Round rows and columns ``extents`` of the map from ``corner`` on, as far as it goes."""
        em, source, (rows, columns) = self.em, self.source, extents
        size = rows * columns * em.lanes
        if columns < self.geometry.width:
            width = self.geometry.width
            present = em.bind_index(clamp_high(width - corner[1], columns), "columns")
            with em.loop(rows, prefix="row") as row, em.loop(present, prefix="column") as column:
                pixel, target = (
                    row * width + corner[1] + column,
                    (row * columns + column) * em.lanes,
                )
                _round_pixel(em, source, (image, pixel), copy, target, size)
            return
        # The long axis may be another than that of the source, where the map is one line.
        line = source.width * em.lanes
        height = self.geometry.height * self.geometry.width // source.width
        here = rows * columns // source.width
        first = em.bind_index(corner[0], "first")
        present = em.bind_index(clamp_high(height - first, here), "rows")
        with em.loop(source.pairs, prefix="block") as block, em.loop(present, prefix="row") as row:
            _round_row(em, source, (image, block, first + row), copy, block * size + row * line)


@contextmanager
def _always() -> Iterator[None]:
    yield


def _round_row(
    em: PairEmitter,
    source: _Source,
    place: tuple[Index, Index, Index],
    copy: tirx.Buffer,
    target: Index,
) -> None:
    """Round a row of the copy: ``place`` is its image, block of pairs, and number."""
    geometry, lanes, (image, block, row) = source.geometry, source.lanes, place
    (rows, columns), (top, left) = source.step, geometry.padding[:2]
    target = em.bind_index(target, "to")
    line = em.bind_index(row * rows - top, "line")
    start = em.bind_index(
        (image * source.blocks + block * 2) * source.size + line * (geometry.width * lanes), "from"
    )
    # Columns of the copy that lie on the map.
    low = min(-(-left // columns), source.width)
    high = max(low, min((geometry.width - 1 + left) // columns + 1, source.width))

    def clear(begin: int, count: int) -> None:
        if count > 0:
            with em.loop(count, prefix="column") as column:
                em.store(copy, em.constant(0), target + (begin + column) * lanes)

    def move(second: bool) -> None:
        with em.loop(high - low, prefix="column") as column:
            at = em.bind_index(start + ((low + column) * columns - left) * lanes, "at")
            values = em.load(source.x, at)
            others = em.load(source.x, at + source.size) if second else em.constant(0)
            em.store(copy, em.rounded(values, others), target + (low + column) * lanes)

    inside = tirx.And(tirx.GE(line, 0), tirx.LT(line, geometry.height))
    padded = any(geometry.padding)
    with em.when(inside) if padded else _always():
        clear(0, low)
        if high > low:
            _both(em, source, block, move)
        clear(high, source.width - high)
    if padded:
        with em.when(tirx.Not(inside)):
            clear(0, source.width)


def _round_pixel(
    em: PairEmitter,
    source: _Source,
    place: tuple[Index, Index],
    copy: tirx.Buffer,
    target: Index,
    size: int,
) -> None:
    """Round all channels of a pixel: ``place`` is its image, and its number in the copy's map.

    Blocks of pairs are ``size`` elements apart in ``copy``.
    """
    geometry, lanes, (image, pixel) = source.geometry, source.lanes, place
    (rows, columns), (top, left) = source.step, geometry.padding[:2]
    pixel = em.bind_index(pixel, "pixel")
    line = em.bind_index(quotient(pixel, source.width) * rows - top, "line")
    column = em.bind_index(remainder(pixel, source.width) * columns - left, "column")
    start = em.bind_index(
        image * (source.blocks * source.size) + (line * geometry.width + column) * lanes, "from"
    )

    def move(block: Index, second: bool) -> None:
        at = em.bind_index(start + block * (2 * source.size), "at")
        values = em.load(source.x, at)
        others = em.load(source.x, at + source.size) if second else em.constant(0)
        em.store(copy, em.rounded(values, others), target + block * size)

    def move_all() -> None:
        whole = source.blocks // 2
        if whole:
            with em.loop(whole, prefix="block") as block:
                move(block, True)
        if source.blocks % 2:
            move(whole, False)

    if not any(geometry.padding):
        move_all()
        return
    inside = tirx.And(
        tirx.And(tirx.GE(line, 0), tirx.LT(line, geometry.height)),
        tirx.And(tirx.GE(column, 0), tirx.LT(column, geometry.width)),
    )
    with em.when(inside):
        move_all()
    with em.when(tirx.Not(inside)), em.loop(source.pairs, prefix="block") as block:
        em.store(copy, em.constant(0), target + block * size)


def _both(em: PairEmitter, source: _Source, block: Index, move: Callable[[bool], None]) -> None:
    """Move two blocks of channels, or the one that the last block of pairs may have."""
    if source.blocks % 2 == 0:
        move(True)
        return
    if source.pairs > 1:
        with em.when(tirx.LT(block, source.pairs - 1)):
            move(True)
    with em.when(tirx.EQ(block, source.pairs - 1)):
        move(False)
