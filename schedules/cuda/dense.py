"""Fully connected layers of few samples: a warp adds up a few outputs, its lanes along the sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import model
from .arch import MOST_THREADS, WARP, CudaArch
from .epilogue import Epilogue, map_shape, operand_shapes
from .gemm import round_up
from .program import WEIGHTS, Program, Stage, X, Y, moved_bytes
from .threads import ThreadSchedule

# With more samples the weights are read once for many products, which `direct` does better.
_MOST_SAMPLES = 16
# Sums that a thread keeps in registers.
_MOST_SUMS = 32


@dataclass(frozen=True)
class DenseSchedule:
    """The tunable choices: ``warps`` of a block, and ``rows``, the outputs of each warp."""

    kernel: ClassVar[str] = "cuda_dense"

    warps: int
    rows: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DenseSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(data["warps"], data["rows"])


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    g = workload.geometry
    if workload.in_block != arch.block:
        return f"in_block is {workload.in_block}, expected {arch.block}"
    if g.groups != 1 or any(g.padding) or g.kernel != (g.height, g.width):
        return f"{g} is not fully connected"
    if g.batch > _MOST_SAMPLES:
        return f"batch is {g.batch}, expected at most {_MOST_SAMPLES}"
    return None


def is_legal(workload: ConvWorkload, schedule: DenseSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    if not 1 <= schedule.warps <= MOST_THREADS // WARP:
        return f"warps is {schedule.warps}, expected 1 to {MOST_THREADS // WARP}"
    sums = schedule.rows * workload.geometry.batch
    if schedule.rows < 1 or sums > max(_MOST_SUMS, workload.geometry.batch):
        return f"rows is {schedule.rows}, a thread would keep {sums} sums"
    return None


def space(workload: ConvWorkload, arch: CudaArch) -> list[DenseSchedule]:
    """The legal schedules, the one predicted fastest first."""
    found = itertools.starmap(DenseSchedule, itertools.product((4, 8, 2, 1), (1, 2, 4)))
    legal = [schedule for schedule in found if is_legal(workload, schedule, arch) is None]
    return sorted(legal, key=lambda schedule: predict(workload, schedule, arch))


def predict(workload: ConvWorkload, schedule: DenseSchedule, arch: CudaArch) -> float:
    """Predicted microseconds."""
    g, s = workload.geometry, schedule
    shape = _Shape(workload, schedule)
    blocks = shape.outputs // (s.rows * s.warps)
    sums = s.rows * g.batch
    # A thread's multiply-adds among its loads, of which a vector is one.
    loads = (s.rows + g.batch) / shape.vector
    rate = arch.gflops * 1e3 / arch.multiprocessors * sums / (sums + loads + 1)
    load = model.Load(
        blocks=blocks,
        threads=WARP * s.warps,
        registers=32 + sums + shape.vector * (s.rows + g.batch),
        shared=4 * s.warps * sums,
        block_us=2 * s.rows * s.warps * g.batch * shape.length / rate,
        steps=shape.steps,
        overlapped=True,
        memory=moved_bytes(workload, 4 * shape.outputs * shape.length),
        traffic=4.0 * shape.length * (shape.outputs + blocks * s.warps * g.batch),
    )
    return model.microseconds(load, arch)


class _Shape:
    """Extents of a layer, padded to what the warps compute."""

    def __init__(self, workload: ConvWorkload, schedule: DenseSchedule) -> None:
        g = workload.geometry
        self.samples = g.batch
        self.inputs = g.in_channels * g.height * g.width
        # Neighbouring inputs that a lane reads at once.
        self.vector = math.gcd(self.inputs, 4)
        self.length = round_up(self.inputs, WARP * self.vector)
        self.steps = self.length // (WARP * self.vector)
        self.outputs = round_up(g.out_channels, schedule.rows * schedule.warps)


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: DenseSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [outputs][inputs], padded with zeros."""
    shape = _Shape(workload, schedule)
    flat = weight.reshape(len(weight), -1)
    missing = (shape.outputs - flat.shape[0], shape.length - flat.shape[1])
    return np.pad(flat, ((0, missing[0]), (0, missing[1]))).astype(np.float32)


def emit(workload: ConvWorkload, schedule: DenseSchedule, arch: CudaArch) -> Program:
    """The kernel; ValueError if the schedule is not legal for the workload."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    g, shape = workload.geometry, _Shape(workload, schedule)
    operands = operand_shapes(g, workload.epilogue)
    shapes = {
        X: (g.batch, g.in_channels, g.height, g.width),
        WEIGHTS: (shape.outputs, shape.length),
        **operands,
        Y: map_shape(g),
    }
    func = _schedule(_define(workload, shape, shapes), shape, schedule, arch)
    return Program((Stage(func, (X, WEIGHTS, *operands), Y),), shapes, tuple(operands))


def _define(
    workload: ConvWorkload, shape: _Shape, shapes: Mapping[str, tuple[int, ...]]
) -> tirx.PrimFunc:
    """Sums of each lane, their total over the lanes, and what is written."""
    g, zero = workload.geometry, tirx.const(0, "float32")
    pixels = g.height * g.width
    samples, outputs, vector = shape.samples, shape.outputs, shape.vector
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        x = T.arg(X, T.buffer(shapes[X], "float32"))
        weights = T.arg(WEIGHTS, T.buffer(shapes[WEIGHTS], "float32"))
        epilogue = Epilogue(g, workload.epilogue)
        y = T.arg(Y, T.buffer(shapes[Y], "float32"))
        with T.sblock("root"):
            inputs = T.sblock_alloc_buffer((samples, shape.length), "float32")
            parts = T.sblock_alloc_buffer((WARP, samples, outputs), "float32")
            sums = T.sblock_alloc_buffer((samples, outputs), "float32")
            with T.grid(samples, shape.length) as (b, k), T.sblock("inputs"):
                vb, vk = T.axis.remap("SS", [b, k])
                pixel = vk % pixels
                value = x[vb, vk // pixels, pixel // g.width, pixel % g.width]
                if shape.length > shape.inputs:
                    inside = vk // vector * vector < shape.inputs
                    value = tirx.if_then_else(inside, value, zero)
                T.buffer_store(inputs, value, [vb, vk])
            extents = (WARP, samples, outputs, shape.steps, vector)
            with T.grid(*extents) as (lane, b, i, s, v), T.sblock("parts"):
                vl, vb, vi, vs, vv = T.axis.remap("SSSRR", [lane, b, i, s, v])
                with T.init():
                    T.buffer_store(parts, zero, [vl, vb, vi])
                k = (vs * WARP + vl) * vector + vv
                term = weights[vi, k] * inputs[vb, k]
                T.buffer_store(parts, parts[vl, vb, vi] + term, [vl, vb, vi])
            with T.grid(samples, outputs, WARP) as (b, i, lane), T.sblock("total"):
                vb, vi, vl = T.axis.remap("SSR", [b, i, lane])
                with T.init():
                    T.buffer_store(sums, zero, [vb, vi])
                T.buffer_store(sums, sums[vb, vi] + parts[vl, vb, vi], [vb, vi])
            with T.grid(samples, outputs) as (b, i), T.sblock("write"):
                vb, vi = T.axis.remap("SS", [b, i])
                place = [vb, vi, tirx.const(0, "int32"), tirx.const(0, "int32")]
                if outputs == g.out_channels:
                    T.buffer_store(y, epilogue.apply(sums[vb, vi], place), place)
                else:
                    with T.If(vi < g.out_channels), T.Then():
                        T.buffer_store(y, epilogue.apply(sums[vb, vi], place), place)
    return builder.get()


def _schedule(
    func: tirx.PrimFunc, shape: _Shape, schedule: DenseSchedule, arch: CudaArch
) -> tirx.PrimFunc:
    """Outputs over blocks, warps and rows; the sum over lanes."""
    sch = ThreadSchedule(func, arch)
    tir = sch.tir
    inputs, parts, total, write = map(tir.get_sblock, ("inputs", "parts", "total", "write"))
    b, i, lane = tir.get_loops(total)
    block, warp, row = tir.split(i, [None, schedule.warps, schedule.rows])
    tir.reorder(block, warp, b, row, lane)
    sch.bind(block, "blockIdx.x")
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    tir.compute_at(parts, warp, preserve_unit_loops=True)
    tir.set_scope(parts, 0, sch.scope("local"))
    lane, b, row, step, vector = tir.get_loops(parts)[-5:]
    tir.reorder(lane, step, b, row, vector)
    sch.bind(lane, "threadIdx.x")
    weights = tir.cache_read(parts, 0, sch.scope("local"))
    for copy in (weights, inputs):
        tir.set_scope(copy, 0, sch.scope("local"))
        tir.compute_at(copy, step, preserve_unit_loops=True)
        tir.vectorize(tir.get_loops(copy)[-1])
        tir.unroll(tir.get_loops(copy)[-2])
    start = tir.decompose_reduction(parts, step)
    sch.unroll(start, 2)
    sch.unroll(parts, 3)
    tir.set_scope(total, 0, sch.scope("shared"))
    tir.reverse_compute_at(write, block, preserve_unit_loops=True)
    sch.spread(write, tir.get_loops(write)[-2:], (schedule.warps, WARP), 1)
    return sch.finish()
