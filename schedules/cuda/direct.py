"""Convolution as one matrix product whose columns are gathered as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

from . import model, turn
from .arch import CudaArch
from .epilogue import Epilogue, map_shape, operand_shapes
from .gemm import Gemm, GemmSchedule, Index, Operands, Tiles, is_legal, round_up, tiles
from .gemm import emit as emit_gemm
from .program import WEIGHTS, Program, Shape, Stage, X, Y, moved_bytes
from .threads import ThreadSchedule

# Threads of the kernel that adds up the parts of a split sum.
_SUM_THREADS = 256
_MOST_SCHEDULES = 32
_MOST_LAST = 4


@dataclass(frozen=True)
class DirectSchedule(GemmSchedule):
    """The tiles of a convolution's product: F output channels by N * OH * OW pixels.

    With ``channels_last`` the kernel works on NHWC maps, of which it reads four channels at once;
    others turn its maps.
    """

    kernel: ClassVar[str] = "cuda_direct"

    channels_last: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DirectSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if workload.in_block != arch.block:
        return f"in_block is {workload.in_block}, expected {arch.block}"
    g = workload.geometry
    if g.groups > 1 and g.groups == g.in_channels:
        return f"{g} is depthwise, which has a kernel of its own"
    return None


def is_schedule_legal(
    workload: ConvWorkload, schedule: DirectSchedule, arch: CudaArch
) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    s, g = schedule, workload.geometry
    problem = refuse(workload, arch) or is_legal(gemm_of(g, s.block_k), s, arch)
    if problem or not s.channels_last:
        return problem
    rows, columns = s.threads
    return refuse_last(g, s, rows * columns)


def refuse_last(geometry: ConvGeometry, schedule: Tiles, threads: int) -> str | None:
    """Why a block of so many threads cannot gather columns of NHWC maps, or None if it can."""
    each = schedule.block_k * schedule.block_n // threads
    if schedule.split_k > 1 or geometry.in_channels // geometry.groups % 4 or each % 4:
        return "channels last are read by four, of a sum that is not split"
    return None


def space(workload: ConvWorkload, arch: CudaArch) -> list[DirectSchedule]:
    """Legal schedules, the one predicted fastest first; never empty unless refused."""
    rough = gemm_of(workload.geometry, 8)
    found = {DirectSchedule(**vars(tile)) for tile in tiles(rough, arch)}
    found |= {replace(schedule, pipeline=False) for schedule in found}
    found |= {replace(schedule, channels_last=True) for schedule in found}
    legal = [s for s in found if is_schedule_legal(workload, s, arch) is None]
    legal.sort(key=lambda s: (predict(workload, s, arch), str(s)))
    return some_of_each(legal, _MOST_SCHEDULES)


def some_of_each(legal: list[Any], most: int) -> list[Any]:
    """The first schedules, some of each layout, in their order.

    With channels last a kernel is the faster the more its neighbours are so.
    """
    last = [schedule for schedule in legal if schedule.channels_last][:_MOST_LAST]
    first = [schedule for schedule in legal if not schedule.channels_last]
    kept = {*last, *first[: most - len(last)]}
    return [schedule for schedule in legal if schedule in kept]


def predict(workload: ConvWorkload, schedule: DirectSchedule, arch: CudaArch) -> float:
    """Predicted microseconds."""
    g = workload.geometry
    gemm = gemm_of(g, schedule.block_k)
    memory = moved_bytes(workload, 4 * g.weight_count)
    pointwise = g.kernel == (1, 1) and g.stride == (1, 1)
    gather = 0.3 if pointwise or schedule.channels_last else 1.0
    product = model.of_gemm(gemm, schedule, memory + parts_bytes(gemm, schedule), arch, gather)
    turning = turn.of_convolution(workload, arch) if schedule.channels_last else 0.0
    return product + predict_adding(gemm, schedule, arch) + turning


def parts_bytes(gemm: Gemm, schedule: Tiles) -> float:
    """Bytes of the parts of a split sum."""
    return 4.0 * schedule.split_k * gemm.batch * gemm.m * gemm.n * (schedule.split_k > 1)


def predict_adding(gemm: Gemm, schedule: Tiles, arch: CudaArch) -> float:
    """Predicted microseconds of the kernel that adds up the parts of a split sum, if there is."""
    if schedule.split_k == 1:
        return 0.0
    values = gemm.batch * gemm.m * gemm.n
    memory = parts_bytes(gemm, schedule) + 4 * values
    return model.of_streaming(values, memory, 2 * schedule.split_k, arch, _SUM_THREADS)


def channels_of(geometry: ConvGeometry, block_k: int) -> int:
    """Channels of a tap in the sum: whole pieces of it, unless the taps are too small for that."""
    channels = geometry.in_channels // geometry.groups
    padded = round_up(channels, block_k)
    return padded if 2 * channels >= padded else channels


def gemm_of(geometry: ConvGeometry, block_k: int) -> Gemm:
    """The product that a convolution is; its sum, in pieces, runs over taps, then channels."""
    taps = geometry.kernel[0] * geometry.kernel[1]
    return Gemm(
        geometry.groups,
        geometry.out_channels // geometry.groups,
        geometry.batch * geometry.out_height * geometry.out_width,
        taps * channels_of(geometry, block_k),
    )


def emit(workload: ConvWorkload, schedule: DirectSchedule, arch: CudaArch) -> Program:
    """The kernel, or two if the sum is split; ValueError if the schedule is not legal."""
    problem = is_schedule_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    product = Convolution(workload, schedule)
    func = emit_gemm(product.gemm, schedule, product, arch, schedule.channels_last)
    return program_of(product, func, arch)


def program_of(product: Convolution, func: tirx.PrimFunc, arch: CudaArch) -> Program:
    """The kernel of a product, and where its sum is split the one that adds up the parts."""
    workload, g = product.workload, product.geometry
    operands = operand_shapes(g, workload.epilogue)
    shapes = {
        X: (g.batch, product.given.in_channels, product.given.height, product.given.width),
        WEIGHTS: product.weight_shape,
        **operands,
        Y: map_shape(g),
    }
    names = tuple(operands)
    if product.channels_last:
        return turn.program(func, shapes, names, arch, product.kind, product.splits)
    if product.split == 1:
        return Program((Stage(func, (X, WEIGHTS, *names), Y),), shapes, names)
    shapes["parts"] = product.parts
    stages = (
        Stage(func, (X, WEIGHTS), "parts"),
        Stage(_add_parts(workload, product.parts, arch), ("parts", *names), Y),
    )
    return Program(stages, shapes, names)


def pack(weight: np.ndarray, workload: ConvWorkload, schedule: Tiles, arch: CudaArch) -> np.ndarray:
    """OIHW to [groups][taps x channels][output channels of a group], padded with zeros."""
    geometry = workload.geometry
    gemm = gemm_of(geometry, schedule.block_k)
    whole = gemm.padded(schedule)
    channels = channels_of(geometry, schedule.block_k)
    split = weight.reshape(geometry.groups, gemm.m, -1, *geometry.kernel)
    packed = np.zeros((geometry.groups, *geometry.kernel, channels, whole.m), np.float32)
    packed[:, :, :, : split.shape[2], : gemm.m] = split.transpose(0, 3, 4, 2, 1)
    packed = packed.reshape(geometry.groups, gemm.k, whole.m)
    missing = whole.k * schedule.split_k - gemm.k
    return np.pad(packed, ((0, 0), (0, missing), (0, 0)))


class Convolution(Operands):
    """The product's operands: rows are packed weights, columns the pixels of the output map."""

    weight_dtype = "float32"
    #: Of `turn`, where maps have channels last.
    kind = turn.PLAIN

    def __init__(self, workload: ConvWorkload, schedule: Tiles) -> None:
        """Of a workload; where the sum is split, they are parts of it and there is no epilogue."""
        self.workload = workload
        self.geometry = g = workload.geometry
        # What callers know, where the product is another convolution than theirs.
        self.given = g
        self.splits = False
        self.split = schedule.split_k
        self.steps = workload.epilogue if self.split == 1 else ()
        self.gemm = gemm_of(g, schedule.block_k)
        self.whole = self.gemm.padded(schedule)
        self.channels = channels_of(g, schedule.block_k)
        self.pixels = g.out_height * g.out_width
        self.channels_last = bool(getattr(schedule, "channels_last", False))
        pointwise = (
            not self.channels_last
            and g.kernel == (1, 1)
            and g.stride == (1, 1)
            and not any(g.padding)
        )
        if pointwise and self.pixels % 4 == 0:
            self.vector = 4
        # Neighbouring rows that `write` leaves next to each other in memory.
        self.vector_rows = 4 if self.channels_last and self.gemm.m % 4 == 0 else 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        return (self.geometry.groups, self.whole.k * self.split, self.whole.m)

    @property
    def parts(self) -> tuple[int, ...]:
        """Shape of the parts of a split sum."""
        return (self.split, self.geometry.groups, self.gemm.m, self.gemm.n)

    def declare(self) -> None:
        """Input, weights, operands of the epilogue, output (or parts of the sums)."""
        g = self.geometry
        dtype = turn.dtype_of(self.kind)
        self.x = T.arg(X, T.buffer(self._shape(g.in_channels, g.height, g.width), dtype))
        self.w = T.arg(WEIGHTS, T.buffer(self.weight_shape, self.weight_dtype))
        if self.split > 1:
            self.y = T.arg("parts", T.buffer(self.parts, "float32"))
            return
        self.epilogue = Epilogue(g, self.steps, self.channels_last, dtype)
        y = self._shape(g.out_channels, g.out_height, g.out_width)
        self.y = T.arg(Y, T.buffer(y, dtype))

    def _shape(self, channels: int, height: int, width: int) -> Shape:
        shape = (self.geometry.batch, channels, height, width)
        return turn.last_shape(shape) if self.channels_last else shape

    def part(self, batch: Index) -> tuple[Index, Index]:
        """The part of the sum and the group of a product."""
        if self.split == 1:
            return tirx.const(0, "int32"), batch
        return batch // self.geometry.groups, batch % self.geometry.groups

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A packed weight."""
        part, group = self.part(batch)
        return self.w[group, part * self.whole.k + k, i]

    def place_in_sum(self, at: Index) -> tuple[Index, Index]:
        """The tap and the channel of its group that an element of the sum belongs to."""
        if self.channels_last:
            # Four channels are read at once; they belong to one tap.
            return at // 4 // (self.channels // 4), at % self.channels
        return at // self.channels, at % self.channels

    def read(self, batch: Index, k: Index, j: Index) -> ir.Expr:
        """The input that a tap and a channel take for a pixel."""
        place, inside = self.source(batch, k, j)
        value = self.x[tuple(place)].astype("float32")
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, "float32"))

    def source(self, batch: Index, k: Index, j: Index) -> tuple[list[ir.Expr], list[ir.Expr]]:
        """Indices of what `read` reads, and the conditions under which they are in the map."""
        g = self.geometry
        part, group = self.part(batch)
        at = part * self.whole.k + k
        tap, channel = self.place_in_sum(at)
        # Of four channels that are read at once.
        first = at // 4 * 4 if self.channels_last else at
        per_group = g.in_channels // g.groups
        pixel = j % self.pixels
        row = pixel // g.out_width * g.stride[0] + tap // g.kernel[1] * g.dilation[0]
        column = pixel % g.out_width * g.stride[1] + tap % g.kernel[1] * g.dilation[1]
        row, column = row - g.padding[0], column - g.padding[1]
        inside = []
        if self.whole.n > self.gemm.n:
            inside.append(self._first(j) < self.gemm.n)
        if self.channels > per_group:
            inside.append((first % self.channels if self.channels_last else channel) < per_group)
        if self.whole.k * self.split > self.gemm.k:
            inside.append(first < self.gemm.k)
        inside += _within(row, g.height, g.padding[0], g.padding[2])
        inside += _within(column, g.width, g.padding[1], g.padding[3])
        place = [j // self.pixels, group * per_group + channel, row, column]
        return turn.indices(place, self.channels_last), inside

    def write(self, batch: Index, i: Index, j: Index, value: ir.Expr) -> None:
        """An output with its epilogue, or a part of its sum."""
        g, gemm = self.geometry, self.gemm
        part, group = self.part(batch)
        inside = []
        if self.whole.m > gemm.m:
            inside.append(i // self.vector_rows * self.vector_rows < gemm.m)
        if self.whole.n > gemm.n:
            inside.append(self._first(j) < gemm.n)

        def store() -> None:
            if self.split > 1:
                T.buffer_store(self.y, value, [part, group, i, j])
                return
            pixel = j % self.pixels
            place = [
                j // self.pixels,
                group * gemm.m + i,
                pixel // g.out_width,
                pixel % g.out_width,
            ]
            where = turn.indices(place, self.channels_last)
            result = turn.rounded(self.epilogue.apply(value, place), self.kind, loops=True)
            T.buffer_store(self.y, result, where)

        if not inside:
            store()
            return
        with T.If(tirx.all(*inside)), T.Then():
            store()

    def _first(self, j: Index) -> Index:
        """The first of the neighbouring columns that are read at once."""
        return j if self.vector == 1 else j // self.vector * self.vector


def _within(at: Index, extent: int, before: int, after: int) -> list[ir.Expr]:
    """The conditions for an index that padding may put outside of its axis."""
    return [at >= 0, at < extent] if before or after else []


def _add_parts(workload: ConvWorkload, parts: tuple[int, ...], arch: CudaArch) -> tirx.PrimFunc:
    """The kernel that adds up the parts of a split sum and applies the epilogue."""
    g = workload.geometry
    count, groups, channels, pixels = parts
    values = groups * channels * pixels
    per_image = g.out_height * g.out_width
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        source = T.arg("parts", T.buffer(parts, "float32"))
        epilogue = Epilogue(g, workload.epilogue)
        y = T.arg(Y, T.buffer(map_shape(g), "float32"))
        with T.sblock("root"):
            sums = T.sblock_alloc_buffer((values,), "float32")
            with T.grid(values, count) as (i, p), T.sblock("sum"):
                vi, vp = T.axis.remap("SR", [i, p])
                with T.init():
                    T.buffer_store(sums, tirx.const(0, "float32"), [vi])
                channel = vi // pixels
                part = source[vp, channel // channels, channel % channels, vi % pixels]
                T.buffer_store(sums, sums[vi] + part, [vi])
            with T.serial(values) as i, T.sblock("write"):
                vi = T.axis.spatial(values, i)
                pixel = vi % pixels
                inner = pixel % per_image
                place = [
                    pixel // per_image,
                    vi // pixels,
                    inner // g.out_width,
                    inner % g.out_width,
                ]
                T.buffer_store(y, epilogue.apply(sums[vi], place), place)
    sch = ThreadSchedule(builder.get(), arch)
    tir = sch.tir
    total, write = tir.get_sblock("sum"), tir.get_sblock("write")
    (loop,) = tir.get_loops(write)
    block, thread = tir.split(loop, [None, _SUM_THREADS])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    tir.compute_at(total, thread)
    tir.set_scope(total, 0, sch.scope("local"))
    return sch.finish()
