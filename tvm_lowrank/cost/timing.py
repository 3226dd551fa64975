"""The time of one kernel, with its weights cold as they are in a network."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.build import compile_module
from tvm_lowrank.cost import measure_batch
from tvm_lowrank.cost.pace import Pacer, paced
from tvm_lowrank.cost.rotation import Maps, rotation
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import SMALL
from tvm_lowrank.schedules.cuda.arch import arch_of
from tvm_lowrank.schedules.cuda.program import Program
from tvm_lowrank.schedules.cuda.straight import copy_program
from tvm_lowrank.schedules.kernels import emit, schedule_from_json, spaces
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86 import fused, reading
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.threads import apart_from_pool, physical_cores

# Seconds of one of the measurements that have to agree, and of what its minimum is taken over.
_SECONDS = 0.015
_BLOCK = 1e-4
# Compiled kernels that a process keeps.
_KEPT = 256
# The layer of the kernel that `pace` compares with, and for how many seconds that runs.
_PACE = ConvGeometry(64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1))
_PACE_SECONDS = 0.003
# Turns of schedules that are compared; each runs in all of them as long as if it ran alone.
_TURNS = 32


def time_kernel(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile and time a kernel; what the measuring process does for each request.

    Of a chain, all kernels are called in turn, each on the map that the one before has written:
    their times one by one would miss what that map costs to move.

    Parameters
    ----------
    request : dict
        ``target``, ``workload`` and ``schedule`` as JSON values, of a convolution or of a chain,
        and ``network``, how many MiB of weights its network has, `place.SMALL` by default;
        for a GPU also ``target`` and the bytes of a ``copy``, else ``target`` and the bytes of a
        ``reading``. With ``rivals``, a list, instead of ``schedule``, these take turns; ``target``
        and ``pace`` ask for the least time of the reference kernel within so many seconds, and
        ``prepare``, a list of requests, has their kernels compiled for later.

    Returns
    -------
    dict
        ``us``, the minimum of repeated runs in microseconds, of rivals a list; else what `paced`
        gives of such minima.
    """
    target = tvm.target.Target(request["target"])
    if target.kind.name == "cuda" and "copy" in request:
        copy = copy_program(arch_of(target), request["copy"] // 4)
        return time_program(copy, target, tvm.cuda())
    if target.kind.name == "cuda":
        workload = ConvWorkload.from_json(request["workload"])
        schedule = schedule_from_json(request["schedule"])
        program = emit(workload, schedule, machine_of(target))
        return time_program(program, target, tvm.cuda())
    if "prepare" in request:
        return _prepare(request["prepare"])
    if "pace" in request:
        with apart_from_pool():
            return {"us": 1e6 * _pacer(json.dumps(request["target"])).least(request["pace"])}
    if "rivals" in request:
        rivals = [{**request, "schedule": schedule} for schedule in request["rivals"]]
        maps: Maps = {}
        shares = [index / len(rivals) for index in range(len(rivals))]
        runs = [_runner(*each, maps) for each in zip(rivals, shares, strict=True)]
        return {"us": _in_turns(runs)}
    if "reading" in request:
        return _time_reading(request["reading"], request["target"])
    return _least(_runner(request), _pacer(json.dumps(request["target"])))


def _prepare(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compile the kernels of requests on all cores; those that fail do so when asked for."""

    def compile_one(request: Mapping[str, Any]) -> None:
        with contextlib.suppress(Exception):
            _compiled(_name(request))

    with ThreadPoolExecutor(physical_cores()) as pool:
        list(pool.map(compile_one, requests))
    return {}


def _name(request: Mapping[str, Any]) -> str:
    """What kernels are kept by."""
    named = {name: request[name] for name in ("target", "workload", "schedule")}
    return json.dumps(named, sort_keys=True)


def _runner(
    request: Mapping[str, Any], start: float = 0.0, maps: Maps | None = None
) -> Callable[[], None]:
    """Runs the kernels of a request once, each time with other copies of their weights.

    See `rotation` for the other parameters.
    """
    kernels = _compiled(_name(request))
    network = request.get("network", SMALL)
    turns = rotation([kernel.parameters for kernel in kernels], network, start, maps)

    def run() -> None:
        for kernel, arguments in zip(kernels, next(turns), strict=True):
            kernel.call(*arguments)

    return run


@dataclass(frozen=True)
class _Kernel:
    """A compiled kernel, with the name and shape of each parameter."""

    call: Callable[..., Any]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]


@functools.lru_cache(maxsize=_KEPT)
def _compiled(text: str) -> list[_Kernel]:
    """The kernels of a request, given as JSON; what ran alone often runs in turns later."""
    request = json.loads(text)
    target = tvm.target.Target(request["target"])
    return [
        _Kernel(
            _compile(func, target),
            tuple((p.name, tuple(int(n) for n in p.shape)) for p in func.params),
        )
        for func in kernels_of(request, target)
    ]


def _time_reading(size: int, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time in which all threads read ``size`` bytes, as `time_kernel` gives it."""
    target = tvm.target.Target(spec)
    threads = int(tvm.get_global_func("runtime.NumThreads")())
    func = reading.emit(size, threads, isa_of(target))
    call = _compile(func, target)
    # In pages of their own once TVM has copied them; those that NumPy never wrote take no memory.
    source, sums = (
        tvm.runtime.tensor(np.zeros([int(n) for n in parameter.shape], np.float32))
        for parameter in func.params
    )
    return _least(lambda: call(source, sums), _pacer(json.dumps(spec)))


def _least(run: Callable[[], None], pacer: Pacer) -> dict[str, Any]:
    """The time of runs as `time_kernel` gives it."""
    run()  # starts the pool
    with apart_from_pool():
        number, count = _lengths(run)
        return paced(lambda: min(_blocks(run, number, count)), pacer)


@functools.lru_cache(maxsize=1)
def _pacer(target: str) -> Pacer:
    described = json.loads(target)
    isa = isa_of(tvm.target.Target(described))
    workload = ConvWorkload(_PACE, isa.block)
    schedule = spaces(workload, isa)["direct"][0].to_json()
    run = _runner({"target": described, "workload": workload.to_json(), "schedule": schedule})
    run()
    with apart_from_pool():
        count = max(3, round(_PACE_SECONDS / min(_blocks(run, 1, 4))))
        return Pacer(lambda: min(_blocks(run, 1, count)))


def _in_turns(runs: Sequence[Callable[[], None]]) -> list[float]:
    """The microseconds of several runs that take turns.

    Each is compared with all of them in the same turn, since a machine that others share is slower
    in some turns than in others: the median of the times relative to the turn's mean counts, at the
    pace of the fastest turn.
    """
    runs[0]()  # starts the pool
    found = np.empty((_TURNS, len(runs)))
    with apart_from_pool():
        lengths = [_lengths(run) for run in runs]
        for turn in found:
            for index, (run, (number, count)) in enumerate(zip(runs, lengths, strict=True)):
                turn[index] = min(_blocks(run, number, max(2, math.ceil(2 * count / _TURNS))))
    means = np.exp(np.log(found).mean(axis=1, keepdims=True))
    relative = np.median(found / means, axis=0)
    return [float(us) for us in 1e6 * means.min() * relative]


def _lengths(run: Callable[[], None]) -> tuple[int, int]:
    """How many runs make a block, and how many blocks a measurement."""
    first = min(_blocks(run, 1, 4))
    number = max(1, round(_BLOCK / first))
    return number, max(3, round(_SECONDS / (first * number)))


def time_program(
    program: Program, target: tvm.target.Target, device: tvm.runtime.Device
) -> dict[str, Any]:
    """Compile and time the kernels of a program one after the other, on a GPU by its events.

    Returns what `time_kernel` does; ``us`` is the sum of the kernels' medians.
    """
    return time_programs([program], target, device)[0]


def time_programs(
    programs: Sequence[Program], target: tvm.target.Target, device: tvm.runtime.Device
) -> list[dict[str, Any]]:
    """As `time_program`, of several that are compiled together, which takes nvcc less long."""
    functions: dict[str, Any] = {}
    described = []
    for program in programs:
        names = [f"stage{len(functions) + index}" for index in range(len(program.stages))]
        functions |= program.named(names)
        described.append(program.to_json(names))
    module = compile_module(tvm.IRModule(functions), target).jit()
    return [measure_batch.time_candidate(module, candidate, device) for candidate in described]


def _blocks(run: Callable[[], None], number: int, count: int) -> Iterator[float]:
    """Seconds of a run, averaged over ``number`` in a row, ``count`` times."""
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(number):
            run()
        yield (time.perf_counter() - start) / number


def kernels_of(request: Mapping[str, Any], target: tvm.target.Target) -> list[tvm.tirx.PrimFunc]:
    """The kernels of a request to `time_kernel` in the order of their calls."""
    isa = isa_of(target)
    if "stages" not in request["workload"]:
        workload = ConvWorkload.from_json(request["workload"])
        return [emit(workload, schedule_from_json(request["schedule"]), isa)]
    parts = ChainSchedule.from_json(request["schedule"]).split(
        ChainWorkload.from_json(request["workload"])
    )
    return [
        fused.emit(workload, schedule, isa)
        if isinstance(workload, ChainWorkload)
        else emit(workload, schedule, isa)
        for workload, schedule in parts
    ]


def _compile(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., Any]:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return compile_module(module, target, checks=False).jit()["main"]
