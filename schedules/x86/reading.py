"""A kernel that only reads: how fast all threads together fetch what no core has near."""

from __future__ import annotations

from tvm import tirx

from .emitter import Emitter
from .isa import VectorISA

# Vectors that a task adds up side by side, so that no addition waits for the one before; and tasks
# a thread, so that a thread that was held up leaves its rest to be taken in no larger pieces.
_VECTORS = 16
_TASKS = 8


def emit(size: int, threads: int, isa: VectorISA) -> tirx.PrimFunc:
    """``reading(source, sums)``: adds up about ``size`` bytes in vectors, in tasks for threads.

    Parameters
    ----------
    size : int
        Bytes, cut to whole steps of every task, at least one.
    threads : int
    isa : VectorISA

    Returns
    -------
    PrimFunc
        Of float32 ``source (n,)`` and ``sums (tasks * 16 * lanes,)``.
    """
    em, step, tasks = Emitter(isa), _VECTORS * isa.lanes, _TASKS * threads
    steps = max(1, size // (4 * step * tasks))
    source = em.argument("source", (tasks * steps * step,))
    sums = em.argument("sums", (tasks * step,))
    with em.loop(tasks, "parallel", prefix="task") as task:
        accumulators = em.accumulators(_VECTORS)
        for accumulator in accumulators:
            em.store(accumulator, em.constant(0))
        with em.loop(steps) as index:
            base = em.bind_index((task * steps + index) * step, "base")
            for number, accumulator in enumerate(accumulators):
                value = em.load(source, base + number * isa.lanes)
                em.store(accumulator, em.value_of(accumulator) + value)
        for number, accumulator in enumerate(accumulators):
            em.store(sums, em.value_of(accumulator), task * step + number * isa.lanes)
    return em.finish()
