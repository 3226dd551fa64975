"""Depthwise convolution on channel-blocked maps, in register tiles of several rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm_lowrank.schedules.effort import Effort, imbalance

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .epilogue import Epilogue
from .groups import is_depthwise
from .isa import VectorISA
from .padding import Sides, pad_geometry, pad_map
from .tiles import TileGroup, kernel_rows, tiling
from .workload import ConvWorkload

# Vector loads that a cycle sustains, and cycles of a tile outside of its reduction.
_LOADS_PER_CYCLE = 1.6
_TILE_OVERHEAD = 25
# Wider kernels run through their columns in a loop.
_UNROLLED_COLUMNS = 3
# Multiply-adds of straight-line code that border tiles may take before the map is copied between
# columns of zeros: 31x31 on small maps, not 7x7.
_BORDER_CODE = 2000
_MOST_ROWS = 6
_MOST_SCHEDULES = 24


@dataclass(frozen=True)
class DepthwiseSchedule:
    """The tunable choices: a register tile of ``rows`` by ``tile`` pixels of one channel vector."""

    kernel: ClassVar[str] = "depthwise"

    rows: int
    tile: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DepthwiseSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(data["rows"], data["tile"])


def refuse(workload: ConvWorkload, isa: VectorISA) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if not is_depthwise(workload.geometry):
        return f"{workload.geometry} is not depthwise"
    if workload.in_block != isa.lanes:
        return f"in_block is {workload.in_block}, expected {isa.lanes}"
    return None


def is_legal(workload: ConvWorkload, schedule: DepthwiseSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa)
    if problem:
        return problem
    geometry = workload.geometry
    if not (1 <= schedule.rows <= geometry.out_height and 1 <= schedule.tile <= geometry.out_width):
        return f"tiles must lie within the {geometry.out_height}x{geometry.out_width} output"
    needed = schedule.rows * schedule.tile + schedule.rows + 1
    if needed > isa.registers - 1:
        return f"it needs {needed} of {isa.registers - 1} vector registers"
    return None


def space(workload: ConvWorkload, isa: VectorISA) -> list[DepthwiseSchedule]:
    """Legal schedules, most promising first by a count of cycles; never empty unless refused."""
    geometry = workload.geometry
    found: dict[DepthwiseSchedule, float] = {}
    for rows in range(1, min(_MOST_ROWS, geometry.out_height) + 1):
        widest = max(1, min(geometry.out_width, (isa.registers - 2 - rows) // rows))
        least = -(-geometry.out_width // widest)
        for count in range(least, 2 * least + 3):
            schedule = DepthwiseSchedule(rows, -(-geometry.out_width // count))
            if is_legal(workload, schedule, isa) is None:
                found[schedule] = _cycles(geometry, schedule, isa)
    return sorted(found, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: DepthwiseSchedule, isa: VectorISA
) -> np.ndarray:
    """Lay out a (C, 1, X, Y) weight as float32 ``(ceil(C / lanes), X, Y, lanes)``.

    Channels beyond C are zero. Raises ValueError if the weight has another shape.
    """
    shape = workload.geometry.weight_shape
    if weight.shape != shape:
        raise ValueError(f"weight has shape {weight.shape}, expected {shape}")
    blocks = -(-shape[0] // isa.lanes)
    padded = np.zeros((blocks * isa.lanes, *shape[2:]), np.float32)
    padded[: shape[0]] = weight[:, 0]
    split = padded.reshape(blocks, isa.lanes, *shape[2:])
    return np.ascontiguousarray(split.transpose(0, 2, 3, 1))


def emit(workload: ConvWorkload, schedule: DepthwiseSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Its parameters are ``x`` of shape ``(N, ceil(C / lanes), H, W, lanes)``, the packed weights, the
    buffers of the epilogue's steps, and ``y`` of ``(N, ceil(C / lanes), OH, OW, lanes)``.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    given = workload.geometry
    blocks = -(-given.in_channels // isa.lanes)
    em = Emitter(isa)
    x = em.argument("x", (given.batch, blocks, given.height, given.width, isa.lanes))
    weights = em.argument("weights", (blocks, *given.kernel, isa.lanes))
    y_shape = (given.batch, blocks, given.out_height, given.out_width, isa.lanes)
    epilogue = Epilogue(em, workload.epilogue, blocks * isa.lanes, y_shape)
    y = em.argument("y", y_shape)
    sides = copied_sides(given, schedule)
    if any(sides):
        x = pad_map(em, given, sides, isa.lanes, x)
    nest = Nest(pad_geometry(given, sides), schedule, x, weights)

    geometry = nest.geometry
    bands = -(-geometry.out_height // schedule.rows)
    with em.loop(geometry.batch * blocks * bands, "parallel", prefix="task") as task:
        plane = em.bind_index(quotient(task, bands), "map")
        row = remainder(task, bands) * schedule.rows
        # The last band starts early enough to be whole: rows that two bands share are written
        # twice, with the same values.
        row = em.bind_index(clamp_high(row, geometry.out_height - schedule.rows), "row")
        block = em.bind_index(remainder(plane, blocks), "block")
        for part in tiling(geometry, schedule.tile).groups:
            with em.loop(part.count, start=part.first, prefix="tile") as tile:
                column = em.bind_index(tile * schedule.tile, "column")
                values = emit_tile(em, nest, part, (plane, block, row, column))
                base = em.bind_index(
                    ((plane * geometry.out_height + row) * geometry.out_width + column) * isa.lanes,
                    "out",
                )
                pitch = geometry.out_width * isa.lanes
                epilogue.store(y, values, base, pitch, block * isa.lanes, 0)
    return em.finish()


@dataclass(frozen=True)
class Nest:
    """The loop nest in numbers, with the buffers it works on."""

    geometry: ConvGeometry  # of ``x``, which may be the padded copy
    schedule: DepthwiseSchedule
    x: tirx.Buffer
    weights: tirx.Buffer


def copied_sides(geometry: ConvGeometry, schedule: DepthwiseSchedule) -> Sides:
    """The columns of padding that a copy of the input should hold; usually none."""
    border = sum(
        len(pixels)
        for group in tiling(geometry, schedule.tile).groups
        for _, pixels in group.partial
    )
    if border * schedule.rows * geometry.kernel[0] > _BORDER_CODE:
        return (0, geometry.padding[1], 0, geometry.padding[3])
    return (0, 0, 0, 0)


def emit_tile(
    em: Emitter, nest: Nest, part: TileGroup, place: tuple[Index, Index, Index, Index]
) -> list[list[tirx.Expr]]:
    """Clear the accumulators of a tile and run its taps; returns them by row and pixel."""
    geometry, rows = nest.geometry, nest.schedule.rows
    plane, block, row, column = place
    accumulators = [em.accumulators(part.width) for _ in range(rows)]
    for line in accumulators:
        for accumulator in line:
            em.store(accumulator, em.constant(0))
    top, left = geometry.padding[:2]
    (stride, step), (spread, _) = geometry.stride, geometry.dilation
    first_line = row * stride - top
    origin = em.bind_index(
        (plane * geometry.height + first_line) * geometry.width + column * step - left, "x"
    )
    taps = em.bind_index(block * (geometry.kernel[0] * geometry.kernel[1]), "w")

    def line_at(offset: Index, users: Sequence[tuple[int, Index]]) -> None:
        """One line of the input for the output rows ``users``, each with its kernel row."""
        start = em.bind_index(origin + offset * geometry.width, "x")
        tap_rows = [(o, em.bind_index(taps + kh * geometry.kernel[1], "w")) for o, kh in users]
        _emit_line(em, nest, part, start, tap_rows, accumulators)

    if rows == 1:
        low, high = kernel_rows(geometry, row)
        low = em.bind_index(low, "low")
        with em.loop(high - low, start=low, prefix="kh") as kh:
            line_at(kh * spread, [(0, kh)])
    else:
        last_line = (geometry.out_height - rows) * stride - top
        users: dict[int, list[tuple[int, Index]]] = {}
        for o in range(rows):
            for kernel_row in range(geometry.kernel[0]):
                users.setdefault(o * stride + kernel_row * spread, []).append((o, kernel_row))
        for offset in sorted(users):
            at = _expr(first_line + offset)
            conditions = []
            if offset < top:
                conditions.append(tirx.GE(at, 0))
            if last_line + offset >= geometry.height:
                conditions.append(tirx.LT(at, geometry.height))
            if not conditions:
                line_at(offset, users[offset])
                continue
            condition = conditions[0] if len(conditions) == 1 else tirx.And(*conditions)
            with em.when(condition):
                line_at(offset, users[offset])
    return [[em.value_of(accumulator) for accumulator in line] for line in accumulators]


def _emit_line(
    em: Emitter,
    nest: Nest,
    part: TileGroup,
    start: Index,
    tap_rows: Sequence[tuple[int, Index]],
    accumulators: Sequence[Sequence[tirx.Buffer]],
) -> None:
    """The kernel columns on one line of the input, which starts at pixel ``start``."""
    step, spread = nest.geometry.stride[1], nest.geometry.dilation[1]

    def column(kw: Index, pixels: range | tuple[int, ...]) -> None:
        weights = [(o, em.load(nest.weights, (taps + kw) * em.lanes)) for o, taps in tap_rows]
        at = em.bind_index((start + kw * spread) * em.lanes, "x")
        for i in pixels:
            value = em.load(nest.x, at + i * step * em.lanes)
            for o, weight in weights:
                em.multiply_add(accumulators[o][i], value, weight)

    first, last = part.full
    if nest.geometry.kernel[1] <= _UNROLLED_COLUMNS:
        for kw in range(first, last):
            column(kw, range(part.width))
    elif last > first:
        with em.loop(last - first, start=first, prefix="kw") as kw:
            column(kw, range(part.width))
    for kw, pixels in part.partial:
        column(kw, pixels)


def effort(workload: ConvWorkload, schedule: DepthwiseSchedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`."""
    geometry = workload.geometry
    maps, taps = -(-geometry.in_channels // isa.lanes), math.prod(geometry.kernel)
    bands = -(-geometry.out_height // schedule.rows)
    pixels = bands * schedule.rows * geometry.out_width
    return Effort(
        multiplications=float(geometry.batch * maps * isa.lanes * pixels * taps),
        operations=0.0,
        products=geometry.batch * maps * _map_cycles(geometry, schedule, isa),
        transforms=0.0,
        weight_bytes=4.0 * maps * isa.lanes * taps,
        tasks=geometry.batch * maps * bands,
    )


def _cycles(geometry: ConvGeometry, schedule: DepthwiseSchedule, isa: VectorISA) -> float:
    """Cycles of a map on a core with two multiply-add units, with the threads' imbalance."""
    bands = -(-geometry.out_height // schedule.rows)
    tasks = geometry.batch * -(-geometry.in_channels // isa.lanes) * bands
    return _map_cycles(geometry, schedule, isa) * imbalance(tasks)


def _map_cycles(geometry: ConvGeometry, schedule: DepthwiseSchedule, isa: VectorISA) -> float:
    """Cycles of a vector of maps on a core with two multiply-add units."""
    rows, columns = geometry.kernel
    # Lines of the input that the rows of a tile read together.
    lines = len(
        {
            o * geometry.stride[0] + kh * geometry.dilation[0]
            for o in range(schedule.rows)
            for kh in range(rows)
        }
    )
    bands = -(-geometry.out_height // schedule.rows)
    per_band = 0.0
    for group in tiling(geometry, schedule.tile).groups:
        work = schedule.rows * group.width * rows * columns / 2
        loads = (lines * columns * group.width + schedule.rows * rows * columns) / _LOADS_PER_CYCLE
        # LLVM keeps the pixels that neighbouring columns share, and spills what does not fit.
        kept = (group.width - 1) * geometry.stride[1] + columns
        spilled = schedule.rows * (group.width + 1) + kept - isa.registers
        loads += 2 * lines * max(0, spilled)
        latency = 4 * rows * columns
        overhead = _TILE_OVERHEAD + schedule.rows * group.width
        per_band += group.count * (max(work, loads, latency) + overhead)
    cycles = bands * per_band
    sides = copied_sides(geometry, schedule)
    if any(sides):
        padded = pad_geometry(geometry, sides)
        cycles += 2 * padded.height * padded.width
    return cycles


def _expr(value: Index) -> tirx.Expr:
    return tirx.IntImm("int32", value) if isinstance(value, int) else value
