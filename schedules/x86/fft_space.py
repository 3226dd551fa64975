"""The Fourier schedules of a workload worth trying, most promising first by a simple model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

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
from .workload import ConvWorkload

# Vector loads and broadcasts that a cycle sustains, as the direct convolution's model has it.
_LOADS_PER_CYCLE = 1.6
# Cycles of a register block outside of its sum: index arithmetic, clearing.
_BLOCK_OVERHEAD = 40
# Cycles to bring a slot of a tile to its place in the second-level cache, or back.
_CYCLES_PER_SLOT = 6
# Cycles of a value that is transformed, beside arithmetic: its loads, stores and spills.
_CYCLES_PER_VALUE = 2
# Bytes of its first-level cache that the weights of a product may take; more come in again for
# every register block, at 128 bytes a cycle at most.
_NEAR_BYTES = 1 << 15
# Bytes of a core's second-level cache that weights used again may count on.
_CACHE_BYTES = 1 << 20
# Bytes of scratch that a task of several register blocks may take.
_SCRATCH_BYTES = 1 << 21
# Bytes a cycle that come in from beyond that cache.
_BYTES_PER_CYCLE = 8
# Cycles to start the threads on a parallel loop.
_START = 3000
_THREADS = (2, 4, 8)
_REGISTER_BLOCKS = 2
_MOST_SCHEDULES = 24


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
    ranked = sorted(found, key=lambda schedule: found[schedule])
    peers: Counter[tuple[tuple[int, int], bool, bool]] = Counter()
    for schedule in ranked:
        kind = (schedule.tile, schedule.gauss, schedule.blocks > 0)
        found[schedule] *= 1 + 0.1 * peers[kind]
        peers[kind] += 1
    return sorted(ranked, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


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
    yield replace(shape, blocks=0)
    for blocks in sorted({1, 2, *(-(-grid.blocks // n) for n in _THREADS)}):
        if blocks <= grid.blocks and (blocks == 1 or blocks * _scratch(grid) <= _SCRATCH_BYTES):
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
    # With one vector each broadcast is part of its multiply-add, where the instructions allow it.
    loads = 2.0 if block.vectors == 1 and isa.lanes == 16 else _LOADS_PER_CYCLE
    steps = block.channels * block.segments
    total = 0.0
    for parts, products in _kinds(grid):
        step = max(
            parts * parts * sums / 2, parts * (block.rows + block.vectors) / loads, 4 * parts
        )
        weights = parts * block.vectors * isa.vector_bytes
        if grid.blocks > 1 and weights * steps > _NEAR_BYTES:
            step += weights / 128
        total += products * (steps * step + _BLOCK_OVERHEAD + parts * sums)
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
        cycles += _CYCLES_PER_SLOT * grid.slots
        total += -(-channels // isa.lanes) * terms * cycles
    return total * grid.blocks * grid.rows


def _of_reals(axis: Axis) -> float:
    """Cycles of a transform of real vectors; one of complex vectors takes two of them."""
    size = axis.points
    if size == 1:
        return 0.0
    operations = 2 * size * math.log2(size) - 4 * size + 6
    return operations / 2 + _CYCLES_PER_VALUE * size


def _cycles(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> float:
    """Cycles times threads, averaged over some numbers of threads."""
    grid = grid_of(workload, schedule, isa)
    product = _product_cycles(workload, schedule, isa)
    transforms = _transform_cycles(workload, schedule, isa)
    channels = grid.geometry.in_channels // grid.geometry.groups * grid.terms
    weights = 4 * grid.slots * channels * grid.geometry.out_channels
    tasks = -(-grid.blocks // schedule.blocks) if schedule.blocks else 0
    if not tasks:
        # What one thread transforms, another multiplies: it goes through the shared cache.
        transforms += grid.blocks * _scratch(grid) / _BYTES_PER_CYCLE
    total = 0.0
    for threads in _THREADS:
        if tasks:
            passes = -(-tasks // threads) if weights > _CACHE_BYTES else 1
            fetch = passes * weights / _BYTES_PER_CYCLE * threads
            imbalance = -(-tasks // threads) * threads / tasks
            starts = 1
        else:
            fetch = weights / _BYTES_PER_CYCLE
            imbalance, starts = 1.0, 4
        # Fetching overlaps with the products, but not all of it.
        busy = max(product, fetch) + min(product, fetch) / 3
        total += (busy + transforms) * imbalance + starts * _START * threads
    return total / len(_THREADS)
