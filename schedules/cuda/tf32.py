"""Convolution on tensor cores in TF32: factors with 10 bits of mantissa, float32 sums and maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tvm
from tvm import ir, s_tir, tirx
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

from . import direct, mma, turn
from .arch import STATIC_SHARED_BYTES, WARP, CudaArch, version_of
from .direct import Convolution
from .gemm import define, refuse_grid
from .program import Program, moved_bytes
from .tensor import MOST_REGISTERS, SKEW, TensorSchedule, predict_tiles
from .threads import ThreadSchedule

_MOST_SCHEDULES = 16
# The first architecture whose tensor cores know TF32.
_OLDEST = 80
# Of a thread. Twice as many only where few registers go into gathering columns: nothing is
# prefetched, taps are few and a piece is of one, and warps are enough to share it.
_MOST_SUMS = 64
_FEW_TAPS, _SOME_WARPS = 9, 4
# As `SKEW`, between columns that lie in shared memory one after the other.
_SKEW_LAST = 4


@dataclass(frozen=True)
class TF32Schedule(TensorSchedule):
    """Tiles of a convolution's product on tensor cores; ``block_n``, ``block_k`` in multiples of 8.

    ``pipeline`` and ``split_k`` are as of `gemm.GemmSchedule`.
    """

    kernel: ClassVar[str] = "cuda_tf32"

    pipeline: bool = True
    split_k: int = 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pieces of rows and columns, whose lines are apart."""
        rows = self.block_k * (self.block_m + SKEW)
        if self.channels_last:
            return 4 * (rows + (self.block_k + _SKEW_LAST) * self.block_n)
        return 4 * (rows + self.block_k * (self.block_n + SKEW))

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: sums, fragments, prefetched values."""
        rows, columns = self.block_m // self.warps_m, self.block_n // self.warps_n
        fragments = (rows * mma.K + columns * mma.K) // WARP
        pieces = self.block_k * (self.block_m + self.block_n) // self.threads
        return rows * columns // WARP + fragments + pieces * self.pipeline + 40


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if version_of(arch.name) < _OLDEST:
        return f"{arch.name} has no TF32, which begins with sm_{_OLDEST}"
    return direct.refuse(workload, arch)


def is_legal(workload: ConvWorkload, schedule: TF32Schedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    s = schedule
    if min(s.block_m, s.block_n, s.block_k, s.warps_m, s.warps_n, s.split_k) < 1:
        return "tiles, warps and split_k must be positive"
    if s.block_m % (mma.M * s.warps_m) or s.block_n % (mma.N * s.warps_n) or s.block_k % mma.K:
        return f"tiles must be whole products of {mma.M} x {mma.N} x {mma.K} for each warp"
    if s.block_m % WARP or s.block_n % WARP:
        return f"block_m and block_n must be multiples of {WARP}, which keep off shared banks"
    if s.block_k * s.block_m % s.threads or s.block_k * s.block_n % s.threads:
        return "the threads of a block cannot share its copies evenly"
    if s.shared_bytes > STATIC_SHARED_BYTES:
        return f"it needs {s.shared_bytes} of {STATIC_SHARED_BYTES} bytes of shared memory"
    sums = _most_sums(workload.geometry, s)
    if s.block_m * s.block_n > sums * s.threads:
        return f"a thread would keep more than {sums} sums"
    if s.registers > MOST_REGISTERS or s.registers * s.threads > arch.registers:
        return f"it needs about {s.registers} registers for each of {s.threads} threads"
    if s.channels_last and (problem := direct.refuse_last(workload.geometry, s, s.threads)):
        return problem
    return refuse_grid(direct.gemm_of(workload.geometry, s.block_k), s)


def _most_sums(geometry: ConvGeometry, schedule: TF32Schedule) -> int:
    """How many sums a thread can keep without spilling registers."""
    one_tap = direct.channels_of(geometry, schedule.block_k) % schedule.block_k == 0
    few_taps = geometry.kernel[0] * geometry.kernel[1] <= _FEW_TAPS
    # Rows of padding alone are not known to be so, and are kept in memory.
    rows = schedule.block_m <= geometry.out_channels // geometry.groups
    warps = schedule.threads >= _SOME_WARPS * WARP
    return _MOST_SUMS * (1 + (one_tap and few_taps and rows and warps and not schedule.pipeline))


def space(workload: ConvWorkload, arch: CudaArch) -> list[TF32Schedule]:
    """Legal schedules, the one predicted fastest first."""
    sizes, warps = (32, 64, 128), (1, 2, 4)
    both = (True, False)
    pieces = (16, 32, 8)
    choices = itertools.product(sizes, sizes, pieces, warps, warps, both, both, (1, 2, 4))
    legal = []
    for schedule in itertools.starmap(TF32Schedule, choices):
        if is_legal(workload, schedule, arch) is not None:
            continue
        gemm = direct.gemm_of(workload.geometry, schedule.block_k)
        if schedule.split_k == 1 or gemm.blocks(schedule) <= 4 * arch.multiprocessors:
            legal.append(schedule)
    legal.sort(key=lambda schedule: (predict(workload, schedule, arch), str(schedule)))
    return direct.some_of_each(legal, _MOST_SCHEDULES)


def predict(workload: ConvWorkload, schedule: TF32Schedule, arch: CudaArch) -> float:
    """Predicted microseconds; tensor cores multiply TF32 at half the rate of float16."""
    s, g = schedule, workload.geometry
    gemm = direct.gemm_of(g, s.block_k)
    memory = moved_bytes(workload, 4 * g.weight_count) + direct.parts_bytes(gemm, s)
    whole = gemm.padded(s)
    product = predict_tiles(
        whole, s, arch, arch.tensor_gflops / 2, memory, 4, s.pipeline, 4 if s.channels_last else 1
    )
    turning = turn.of_convolution(workload, arch) if s.channels_last else 0.0
    return product + direct.predict_adding(gemm, s, arch) + turning


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: TF32Schedule, arch: CudaArch
) -> np.ndarray:
    """As `direct.pack`, rounded to TF32."""
    return mma.round_array(direct.pack(weight, workload, schedule, arch))


def emit(workload: ConvWorkload, schedule: TF32Schedule, arch: CudaArch) -> Program:
    """The kernel, or two if the sum is split; ValueError if the schedule is not legal."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    product = _Product(workload, schedule)
    product.loops = arch.loops
    func = _schedule(define(product.whole, product), schedule, product.vector, arch)
    return direct.program_of(product, func, arch)


class _Product(Convolution):
    """A convolution's operands, its columns rounded to TF32."""

    loops = False

    def prepare(self, value: ir.Expr) -> ir.Expr | None:
        """Round a value of a column; one of float4 in shared memory stays a float4."""
        return mma.round_value(value, self.loops)


Place = Callable[[ir.Expr, ir.Expr], tuple[ir.Expr, ir.Expr]]


def _fragments(rows: int, columns: int, place: Place) -> Callable[..., list[ir.Expr]]:
    """The layout of a buffer whose last two axes are in tiles, each as a warp holds it."""

    def layout(*at: ir.Expr) -> list[ir.Expr]:
        *outer, row, column = at
        return [*outer, row // rows, column // columns, *place(row % rows, column % columns)]

    return layout


def _schedule(
    func: tirx.PrimFunc, schedule: TF32Schedule, vector: int, arch: CudaArch
) -> tirx.PrimFunc:
    """Blocks, warps, pieces of the sum, fragments."""
    sch = ThreadSchedule(func, arch)
    tir, s = sch.tir, schedule
    weights, columns, right, product, write = map(
        tir.get_sblock, ("weights", "columns", "prepared", "product", "write")
    )
    warps = s.warps_m * s.warps_n
    read = 4 if s.channels_last else vector
    b, i, j, k = tir.get_loops(product)
    block_i, warp_i, i, inner_i = tir.split(i, [None, s.warps_m, _tiles_m(s), mma.M])
    block_j, warp_j, j, inner_j = tir.split(j, [None, s.warps_n, _tiles_n(s), mma.N])
    outer_k, k, inner_k = tir.split(k, [None, s.block_k // mma.K, mma.K])
    tir.reorder(b, block_i, block_j, warp_i, warp_j, outer_k, k, i, j, inner_i, inner_j, inner_k)
    warp = tir.fuse(warp_i, warp_j)
    for loop, axis in ((block_j, "x"), (block_i, "y"), (b, "z")):
        sch.bind(loop, f"blockIdx.{axis}")
    sch.bind(warp, "threadIdx.y")

    def lanes_of(block: Any, rows: list[int | None], across: list[int | None]) -> Any:
        """Split a block's last two loops into (tiles, registers, lanes); the inner registers."""
        row, column = tir.get_loops(block)[-2:]
        row, row_high, row_low = tir.split(row, rows)
        column, column_high, column_low = tir.split(column, across)
        return row, row_high, row_low, column, column_high, column_low

    # Both pieces have the sum's axis first: elements (k, row) and (k, column).
    left = tir.cache_read(product, 0, "global")
    for load, extent, place in (
        (left, mma.M, lambda k, row: mma.left_place(row, k)),
        (right, mma.N, mma.right_place),
    ):
        tir.set_scope(load, 0, sch.scope("local"))
        tir.compute_at(load, k, preserve_unit_loops=True)
        tir.transform_layout(load, ("write", 0), _fragments(mma.K, extent, place))
        r, high_k, low_k, c, high, low = lanes_of(load, [None, 2, 4], [None, extent // 8, 8])
        tir.reorder(low, low_k, r, c, high_k, high)
        sch.bind(tir.fuse(low, low_k), "threadIdx.x")
        sch.unroll(load, 4)
    for copy, extent, lanes in ((weights, s.block_m, 4), (columns, s.block_n, read)):
        while s.block_k * extent // s.threads % lanes:
            lanes //= 2
        tir.set_scope(copy, 0, sch.scope("shared"))
        tir.compute_at(copy, outer_k, preserve_unit_loops=True)
        line, along = tir.get_loops(copy)[-2:]
        if copy is columns and s.channels_last:
            tir.transform_layout(copy, ("write", 0), lambda b, k, j: [b, j, k])
            tir.reorder(along, line)
            line, along = along, line
        sch.spread(copy, (line, along), (warps, WARP), lanes)
        align = (SKEW, _SKEW_LAST) if copy is columns and s.channels_last else (WARP, SKEW)
        tir.storage_align(copy, 0, axis=-2, factor=align[0], offset=align[1])
    tir.set_scope(product, 0, sch.scope("local"))
    tir.reverse_compute_at(write, warp, preserve_unit_loops=True)
    tir.transform_layout(product, ("write", 0), _fragments(mma.M, mma.N, mma.sums_place))
    start = tir.decompose_reduction(product, outer_k)
    for block in (start, write):
        r, high, low, c, quad, pair = lanes_of(block, [None, 2, 8], [None, 4, 2])
        tir.reorder(low, quad, r, c, high, pair)
        sch.bind(tir.fuse(low, quad), "threadIdx.x")
        sch.unroll(block, 4)
    if vector > 1:
        tir.vectorize(tir.get_loops(write)[-1])
    for loop in (i, j):
        tir.unroll(loop)
    if not arch.loops:
        tir.tensorize(tir.get_loops(product)[-3], mma.register())
    if s.pipeline:
        sch.pipeline(outer_k, [weights, columns])
    return _name_registers(sch.finish())


def _name_registers(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Indices of fragments written by loops and simplified, so that a thread's lane is plain.

    Else TVM gives each thread an array as large as a warp's.
    """
    passes = [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
    ]
    return tvm.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]


def _tiles_m(schedule: TF32Schedule) -> int:
    return schedule.block_m // schedule.warps_m // mma.M


def _tiles_n(schedule: TF32Schedule) -> int:
    return schedule.block_n // schedule.warps_n // mma.N
