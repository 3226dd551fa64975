"""The legal schedules of a direct convolution, most promising first by a simple model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tvm_lowrank.schedules.effort import Effort, imbalance

from tvm_lowrank.geometry import ConvGeometry

from .dense import is_dense
from .groups import is_depthwise, merge_groups
from .isa import VectorISA
from .padding import pad_geometry, padded_copy
from .tiles import Tiling, tiling
from .workload import ConvSchedule, ConvWorkload, TiledSchedule

# Multiply-adds in flight that keep two units of four cycles' latency busy.
_IN_FLIGHT = 8
# Vector loads and broadcasts that a cycle sustains (two ports, measured on Sapphire Rapids).
_LOADS_PER_CYCLE = 1.6
# Cycles of a register tile outside of its reduction: index arithmetic, clearing, storing.
_TILE_OVERHEAD = 30
# Bytes that a core keeps close at hand (half of a usual L2 cache).
_CACHE_BYTES = 1 << 20
# Bytes of its first-level cache that the weights of a group of channels may take.
_NEAR_BYTES = 1 << 15
# Bytes of weights from which the next group's are asked for early; fewer are in a cache anyway.
_COLD_BYTES = 1 << 18
_MOST_SCHEDULES = 32


def canonical_geometry(geometry: ConvGeometry) -> ConvGeometry:
    """The same convolution on the same memory, with the long axis of the map as its width.

    A map of one column becomes one row (kernels of 1-D networks), and a pointwise convolution
    sees all its pixels as one row.
    """
    height, width = geometry.height, geometry.width
    if geometry.kernel == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding):
        return replace(geometry, height=1, width=height * width)
    top, left, bottom, right = geometry.padding
    if width == 1 and geometry.kernel[1] == 1 and left == right == 0:
        return replace(
            geometry,
            height=1,
            width=height,
            kernel=(1, geometry.kernel[0]),
            stride=(1, geometry.stride[0]),
            padding=(0, top, 0, bottom),
            dilation=(1, geometry.dilation[0]),
        )
    return geometry


def direct_geometry(workload: ConvWorkload, isa: VectorISA) -> ConvGeometry:
    """What the direct kernel computes: `canonical_geometry` with its groups merged."""
    merged = merge_groups(workload.geometry, workload.in_block, isa.lanes)
    return canonical_geometry(merged)


def reduction_of(geometry: ConvGeometry, in_block: int) -> tuple[int, int, int]:
    """The loops over a group's channels: outer extent, inner extent, inner stride in elements."""
    channels = geometry.in_channels // geometry.groups
    if in_block == 1 and geometry.kernel == (1, 1):
        return 1, channels, geometry.height * geometry.width
    return -(-channels // in_block), in_block, 1


def refuse(workload: ConvWorkload, isa: VectorISA) -> str | None:
    """Why the direct kernel cannot compute ``workload``, or None if it can."""
    if workload.in_block not in (1, isa.lanes):
        return f"in_block is {workload.in_block}, expected 1 or {isa.lanes}"
    if is_depthwise(workload.geometry) and workload.in_block == isa.lanes:
        return f"{workload.geometry} is depthwise, which has a kernel of its own"
    if is_dense(workload.geometry):
        return f"{workload.geometry} is dense, which for several samples has a kernel of its own"
    return None


def is_legal(workload: ConvWorkload, schedule: ConvSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa)
    if problem:
        return problem
    return illegal_tiles(direct_geometry(workload, isa), schedule, isa)


def illegal_tiles(geometry: ConvGeometry, schedule: ConvSchedule, isa: VectorISA) -> str | None:
    """Why a map of ``geometry`` cannot be computed in the register tiles, or None if it can."""
    vectors = -(-geometry.out_channels // geometry.groups // isa.lanes)
    counts = (schedule.tile, schedule.vectors, schedule.chunk, schedule.chains, schedule.rows)
    if min(counts) < 1:
        return "tile, vectors, chunk, chains and rows must be positive"
    width = geometry.out_width
    if schedule.rows > 1 and schedule.tile != width:
        return f"tiles of {schedule.rows} rows must be {width} wide"
    if vectors % schedule.vectors:
        return f"vectors={schedule.vectors} does not divide the {vectors} vectors of a group"
    if _registers(schedule) > isa.registers - 1:
        return f"it needs {_registers(schedule)} of {isa.registers - 1} vector registers"
    return None


def space(workload: ConvWorkload, isa: VectorISA) -> list[ConvSchedule]:
    """Legal schedules of the direct convolution, most promising first; the first is the default.

    Never empty unless refused. The order comes from counting the cycles of the register tiles
    (multiply-adds, loads, latency) and the imbalance of the parallel tasks; it is for a tuner to
    correct.
    """
    geometry = direct_geometry(workload, isa)
    vectors = -(-geometry.out_channels // geometry.groups // isa.lanes)
    is_cold = 4 * geometry.weight_count > _COLD_BYTES
    found: dict[ConvSchedule, float] = {}
    for shape in register_tiles(workload, geometry, isa):
        cycles = tile_cycles(workload, geometry, shape, isa)
        cycles += _padding_cycles(workload, geometry, shape, isa)
        groups = vectors // shape.vectors * geometry.groups
        for order, chunk in _orders(geometry, shape, groups):
            prefetch = is_cold and tiling_of(geometry, shape).count > 1
            schedule = replace(shape, order=order, chunk=chunk, prefetch=prefetch)
            found[schedule] = cycles * imbalance(groups * _chunks(geometry, schedule))
    # Sorting is stable: among equals, the order that _orders prefers stays first.
    return sorted(found, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


def register_tiles(
    workload: ConvWorkload, geometry: ConvGeometry, isa: VectorISA
) -> Iterator[ConvSchedule]:
    """Register tiles worth trying for a map of ``geometry``, as schedules of the default order."""
    vectors = -(-geometry.out_channels // geometry.groups // isa.lanes)
    for group in range(1, vectors + 1):
        if vectors % group:
            continue
        for tile, rows in _tiles(geometry, group, isa):
            chains = _chains(workload, geometry, rows * tile * group, group, isa)
            shape = ConvSchedule(tile, group, chains=chains, rows=rows)
            if illegal_tiles(geometry, shape, isa) is None:
                yield shape


def _registers(schedule: ConvSchedule) -> int:
    """Vector registers of the inner loop: accumulators, a vector of weights each, a broadcast."""
    accumulators = schedule.rows * schedule.tile * schedule.vectors * schedule.chains
    return accumulators + schedule.vectors + 1


def _tiles(geometry: ConvGeometry, group: int, isa: VectorISA) -> list[tuple[int, int]]:
    """Widths and rows of register tiles worth trying with ``group`` vectors."""
    pixels = (isa.registers - 2 - group) // group
    if pixels < 1:
        return []
    least = -(-geometry.out_width // min(geometry.out_width, pixels))
    widths = {-(-geometry.out_width // count) for count in range(least, 2 * least + 3)}
    tiles = [(width, 1) for width in sorted(widths, reverse=True)]
    for rows in range(2, min(geometry.out_height, pixels // geometry.out_width) + 1):
        tiles.append((geometry.out_width, rows))
    return tiles


def _chains(
    workload: ConvWorkload, geometry: ConvGeometry, accumulators: int, group: int, isa: VectorISA
) -> int:
    """Partial sums that bring a small register tile to `_IN_FLIGHT` accumulators."""
    chains = 1
    inner = reduction_of(geometry, workload.in_block)[1]
    while accumulators * chains < _IN_FLIGHT and inner >= 2 * chains:
        if 2 * accumulators * chains + group + 1 > isa.registers - 1:
            break
        chains *= 2
    return chains


def _orders(geometry: ConvGeometry, shape: ConvSchedule, groups: int) -> list[tuple[str, int]]:
    """Orders of the tasks with their chunks, the one with less traffic from memory first."""
    inputs = 4 * geometry.in_channels * geometry.height * geometry.width
    weights = 4 * geometry.weight_count
    tiles = tiling_of(geometry, shape)
    chunk = tiles.per_line if tiles.lines > 1 else min(4, tiles.per_line)
    chunks = tiles.count / chunk
    again_inputs = inputs * (groups if inputs > _CACHE_BYTES else 1)
    again_weights = weights * (chunks if weights > _CACHE_BYTES else 1)
    channels, by_rows = ("channels", 1), ("rows", chunk)
    if again_inputs + weights <= again_weights + inputs:
        return [channels, by_rows]
    return [by_rows, channels]


def tiling_of(geometry: ConvGeometry, schedule: TiledSchedule) -> Tiling:
    """The register tiles of a schedule; those of several rows read a padded copy."""
    sides = geometry.padding if schedule.rows > 1 else (0, 0, 0, 0)
    return tiling(pad_geometry(geometry, sides), schedule.tile, schedule.rows)


def tile_cycles(
    workload: ConvWorkload, geometry: ConvGeometry, schedule: ConvSchedule, isa: VectorISA
) -> float:
    """Cycles of the register tiles of one image, on a core with two multiply-add units."""
    steps = geometry.weight_count // geometry.out_channels
    groups = -(-geometry.out_channels // (isa.lanes * schedule.vectors))
    tiles = tiling_of(geometry, schedule)
    per_line = 0.0
    for group in tiles.groups:
        step = _step_cycles(workload, geometry, schedule, isa, group.width)
        per_line += group.count * (steps * step + _TILE_OVERHEAD)
    return per_line * tiles.lines * groups


def _step_cycles(
    workload: ConvWorkload,
    geometry: ConvGeometry,
    schedule: ConvSchedule,
    isa: VectorISA,
    width: int,
) -> float:
    """Cycles of one step of the reduction for ``width`` pixels."""
    steps = geometry.weight_count // geometry.out_channels
    weights = schedule.vectors * isa.vector_bytes
    # Weights that do not stay in the first-level cache come in at 128 bytes a cycle at most.
    fetch = weights / 128 if weights * steps > _NEAR_BYTES else 0.0
    work = width * schedule.vectors / 2
    loads = (width + schedule.vectors) / _LOADS_PER_CYCLE
    step = max(work, loads, 4 / schedule.chains) + fetch
    if geometry.stride[1] < geometry.kernel[1] and workload.in_block == 1:
        # LLVM keeps inputs that neighbouring taps share, and spills what no longer fits.
        kept = width + geometry.kernel[1] - 1
        step += 0.2 * max(0, _registers(schedule) + kept - isa.registers)
    return step


def _padding_cycles(
    workload: ConvWorkload, geometry: ConvGeometry, schedule: ConvSchedule, isa: VectorISA
) -> float:
    """Cycles to copy the map between zeros, if the kernel needs that."""
    sides = padded_copy(geometry, schedule, workload.in_block)
    if not any(sides):
        return 0.0
    padded = pad_geometry(geometry, sides)
    return geometry.in_channels * padded.height * padded.width / isa.lanes * 2


def _chunks(geometry: ConvGeometry, schedule: ConvSchedule) -> int:
    """Tasks of one group of outputs."""
    return geometry.batch * -(-tiling_of(geometry, schedule).count // schedule.chunk)


def effort(workload: ConvWorkload, schedule: ConvSchedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`. Rows and columns of padding are skipped."""
    geometry = direct_geometry(workload, isa)
    steps, width = geometry.weight_count // geometry.out_channels, isa.lanes * schedule.vectors
    groups = geometry.groups * -(-geometry.out_channels // geometry.groups // width)
    tiles = tiling_of(geometry, schedule)
    chunks = _chunks(geometry, schedule)
    rows, columns = geometry.kernel
    of_tap = steps // (rows * columns)
    # Tiles of several rows read a padded copy, so they skip nothing.
    taps = [rows] * tiles.lines if schedule.rows > 1 else _rows_within(geometry)
    pixels, cycles = 0.0, 0.0
    for part in tiles.groups:
        shared = part.full[1] - part.full[0]
        users = [part.width] * shared + [len(of) for _, of in part.partial]
        pixels += part.count * sum(users)
        of_row = sum(_step_cycles(workload, geometry, schedule, isa, each) for each in users)
        cycles += part.count * (sum(taps) * of_tap * of_row + tiles.lines * _TILE_OVERHEAD)
    cycles = cycles * groups + _padding_cycles(workload, geometry, schedule, isa)
    return Effort(
        multiplications=float(geometry.batch * sum(taps) * of_tap * pixels * groups * width),
        operations=0.0,
        products=geometry.batch * cycles,
        transforms=0.0,
        weight_bytes=4.0 * groups * width * steps,
        weight_reads=float(chunks if schedule.order == "rows" else 1),
        input_reads=float(groups if schedule.order == "channels" else 1),
        task_bytes=4.0 * width * steps,
        tasks=groups * chunks,
    )


def _rows_within(geometry: ConvGeometry) -> list[int]:
    """Of each row of the output, the rows of the kernel that meet the map."""
    reach = range(0, geometry.kernel[0] * geometry.dilation[0], geometry.dilation[0])
    first = range(-geometry.padding[0], geometry.height * geometry.stride[0], geometry.stride[0])
    return [
        sum(0 <= start + tap < geometry.height for tap in reach)
        for start in first[: geometry.out_height]
    ]
