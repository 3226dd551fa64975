"""What the machine can do at most: multiply-adds from registers, and reading memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm_lowrank.schedules.x86 import reading
from tvm_lowrank.schedules.x86.emitter import Emitter
from tvm_lowrank.schedules.x86.isa import VectorISA, isa_of

_ITERATIONS = 200_000
_SECONDS = 0.5


def peak_gflops(target: tvm.target.Target, threads: int) -> float:
    """Multiply-adds on registers alone, all threads, in GF/s (two operations each)."""
    isa = isa_of(target)
    count = isa.registers - 8
    values = tvm.runtime.tensor(np.full((count + 2) * isa.lanes, 0.5, np.float32))
    results = tvm.runtime.tensor(np.zeros(threads * count * isa.lanes, np.float32))
    run = compile_kernel(_multiply_adds(isa, count, threads), target)
    seconds = _median(lambda: run(values, results))
    return 2e-9 * isa.lanes * count * _ITERATIONS * threads / seconds


def read_gigabytes(target: tvm.target.Target, threads: int, size: int) -> float:
    """Gigabytes a second at which all threads read ``size`` bytes again and again."""
    func = reading.emit(size, threads, isa_of(target))
    lengths = [int(parameter.shape[0]) for parameter in func.params]
    source, sums = (tvm.runtime.tensor(np.ones(length, np.float32)) for length in lengths)
    run = compile_kernel(func, target)
    return 4e-9 * lengths[0] / _median(lambda: run(source, sums))


def compile_kernel(func: tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., Any]:
    """A PrimFunc as a function of tensors."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target).jit()["main"]


def _median(run: Callable[[], Any]) -> float:
    """Median seconds of single runs.

    Not the least: virtual processors that share a core now and then get one each for a moment.
    """
    run()
    spent: list[float] = []
    deadline = time.perf_counter() + _SECONDS
    while not spent or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _multiply_adds(isa: VectorISA, count: int, tasks: int) -> tirx.PrimFunc:
    """Each task: ``a_i = a_i * s + t``, for ``count`` accumulators at once."""
    em = Emitter(isa)
    values = em.argument("values", ((count + 2) * isa.lanes,))
    results = em.argument("results", (tasks * count * isa.lanes,))
    with em.loop(tasks, "parallel", prefix="task") as task:
        scale, shift = (em.load(values, (count + i) * isa.lanes) for i in range(2))
        accumulators = em.accumulators(count)
        for index, accumulator in enumerate(accumulators):
            em.store(accumulator, em.load(values, index * isa.lanes))
        with em.loop(_ITERATIONS):
            for accumulator in accumulators:
                em.store(accumulator, em.value_of(accumulator) * scale + shift)
        for index, accumulator in enumerate(accumulators):
            offset = (task * count + index) * isa.lanes
            em.store(results, em.value_of(accumulator), offset)
    return em.finish()
