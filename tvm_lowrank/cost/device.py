"""One device behind TVM's RPC: what the process that measures on it does for each request."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc, te
from tvm.rpc import base

from tvm_lowrank.build import compile_module
from tvm_lowrank.cost import measure_batch
from tvm_lowrank.cost.timing import kernels_of
from tvm_lowrank.records import AGREEMENT
from tvm_lowrank.schedules.cuda.arch import arch_of
from tvm_lowrank.schedules.cuda.program import Program
from tvm_lowrank.schedules.cuda.straight import copy_program
from tvm_lowrank.schedules.kernels import emit, schedule_from_json
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.isa import architecture_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.target import host_architecture

# Seconds of one of the measurements that have to agree; runs are single, each with the weights
# thrown out of all caches before.
_SECONDS = 0.02
_COPY_FLOATS = 16 << 20


class _Device:
    """The session of this process, the address of its server, and what its machine is called."""

    session: Any = None
    address = ""
    numbers = itertools.count()


def serve_device(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer one request of `cost.fleet`.

    - ``{"connect": {"host", "port", "key", "wait"}}`` takes a free server from a tracker within
      ``wait`` seconds; the answer has its ``device`` (address), ``machine`` and ``threads``;
    - ``{"copy": true, "target", "threads"}`` sets the threads of its runtime, and times a copy of
      64 MiB;
    - what `timing.time_kernel` takes is compiled here and timed there.

    Returns
    -------
    dict
        The answer; with ``lost`` and a reason if the device does not answer any more, with
        ``failed`` and a reason if the kernel does not compile or run.
    """
    if "connect" in request:
        try:
            return _connect(**request["connect"])
        except Exception as error:
            return {"lost": _line(error)}
    try:
        return _time_copy(**request) if "copy" in request else _time_kernel(request)
    except Exception as error:
        try:
            _Device.session.get_function("runtime.NumThreads")()
        except Exception:
            return {"lost": _line(error)}
        return {"failed": _line(error)}


def _connect(
    host: str, port: int, key: str, wait: float, threads: int | None = None, gpu: bool = False
) -> dict[str, Any]:
    # TrackerSession.request does not tell which server it got, and waits without end.
    sock = base.connect_with_retry((host, port), timeout=wait, retry_period=1)
    sock.settimeout(wait)
    sock.sendall(int(base.RPC_TRACKER_MAGIC).to_bytes(4, "little"))
    if int.from_bytes(base.recvall(sock, 4), "little") != base.RPC_TRACKER_MAGIC:
        raise RuntimeError(f"{host}:{port} is no RPC tracker")
    base.sendjson(sock, [base.TrackerCode.REQUEST, key, "", 1])
    code, value = base.recvjson(sock)
    sock.close()
    if code != base.TrackerCode.SUCCESS:
        raise RuntimeError(str(value))
    url, server_port, matchkey = value
    _Device.session = rpc.connect(url, server_port, matchkey)
    _Device.address = f"{url}:{server_port}"
    if threads:
        _use(threads)
    used = int(_Device.session.get_function("runtime.NumThreads")())
    name = _gpu() if gpu else _machine()
    return {"device": _Device.address, "machine": name, "threads": threads or used}


def _machine() -> str:
    """The processor if the server can tell, else the server itself: two of those never mix."""
    try:
        name = _Device.session.get_function("target.llvm_get_system_cpu")()
        triple = _Device.session.get_function("target.llvm_get_system_triple")()
    except Exception:
        return f"server {_Device.address} by RPC"  # TVM's runtime alone, no compiler
    return f"{name} {str(triple).partition('-')[0]} by RPC"


def _gpu() -> str:
    """The name of the server's first GPU."""
    device = _Device.session.cuda()
    if not device.exist:
        raise RuntimeError(f"server {_Device.address} has no GPU")
    return f"{device.device_name} by RPC"


def _time_kernel(request: Mapping[str, Any]) -> dict[str, Any]:
    """The time of a kernel, of a chain the sum of its kernels' times."""
    target = tvm.target.Target(request["target"])
    if target.kind.name == "cuda":
        workload = ConvWorkload.from_json(request["workload"])
        schedule = schedule_from_json(request["schedule"])
        program = emit(workload, schedule, machine_of(target))
        return time_program(program, target, _Device.session.cuda())
    minima = np.zeros(3)
    for func in kernels_of(request, target):
        shapes = [tuple(int(n) for n in parameter.shape) for parameter in func.params]
        minima += _minima(func, shapes, target)
    return _answer(minima)


def _use(threads: int) -> None:
    _Device.session.get_function("runtime.config_threadpool")(0, threads)


def _time_copy(copy: bool, target: dict[str, Any], threads: int) -> dict[str, Any]:
    _use(threads)
    if target["kind"] == "cuda":
        gpu = tvm.target.Target(target)
        program = copy_program(arch_of(gpu), _COPY_FLOATS)
        return time_program(program, gpu, _Device.session.cuda())
    source = te.placeholder((_COPY_FLOATS,), "float32", "source")
    sink = te.compute((_COPY_FLOATS,), lambda i: source[i], "sink")
    shapes: list[tuple[int, ...]] = [(_COPY_FLOATS,)] * 2
    func = te.create_prim_func([source, sink])
    return _answer(_minima(func, shapes, tvm.target.Target(target)))


def time_program(program: Program, target: tvm.target.Target, device: Any) -> dict[str, Any]:
    """The sum of the medians of a program's kernels on the server, one after the other."""
    names = [f"stage{index}" for index in range(len(program.stages))]
    with tempfile.TemporaryDirectory(prefix="tvm_lowrank-") as folder:
        path = Path(folder) / f"kernel{next(_Device.numbers)}.so"
        compile_module(tvm.IRModule(program.named(names)), target).export_library(str(path))
        _Device.session.upload(str(path))
    module = _Device.session.load_module(path.name)
    _Device.session.remove(path.name)
    answer = measure_batch.time_candidate(module, program.to_json(names), device)
    return {**answer, "device": _Device.address}


def _answer(minima: np.ndarray) -> dict[str, Any]:
    return {
        "us": 1e6 * float(minima[0]),
        "spread": float(minima[1] / minima[0] - 1),
        "apart": float(minima[2] / minima[0] - 1),
        "device": _Device.address,
    }


def _minima(func: Any, shapes: list[tuple[int, ...]], target: tvm.target.Target) -> np.ndarray:
    """The least, the second and the last of the minima of two or three series of runs, in seconds.

    A third is run only where the first two disagree.
    """
    function, arguments = _upload(func, target), _tensors(shapes)

    def series(count: int) -> float:
        found = function("main", _Device.session.cpu(), number=1, repeat=count,
                         f_preproc="cache_flush_cpu_non_first_arg")(*arguments)  # fmt: skip
        return float(min(found.results))

    first = max(series(2), 1e-7)
    count = min(max(3, math.ceil(_SECONDS / first)), 1000)
    found = sorted(series(count) for _ in range(2))
    if found[1] > (1 + AGREEMENT) * found[0]:
        found = sorted([*found, series(count)])
    return np.array([found[0], found[1], found[-1]])


def _upload(func: Any, target: tvm.target.Target) -> Any:
    """The function's library on the device, as what makes evaluators."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    # Another family of processors: the objects are linked where they run.
    own = architecture_of(target) in ("", host_architecture())
    with tempfile.TemporaryDirectory(prefix="tvm_lowrank-") as folder:
        # A new name each time: a library that is loaded there must not be written over.
        name = f"kernel{next(_Device.numbers)}"
        path = Path(folder) / (name + (".so" if own else ".tar"))
        compile_module(module, target).export_library(str(path))
        _Device.session.upload(str(path))
    function = _Device.session.load_module(path.name).time_evaluator
    _Device.session.remove(path.name)
    return function


def _tensors(shapes: list[tuple[int, ...]]) -> list[Any]:
    noise = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) * 0.1
    device = _Device.session.cpu()
    return [tvm.runtime.tensor(np.resize(noise, shape), device) for shape in shapes]


def _line(error: Exception) -> str:
    """The last line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
