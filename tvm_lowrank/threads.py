"""How many threads TVM's runtime uses, and which others it meets.

TVM starts half as many threads as there are logical processors, taking the other half for
hyper-threads; on machines without them that halves every speed. Its pool reads
``TVM_NUM_THREADS`` once, when the first parallel kernel of the process runs.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tvm_lowrank.errors import LowRankError

# The logarithm of the cycles that a thread of OpenBLAS waits for work before it sleeps: 0.1 ms.
_BLAS_ATTENTION = 18


def physical_cores() -> int:
    """Number of physical cores this process may run on (hyper-threads of one core count once)."""
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(_logical()))
    )
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(topology.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def processor() -> str:
    """Name of this machine's processor, as ``AMD EPYC 9R14 (25/17/1)``.

    The numbers (family, model, stepping) tell apart what virtual machines call alike.
    """
    wanted = {"model name": "", "cpu family": "", "model": "", "stepping": ""}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if not wanted.get(name.strip(), "known"):
                wanted[name.strip()] = value.strip()
    except OSError:
        pass
    name, *numbers = wanted.values()
    if not name:
        return platform.processor() or platform.machine() or "unknown"
    return f"{name} ({'/'.join(numbers)})"


def set_threads(count: int | None = None) -> int:
    """Make TVM's runtime use ``count`` threads, all physical cores by default.

    ``TVM_NUM_THREADS`` wins over the default but not over a given count. Must run before the
    process's first parallel kernel; a warning says so when the pool already has another size.

    Returns
    -------
    int
        The number of threads that the runtime uses.

    Raises
    ------
    LowRankError
        ``count`` is not positive.
    """
    if count is None:
        count = int(os.environ.get("TVM_NUM_THREADS", "0") or 0) or physical_cores()
    if count < 1:
        raise LowRankError(f"threads is {count}; give a positive number")
    os.environ["TVM_NUM_THREADS"] = str(count)
    import tvm

    used = int(tvm.get_global_func("runtime.NumThreads")())
    if used != count:
        warnings.warn(
            f"TVM's thread pool already runs {used} threads, not {count}: set TVM_NUM_THREADS "
            "before the first kernel of the process",
            stacklevel=2,
        )
    return used


def let_blas_rest() -> None:
    """Have NumPy's threads sleep soon after each product; for before NumPy is imported.

    OpenBLAS has them look out for the next product for a tenth of a second. Kernels that TVM runs
    in that time share their processors, and take several times as long on two cores. Where
    ``OPENBLAS_THREAD_TIMEOUT`` is set it stays as it is, and where NumPy was imported first it is
    too late.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", str(_BLAS_ATTENTION))


@contextmanager
def apart_from_pool() -> Iterator[None]:
    """Keep the calling thread off the processors that TVM's pool has bound its threads to.

    The pool binds each of its own threads to a processor. The caller, which does the first share of
    a kernel, may run on any: where the system puts it beside a thread of the pool, kernels take
    twice as long on two cores, for seconds at a time. For measurements; does nothing before the
    first parallel kernel, and on systems that do not tell.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    free = before - _bound()
    if free:
        os.sched_setaffinity(0, free)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _bound() -> set[int]:
    """The processors that other threads of this process are bound to, one each."""
    found: set[int] = set()
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        if int(task.name) != threading.get_native_id():
            with suppress(OSError):  # the thread has ended
                allowed = os.sched_getaffinity(int(task.name))
                found |= allowed if len(allowed) == 1 else set()
    return found


def _logical() -> int:
    return os.cpu_count() or 1
