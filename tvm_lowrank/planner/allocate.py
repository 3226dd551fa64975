"""Choosing one candidate a layer: the least harm within a time.

Lagrangian relaxation finds the choices on the convex hull of time and harm. Networks of few layers
have wide gaps between those, which dynamic programming fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tvm_lowrank.planner.candidates import Candidate

Choice = dict[str, Candidate]

# Steps that a time is counted in; each layer is rounded up to a whole one.
_STEPS = 8192


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
    """The least harmful choice whose kernels take at most ``budget_us``.

    The better of what relaxation finds, by bisection of its price, and of what dynamic programming
    does, whose times are rounded up by less than 0.02 % of the budget a layer. The fastest choice
    when none is within the budget.
    """
    relaxed = around(options, sensitivity, lambda choice: microseconds(choice) <= budget_us)[1]
    if microseconds(relaxed) > budget_us:
        return relaxed
    filled = _filled(options, sensitivity, budget_us)
    return min((relaxed, filled or relaxed), key=lambda choice: total_harm(choice, sensitivity))


def total_harm(choice: Choice, sensitivity: Mapping[str, float]) -> float:
    """The harm of all layers together."""
    return sum(harm(c, sensitivity.get(name, 0.0)) for name, c in choice.items())


def _filled(
    options: Mapping[str, Sequence[Candidate]],
    sensitivity: Mapping[str, float],
    budget_us: float,
) -> Choice | None:
    """The multiple-choice knapsack over times in whole steps; None if rounded times do not fit."""
    # Of the layers so far, the least harm within each time, and which candidates that takes.
    best, picks = np.zeros(_STEPS + 1), []
    steps = {
        name: [math.ceil(c.cost_us / budget_us * _STEPS) for c in candidates]
        for name, candidates in options.items()
    }
    for name, candidates in options.items():
        table = np.full((len(candidates), _STEPS + 1), math.inf)
        for row, candidate, taken in zip(table, candidates, steps[name], strict=True):
            if taken <= _STEPS:
                rest = best[: _STEPS + 1 - taken]
                row[taken:] = rest + harm(candidate, sensitivity.get(name, 0.0))
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    if not math.isfinite(best[-1]):
        return None
    choice, left = Choice(), _STEPS
    for name, pick in zip(reversed([*options]), reversed(picks), strict=True):
        index = int(pick[left])
        choice[name] = options[name][index]
        left -= steps[name][index]
    return {name: choice[name] for name in options}


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
