"""What convolutions in transformed domains share in ranking their schedules: tasks and cycles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from tvm_lowrank.schedules.effort import Effort

from .isa import VectorISA

# Cycles of a register block outside of its sum: index arithmetic, clearing.
BLOCK_OVERHEAD = 40
# Cycles to bring a value of a transformed tile to its place in the second-level cache, or back.
CYCLES_PER_PLACE = 6
# Bytes of its first-level cache that the weights of a product may take; more come in again for
# every register block, at 128 bytes a cycle at most.
NEAR_BYTES = 1 << 15
# Vector loads and broadcasts that a cycle sustains, as the direct convolution's model has it.
_LOADS_PER_CYCLE = 1.6
# Bytes of a core's second-level cache that weights used again may count on.
_CACHE_BYTES = 1 << 20
# Bytes of scratch that a task of several register blocks may take.
_SCRATCH_BYTES = 1 << 21
# Bytes a cycle that come in from beyond that cache.
_BYTES_PER_CYCLE = 8
# Cycles to start the threads on a parallel loop.
_START = 3000
_THREADS = (2, 4, 8)
_MOST_SCHEDULES = 24

S = TypeVar("S")


def ranked(cycles: dict[S, float], kind: Callable[[S], Hashable]) -> list[S]:
    """The most promising schedules; the best of each kind come before second bests."""
    peers: Counter[Hashable] = Counter()
    handicapped = {}
    for schedule in sorted(cycles, key=lambda schedule: cycles[schedule]):
        handicapped[schedule] = cycles[schedule] * (1 + 0.1 * peers[kind(schedule)])
        peers[kind(schedule)] += 1
    return sorted(handicapped, key=lambda schedule: handicapped[schedule])[:_MOST_SCHEDULES]


def task_sizes(blocks: int, scratch: int) -> Iterator[int]:
    """Register blocks a task, of so many that take ``scratch`` bytes each; 0 for stages."""
    yield 0
    for size in sorted({1, 2, *(-(-blocks // threads) for threads in _THREADS)}):
        if size <= blocks and (size == 1 or size * scratch <= _SCRATCH_BYTES):
            yield size


def loads_per_cycle(vectors: int, isa: VectorISA) -> float:
    """Loads and broadcasts that a product of so many vectors of outputs sustains.

    With one vector each broadcast is part of its multiply-add, where the instructions allow it.
    """
    return 2.0 if vectors == 1 and isa.lanes == 16 else _LOADS_PER_CYCLE


def parallel_cycles(effort: Effort) -> float:
    """Cycles times threads of a kernel in transformed domains, averaged over some threads.

    Each of its tasks reads all weights; without tasks, one stage follows the other.
    """
    total = 0.0
    exchange = effort.exchange_bytes / _BYTES_PER_CYCLE
    for threads in _THREADS:
        if effort.stages == 1:
            rounds = -(-effort.tasks // threads)
            passes = rounds if effort.weight_bytes > _CACHE_BYTES else 1
            fetch = passes * effort.weight_bytes / _BYTES_PER_CYCLE * threads
            imbalance = rounds * threads / effort.tasks
        else:
            fetch, imbalance = effort.weight_bytes / _BYTES_PER_CYCLE, 1.0
        # Fetching overlaps with the products, but not all of it.
        busy = max(effort.products, fetch) + min(effort.products, fetch) / 3
        total += (busy + effort.transforms + exchange) * imbalance
        total += effort.stages * _START * threads
    return total / len(_THREADS)
