"""The time of a kernel by a model of the card: what ranks schedules where there is no GPU.

The figures are published ones and the form is a roofline with latencies; nothing in it was fitted
to measurements. It is good for ordering, and every time it gives is called predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arch import WARP, CudaArch
from .gemm import Gemm, GemmSchedule

# Microseconds from a load of global memory to its value, and from one kernel's end to the next's
# start within a CUDA graph.
LATENCY = 0.4
LAUNCH = 1.5
# How much faster than memory the second-level cache hands out what blocks share.
_CACHE = 2.5


@dataclass(frozen=True)
class Load:
    """What one kernel asks of the card.

    ``block_us`` is the time of one block that has a multiprocessor to itself with ``steps`` waits
    for memory left out; ``steps`` are these waits, which ``overlapped`` ones spend computing.
    ``memory`` are bytes that cross the memory bus, ``traffic`` those that cross the cache.
    """

    blocks: int
    threads: int
    registers: int
    shared: int
    block_us: float
    steps: int
    overlapped: bool
    memory: float
    traffic: float


def resident_blocks(load: Load, arch: CudaArch) -> int:
    """Blocks that a multiprocessor holds at once; 0 if not even one fits."""
    registers = -(-load.registers // 8) * 8 * load.threads
    limits = [arch.blocks, arch.threads // load.threads, arch.registers // registers]
    if load.shared:
        limits.append(arch.shared_bytes // (load.shared + 1024))
    return min(limits)


def microseconds(load: Load, arch: CudaArch) -> float:
    """Predicted time of one kernel; infinite if no block fits."""
    fit = resident_blocks(load, arch)
    if not fit:
        return math.inf
    each = -(-load.blocks // arch.multiprocessors)
    together = min(fit, each)
    rounds = -(-each // together)
    step = load.block_us / load.steps
    busy = together * step
    wait = max(busy, LATENCY) if load.overlapped else max(busy, step + LATENCY)
    compute = rounds * (load.steps * wait + 2 * LATENCY)
    bytes_us = max(load.memory, load.traffic / _CACHE) / (1e3 * arch.gigabytes)
    return max(compute, bytes_us) + LAUNCH


def of_gemm(
    gemm: Gemm, schedule: GemmSchedule, memory: float, arch: CudaArch, gather: float = 1.0
) -> float:
    """Predicted time of a product; ``gather`` is the work of reading a column over a plain read."""
    whole = gemm.padded(schedule)
    rows, columns = schedule.threads
    blocks = gemm.blocks(schedule)
    m, n = schedule.thread_m, schedule.thread_n
    # A thread's instructions for each of its m * n multiply-adds: loads of shared memory, loop, and
    # its share of the copies, some ten instructions for every value gathered.
    copies = 10 * gather * schedule.block_n / (rows * columns)
    issued = m * n / (m * n + m + n + 4 + copies)
    rate = arch.gflops * 1e3 / arch.multiprocessors * issued
    work = 2 * schedule.block_m * schedule.block_n * whole.k
    load = Load(
        blocks=blocks,
        threads=rows * columns,
        registers=schedule.registers,
        shared=schedule.shared_bytes,
        block_us=work / rate,
        steps=whole.k // schedule.block_k,
        overlapped=schedule.pipeline,
        memory=memory,
        traffic=4.0 * blocks * whole.k * (schedule.block_m + schedule.block_n),
    )
    return microseconds(load, arch)


def of_streaming(
    values: int, memory: float, operations: float, arch: CudaArch, threads: int, each: int = 1
) -> float:
    """Predicted time of a kernel without shared memory that makes ``each`` values a thread.

    ``operations`` are those of one value.
    """
    rate = arch.gflops * 1e3 / arch.multiprocessors / 3
    blocks = -(-values // (threads * each))
    load = Load(
        blocks=blocks,
        threads=-(-threads // WARP) * WARP,
        registers=40,
        shared=0,
        block_us=threads * each * operations / rate,
        steps=1,
        overlapped=False,
        memory=memory,
        traffic=memory,
    )
    return microseconds(load, arch)
