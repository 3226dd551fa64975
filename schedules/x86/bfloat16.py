"""Direct convolution of bfloat16 factors with float32 sums, by the instructions of AVX512-BF16.

The loops are those of the direct convolution with half as many channels: pairs take the place of
single values, in a copy of the input that holds its padding. Maps between kernels stay float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from tvm_lowrank.geometry import ConvGeometry

from . import space as direct
from .bfloat16_schedule import (
    Bfloat16Schedule,
    computed,
    groups_of,
    is_legal,
    paired,
    parts_of,
    slab_of,
)
from .convolution import Nest, Place, emit_tasks, emit_tile, store_values, within
from .emitter import Index, clamp_high, moving, quotient, remainder
from .epilogue import Epilogue
from .isa import VectorISA
from .packing import pack_weights
from .pairs import PairEmitter, RoundedMap, pair_rows
from .space import tiling_of
from .workload import ConvWorkload


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
    packed = packed_shape(workload, schedule, isa)
    weights = em.argument("weights", packed)
    y_shape = (given.batch, out_blocks, given.out_height, given.out_width, lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * lanes, y_shape)
    y = em.argument("y", y_shape)
    source = RoundedMap(em, given, paired(workload, isa).geometry.width, x)
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
    blocks = replace(workload, in_block=2 * isa.lanes)
    return pair_rows(pack_weights(weight, blocks, schedule.direct, isa))


def packed_shape(
    workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA
) -> tuple[int, int, int, int, int, int]:
    """The shape of what `pack` returns."""
    geometry, width = paired(workload, isa).geometry, schedule.vectors * isa.lanes
    blocks = -(-geometry.in_channels // geometry.groups // isa.lanes)
    return groups_of(geometry, schedule, isa), blocks, *geometry.kernel, isa.lanes, width


@dataclass(frozen=True)
class _Kernel:
    """The loops of a kernel. ``geometry`` is that of pairs, which ``schedule`` cuts into tiles."""

    em: PairEmitter
    source: RoundedMap
    geometry: ConvGeometry
    schedule: Bfloat16Schedule
    groups: int  # of output channels, each with register tiles of its own
    weights: tirx.Buffer
    epilogue: Epilogue
    y: tirx.Buffer

    def by_channels(self, height: int) -> None:
        """Round the whole map, of ``height`` rows, then compute it by groups of channels."""
        em, source, geometry = self.em, self.source, self.geometry
        line = source.width * em.lanes
        maps = geometry.batch * source.pairs
        copy = em.workspace(maps * height * line)
        kind = moving(4 * maps * height * line)
        with em.loop(maps * height, kind, prefix="row") as row:
            of = em.bind_index(quotient(row, height), "map")
            image = em.bind_index(quotient(of, source.pairs), "image")
            block = em.bind_index(remainder(of, source.pairs), "block")
            source.round_row((image, block, remainder(row, height)), copy, row * line)
        emit_tasks(em, self._nest(geometry, copy), self.groups, self.epilogue, self.y)

    def by_rows(self) -> None:
        """In each task round a part of the map, then compute it for all channels."""
        em, source, geometry, schedule = self.em, self.source, self.geometry, self.schedule
        tiles, parts = tiling_of(geometry, schedule), parts_of(geometry, schedule)
        chunk = min(schedule.chunk, parts)
        chunks = -(-parts // chunk)
        rows, columns = slab_of(geometry, schedule)
        slab = replace(geometry, height=rows, width=columns, batch=1)
        tasks = geometry.batch * chunks
        with em.loop(tasks, "parallel", prefix="task") as task:
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
                span = (begin, chunk * of_line)
                self._tiles(nest, (image, group), span, (lines, pixels))

    def _nest(self, geometry: ConvGeometry, copy: tirx.Buffer) -> Nest:
        reduction = direct.reduction_of(geometry, self.em.lanes)
        return Nest(
            geometry, self.schedule.direct, self.em.lanes, *reduction, self.em.lanes, copy,
            self.weights,
        )  # fmt: skip

    def _tiles(
        self,
        nest: Nest,
        of: tuple[Index, Index],
        span: tuple[Index, int],
        origin: tuple[Index, Index],
    ) -> None:
        """Register tiles ``span``: the first, and how many as far as there are so many.

        ``of`` is their image and group of output channels, ``origin`` the row and column of the
        output that the copy in ``nest`` begins with.
        """
        em, geometry, schedule = self.em, self.geometry, self.schedule
        tiles, (first, chunk) = tiling_of(geometry, schedule), span
        extent: Index = chunk
        if tiles.count % chunk:
            extent = clamp_high(tiles.count - first, chunk)
        with em.loop(extent, prefix="tile") as number:
            tile = em.bind_index(first + number, "tile")
            line = em.bind_index(quotient(tile, tiles.per_line), "line")
            index = em.bind_index(remainder(tile, tiles.per_line), "tile")
            for part in tiles.groups:
                at = part.first if part.count == 1 else index
                row = line if schedule.rows == 1 else at * schedule.rows
                column = at * schedule.tile if schedule.rows == 1 else 0
                place = Place(*of, row, column, 0)
                read = Place(0, of[1], row - origin[0], column - origin[1], 0)
                only = len(tiles.groups) == 1
                with nullcontext() if only else em.when(within(index, part, tiles.per_line)):
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
                pixel = row * width + corner[1] + column
                target = (row * columns + column) * em.lanes
                source.round_pixel((image, pixel), copy, target, size)
            return
        # The long axis may be another than that of the source, where the map is one line.
        line = source.width * em.lanes
        height = self.geometry.height * self.geometry.width // source.width
        here = rows * columns // source.width
        first = em.bind_index(corner[0], "first")
        present = em.bind_index(clamp_high(height - first, here), "rows")
        with em.loop(source.pairs, prefix="block") as block, em.loop(present, prefix="row") as row:
            source.round_row((image, block, first + row), copy, block * size + row * line)
