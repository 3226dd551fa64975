"""Convolution on tensor cores: float16 products, float32 sums; maps stay float32 in memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import direct, fragments, model, turn
from .arch import STATIC_SHARED_BYTES, WARP, CudaArch
from .direct import Convolution
from .fragments import SIDE
from .gemm import Gemm, Index
from .program import WEIGHTS, Program, moved_bytes
from .threads import ThreadSchedule

_MOST_SCHEDULES = 16
# Elements between rows of shared memory that keep threads off the same banks.
SKEW = 8
# Of a thread, by the rough count here: with more, the compiler puts sums into memory.
MOST_REGISTERS = 200
# Half an ulp of float16 at 1, of weights and of inputs.
ROUNDING = 2.0**-11


@dataclass(frozen=True)
class TensorSchedule:
    """Tiles of a convolution's product on tensor cores.

    - ``block_m``, ``block_n``, ``block_k``: as of `GemmSchedule`, in multiples of 16;
    - ``warps_m``, ``warps_n``: warps of a block along rows and columns;
    - ``channels_last``: whether the kernel works on NHWC maps, of which it reads four channels at
      once; others turn its maps.
    """

    kernel: ClassVar[str] = "cuda_tensor"

    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    channels_last: bool = False

    @property
    def split_k(self) -> int:
        """Parts of the sum."""
        return 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_n * WARP

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pieces in float16, results in float32."""
        rows = self.block_m * (self.block_k + SKEW)
        columns = self.block_k * (self.block_n + SKEW)
        if self.channels_last:
            columns = (self.block_k + SKEW) * self.block_n
        return 2 * (rows + columns) + 4 * self.block_m * self.block_n

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: its share of the sums, and of two fragments."""
        sums = self.block_m * self.block_n // (self.warps_m * self.warps_n * WARP)
        return sums + 2 * (self.block_m // self.warps_m + self.block_n // self.warps_n) // 4 + 40

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    return direct.refuse(workload, arch)


def is_legal(workload: ConvWorkload, schedule: TensorSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    s = schedule
    if min(s.block_m, s.block_n, s.block_k, s.warps_m, s.warps_n) < 1:
        return "tiles and warps must be positive"
    if s.block_m % (SIDE * s.warps_m) or s.block_n % (SIDE * s.warps_n) or s.block_k % SIDE:
        return f"tiles must be whole fragments of {SIDE} for each warp"
    threads = s.threads
    if s.block_m * s.block_k % (8 * threads) or s.block_n * s.block_k % threads:
        return "the threads of a block cannot share its copies evenly"
    if s.block_m * s.block_n % (4 * threads):
        return "the threads of a block cannot share its results evenly"
    if s.shared_bytes > STATIC_SHARED_BYTES:
        return f"it needs {s.shared_bytes} of {STATIC_SHARED_BYTES} bytes of shared memory"
    if s.registers > MOST_REGISTERS or s.registers * threads > arch.registers:
        return f"it needs about {s.registers} registers for each of {threads} threads"
    return direct.refuse_last(workload.geometry, s, threads) if s.channels_last else None


def space(workload: ConvWorkload, arch: CudaArch) -> list[TensorSchedule]:
    """Legal schedules, the one predicted fastest first."""
    sizes, warps = (32, 64, 128), (1, 2, 4)
    choices = itertools.product(sizes, sizes, (32, 16, 64), warps, warps, (False, True))
    found = [TensorSchedule(*choice) for choice in choices]
    legal = [s for s in found if is_legal(workload, s, arch) is None]
    legal.sort(key=lambda schedule: (predict(workload, schedule, arch), str(schedule)))
    return direct.some_of_each(legal, _MOST_SCHEDULES)


def predict(workload: ConvWorkload, schedule: TensorSchedule, arch: CudaArch) -> float:
    """Predicted microseconds."""
    whole = direct.gemm_of(workload.geometry, schedule.block_k).padded(schedule)
    memory = moved_bytes(workload, 2 * workload.geometry.weight_count)
    last = schedule.channels_last
    vector = 4 if last else 1
    product = predict_tiles(
        whole, schedule, arch, arch.tensor_gflops, memory, 2, overlapped=False, vector=vector
    )
    return product + (turn.of_convolution(workload, arch) if last else 0.0)


def predict_tiles(
    whole: Gemm,
    schedule: TensorSchedule,
    arch: CudaArch,
    gflops: float,
    memory: float,
    weight_bytes: int,
    overlapped: bool = False,
    vector: int = 1,
) -> float:
    """Predicted microseconds of a product in whole tiles on tensor cores of so many ``gflops``.

    ``memory`` are bytes that cross the memory bus, ``weight_bytes`` those of one weight; ``vector``
    values of a column are gathered at once.
    """
    s = schedule
    blocks = whole.blocks_of(s)
    tile_m, tile_n = s.block_m // s.warps_m, s.block_n // s.warps_n
    # Fragments loaded for each product, and some ten instructions for each value gathered.
    reached = tile_m * tile_n / (tile_m * tile_n + SIDE * (tile_m + tile_n))
    rate = reached * gflops * 1e3 / arch.multiprocessors / 2
    gather = 10 / vector * s.block_n * whole.k / (arch.gflops * 1e3 / arch.multiprocessors / 2)
    load = model.Load(
        blocks=blocks,
        threads=s.threads,
        registers=s.registers,
        shared=s.shared_bytes,
        block_us=2 * s.block_m * s.block_n * whole.k / rate + gather,
        steps=whole.k // s.block_k,
        overlapped=overlapped,
        memory=memory,
        traffic=blocks * whole.k * (float(weight_bytes) * s.block_m + 4.0 * s.block_n),
    )
    return model.microseconds(load, arch)


def error_bound(workload: ConvWorkload, schedule: TensorSchedule) -> float:
    """The stated max|error| / max|result|: both factors of each product are rounded to float16."""
    return 2 * ROUNDING


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: TensorSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to float16 [groups][output channels of a group][taps x channels], padded with zeros."""
    g = workload.geometry
    gemm = direct.gemm_of(g, schedule.block_k)
    whole = gemm.padded(schedule)
    channels = direct.channels_of(g, schedule.block_k)
    split = weight.reshape(g.groups, gemm.m, -1, *g.kernel)
    packed = np.zeros((g.groups, whole.m, *g.kernel, channels), np.float16)
    packed[:, : gemm.m, :, :, : split.shape[2]] = split.transpose(0, 1, 3, 4, 2)
    packed = packed.reshape(g.groups, whole.m, gemm.k)
    return np.pad(packed, ((0, 0), (0, 0), (0, whole.k - gemm.k)))


def emit(workload: ConvWorkload, schedule: TensorSchedule, arch: CudaArch) -> Program:
    """The kernel; ValueError if the schedule is not legal for the workload."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    product = _Product(workload, schedule)
    func = _schedule(_define(product.whole, product), schedule, product, arch)
    return replace(direct.program_of(product, func, arch), dtypes={WEIGHTS: "float16"})


class _Product(Convolution):
    """A convolution's operands with float16 weights, whose rows are in memory as they are."""

    weight_dtype = "float16"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        return (self.geometry.groups, self.whole.m, self.whole.k)

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A packed weight."""
        return self.w[batch, i, k]


def _define(whole: Gemm, product: _Product) -> tirx.PrimFunc:
    """As `gemm.define`, with rows and columns in float16 and rows along the sum."""
    batch, m, n, k = whole.batch, whole.m, whole.n, whole.k
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        product.declare()
        with T.sblock("root"):
            rows = T.sblock_alloc_buffer((batch, m, k), "float16")
            columns = T.sblock_alloc_buffer((batch, k, n), "float16")
            sums = T.sblock_alloc_buffer((batch, m, n), "float32")
            with T.grid(batch, m, k) as (b, i, r), T.sblock("weights"):
                vb, vi, vr = T.axis.remap("SSS", [b, i, r])
                T.buffer_store(rows, product.weight(vb, vr, vi), [vb, vi, vr])
            with T.grid(batch, k, n) as (b, r, j), T.sblock("columns"):
                vb, vr, vj = T.axis.remap("SSS", [b, r, j])
                half = product.read(vb, vr, vj).astype("float16")
                T.buffer_store(columns, half, [vb, vr, vj])
            with T.grid(batch, m, n, k) as (b, i, j, r), T.sblock("product"):
                vb, vi, vj, vr = T.axis.remap("SSSR", [b, i, j, r])
                with T.init():
                    T.buffer_store(sums, tirx.const(0, "float32"), [vb, vi, vj])
                left = rows[vb, vi, vr].astype("float32")
                right = columns[vb, vr, vj].astype("float32")
                T.buffer_store(sums, sums[vb, vi, vj] + left * right, [vb, vi, vj])
            with T.grid(batch, m, n) as (b, i, j), T.sblock("write"):
                vb, vi, vj = T.axis.remap("SSS", [b, i, j])
                product.write(vb, vi, vj, sums[vb, vi, vj])
    return builder.get()


def _schedule(
    func: tirx.PrimFunc, schedule: TensorSchedule, product_of: _Product, arch: CudaArch
) -> tirx.PrimFunc:
    """Blocks, warps, pieces of the sum, fragments."""
    sch = ThreadSchedule(func, arch)
    tir, s, last = sch.tir, schedule, schedule.channels_last
    weights, columns, product, write = map(
        tir.get_sblock, ("weights", "columns", "product", "write")
    )
    warps = s.warps_m * s.warps_n
    b, i, j, k = tir.get_loops(product)
    i, inner_i = tir.split(i, [None, SIDE])
    j, inner_j = tir.split(j, [None, SIDE])
    k, inner_k = tir.split(k, [None, SIDE])
    tir.reorder(b, i, j, k, inner_i, inner_j, inner_k)
    tile = tir.blockize(inner_i)
    block_i, warp_i, i = tir.split(i, [None, s.warps_m, s.block_m // s.warps_m // SIDE])
    block_j, warp_j, j = tir.split(j, [None, s.warps_n, s.block_n // s.warps_n // SIDE])
    outer_k, k = tir.split(k, [None, s.block_k // SIDE])
    tir.reorder(b, block_i, block_j, warp_i, warp_j, outer_k, k, i, j)
    warp = tir.fuse(warp_i, warp_j)
    for loop, axis in ((block_j, "x"), (block_i, "y"), (b, "z")):
        sch.bind(loop, f"blockIdx.{axis}")
    sch.bind(warp, "threadIdx.y")
    loads = []
    for index, scope in enumerate(("wmma.matrix_a", "wmma.matrix_b")):
        load = tir.cache_read(tile, index, sch.scope(scope))
        tir.compute_at(load, k, preserve_unit_loops=True)
        loads.append(load)
    for copy, lanes in ((weights, 8), (columns, 4 if last else product_of.vector)):
        tir.set_scope(copy, 0, sch.scope("shared"))
        tir.compute_at(copy, outer_k, preserve_unit_loops=True)
        if copy is columns and last:
            _turn(tir, copy)
        sch.spread(copy, tir.get_loops(copy)[-2:], (warps, WARP), lanes)
        tir.storage_align(copy, 0, axis=-2, factor=2 * SKEW, offset=SKEW)
    store = tir.cache_write(tile, 0, sch.scope("wmma.accumulator"))
    tir.reverse_compute_at(store, warp, preserve_unit_loops=True)
    tir.set_scope(store, 0, sch.scope(fragments.RESULTS))
    tir.reverse_compute_at(write, block_j, preserve_unit_loops=True)
    if last:
        tir.transform_layout(store, ("write", 0), lambda b, i, j: [b, j, i])
        tir.reorder(*reversed(tir.get_loops(write)[-2:]))
    lanes = product_of.vector_rows if last else product_of.vector
    sch.spread(write, tir.get_loops(write)[-2:], (warps, WARP), lanes)
    start = tir.decompose_reduction(tile, outer_k)
    if not arch.loops:
        names = fragments.register()
        used = (
            ("load_a", "load_b_turned", "store_turned") if last else ("load_a", "load_b", "store")
        )
        for copy, name in zip((*loads, store), used, strict=True):
            *_, i, j = tir.get_loops(copy)
            i, inner_i = tir.split(i, [None, SIDE])
            j, inner_j = tir.split(j, [None, SIDE])
            tir.reorder(i, j, inner_i, inner_j)
            tir.tensorize(inner_i, names[name])
        tir.tensorize(tir.get_loops(tir.get_child_blocks(start)[0])[-2], names["fill"])
        tir.tensorize(tir.get_loops(tir.get_child_blocks(tile)[0])[-3], names["multiply"])
    return sch.finish()


def _turn(tir: Any, copy: Any) -> None:
    """Columns of a piece one after the other in shared memory, and copied in that order."""
    tir.transform_layout(copy, ("write", 0), lambda b, k, j: [b, j, k])
    tir.reorder(*reversed(tir.get_loops(copy)[-2:]))
