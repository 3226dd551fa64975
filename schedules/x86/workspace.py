"""Where values that live for a while lie in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A value of ``size`` bytes, from the step that makes it to the last that reads it."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are there in some step: what a step reads is still there as it writes."""
        return self.first <= other.last and other.first <= self.last


def plan_offsets(lifetimes: Sequence[Lifetime], alignment: int) -> tuple[list[int], int]:
    """The offset of each value, a multiple of ``alignment``, and the bytes of all together.

    Values whose lifetimes meet do not overlap. The largest are placed first, each at the lowest
    offset that is free all its life, so small ones fill the holes between (greedy by size;
    Pisarchyk and Lee, *Efficient Memory Management for Deep Neural Net Inference*, 2020).
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, i)):
        size = _aligned(lifetimes[index].size, alignment)
        offset = 0
        for other in sorted(placed, key=offsets.__getitem__):
            if not lifetimes[index].meets(lifetimes[other]):
                continue
            if offset + size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + _aligned(lifetimes[other].size, alignment))
        offsets[index] = offset
        placed.append(index)
    ends = (
        o + _aligned(value.size, alignment) for o, value in zip(offsets, lifetimes, strict=True)
    )
    return offsets, max(ends, default=0)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
