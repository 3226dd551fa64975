"""Convolution on Hopper's tensor cores between maps with channels last, in float16 or TF32.

Both factors are read from shared memory as they lie in the map: a copy takes 16 bytes of channels
of one pixel, whatever kernel, stride and padding. What is written is rounded, so that nothing is
when it is read. Between two such kernels no map is turned.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import direct, mma, model, tensor, turn, warpgroup, wgmma, wgmma_shared
from .arch import WARP, CudaArch
from .channels_last_code import LastProduct, kernel
from .channels_last_schedule import LastHalfSchedule, LastSchedule, LastTF32Schedule
from .few_channels import inner, inner_weight
from .gemm import define, refuse_grid, round_up
from .program import WEIGHTS, Program
from .threads import ThreadSchedule

__all__ = ["LastHalfSchedule", "LastSchedule", "LastTF32Schedule"]

_MOST_SCHEDULES = 24
# Pixels whose places a thread that copies keeps, and taps along an axis that it knows of each.
_MOST_PIXELS, _MOST_WHERE_SCARCE, _MOST_TAPS = 12, 8, 15
# What `predict` adds up, in cycles of a multiprocessor, as measured on an H200: a copy by a warp,
# what a piece takes besides its products, from a copy's start until it is there, writing 1,024
# bytes of results, and how much longer products take than they could.
_COPY, _PIECE, _AWAY, _WRITE, _SLOWER = 16, 90, 1100, 120, 1.35
# How well products and what crosses the memory bus hide each other: the power of their mean.
_HIDES = 4
# What schedules are made of: channels of a block, of which at most so many times as many as there
# are may be computed.
_SIZES, _PADDED = (32, 64, 96, 128, 192, 256), 1.15


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if problem := warpgroup.refuse(workload, arch):
        return problem
    g = workload.geometry
    if (g.in_channels // g.groups % turn.EIGHT and g.groups > 1) or (
        g.out_channels // g.groups % turn.EIGHT
    ):
        return f"channels last are copied and written by {turn.EIGHT}"
    if max(g.kernel) > _MOST_TAPS:
        return f"kernels of channels last have {_MOST_TAPS} taps along an axis at most"
    pixels = g.batch * max(g.height * g.width, g.out_height * g.out_width)
    if pixels * max(g.in_channels, g.out_channels) >= 1 << 31:
        return "its maps have more values than an index of 32 bits counts"
    return None


def is_legal(workload: ConvWorkload, schedule: LastSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    s = schedule
    if problem := s.refuse():
        return problem
    threads = s.copying * WARP
    if threads % s.lines or s.block_n * s.lines % threads:
        return "the threads that copy cannot share a piece evenly"
    most = _MOST_WHERE_SCARCE if s.shares else _MOST_PIXELS
    if s.block_n * s.lines // threads > most:
        return f"a thread would copy more than {most} pixels of a piece"
    if not s.shares and s.registers * s.threads > arch.registers:
        return f"it needs about {s.registers} registers for each of {s.threads} threads"
    return refuse_grid(direct.gemm_of(inner(workload).geometry, s.block_k), s)


def space(kind: type[LastSchedule], workload: ConvWorkload, arch: CudaArch) -> list[LastSchedule]:
    """Legal schedules of one kind, the one predicted fastest first."""
    g = inner(workload).geometry
    channels = round_up(g.out_channels // g.groups, LastSchedule.least_channels)
    sizes = [s for s in _SIZES if round_up(channels, s) <= _PADDED * channels]
    # Long ones save waiting, where the sum is not padded for them.
    pieces = (4 * kind.factor.k, 2 * kind.factor.k)
    piece = min(pieces, key=lambda p: (round_up(direct.gemm_of(g, p).k, p), -p))
    legal = []
    for size, groups, tiles, stages in itertools.product(sizes, (1, 2, 3), (1, 2), (2, 3, 4, 6)):
        for copying in (4, 8):
            schedule = kind(size, wgmma.ROWS * tiles * groups, piece, tiles, stages, copying)
            if is_legal(workload, schedule, arch) is None:
                legal.append(schedule)
                tiles_of = direct.gemm_of(g, piece).blocks(schedule)
                if tiles_of > arch.multiprocessors * _together(schedule, arch):
                    legal.append(replace(schedule, stays=True))
                break  # more warps copy only where fewer cannot
    legal.sort(key=lambda s: (predict(workload, s, arch), str(s)))
    return legal[:_MOST_SCHEDULES]


def predict(workload: ConvWorkload, schedule: LastSchedule, arch: CudaArch) -> float:
    """Predicted microseconds, with those of turning the maps."""
    s, g = schedule, inner(workload).geometry
    gemm = direct.gemm_of(g, s.block_k)
    whole = gemm.padded(s)
    # Of an instruction: multiplying, and reading rows and columns from shared memory.
    rows, columns = s.block_n // wgmma.ROWS, s.block_m
    instruction = _SLOWER * max(columns / 2, 16 + columns / 4)
    products = s.block_k // s.factor.k * rows * instruction
    copies = _COPY * s.block_n * s.lines / WARP
    each = -(-whole.blocks_of(s) // arch.multiprocessors)
    together = min(_together(s, arch), each)
    alone = max(products, copies)
    piece = max(together * alone, alone + _PIECE, _AWAY / (s.stages - 1))
    written = together * s.block_n * s.block_m * s.factor.bytes / 1024
    cycles = -(-each // together) * (whole.k // s.block_k * piece + _WRITE * written)
    # A multiprocessor's tensor cores do 4,096 operations on float16 in a cycle.
    per_us = arch.tensor_gflops * 1e3 / arch.multiprocessors / 4096
    maps = 1 + sum(step == "residual" for step in workload.epilogue)
    inputs = g.batch * g.in_channels * g.height * g.width
    values = inputs + maps * gemm.batch * gemm.m * gemm.n + g.weight_count
    memory = s.factor.bytes * values / (1e3 * arch.gigabytes)
    turning = turn.of_convolution(workload, arch, s.kind)
    both = ((cycles / per_us) ** _HIDES + memory**_HIDES) ** (1 / _HIDES)
    return both + model.LAUNCH + turning


def _together(schedule: LastSchedule, arch: CudaArch) -> int:
    """Blocks that a multiprocessor holds at once."""
    s = schedule
    load = model.Load(1, s.threads, s.registers, s.shared_bytes, 1, 1, True, 0, 0)
    return max(model.resident_blocks(load, arch), 1)


def error_bound(workload: ConvWorkload, schedule: LastSchedule) -> float:
    """As `tensor.error_bound`, and rounded once more as it is written."""
    return 3 * tensor.ROUNDING


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: LastSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [groups][blocks of channels][pieces of the sum][what a piece is in shared memory]."""
    s, g = schedule, inner(workload).geometry
    product = LastProduct(workload, s)
    weight = inner_weight(weight, workload)
    whole, per_core = product.whole, s.factor.per_core
    taps = g.kernel[0] * g.kernel[1]
    split = weight.reshape(g.groups, product.gemm.m, -1, taps).transpose(0, 1, 3, 2)
    rows = np.zeros((g.groups, whole.m, taps, product.channels), np.float32)
    rows[:, : product.gemm.m, :, : split.shape[3]] = split
    rows = rows.reshape(g.groups, whole.m, product.gemm.k)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, whole.k - product.gemm.k)))
    blocks = rows.reshape(g.groups, -1, s.block_m, whole.k)
    blocks = blocks[:, :, wgmma_shared.channel_of(s.factor, np.arange(s.block_m))]
    cores = blocks.reshape(*blocks.shape[:3], whole.k // per_core, per_core)
    packed = cores.transpose(0, 1, 3, 2, 4).reshape(product.weight_shape)
    return mma.round_array(packed) if s.factor is wgmma.TF32 else packed.astype(np.float16)


def emit(workload: ConvWorkload, schedule: LastSchedule, arch: CudaArch) -> Program:
    """The kernel among those that turn its maps; ValueError if the schedule is not legal."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    product = LastProduct(workload, schedule)
    if arch.loops:
        func = ThreadSchedule(define(product.whole, product), arch).finish()
    else:
        func = kernel(product, arch.multiprocessors * _together(schedule, arch))
    program = direct.program_of(product, func, arch)
    return replace(program, dtypes={**(program.dtypes or {}), WEIGHTS: product.weight_dtype})
