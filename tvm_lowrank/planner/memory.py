"""Schedules under a bound of weight memory: the least time, by Lagrangian relaxation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One way to run a kernel: its microseconds, and the bytes of its weights as it keeps them.

    Both are of all calls of the kernel together.
    """

    microseconds: float
    bytes: int
    schedule: Any


def within_bytes(options: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    """One option of each kernel, together at most ``limit`` bytes, in nearly the least time.

    Minimises ``microseconds + price * bytes`` of each kernel; the price is found by bisection, so
    the choice is on the lower convex hull of time against bytes. Where even the smallest options
    take more than ``limit``, those are the choice.
    """

    def cheapest(price: float) -> list[Option]:
        return [
            min(of_kernel, key=lambda o: (o.microseconds + price * o.bytes, o.bytes))
            for of_kernel in options
        ]

    fastest = cheapest(0.0)
    if sum(option.bytes for option in fastest) <= limit:
        return fastest
    smallest = [min(of_kernel, key=lambda o: (o.bytes, o.microseconds)) for of_kernel in options]
    if sum(option.bytes for option in smallest) > limit:
        return smallest
    # Microseconds a byte; beyond the upper end the smallest option wins everywhere.
    low, high, best = 1e-12, 1e6, smallest
    for _ in range(80):
        price = math.sqrt(low * high)
        found = cheapest(price)
        if sum(option.bytes for option in found) <= limit:
            high, best = price, found
        else:
            low = price
    return best
