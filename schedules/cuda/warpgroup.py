"""Convolution on Hopper's tensor cores: warpgroups multiply pixels by packed weights.

Pixels are gathered, and weights copied, piece by piece of the sum into several stages of shared
memory, by warps of their own while others multiply. Maps stay NCHW in float32; factors are TF32 or
float16, sums float32.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import direct, mma, model, wgmma
from .arch import WARP, CudaArch, version_of
from .gemm import define, refuse_grid, round_up
from .program import WEIGHTS, Program, moved_bytes
from .threads import ThreadSchedule
from .warpgroup_code import WarpgroupProduct, kernel, pixels_a_copy
from .warpgroup_schedule import WarpgroupHalfSchedule, WarpgroupSchedule, WarpgroupTF32Schedule

__all__ = ["WarpgroupHalfSchedule", "WarpgroupSchedule", "WarpgroupTF32Schedule"]

_ARCHITECTURE = 90
_MOST_SCHEDULES = 16
# A copy of columns takes as long as so many multiply-adds of float32; one whose place in the map
# is computed for itself, twice that.
_COPY = 16
# What schedules are made of: channels of a block, of which at most so many times as many as there
# are may be computed; pieces of the sum, and up to which length it takes the shortest ones.
_SIZES, _PADDED = (16, 32, 48, 64, 96, 128, 192, 256), 1.15
_PIECE, _SHORT_SUM = 32, 64
_USUAL_STAGES = 4


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if version_of(arch.name) != _ARCHITECTURE:
        return f"{arch.name} has no warpgroups, which sm_{_ARCHITECTURE} alone has"
    return direct.refuse(workload, arch)


def is_legal(workload: ConvWorkload, schedule: WarpgroupSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    s = schedule
    if s.split_k < 1:
        return "split_k must be positive"
    if problem := s.refuse():
        return problem
    if s.block_k // s.factor.k % 2:
        return "pieces must be of an even number of instructions"
    across, copying = s.block_n // pixels_a_copy(workload.geometry), s.copying * WARP
    if max(across, copying) % min(across, copying) or s.block_k * across % copying:
        return "the threads that copy cannot share a piece evenly"
    if s.registers * s.threads > arch.registers:
        return f"it needs about {s.registers} registers for each of {s.threads} threads"
    return refuse_grid(direct.gemm_of(workload.geometry, s.block_k), s)


def space(
    kind: type[WarpgroupSchedule], workload: ConvWorkload, arch: CudaArch
) -> list[WarpgroupSchedule]:
    """Legal schedules with one type of factors, the one predicted fastest first."""
    g = workload.geometry
    channels = round_up(g.out_channels // g.groups, WarpgroupSchedule.least_channels)
    sizes = [s for s in _SIZES if round_up(channels, s) <= _PADDED * channels]
    short = direct.gemm_of(g, WarpgroupSchedule.least_channels).k <= _SHORT_SUM
    piece = 2 * kind.factor.k if short else _PIECE
    legal = []
    for size, groups, tiles, stages, copying, split in itertools.product(
        sizes, (1, 2), (1, 2), (3, 4, 6), (4, 8), (1, 2, 4, 8)
    ):
        pixels = wgmma.ROWS * tiles * groups
        schedule = kind(size, pixels, piece, tiles, stages, copying, split)
        if is_legal(workload, schedule, arch) is not None:
            continue
        # More threads copy where each has much to compute for it.
        if copying > 4 and WarpgroupProduct(workload, schedule).stride_of_channels:
            continue
        gemm = direct.gemm_of(g, piece)
        if split == 1 or gemm.blocks(schedule) <= 4 * arch.multiprocessors:
            legal.append(schedule)
    legal.sort(key=lambda s: (predict(workload, s, arch), abs(s.stages - _USUAL_STAGES), str(s)))
    return legal[:_MOST_SCHEDULES]


def predict(workload: ConvWorkload, schedule: WarpgroupSchedule, arch: CudaArch) -> float:
    """Predicted microseconds."""
    s, g = schedule, workload.geometry
    gemm = direct.gemm_of(g, s.block_k)
    whole = gemm.padded(s)
    blocks = whole.blocks_of(s)
    per_multiprocessor = 1e3 / arch.multiprocessors
    products = 2 * s.block_m * s.block_n * whole.k
    products_us = products / (arch.tensor_gflops * 2 / s.factor.bytes * per_multiprocessor)
    # Copies of the columns run beside the products.
    copies = s.block_n * whole.k / pixels_a_copy(g)
    known = WarpgroupProduct(workload, s).stride_of_channels > 0
    copies_us = (_COPY if known else 2 * _COPY) * copies / (arch.gflops * per_multiprocessor / 2)
    ahead = -(-whole.k // (s.block_k * (s.stages - 1)))
    load = model.Load(
        blocks=blocks,
        threads=s.threads,
        registers=s.registers,
        shared=s.shared_bytes,
        block_us=max(products_us, copies_us),
        steps=ahead,
        overlapped=True,
        memory=moved_bytes(workload, s.factor.bytes * g.weight_count) + direct.parts_bytes(gemm, s),
        traffic=blocks * whole.k * (float(s.factor.bytes) * s.block_m + 4.0 * s.block_n),
    )
    return model.microseconds(load, arch) + direct.predict_adding(gemm, s, arch)


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: WarpgroupSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [groups][blocks of channels][pieces of the sum][what a piece is in shared memory]."""
    s, g = schedule, workload.geometry
    product = WarpgroupProduct(workload, s)
    whole, channels = product.whole, product.channels
    length = whole.k * s.split_k
    at = np.arange(product.gemm.k)
    tap, channel = product.place_in_sum(at)
    split = weight.reshape(g.groups, product.gemm.m, -1, g.kernel[0] * g.kernel[1])
    padded = np.zeros((g.groups, whole.m, channels, split.shape[3]), np.float32)
    padded[:, : product.gemm.m, : split.shape[2]] = split
    rows = np.zeros((g.groups, whole.m, length), np.float32)
    rows[:, :, : product.gemm.k] = padded[:, :, channel, tap]
    # Of each instruction's sum: places in the order of core matrices.
    factor = s.factor
    order = np.argsort(factor.slot_of(np.arange(factor.k)))
    cores = rows.reshape(g.groups, -1, s.block_m, length // factor.k, factor.k)[..., order]
    cores = cores.reshape(*cores.shape[:4], -1, factor.per_core).transpose(0, 1, 3, 4, 2, 5)
    packed = cores.reshape(product.weight_shape)
    return mma.round_array(packed) if factor is wgmma.TF32 else packed.astype(np.float16)


def emit(workload: ConvWorkload, schedule: WarpgroupSchedule, arch: CudaArch) -> Program:
    """The kernel, or two if the sum is split; ValueError if the schedule is not legal."""
    problem = is_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    product = WarpgroupProduct(workload, schedule)
    if arch.loops:
        func = ThreadSchedule(define(product.whole, product), arch).finish()
    else:
        func = kernel(product)
    program = direct.program_of(product, func, arch)
    return replace(program, dtypes={WEIGHTS: product.weight_dtype})
