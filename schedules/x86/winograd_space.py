"""The Winograd schedules of a workload worth trying, most promising first by a simple model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tvm_lowrank.schedules.effort import Effort
from tvm_lowrank.schedules.transforms.cook_toom import MOST_POINTS, transform_code

from .isa import VectorISA
from .space import canonical_geometry
from .tile_costs import (
    BLOCK_OVERHEAD,
    CYCLES_PER_PLACE,
    NEAR_BYTES,
    loads_per_cycle,
    parallel_cycles,
    ranked,
    task_sizes,
)
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
_BLOCKS_OF_ROWS = 3


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
    return ranked(found, lambda s: (s.tile, s.blocks > 0))


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
    for blocks in task_sizes(grid.blocks, _scratch(workload, grid)):
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
    loads = loads_per_cycle(block.vectors, isa)
    step = max(sums / 2, (block.rows + block.vectors) / loads, 4)
    weights = block.vectors * isa.vector_bytes
    if grid.blocks > 1 and weights * block.channels > NEAR_BYTES:
        step += weights / 128
    call = block.channels * step + BLOCK_OVERHEAD + sums
    return grid.points * grid.blocks * groups * call


def effort(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`."""
    grid, geometry = grid_of(workload, schedule), workload.geometry
    in_channels, vectors = geometry.in_channels, -(-geometry.out_channels // isa.lanes)
    scratch, rows = _scratch(workload, grid), grid.blocks * grid.rows
    tasks = -(-grid.blocks // schedule.blocks) if schedule.blocks else 0
    operations = rows * isa.lanes * _transform_instructions(workload, grid, isa)
    return Effort(
        multiplications=float(grid.points * rows * in_channels * vectors * isa.lanes),
        operations=float(operations),
        products=_product_cycles(workload, schedule, isa),
        transforms=_transform_cycles(workload, grid, isa),
        weight_bytes=4.0 * grid.points * in_channels * geometry.out_channels,
        weight_reads=float(max(1, tasks)),
        # What one thread transforms, another multiplies: it goes through the shared cache.
        exchange_bytes=0.0 if tasks else float(grid.blocks * scratch),
        task_bytes=float(schedule.blocks * scratch),
        tasks=tasks or grid.points * -(-vectors // schedule.vectors),
        stages=1 if tasks else 3,
    )


def _transform_instructions(workload: ConvWorkload, grid: TileGrid, isa: VectorISA) -> int:
    """Vector instructions of both transforms of a tile."""
    total = 0
    for matrix, channels in (
        ("input", workload.geometry.in_channels),
        ("output", workload.geometry.out_channels),
    ):
        down, across = (
            transform_code(outputs, taps, matrix)
            for outputs, taps in zip(grid.tile, grid.geometry.kernel, strict=True)
        )
        of_tile = down.instructions * across.inputs + across.instructions * len(down.outputs)
        total += -(-channels // isa.lanes) * of_tile
    return total


def _transform_cycles(workload: ConvWorkload, grid: TileGrid, isa: VectorISA) -> float:
    """Cycles of both transforms on one core."""
    g = workload.geometry
    vectors = -(-g.in_channels // isa.lanes) + -(-g.out_channels // isa.lanes)
    places = CYCLES_PER_PLACE * grid.points * vectors
    return (_transform_instructions(workload, grid, isa) / 2 + places) * grid.blocks * grid.rows


def _cycles(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> float:
    """Cycles times threads, averaged over some numbers of threads."""
    return parallel_cycles(effort(workload, schedule, isa))
