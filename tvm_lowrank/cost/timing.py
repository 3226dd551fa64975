"""The time of one kernel, with its weights cold as they are in a network."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.kernels import emit, schedule_from_json
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# In a network, the kernels in between push a layer's weights out of the second-level cache. Calls
# take turns among copies of the weights that do not fit there together.
_COLD_BYTES = 16 << 20
_MOST_COPIES = 32
# Seconds of one of the measurements that have to agree, and of what its minimum is taken over.
_SECONDS = 0.02
_BLOCK = 1e-4
_AGREEMENT = 1.1


def time_kernel(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile and time a kernel; what the measuring process does for each request.

    Parameters
    ----------
    request : dict
        ``target``, ``workload`` and ``schedule`` as JSON values.

    Returns
    -------
    dict
        ``us``, the minimum of repeated runs in microseconds, and ``steady``: whether two of at most
        three such minima agreed within 10 %.
    """
    target = tvm.target.Target(request["target"])
    workload = ConvWorkload.from_json(request["workload"])
    func = emit(workload, schedule_from_json(request["schedule"]), isa_of(target))
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(module, target=target).jit()["main"]
    turns = itertools.cycle(_arguments(func))

    def run() -> None:
        main(*next(turns))

    run()
    first = min(_blocks(run, 1, 4))
    number = max(1, round(_BLOCK / first))
    count = max(3, round(_SECONDS / (first * number)))
    minima = sorted(min(_blocks(run, number, count)) for _ in range(2))
    if minima[1] > _AGREEMENT * minima[0]:
        minima = sorted([*minima, min(_blocks(run, number, count))])
    return {"us": 1e6 * minima[0], "steady": minima[1] <= _AGREEMENT * minima[0]}


def _blocks(run: Callable[[], None], number: int, count: int) -> Iterator[float]:
    """Seconds of a run, averaged over ``number`` in a row, ``count`` times."""
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(number):
            run()
        yield (time.perf_counter() - start) / number


def _arguments(func: tvm.tirx.PrimFunc) -> list[list[Any]]:
    """Tensors for every parameter, once for each copy of the weights (the second parameter)."""
    noise = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) * 0.1
    shapes = [tuple(int(n) for n in param.shape) for param in func.params]
    x, weights, *others = [tvm.runtime.tensor(np.resize(noise, shape)) for shape in shapes]
    copies = min(math.ceil(_COLD_BYTES / (4 * math.prod(shapes[1]))), _MOST_COPIES)
    rotation = [weights]
    rotation += [tvm.runtime.tensor(np.resize(noise, shapes[1])) for _ in range(copies - 1)]
    return [[x, each, *others] for each in rotation]
