"""What a kernel asks of a core and of its memory, counted."""

from __future__ import annotations

from dataclasses import dataclass

# Numbers of threads for which a schedule should divide the work evenly.
_THREADS = (2, 4, 8)


@dataclass(frozen=True)
class Effort:
    """Counts of one kernel for the whole batch.

    Cycles are those of one core that starts two vector multiply-adds in each, all tasks together.

    Attributes
    ----------
    multiplications : float
        Multiply-adds of the direct sum, or of the products between transforms, with those that
        fill up vectors, register blocks and tiles.
    operations : float
        Operations of the transforms of data; those of weights are done beforehand.
    products, transforms : float
        Cycles of both.
    weight_bytes : float
        Weights as the kernel reads them: transformed, padded.
    weight_reads, input_reads : float
        How many times all tasks together go through all weights and through the input map.
    exchange_bytes : float
        Transformed data and products that one thread leaves to another.
    task_bytes : float
        The same of one task, if it keeps them to itself.
    tasks : int
        Parallel tasks of the longest stage.
    stages : int
        Parallel loops, one after the other.
    """

    multiplications: float
    operations: float
    products: float
    transforms: float
    weight_bytes: float
    weight_reads: float = 1.0
    input_reads: float = 1.0
    exchange_bytes: float = 0.0
    task_bytes: float = 0.0
    tasks: int = 1
    stages: int = 1


def imbalance(tasks: int, threads: int | None = None) -> float:
    """Time over that of perfectly shared work, by default averaged over some numbers of threads."""
    counts = _THREADS if threads is None else (threads,)
    return sum(-(-tasks // n) * n / tasks for n in counts) / len(counts)
