"""A short L-BFGS that runs on NumPy alone and never goes uphill."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_lowrank.decompose.moments import Array

HISTORY = 8
SUFFICIENT_DECREASE = 1e-4
HALVINGS = 12
CURVATURE_FLOOR = 1e-12


def minimise(
    objective: Callable[[Array], tuple[float, Array]],
    start: Array,
    iterations: int,
    inverse_curvature: float = 1.0,
    tolerance: float = 1e-4,
) -> Array:
    """Lower ``objective`` (value and gradient of one array's shape) from ``start``.

    The two-loop recursion of Nocedal (1980) with backtracking. ``inverse_curvature`` is the guess
    of 1 / Hessian that sets the first step; stops when an iteration gains less than ``tolerance``
    of the value. SciPy's has more options and calls another BLAS (see `projection`).
    """
    point = start
    value, gradient = objective(point)
    history: list[tuple[Array, Array]] = []
    for _ in range(iterations):
        direction = -_inverse_hessian_times(gradient, history, inverse_curvature)
        slope = float(np.vdot(direction, gradient))
        if not slope < 0.0:
            break
        step = 1.0
        for _ in range(HALVINGS):
            tried = point + step * direction
            tried_value, tried_gradient = objective(tried)
            if tried_value <= value + SUFFICIENT_DECREASE * step * slope:
                break
            step /= 2
        else:
            break
        moved, bent = tried - point, tried_gradient - gradient
        if np.vdot(moved, bent) > CURVATURE_FLOOR * np.vdot(bent, bent):
            history = [*history[-HISTORY + 1 :], (moved, bent)]
        gain, point, value, gradient = value - tried_value, tried, tried_value, tried_gradient
        if gain < tolerance * abs(value):
            break
    return point


def _inverse_hessian_times(
    gradient: Array, history: list[tuple[Array, Array]], inverse_curvature: float
) -> Array:
    """Two-loop recursion over pairs (step, change of gradient), oldest first."""
    result = gradient.copy()
    shares = []
    for moved, bent in reversed(history):
        share = np.vdot(moved, result) / np.vdot(moved, bent)
        result -= share * bent
        shares.append(share)
    if history:
        moved, bent = history[-1]
        result *= np.vdot(moved, bent) / np.vdot(bent, bent)
    else:
        result *= inverse_curvature
    for (moved, bent), share in zip(history, reversed(shares), strict=True):
        result += (share - np.vdot(bent, result) / np.vdot(moved, bent)) * moved
    return result
