"""Batched matrix products as tiles of blocks, threads and registers: the core of most kernels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .arch import MOST_BLOCKS_YZ, MOST_THREADS, STATIC_SHARED_BYTES, WARP, CudaArch
from .threads import ThreadSchedule

Index: TypeAlias = ir.Expr
# A thread's tile of more than four values along an axis is in pieces of four, a block's width
# apart, so that neighbouring threads read neighbouring vectors of shared memory.
_PIECE = 4


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


class Tiles(Protocol):
    """What of a schedule decides how a product is padded: see `GemmSchedule`."""

    @property
    def block_m(self) -> int:
        """Rows of a block."""
        ...

    @property
    def block_n(self) -> int:
        """Columns of a block."""
        ...

    @property
    def block_k(self) -> int:
        """Length of a piece of the sum."""
        ...

    @property
    def split_k(self) -> int:
        """Parts of the sum."""
        ...


@dataclass(frozen=True)
class GemmSchedule:
    """Tiles of a product of (m x k) by (k x n) matrices.

    - ``block_m``, ``block_n``: rows and columns of the result that a block of threads computes;
    - ``block_k``: how much of the sum goes through shared memory at once;
    - ``thread_m``, ``thread_n``: rows and columns of a thread, which it keeps in registers;
    - ``pipeline``: whether a block fetches the next piece of the sum while it adds this one up;
    - ``split_k``: parts of the sum that different blocks take on, for a second kernel to add up.
    """

    block_m: int
    block_n: int
    block_k: int
    thread_m: int
    thread_n: int
    pipeline: bool = True
    split_k: int = 1

    @property
    def threads(self) -> tuple[int, int]:
        """Threads of a block along m and along n."""
        return self.block_m // self.thread_m, self.block_n // self.thread_n

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return 4 * self.block_k * (self.block_m + self.block_n)

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: its tile, what it multiplies, prefetched values."""
        rows, columns = self.threads
        fetched = self.shared_bytes // 4 // (rows * columns) if self.pipeline else 0
        return self.thread_m * self.thread_n + self.thread_m + self.thread_n + fetched + 24


@dataclass(frozen=True)
class Gemm:
    """``batch`` products: C[b, i, j] is the sum over l of A[b, r, i] B[b, r, j]."""

    batch: int
    m: int
    n: int
    k: int

    def padded(self, schedule: Tiles) -> Gemm:
        """The same in whole tiles, of which ``split_k`` parts have equal sums."""
        return Gemm(
            self.batch * schedule.split_k,
            round_up(self.m, schedule.block_m),
            round_up(self.n, schedule.block_n),
            round_up(self.k, schedule.block_k * schedule.split_k) // schedule.split_k,
        )

    def blocks(self, schedule: Tiles) -> int:
        """Blocks of threads that are started."""
        return self.padded(schedule).blocks_of(schedule)

    def blocks_of(self, schedule: Tiles) -> int:
        """The same of a product that is `padded` already."""
        return self.batch * (self.m // schedule.block_m) * (self.n // schedule.block_n)


def is_legal(gemm: Gemm, schedule: GemmSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used, or None if it can."""
    s = schedule
    if min(s.block_m, s.block_n, s.block_k, s.thread_m, s.thread_n, s.split_k) < 1:
        return "tiles and split_k must be positive"
    if s.block_m % s.thread_m or s.block_n % s.thread_n:
        return "a thread's tile must divide the block's"
    if any(size > _PIECE and size % _PIECE for size in (s.thread_m, s.thread_n)):
        return f"a thread's tile beyond {_PIECE} must be a multiple of it"
    rows, columns = s.threads
    if not WARP <= rows * columns <= MOST_THREADS or rows * columns % WARP:
        return f"{rows * columns} threads are not whole warps up to {MOST_THREADS}"
    if s.block_k * s.block_m % (rows * columns) or s.block_k * s.block_n % (rows * columns):
        return "the threads of a block cannot share its copies evenly"
    if s.shared_bytes > STATIC_SHARED_BYTES:
        return f"it needs {s.shared_bytes} of {STATIC_SHARED_BYTES} bytes of shared memory"
    if s.registers * rows * columns > arch.registers:
        return f"it needs about {s.registers} registers for each of {rows * columns} threads"
    return refuse_grid(gemm, s)


def refuse_grid(gemm: Gemm, schedule: Tiles) -> str | None:
    """Why a grid cannot hold the blocks of a product or its sum not be split so, or None."""
    whole = gemm.padded(schedule)
    if whole.batch > MOST_BLOCKS_YZ or whole.m // schedule.block_m > MOST_BLOCKS_YZ:
        return "it needs more blocks than a grid has"
    if schedule.split_k > 1 and whole.k < 2 * schedule.block_k:
        return f"the sum of {gemm.k} is too short for {schedule.split_k} parts"
    return None


class Operands:
    """What a product reads and writes, given as code; one instance builds one kernel.

    `declare` adds the function's parameters. Indices passed to the others may lie in the padding of
    the tiles: rows of `weight` are padded in memory, `read` gives zero there, `write` does nothing.
    """

    #: Neighbouring columns that `read` finds next to each other in memory, and `write` leaves so.
    vector = 1
    #: Neighbouring rows that `write` leaves next to each other in memory.
    vector_rows = 1

    def declare(self) -> None:
        """Add the parameters of the function, in order."""
        raise NotImplementedError

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A[batch, k, i]."""
        raise NotImplementedError

    def read(self, batch: Index, k: Index, j: Index) -> ir.Expr:
        """B[batch, k, j], zero in the padding."""
        raise NotImplementedError

    def prepare(self, value: ir.Expr) -> ir.Expr | None:
        """What is done to a column's value between shared memory and registers, if anything is."""
        return None

    def write(self, batch: Index, i: Index, j: Index, value: ir.Expr) -> None:
        """Store C[batch, i, j], unless it lies in the padding."""
        raise NotImplementedError


def emit(
    gemm: Gemm,
    schedule: GemmSchedule,
    operands: Operands,
    arch: CudaArch,
    channels_last: bool = False,
) -> tirx.PrimFunc:
    """The kernel of a product; ValueError if the schedule is not legal for it.

    With ``channels_last`` columns are read by four along the sum, and results written along rows.
    """
    problem = is_legal(gemm, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {gemm}: {problem}")
    func = define(gemm.padded(schedule), operands)
    return _schedule(func, schedule, operands, arch, channels_last)


def define(whole: Gemm, operands: Operands) -> tirx.PrimFunc:
    """The product in steps without any order: gather columns, multiply, write."""
    zero = tirx.const(0, "float32")
    batch, m, n, k = whole.batch, whole.m, whole.n, whole.k
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        operands.declare()
        with T.sblock("root"):
            rows = T.sblock_alloc_buffer((batch, k, m), "float32")
            columns = T.sblock_alloc_buffer((batch, k, n), "float32")
            sums = T.sblock_alloc_buffer((batch, m, n), "float32")
            with T.grid(batch, k, m) as (b, r, i), T.sblock("weights"):
                vb, vr, vi = T.axis.remap("SSS", [b, r, i])
                T.buffer_store(rows, operands.weight(vb, vr, vi), [vb, vr, vi])
            with T.grid(batch, k, n) as (b, r, j), T.sblock("columns"):
                vb, vr, vj = T.axis.remap("SSS", [b, r, j])
                T.buffer_store(columns, operands.read(vb, vr, vj), [vb, vr, vj])
            if operands.prepare(zero) is not None:
                gathered, columns = columns, T.sblock_alloc_buffer((batch, k, n), "float32")
                with T.grid(batch, k, n) as (b, r, j), T.sblock("prepared"):
                    vb, vr, vj = T.axis.remap("SSS", [b, r, j])
                    value = operands.prepare(gathered[vb, vr, vj])
                    T.buffer_store(columns, value, [vb, vr, vj])
            with T.grid(batch, m, n, k) as (b, i, j, r), T.sblock("product"):
                vb, vi, vj, vr = T.axis.remap("SSSR", [b, i, j, r])
                with T.init():
                    T.buffer_store(sums, zero, [vb, vi, vj])
                term = rows[vb, vr, vi] * columns[vb, vr, vj]
                T.buffer_store(sums, sums[vb, vi, vj] + term, [vb, vi, vj])
            with T.grid(batch, m, n) as (b, i, j), T.sblock("write"):
                vb, vi, vj = T.axis.remap("SSS", [b, i, j])
                operands.write(vb, vi, vj, sums[vb, vi, vj])
    return builder.get()


def _schedule(
    func: tirx.PrimFunc,
    schedule: GemmSchedule,
    operands: Operands,
    arch: CudaArch,
    channels_last: bool,
) -> tirx.PrimFunc:
    """Tiles in the order blocks, threads, pieces of the sum, register tile."""
    vector = operands.vector
    sch = ThreadSchedule(func, arch)
    tir = sch.tir
    weights, columns, product, write = map(
        tir.get_sblock, ("weights", "columns", "product", "write")
    )
    rows, across = schedule.threads
    b, i, j, k = tir.get_loops(product)
    piece_m, piece_n = min(schedule.thread_m, _PIECE), min(schedule.thread_n, _PIECE)
    block_i, piece_i, thread_i, inner_i = tir.split(
        i, [None, schedule.thread_m // piece_m, rows, piece_m]
    )
    block_j, piece_j, thread_j, inner_j = tir.split(
        j, [None, schedule.thread_n // piece_n, across, piece_n]
    )
    outer_k, inner_k = tir.split(k, [None, schedule.block_k])
    # Neighbouring threads of a warp write neighbouring values.
    order = (thread_j, thread_i) if channels_last else (thread_i, thread_j)
    shape = (across, rows) if channels_last else (rows, across)
    blocks, threads = (b, block_i, block_j), (piece_i, piece_j, *order)
    tir.reorder(*blocks, *threads, outer_k, inner_k, inner_i, inner_j)
    sch.bind(block_j, "blockIdx.x")
    sch.bind(block_i, "blockIdx.y")
    sch.bind(b, "blockIdx.z")
    sch.bind(piece_i, "vthread.y")
    sch.bind(piece_j, "vthread.x")
    sch.bind(order[0], "threadIdx.y")
    sch.bind(order[1], "threadIdx.x")
    tir.unroll(inner_k)
    for copy, extent, lanes in (
        (weights, schedule.block_m, _PIECE),
        (columns, schedule.block_n, vector),
    ):
        tir.set_scope(copy, 0, sch.scope("shared"))
        tir.compute_at(copy, outer_k, preserve_unit_loops=True)
        each = schedule.block_k * extent // (rows * across)
        while each % lanes or extent % lanes:
            lanes //= 2
        line, along = tir.get_loops(copy)[-2:]
        if copy is columns and channels_last:
            tir.reorder(along, line)
            line, along, lanes = along, line, _PIECE
        sch.spread(copy, (line, along), shape, lanes)
    tir.set_scope(product, 0, sch.scope("local"))
    tir.reverse_compute_at(write, order[1], preserve_unit_loops=True)
    for index in range(2):
        registers = tir.cache_read(product, index, sch.scope("local"))
        tir.compute_at(registers, inner_k, preserve_unit_loops=True)
        tir.vectorize(tir.get_loops(registers)[-1])
    start = tir.decompose_reduction(product, outer_k)
    sch.unroll(start, 2)
    if channels_last:
        tir.reorder(*reversed(tir.get_loops(write)[-2:]))
        if operands.vector_rows > 1:
            tir.vectorize(tir.get_loops(write)[-1])
            tir.unroll(tir.get_loops(write)[-2])
        else:
            sch.unroll(write, 2)
    elif vector > 1 and piece_n % vector == 0:
        tir.vectorize(tir.get_loops(write)[-1])
        tir.unroll(tir.get_loops(write)[-2])
    else:
        sch.unroll(write, 2)
    sch.unroll(product, 2)
    sch.write_out(tir.get_loops(product)[-2])
    if schedule.pipeline:
        sch.pipeline(outer_k, [weights, columns])
    return sch.finish()


def tiles(gemm: Gemm, arch: CudaArch) -> list[GemmSchedule]:
    """Legal schedules worth considering for a product, without regard to what it reads."""
    found = []
    for block_m, block_n, block_k in itertools.product((16, 32, 64, 128), (32, 64, 128), (8, 16)):
        if block_m > 2 * round_up(gemm.m, 16) or block_n > 2 * round_up(gemm.n, 32):
            continue
        for thread_m, thread_n in ((8, 8), (4, 8), (8, 4), (4, 4), (2, 4)):
            for split_k in (1, 2, 4, 8):
                schedule = GemmSchedule(
                    block_m, block_n, block_k, thread_m, thread_n, split_k=split_k
                )
                # Few parts of a sum are a kernel more; they pay where blocks are few.
                if split_k > 1 and gemm.blocks(schedule) > 4 * arch.multiprocessors:
                    continue
                if is_legal(gemm, schedule, arch) is None:
                    found.append(schedule)
    return found
