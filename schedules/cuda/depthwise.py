"""Depthwise convolution: each thread computes a few pixels of one channel from global memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import model, turn
from .arch import MOST_THREADS, WARP, CudaArch
from .epilogue import Epilogue, map_shape, operand_shapes
from .program import WEIGHTS, Program, Stage, X, Y, moved_bytes
from .threads import ThreadSchedule

_MOST_TAPS = 31 * 31
# More pixels of a row in one thread read memory in strides that waste its transactions.
_MOST_PIXELS = 4
# Taps that are written out; of larger kernels only a row is.
_UNROLLED_TAPS = 49


@dataclass(frozen=True)
class DepthwiseSchedule:
    """The tunable choices: ``threads`` of a block, and ``pixels`` of a row for each of them.

    Neighbouring pixels of a thread share their inputs, which it keeps in registers. With
    ``channels_last`` neighbouring threads have neighbouring channels of NHWC maps, which other
    kernels turn.
    """

    kernel: ClassVar[str] = "cuda_depthwise"

    threads: int
    pixels: int
    channels_last: bool = False

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DepthwiseSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    g = workload.geometry
    if workload.in_block != arch.block:
        return f"in_block is {workload.in_block}, expected {arch.block}"
    if g.groups == 1 or g.groups != g.in_channels:
        return f"{g} is not depthwise"
    if g.kernel[0] * g.kernel[1] > _MOST_TAPS:
        return f"{g} has more than {_MOST_TAPS} taps"
    return None


def is_legal(workload: ConvWorkload, schedule: DepthwiseSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    if schedule.threads % WARP or not WARP <= schedule.threads <= MOST_THREADS:
        return f"threads is {schedule.threads}, expected whole warps up to {MOST_THREADS}"
    if not 1 <= schedule.pixels <= _MOST_PIXELS:
        return f"pixels is {schedule.pixels}, expected 1 to {_MOST_PIXELS}"
    return None


def space(workload: ConvWorkload, arch: CudaArch) -> list[DepthwiseSchedule]:
    """The legal schedules, the one predicted fastest first."""
    width = workload.geometry.out_width
    found = [
        DepthwiseSchedule(threads, pixels, last)
        for last in (False, True)
        for pixels in (4, 2, 1)
        if pixels == 1 or pixels <= width
        for threads in (128, 256, 64)
    ]
    return sorted(found, key=lambda schedule: predict(workload, schedule, arch))


def predict(workload: ConvWorkload, schedule: DepthwiseSchedule, arch: CudaArch) -> float:
    """Predicted microseconds."""
    g = workload.geometry
    strips = -(-g.out_width // schedule.pixels)
    values = g.batch * g.out_channels * g.out_height * strips * schedule.pixels
    taps = g.kernel[0] * g.kernel[1]
    reused = 1 + 4 / schedule.pixels
    memory = moved_bytes(workload, 4 * g.weight_count)
    time = model.of_streaming(
        values, memory, 2 * taps * reused, arch, schedule.threads, schedule.pixels
    )
    return time + (turn.of_convolution(workload, arch) if schedule.channels_last else 0.0)


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: DepthwiseSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [output channels][taps]."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1), np.float32)


def emit(workload: ConvWorkload, schedule: DepthwiseSchedule, arch: CudaArch) -> Program:
    """The kernel; ValueError if the schedule is not legal for the workload."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    g = workload.geometry
    operands = operand_shapes(g, workload.epilogue)
    shapes = {
        X: (g.batch, g.in_channels, g.height, g.width),
        WEIGHTS: (g.out_channels, g.kernel[0] * g.kernel[1]),
        **operands,
        Y: map_shape(g),
    }
    func = _schedule(_define(workload, schedule, shapes), workload, schedule, arch)
    if schedule.channels_last:
        return turn.program(func, shapes, tuple(operands), arch)
    return Program((Stage(func, (X, WEIGHTS, *operands), Y),), shapes, tuple(operands))


def _define(
    workload: ConvWorkload, schedule: DepthwiseSchedule, shapes: Mapping[str, tuple[int, ...]]
) -> tirx.PrimFunc:
    g = workload.geometry
    per_group = g.out_channels // g.groups
    strips = -(-g.out_width // schedule.pixels)
    count = g.batch * g.out_channels * g.out_height * strips
    zero = tirx.const(0, "float32")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        last = schedule.channels_last
        x = T.arg(X, T.buffer(turn.last_shape(shapes[X]) if last else shapes[X], "float32"))
        weights = T.arg(WEIGHTS, T.buffer(shapes[WEIGHTS], "float32"))
        epilogue = Epilogue(g, workload.epilogue, last)
        y = T.arg(Y, T.buffer(turn.last_shape(shapes[Y]) if last else shapes[Y], "float32"))
        with T.sblock("root"):
            sums = T.sblock_alloc_buffer((count, schedule.pixels), "float32")

            def place(strip: ir.Expr, pixel: ir.Expr) -> list[ir.Expr]:
                """NCHW indices of an output."""
                if last:
                    line = strip // g.out_channels
                    column = line % strips * schedule.pixels + pixel
                    row = line // strips
                    image, row = row // g.out_height, row % g.out_height
                    return [image, strip % g.out_channels, row, column]
                line = strip // strips
                plane, row = line // g.out_height, line % g.out_height
                column = strip % strips * schedule.pixels + pixel
                return [plane // g.out_channels, plane % g.out_channels, row, column]

            with T.grid(count, *g.kernel, schedule.pixels) as (s, i, j, p), T.sblock("sum"):
                vs, vi, vj, vp = T.axis.remap("SRRS", [s, i, j, p])
                with T.init():
                    T.buffer_store(sums, zero, [vs, vp])
                image, channel, row, column = place(vs, vp)
                row = row * g.stride[0] + vi * g.dilation[0] - g.padding[0]
                column = column * g.stride[1] + vj * g.dilation[1] - g.padding[1]
                value = x[tuple(turn.indices([image, channel // per_group, row, column], last))]
                inside = []
                if g.padding[0] or g.padding[2]:
                    inside += [row >= 0, row < g.height]
                if g.padding[1] or g.padding[3] or g.out_width % schedule.pixels:
                    inside += [column >= 0, column < g.width]
                if inside:
                    value = tirx.if_then_else(tirx.all(*inside), value, zero)
                term = value * weights[channel, vi * g.kernel[1] + vj]
                T.buffer_store(sums, sums[vs, vp] + term, [vs, vp])
            with T.grid(count, schedule.pixels) as (s, p), T.sblock("write"):
                vs, vp = T.axis.remap("SS", [s, p])
                at = place(vs, vp)
                if g.out_width % schedule.pixels:
                    with T.If(at[3] < g.out_width), T.Then():
                        value = epilogue.apply(sums[vs, vp], at)
                        T.buffer_store(y, value, turn.indices(at, last))
                else:
                    T.buffer_store(y, epilogue.apply(sums[vs, vp], at), turn.indices(at, last))
    return builder.get()


def _schedule(
    func: tirx.PrimFunc, workload: ConvWorkload, schedule: DepthwiseSchedule, arch: CudaArch
) -> tirx.PrimFunc:
    sch = ThreadSchedule(func, arch)
    tir = sch.tir
    total, write = tir.get_sblock("sum"), tir.get_sblock("write")
    strip, pixel = tir.get_loops(write)
    block, thread = tir.split(strip, [None, schedule.threads])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    tir.compute_at(total, thread, preserve_unit_loops=True)
    tir.set_scope(total, 0, sch.scope("local"))
    i, j, pixels = tir.get_loops(total)[-3:]
    start = tir.decompose_reduction(total, i)
    if workload.geometry.kernel[0] * workload.geometry.kernel[1] <= _UNROLLED_TAPS:
        tir.unroll(i)
    for loop in (j, pixels, pixel, tir.get_loops(start)[-1]):
        tir.unroll(loop)
    return sch.finish()
