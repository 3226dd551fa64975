"""The Fourier schedules of a workload worth trying, most promising first by a simple model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from tvm_lowrank.schedules.effort import Effort

from .fft_schedule import (
    LONG_TILES,
    TILES,
    Axis,
    FFTGrid,
    FFTSchedule,
    fft_geometry,
    grid_of,
    is_legal,
    refuse,
    register_block,
)
from .groups import is_depthwise
from .isa import VectorISA
from .tile_costs import (
    BLOCK_OVERHEAD,
    CYCLES_PER_PLACE,
    NEAR_BYTES,
    loads_per_cycle,
    parallel_cycles,
    ranked,
    task_sizes,
)
from .workload import ConvWorkload

# Cycles of a value that is transformed, beside arithmetic: its loads, stores and spills.
_CYCLES_PER_VALUE = 2
_REGISTER_BLOCKS = 2


def space(workload: ConvWorkload, isa: VectorISA) -> list[FFTSchedule]:
    """Legal schedules of the Fourier convolution, most promising first.

    Empty if `refuse` gives a reason. The order comes from counting the cycles of transforms and
    products with weights not in cache; the best of each size of tile come before second bests.
    """
    if refuse(workload, isa):
        return []
    if is_depthwise(workload.geometry):
        schedules = [FFTSchedule(tile) for tile in _tiles(workload, isa)]
        return sorted(schedules, key=lambda s: _transform_cycles(workload, s, isa))
    found = {
        schedule: _cycles(workload, schedule, isa)
        for tile in _tiles(workload, isa)
        for gauss in (False, True)
        for shape in _register_blocks(workload, tile, gauss, isa)
        for schedule in _tasks(workload, shape, isa)
    }
    return ranked(found, lambda s: (s.tile, s.gauss, s.blocks > 0))


def _tiles(workload: ConvWorkload, isa: VectorISA) -> Iterator[tuple[int, int]]:
    """Sizes of tiles, without those of which a half or a quarter already holds the whole map."""
    geometry = fft_geometry(workload, isa)
    known = TILES if min(geometry.kernel) > 1 else LONG_TILES
    choices: list[list[int]] = []
    for index, taps in enumerate(geometry.kernel):
        if taps == 1:
            choices.append([1])
            continue
        kept: list[int] = []
        for points in known:
            axes = grid_of(workload, FFTSchedule((points, points)), isa).axes
            kept.append(points)
            if axes[index].tiles == axes[index].parts == 1:
                break
        choices.append(kept)
    for rows in choices[0]:
        for columns in choices[1]:
            if rows == columns or geometry.kernel[0] != geometry.kernel[1]:
                yield rows, columns
    if choices[0][-1] != choices[1][-1] and geometry.kernel[0] == geometry.kernel[1]:
        yield choices[0][-1], choices[1][-1]  # an oblong map in one tile


def _register_blocks(
    workload: ConvWorkload, tile: tuple[int, int], gauss: bool, isa: VectorISA
) -> list[FFTSchedule]:
    """The register blocks with the fastest products, as schedules of one block a task."""
    geometry = fft_geometry(workload, isa)
    vectors = -(-geometry.out_channels // geometry.groups // isa.lanes)
    most = grid_of(workload, FFTSchedule(tile), isa).tiles
    candidates = [
        FFTSchedule(tile, rows, group, gauss)
        for group in range(1, min(vectors, isa.registers) + 1)
        if vectors % group == 0
        for rows in range(1, min(most, isa.registers) + 1)
    ]
    legal = [c for c in candidates if is_legal(workload, c, isa) is None]
    return sorted(legal, key=lambda c: _product_cycles(workload, c, isa))[:_REGISTER_BLOCKS]


def _tasks(workload: ConvWorkload, shape: FFTSchedule, isa: VectorISA) -> Iterator[FFTSchedule]:
    """The schedule with tasks of several sizes, and in stages."""
    grid = grid_of(workload, shape, isa)
    for blocks in task_sizes(grid.blocks, _scratch(grid)):
        yield replace(shape, blocks=blocks)


def _scratch(grid: FFTGrid) -> int:
    """Bytes of transformed data and products of a register block."""
    channels = grid.geometry.in_channels * grid.terms + grid.geometry.out_channels
    return 4 * grid.slots * grid.rows * channels


def _product_cycles(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> float:
    """Cycles of all products on one core with two multiply-add units."""
    grid, block = grid_of(workload, schedule, isa), register_block(workload, schedule, isa)
    width = isa.lanes * block.vectors
    groups = grid.geometry.groups * -(-grid.geometry.out_channels // grid.geometry.groups // width)
    sums = block.rows * block.vectors
    # Fewer than eight sums do not hide the latency of multiply-add.
    loads = loads_per_cycle(block.vectors, isa)
    steps = block.channels * block.segments
    total = 0.0
    for parts, products in _kinds(grid):
        step = max(
            parts * parts * sums / 2, parts * (block.rows + block.vectors) / loads, 4 * parts
        )
        weights = parts * block.vectors * isa.vector_bytes
        if grid.blocks > 1 and weights * steps > NEAR_BYTES:
            step += weights / 128
        total += products * (steps * step + BLOCK_OVERHEAD + parts * sums)
    return total * grid.blocks * groups


def _kinds(grid: FFTGrid) -> list[tuple[int, int]]:
    """Parts of products and their number: 1 for real ones."""
    return [(1, grid.slots)] if grid.gauss else [(1, grid.reals), (2, grid.pairs)]


def _transform_cycles(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> float:
    """Cycles of both transforms on one core."""
    grid = grid_of(workload, schedule, isa)
    line, cross = sorted(grid.axes, key=lambda axis: axis.points)[::-1]
    if grid.is_planar:
        cross, line = grid.axes
    total = 0.0
    for channels, lines, terms in (
        (grid.geometry.in_channels, cross.points, grid.terms),
        (grid.geometry.out_channels, cross.tile_outputs, 1),
    ):
        cycles = lines * _of_reals(line)
        if grid.is_planar:
            cycles += line.points * _of_reals(cross)
        cycles += CYCLES_PER_PLACE * grid.slots
        total += -(-channels // isa.lanes) * terms * cycles
    return total * grid.blocks * grid.rows


def _of_reals(axis: Axis) -> float:
    """Cycles of a transform of real vectors; one of complex vectors takes two of them."""
    size = axis.points
    if size == 1:
        return 0.0
    operations = 2 * size * math.log2(size) - 4 * size + 6
    return operations / 2 + _CYCLES_PER_VALUE * size


def effort(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`."""
    grid = grid_of(workload, schedule, isa)
    geometry, rows = grid.geometry, grid.blocks * grid.rows
    channels, operations = geometry.in_channels // geometry.groups * grid.terms, 0.0
    vectors = geometry.groups * -(-geometry.out_channels // geometry.groups // isa.lanes)
    size = math.prod(axis.points for axis in grid.axes)
    # A real transform in half of the 5 n log2 n operations of a complex one.
    for maps in (geometry.in_channels * grid.terms, geometry.out_channels):
        operations += 2.5 * rows * maps * size * math.log2(size)
    products, tasks = 0.0, -(-grid.blocks // schedule.blocks) if schedule.blocks else 0
    of_pair = 3 if grid.gauss else 4
    if is_depthwise(geometry):
        tasks = -(-geometry.in_channels // isa.lanes)
        vectors = tasks
        products = rows * grid.terms * tasks * (grid.reals + of_pair * grid.pairs)
    else:
        products = _product_cycles(workload, schedule, isa)
    stages = 1 if tasks else 4
    return Effort(
        multiplications=float(
            rows * channels * vectors * isa.lanes * (grid.reals + of_pair * grid.pairs)
        ),
        operations=operations,
        products=float(products),
        transforms=_transform_cycles(workload, schedule, isa),
        weight_bytes=4.0 * grid.slots * channels * geometry.out_channels,
        weight_reads=1.0 if is_depthwise(geometry) else float(max(1, tasks)),
        # What one thread transforms, another multiplies: it goes through the shared cache.
        exchange_bytes=0.0 if tasks else float(grid.blocks * _scratch(grid)),
        task_bytes=float(schedule.blocks * _scratch(grid)),
        tasks=tasks or (grid.reals + grid.pairs) * -(-vectors // schedule.vectors),
        stages=stages,
    )


def _cycles(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> float:
    """Cycles times threads, averaged over some numbers of threads."""
    return parallel_cycles(effort(workload, schedule, isa))
