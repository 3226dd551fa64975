"""Chains of convolutions as one kernel: tasks take a band of rows through all stages.

The bands of the maps between the stages lie in scratch memory of the thread, between the zeros of
the next stage's padding, so they stay in its core's cache. Rows that neighbouring bands share are
made twice. A stage that multiplies pairs of bfloat16 first rounds the band that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from tvm import tirx

from tvm_lowrank.geometry import ConvGeometry

from . import bfloat16, convolution, depthwise
from .bfloat16_schedule import Bfloat16Schedule, paired
from .chain import ChainWorkload, FusedSchedule
from .depthwise import DepthwiseSchedule
from .emitter import Emitter, Index, clamp_high, clamp_low, quotient, remainder
from .epilogue import Epilogue
from .fused_space import Band, band_geometry, bands, is_flat, is_legal
from .groups import merge_groups
from .isa import VectorISA
from .pairs import PairEmitter, RoundedMap
from .space import reduction_of
from .tiles import tiling
from .workload import ConvSchedule


@dataclass(frozen=True)
class _Target:
    """Where a stage writes its band, in pixels: the whole output map, or scratch memory.

    ``origin`` is the place of the band's first pixel in the first block of channels. The rows from
    ``low`` to before ``high`` of the band lie within the map.
    """

    buffer: tirx.Buffer
    origin: Index
    plane: int
    pitch: int
    low: Index
    high: Index

    def at(self, block: Index, row: Index, column: Index, lanes: int) -> Index:
        """The offset of a vector."""
        return (self.origin + block * self.plane + row * self.pitch + column) * lanes


@dataclass(frozen=True)
class _Stage:
    """A stage with what it reads: the whole input map, or a band in scratch memory.

    ``geometry`` is of that map, ``image`` and ``first`` the image and the row of its output where
    the band starts.
    """

    geometry: ConvGeometry
    x: tirx.Buffer
    weights: tirx.Buffer
    epilogue: Epilogue
    image: Index
    first: Index


def emit(workload: ChainWorkload, schedule: FusedSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Its parameters are ``x``, then for each stage its packed weights and the buffers of its
    epilogue's steps, then ``y``; all as the kernels of the single stages have them.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload}: {problem}")
    first, last = workload.stages[0].geometry, workload.stages[-1].geometry
    em = PairEmitter(isa) if schedule.rounds else Emitter(isa)
    in_blocks = -(-first.in_channels // isa.lanes)
    x = em.argument("x", (first.batch, in_blocks, first.height, first.width, isa.lanes))
    operands = [_operands(em, workload, schedule, number) for number in range(len(workload.stages))]
    y = em.argument("y", _map_shape(last, isa.lanes))

    count = -(-last.out_height // schedule.rows)
    with em.loop(last.batch * count, "parallel", prefix="task") as task:
        image = em.bind_index(quotient(task, count), "image")
        row = clamp_high(remainder(task, count) * schedule.rows, last.out_height - schedule.rows)
        row = em.bind_index(row, "row")
        source = x
        for number, band in enumerate(bands(workload, schedule.rows)):
            given = workload.stages[number].geometry
            first_row = em.bind_index(row * band.factor + band.offset, "first")
            if number + 1 < len(workload.stages):
                padding = workload.stages[number + 1].geometry.padding
                reach = last.out_height - schedule.rows
                target = _scratch(em, given, padding, band, first_row, reach)
            else:
                pixels = last.out_height * last.out_width
                origin = image * (-(-last.out_channels // isa.lanes) * pixels)
                origin = em.bind_index(origin + row * last.out_width, "y")
                target = _Target(y, origin, pixels, last.out_width, 0, band.rows)
            place: tuple[Index, Index] = (image, first_row)
            if number:
                given, place = band_geometry(workload, number, schedule.rows), (0, 0)
            stage = _Stage(given, source, *operands[number], *place)
            tiles = schedule.stages[number]
            if isinstance(tiles, Bfloat16Schedule):
                assert isinstance(em, PairEmitter)
                pairs = paired(workload.stages[number], isa).geometry
                stage = _rounded(em, stage, pairs, band, target)
                _emit_direct(em, stage, tiles.direct, band, target)
            else:
                with em.single() if isinstance(em, PairEmitter) else nullcontext():
                    if isinstance(tiles, DepthwiseSchedule):
                        _emit_depthwise(em, stage, tiles, target)
                    else:
                        merged = merge_groups(given, isa.lanes, isa.lanes)
                        stage = replace(stage, geometry=merged)
                        _emit_direct(em, stage, tiles, band, target)
            source = target.buffer
    return em.finish()


def _map_shape(geometry: ConvGeometry, lanes: int) -> tuple[int, ...]:
    blocks = -(-geometry.out_channels // lanes)
    return geometry.batch, blocks, geometry.out_height, geometry.out_width, lanes


def _operands(
    em: Emitter, workload: ChainWorkload, schedule: FusedSchedule, number: int
) -> tuple[tirx.Buffer, Epilogue]:
    """Add the weights of a stage, and the operands of its epilogue, to the parameters."""
    stage, tiles, lanes = workload.stages[number], schedule.stages[number], em.lanes
    blocks = -(-stage.geometry.out_channels // lanes)
    shape: tuple[int, ...] = (blocks, *stage.geometry.kernel, lanes)
    if isinstance(tiles, Bfloat16Schedule):
        shape = bfloat16.packed_shape(stage, tiles, em.isa)
    elif not isinstance(tiles, DepthwiseSchedule):
        merged = merge_groups(stage.geometry, lanes, lanes)
        reduced = -(-merged.in_channels // merged.groups // lanes)
        width = tiles.vectors * lanes
        shape = (blocks // tiles.vectors, reduced, *merged.kernel, lanes, width)
    weights = em.argument(f"weights{number}", shape)
    map_shape = _map_shape(stage.geometry, lanes)
    return weights, Epilogue(em, stage.epilogue, blocks * lanes, map_shape)


def _scratch(
    em: Emitter,
    geometry: ConvGeometry,
    padding: tuple[int, int, int, int],
    band: Band,
    first: Index,
    last_row: int,
) -> _Target:
    """Memory for a band of the output of ``geometry`` between the zeros of ``padding``.

    The zeros are written here. ``first`` is the row of the map that the band starts at.
    """
    left, right = padding[1], padding[3]
    blocks, pitch = -(-geometry.out_channels // em.lanes), left + geometry.out_width + right
    plane = band.rows * pitch
    buffer = em.workspace(blocks * plane * em.lanes)
    zero = em.constant(0)

    def clear(start: Index, count: Index) -> None:
        with em.loop(count, prefix="pixel") as pixel:
            em.store(buffer, zero, (start + pixel) * em.lanes)

    if left + right:
        with em.loop(blocks * band.rows, prefix="line") as line:
            clear(line * pitch, left)
            clear(line * pitch + (left + geometry.out_width), right)
    if band.is_inside(geometry, last_row):
        return _Target(buffer, left, plane, pitch, 0, band.rows)
    # A task whose whole band is padding has an empty range of rows, not a negative one.
    low = em.bind_index(clamp_high(clamp_low(0 - first, 0), band.rows), "low")
    high = em.bind_index(tirx.max(clamp_high(geometry.out_height - first, band.rows), low), "high")
    with em.loop(blocks, prefix="block") as block:
        clear(block * plane, low * pitch)
        clear(block * plane + high * pitch, (band.rows - high) * pitch)
    return _Target(buffer, left, plane, pitch, low, high)


def _rounded(
    em: PairEmitter, stage: _Stage, pairs: ConvGeometry, band: Band, target: _Target
) -> _Stage:
    """A pointwise stage that reads the rows of its band from scratch memory, as ``pairs``."""
    width = stage.geometry.width
    source = RoundedMap(em, stage.geometry, width, stage.x)
    size = band.rows * width * em.lanes
    copy = em.workspace(source.pairs * size)
    pixels = stage.geometry.height * width
    first = stage.image * (source.blocks * pixels) + stage.first * width
    first = em.bind_index(first, "first")
    span = [em.bind_index(edge * width, "edge") for edge in (target.low, target.high)]
    source.round_pixels(first, (span[0], span[1]), copy, size)
    geometry = replace(pairs, batch=1, height=band.rows)
    return replace(stage, geometry=geometry, x=copy, image=0, first=0)


def _emit_depthwise(
    em: Emitter, stage: _Stage, schedule: DepthwiseSchedule, target: _Target
) -> None:
    geometry, rows, lanes = stage.geometry, schedule.rows, em.lanes
    blocks = -(-geometry.in_channels // lanes)
    nest = depthwise.Nest(geometry, schedule, stage.x, stage.weights)
    lines = quotient(target.high - target.low + (rows - 1), rows)
    with em.loop(blocks, prefix="block") as block, em.loop(lines, prefix="line") as line:
        # The last tiles start early enough to be whole.
        row = em.bind_index(_least(target.low + line * rows, target.high - rows), "row")
        for part in tiling(geometry, schedule.tile).groups:
            with em.loop(part.count, start=part.first, prefix="tile") as tile:
                column = em.bind_index(tile * schedule.tile, "column")
                place = (stage.image * blocks + block, block, stage.first + row, column)
                values = depthwise.emit_tile(em, nest, part, place)
                base = em.bind_index(target.at(block, row, column, lanes), "out")
                pitch = target.pitch * lanes
                stage.epilogue.store(target.buffer, values, base, pitch, block * lanes, 0)


def _emit_direct(
    em: Emitter, stage: _Stage, schedule: ConvSchedule, band: Band, target: _Target
) -> None:
    geometry, lanes = stage.geometry, em.lanes
    width, first = geometry.out_width, stage.first
    inside = isinstance(target.low, int) and isinstance(target.high, int)
    flat = is_flat(geometry) and inside and target.pitch == width
    cut = geometry
    if flat:
        # The pixels of the band are one row, of a map that is one row too.
        cut = replace(geometry, height=1, width=band.rows * width)
        geometry = replace(geometry, height=1, width=geometry.height * width)
    nest = convolution.Nest(
        geometry, schedule, lanes, *reduction_of(geometry, lanes), lanes, stage.x, stage.weights
    )
    groups = -(-geometry.out_channels // lanes) // schedule.vectors

    @contextmanager
    def lines() -> Iterator[Index]:
        if flat:
            yield 0
        else:
            with em.loop(target.high - target.low, start=target.low, prefix="row") as row:
                yield em.bind_index(row, "row")

    with em.loop(groups, prefix="group") as group, lines() as row:
        for part in tiling(cut, schedule.tile).groups:
            with em.loop(part.count, start=part.first, prefix="tile") as tile:
                column = em.bind_index(tile * schedule.tile, "column")
                pixel = (0, first * width + column) if flat else (first + row, column)
                place = convolution.Place(stage.image, group, *pixel, 0)
                values = convolution.emit_tile(em, nest, part, place)
                at = target.at(group * schedule.vectors, row, column, lanes)
                base, plane = em.bind_index(at, "out"), target.plane * lanes
                stage.epilogue.store(target.buffer, values, base, plane, group * nest.group, lanes)


def _least(value: Index, high: Index) -> Index:
    if isinstance(high, int):
        return clamp_high(value, high)
    return tirx.min(value, high)
