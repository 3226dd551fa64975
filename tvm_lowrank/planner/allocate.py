"""Choosing one candidate a layer: the least time for a bounded loss, by Lagrangian relaxation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tvm_lowrank.planner.candidates import Candidate

Choice = dict[str, Candidate]


def harm(candidate: Candidate, sensitivity: float) -> float:
    """Expected harm of a candidate to the network's output, in arbitrary units.

    ``sqrt(s) * (e + 3 e^2)`` for a layer whose error e moves the output by s * e: the square root
    tempers what small-sample sensitivities over-state, the quadratic term keeps any one layer from
    carrying the whole loss.
    """
    return math.sqrt(max(sensitivity, 0.0)) * (candidate.error + 3 * candidate.error**2)


def choose(
    options: Mapping[str, Sequence[Candidate]], sensitivity: Mapping[str, float], price: float
) -> Choice:
    """For each layer the option of least ``harm + price * cost``."""
    return {
        name: min(
            candidates,
            key=lambda c: harm(c, sensitivity.get(name, 0.0)) + price * c.cost_us,
        )
        for name, candidates in options.items()
    }


def microseconds(choice: Choice) -> float:
    """Sum of the chosen kernels' measured times; of memory-bound layers, of what they cost."""
    return sum(candidate.cost_us for candidate in choice.values())


def for_time(
    options: Mapping[str, Sequence[Candidate]],
    sensitivity: Mapping[str, float],
    budget_us: float,
) -> Choice:
    """The least harmful choice whose kernels take at most ``budget_us``, by bisection of the price.

    The fastest choice when none is within the budget.
    """
    return around(options, sensitivity, lambda choice: microseconds(choice) <= budget_us)[1]


def around(
    options: Mapping[str, Sequence[Candidate]],
    sensitivity: Mapping[str, float],
    holds: Callable[[Choice], bool],
) -> tuple[Choice, Choice]:
    """The choices just below and just above the price of time from which something holds."""
    low, high = 1e-12, 1e6
    for _ in range(60):
        price = math.sqrt(low * high)
        if holds(choose(options, sensitivity, price)):
            high = price
        else:
            low = price
    return choose(options, sensitivity, low), choose(options, sensitivity, high)
