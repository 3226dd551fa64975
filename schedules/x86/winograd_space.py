"""The Winograd schedules of a workload worth trying, most promising first by a simple model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tvm_lowrank.schedules.transforms.cook_toom import MOST_POINTS, cook_toom
from tvm_lowrank.schedules.transforms.linear_code import linear_code

from .isa import VectorISA
from .space import canonical_geometry
from .winograd_schedule import (
    TileGrid,
    WinogradSchedule,
    amplification,
    grid_of,
    is_legal,
    refuse,
    register_block,
)
from .workload import ConvWorkload

# Outputs of a transform along an axis; a map divides better into one than into another.
_OUTPUTS = (2, 3, 4, 6)
# Tiles that lose more digits than this factor takes are left out: F(6 x 6, 3 x 3) has 46.
_MOST_AMPLIFICATION = 50.0
# Vector loads and broadcasts that a cycle sustains, as the direct convolution's model has it.
_LOADS_PER_CYCLE = 1.6
# Cycles of a register block outside of its sum: index arithmetic, clearing.
_BLOCK_OVERHEAD = 40
# Cycles to bring a value of a transformed tile to its place in the second-level cache, or back.
_CYCLES_PER_POINT = 6
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
_BLOCKS_OF_ROWS = 3
_MOST_SCHEDULES = 24


def space(workload: ConvWorkload, isa: VectorISA) -> list[WinogradSchedule]:
    """Legal schedules of the Winograd convolution, most promising first.

    Empty if `refuse` gives a reason. The order comes from counting the cycles of transforms and
    products with weights not in cache; the best of each size of tile come before second bests.
    """
    if refuse(workload, isa):
        return []
    found = {
        schedule: _cycles(workload, schedule, isa)
        for tile in _tiles(workload)
        for shape in _register_blocks(workload, tile, isa)
        for schedule in _tasks(workload, shape)
    }
    ranked = sorted(found, key=lambda schedule: found[schedule])
    peers: Counter[tuple[tuple[int, int], bool]] = Counter()
    for schedule in ranked:
        kind = (schedule.tile, schedule.blocks > 0)
        found[schedule] *= 1 + 0.1 * peers[kind]
        peers[kind] += 1
    return sorted(ranked, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


def _tiles(workload: ConvWorkload) -> Iterator[tuple[int, int]]:
    """Sizes of tiles that keep enough digits."""
    geometry = canonical_geometry(workload.geometry)
    choices = [
        [m for m in _OUTPUTS if m + taps - 1 <= MOST_POINTS] if taps > 1 else [1]
        for taps in geometry.kernel
    ]
    for tile in ((m, n) for m in choices[0] for n in choices[1]):
        if amplification(geometry, tile) > _MOST_AMPLIFICATION:
            continue
        # Oblong tiles of square kernels: only the one that halves the weights of 4 x 4.
        if geometry.kernel[0] != geometry.kernel[1] or tile[0] == tile[1] or tile == (2, 4):
            yield tile


def _register_blocks(
    workload: ConvWorkload, tile: tuple[int, int], isa: VectorISA
) -> list[WinogradSchedule]:
    """The register blocks with the fastest products, as schedules of one block a task."""
    vectors = -(-workload.geometry.out_channels // isa.lanes)
    candidates = [
        WinogradSchedule(tile, rows, group)
        for group in range(1, vectors + 1)
        if vectors % group == 0
        for rows in range(1, isa.registers)
    ]
    legal = [c for c in candidates if is_legal(workload, c, isa) is None]
    return sorted(legal, key=lambda c: _product_cycles(workload, c, isa))[:_BLOCKS_OF_ROWS]


def _tasks(workload: ConvWorkload, shape: WinogradSchedule) -> Iterator[WinogradSchedule]:
    """The schedule with tasks of several sizes, and in stages."""
    grid = grid_of(workload, shape)
    yield replace(shape, blocks=0)
    for blocks in sorted({1, 2, *(-(-grid.blocks // n) for n in _THREADS)}):
        if blocks <= grid.blocks and (
            blocks == 1 or blocks * _scratch(workload, grid) <= _SCRATCH_BYTES
        ):
            yield replace(shape, blocks=blocks)


def _scratch(workload: ConvWorkload, grid: TileGrid) -> int:
    """Bytes of transformed data and products of a register block."""
    channels = workload.geometry.in_channels + workload.geometry.out_channels
    return 4 * grid.points * grid.rows * channels


def _product_cycles(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> float:
    """Cycles of all products on one core with two multiply-add units."""
    grid, block = grid_of(workload, schedule), register_block(workload, schedule)
    groups = -(-workload.geometry.out_channels // (isa.lanes * block.vectors))
    sums = block.rows * block.vectors
    # Fewer than eight sums do not hide the latency of multiply-add.
    # With one vector each broadcast is part of its multiply-add, where the instructions allow it.
    loads = 2.0 if block.vectors == 1 and isa.lanes == 16 else _LOADS_PER_CYCLE
    step = max(sums / 2, (block.rows + block.vectors) / loads, 4)
    weights = block.vectors * isa.vector_bytes
    if grid.blocks > 1 and weights * block.channels > _NEAR_BYTES:
        step += weights / 128
    call = block.channels * step + _BLOCK_OVERHEAD + sums
    return grid.points * grid.blocks * groups * call


def _transform_cycles(workload: ConvWorkload, grid: TileGrid, isa: VectorISA) -> float:
    """Cycles of both transforms on one core."""
    total = 0.0
    for matrix, channels in (
        ("input", workload.geometry.in_channels),
        ("output", workload.geometry.out_channels),
    ):
        down, across = (
            linear_code(getattr(cook_toom(outputs, taps), matrix))
            for outputs, taps in zip(grid.tile, grid.geometry.kernel, strict=True)
        )
        instructions = down.instructions * across.inputs + across.instructions * len(down.outputs)
        of_tile = instructions / 2 + _CYCLES_PER_POINT * grid.points
        total += -(-channels // isa.lanes) * of_tile
    return total * grid.blocks * grid.rows


def _cycles(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> float:
    """Cycles times threads, averaged over some numbers of threads."""
    grid = grid_of(workload, schedule)
    product = _product_cycles(workload, schedule, isa)
    transforms = _transform_cycles(workload, grid, isa)
    weights = 4 * grid.points * workload.geometry.in_channels * workload.geometry.out_channels
    tasks = -(-grid.blocks // schedule.blocks) if schedule.blocks else 0
    if not tasks:
        # What one thread transforms, another multiplies: it goes through the shared cache.
        transforms += grid.blocks * _scratch(workload, grid) / _BYTES_PER_CYCLE
    total = 0.0
    for threads in _THREADS:
        if tasks:
            passes = -(-tasks // threads) if weights > _CACHE_BYTES else 1
            fetch = passes * weights / _BYTES_PER_CYCLE * threads
            imbalance = -(-tasks // threads) * threads / tasks
            starts = 1
        else:
            fetch = weights / _BYTES_PER_CYCLE
            imbalance, starts = 1.0, 3
        # Fetching overlaps with the products, but not all of it.
        busy = max(product, fetch) + min(product, fetch) / 3
        total += (busy + transforms) * imbalance + starts * _START * threads
    return total / len(_THREADS)
