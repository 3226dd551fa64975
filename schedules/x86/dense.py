"""Dense layers of several samples: one matrix product, each weight read once for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm_lowrank.schedules.effort import Effort, imbalance

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, moving, quotient, remainder
from .epilogue import Epilogue
from .gemm import RegisterBlock
from .isa import VectorISA
from .packing import pack_weights
from .pairs import NO_BFLOAT16, PairEmitter, pair_rows
from .workload import ConvWorkload

# Vector loads that a cycle sustains, and cycles of a block of sums outside of its reduction.
_LOADS_PER_CYCLE = 1.6
_BLOCK_OVERHEAD = 40
# Bytes of weights that a cycle brings from outside of the first-level cache, where they all are.
_FETCH = 128
# Cycles from one multiply-add to the next on the same sum.
_LATENCY = 4
_MOST_VECTORS = 8
_MOST_SCHEDULES = 24


@dataclass(frozen=True)
class DenseSchedule:
    """The tunable choices: sums of ``rows`` samples times ``vectors`` of outputs are in registers.

    ``vectors`` divides the vectors of output channels.
    """

    kernel: ClassVar[str] = "dense"
    # Whether terms are pairs of bfloat16.
    paired: ClassVar[bool] = False

    rows: int
    vectors: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DenseSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(data["rows"], data["vectors"])


@dataclass(frozen=True)
class Bfloat16DenseSchedule(DenseSchedule):
    """The same with bfloat16 factors."""

    kernel: ClassVar[str] = "bfloat16_dense"
    paired: ClassVar[bool] = True


def is_dense(geometry: ConvGeometry) -> bool:
    """Whether a convolution is one product for each of several samples: its kernel is the map."""
    return (
        geometry.batch > 1
        and geometry.groups == 1
        and geometry.kernel == (geometry.height, geometry.width)
        and geometry.dilation == (1, 1)
        and not any(geometry.padding)
    )


def refuse(
    workload: ConvWorkload, isa: VectorISA, kind: type[DenseSchedule] = DenseSchedule
) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if kind.paired and not isa.bfloat16:
        return NO_BFLOAT16
    if not is_dense(workload.geometry):
        return f"{workload.geometry} is no dense layer of several samples"
    if workload.in_block not in (1, isa.lanes):
        return f"in_block is {workload.in_block}, expected 1 or {isa.lanes}"
    if kind.paired and _terms(workload) % isa.lanes:
        return f"bfloat16: {_terms(workload)} terms are no multiple of {isa.lanes}"
    return None


def is_legal(workload: ConvWorkload, schedule: DenseSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa, type(schedule))
    if problem:
        return problem
    if not 1 <= schedule.rows <= workload.geometry.batch:
        return f"rows={schedule.rows} must be of the {workload.geometry.batch} samples"
    vectors = _vectors(workload.geometry, isa)
    if schedule.vectors < 1 or vectors % schedule.vectors:
        return f"vectors={schedule.vectors} does not divide {vectors}"
    needed = RegisterBlock(schedule.rows, schedule.vectors, 1).registers
    if needed > isa.registers - 1:
        return f"it needs {needed} of {isa.registers - 1} vector registers"
    return None


def space(
    workload: ConvWorkload, isa: VectorISA, kind: type[DenseSchedule] = DenseSchedule
) -> list[DenseSchedule]:
    """Legal schedules, most promising first by a count of cycles; never empty unless refused."""
    geometry = workload.geometry
    found: dict[DenseSchedule, float] = {}
    for vectors in range(1, _MOST_VECTORS + 1):
        # The samples in blocks of about the same size, from as few as the registers allow.
        most = max(1, (isa.registers - 2 - vectors) // vectors)
        least = -(-geometry.batch // most)
        for count in range(least, least + 3):
            schedule = kind(-(-geometry.batch // count), vectors)
            if is_legal(workload, schedule, isa) is None:
                groups, blocks = _tasks(geometry, schedule, isa)
                found[schedule] = _cycles(workload, schedule, isa) * imbalance(groups * blocks)
    return sorted(found, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


def emit(workload: ConvWorkload, schedule: DenseSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel, with the parameters of `convolution.emit`.

    The input is copied first, so that the samples of a block of sums lie side by side: in the map
    they are a whole map apart, often by a power of two, and would share a few lines of the
    first-level cache.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    g, lanes, width = workload.geometry, isa.lanes, schedule.vectors * isa.lanes
    out_blocks, in_blocks = _vectors(g, isa), -(-g.in_channels // workload.in_block)
    (groups, blocks), terms = _tasks(g, schedule, isa), _steps(workload, schedule)
    em = PairEmitter(isa) if schedule.paired else Emitter(isa)
    x_shape = (g.batch, in_blocks, g.height, g.width)
    x = em.argument("x", x_shape if workload.in_block == 1 else (*x_shape, lanes))
    taps = (terms,) if schedule.paired else (in_blocks, *g.kernel, workload.in_block)
    weights = em.argument("weights", (groups, *taps, width))
    y_shape = (g.batch, out_blocks, 1, 1, lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * lanes, y_shape)
    y = em.argument("y", y_shape)

    copy = _emit_copy(em, x, g.batch, schedule.rows, _terms(workload))
    whole, rest = divmod(g.batch, schedule.rows)

    def multiply(block: Index, group: Index, rows: int) -> None:
        sums = RegisterBlock(rows, schedule.vectors, terms)
        size = -(-terms // lanes) * lanes * schedule.rows
        values: dict[tuple[int, int], tirx.Expr] = {}

        def keep(row: int, vector: int, value: tirx.Expr) -> None:
            values[vector, row] = value

        sums.emit(em, (copy, block * size), (weights, group * (terms * width)), keep)
        base = em.bind_index(block * (schedule.rows * out_blocks * lanes) + group * width, "out")
        lines = [[values[j, i] for i in range(rows)] for j in range(schedule.vectors)]
        epilogue.store(y, lines, base, lanes, group * width, lanes, out_blocks * lanes)

    with em.loop(groups * blocks, "parallel", prefix="task") as task:
        group = em.bind_index(quotient(task, blocks), "group")
        block = em.bind_index(remainder(task, blocks), "rows")
        if not rest:
            multiply(block, group, schedule.rows)
        else:
            with em.when(tirx.LT(block, whole)):
                multiply(block, group, schedule.rows)
            with em.when(tirx.EQ(block, whole)):
                multiply(whole, group, rest)
    return em.finish()


def _emit_copy(em: Emitter, x: tirx.Buffer, batch: int, rows: int, terms: int) -> tirx.Buffer:
    """Copy ``x`` as (blocks of samples, blocks of terms, rows, lanes); returns the copy.

    In the last block of samples only as many rows as there are take space. A block is a vector of
    terms, or of pairs that they are rounded to.
    """
    lanes = em.lanes
    length = 2 * lanes if isinstance(em, PairEmitter) else lanes
    columns = -(-terms // length)
    copy = em.workspace(batch * columns * lanes)
    whole = batch // rows * rows

    def move(sample: Index, first: Index, count: int) -> None:
        """The terms of a sample, the first of a block of ``count`` being ``first``."""
        start = em.bind_index(first * (columns * lanes) + (sample - first) * lanes, "to")
        whole_columns, rest = divmod(terms, length)
        if whole_columns:
            with em.loop(whole_columns, prefix="column") as column:
                at = em.bind_index(sample * terms + column * length, "at")
                value = em.load(x, at)
                if isinstance(em, PairEmitter):
                    value = em.rounded(value, em.load(x, at + lanes))
                em.store(copy, value, start + column * (count * lanes))
        if rest and isinstance(em, PairEmitter):
            value = em.load(x, sample * terms + whole_columns * length)
            value = em.rounded(value, em.constant(0))
            em.store(copy, value, start + whole_columns * (count * lanes))
        elif rest:
            with em.loop(rest, prefix="c") as c:
                value = em.scalar(x, sample * terms + whole_columns * lanes + c)
                em.store_scalar(copy, value, start + whole_columns * (count * lanes) + c)

    with em.loop(batch, moving(4 * batch * terms), prefix="sample") as sample:
        if whole == batch:
            move(sample, em.bind_index(sample - remainder(sample, rows), "first"), rows)
        else:
            with em.when(tirx.LT(sample, whole)):
                move(sample, em.bind_index(sample - remainder(sample, rows), "first"), rows)
            with em.when(tirx.GE(sample, whole)):
                move(sample, whole, batch - whole)
    return copy


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: DenseSchedule, isa: VectorISA
) -> np.ndarray:
    """Lay out an OIHW weight, as `pack_weights` does; rounded to pairs of terms where they are.

    Of those the shape is ``(tiles, pairs, vectors * lanes)``.
    """
    packed = pack_weights(weight, workload, schedule, isa)
    if not schedule.paired:
        return packed
    return pair_rows(packed.reshape(len(packed), _terms(workload), -1))


def effort(workload: ConvWorkload, schedule: DenseSchedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`."""
    g, terms = workload.geometry, _steps(workload, schedule)
    groups, blocks = _tasks(g, schedule, isa)
    width = schedule.vectors * isa.lanes
    return Effort(
        multiplications=float(g.batch * terms * groups * width),
        operations=0.0,
        products=_cycles(workload, schedule, isa),
        transforms=0.0,
        weight_bytes=4.0 * terms * groups * width,
        input_reads=float(groups),
        exchange_bytes=4.0 * g.batch * terms,
        task_bytes=4.0 * terms * width,
        tasks=groups * blocks,
        stages=2,
    )


def _vectors(geometry: ConvGeometry, isa: VectorISA) -> int:
    return -(-geometry.out_channels // isa.lanes)


def _tasks(geometry: ConvGeometry, schedule: DenseSchedule, isa: VectorISA) -> tuple[int, int]:
    """Groups of output channels, and blocks of samples."""
    groups = _vectors(geometry, isa) // schedule.vectors
    return groups, -(-geometry.batch // schedule.rows)


def _terms(workload: ConvWorkload) -> int:
    """Products of a sum, with those of channels that fill up the last block."""
    g, block = workload.geometry, workload.in_block
    return -(-g.in_channels // block) * block * math.prod(g.kernel)


def _steps(workload: ConvWorkload, schedule: DenseSchedule) -> int:
    """Multiply-adds of a sum: of its terms, or of pairs of them."""
    return _terms(workload) // 2 if schedule.paired else _terms(workload)


def _cycles(workload: ConvWorkload, schedule: DenseSchedule, isa: VectorISA) -> float:
    """Cycles of all sums on a core with two multiply-add units."""
    groups = _vectors(workload.geometry, isa) // schedule.vectors
    whole, rest = divmod(workload.geometry.batch, schedule.rows)
    cycles, fetch = 0.0, schedule.vectors * isa.vector_bytes / _FETCH
    for count, rows in ((whole, schedule.rows), (1 if rest else 0, rest)):
        loads = (rows + schedule.vectors) / _LOADS_PER_CYCLE
        step = max(rows * schedule.vectors / 2, loads, _LATENCY) + fetch
        cycles += count * (_steps(workload, schedule) * step + _BLOCK_OVERHEAD)
    return cycles * groups
