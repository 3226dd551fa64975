"""Chains of convolutions as weights: their product, and channel orders as 1x1 convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_lowrank.decompose.moments import Array


def compose(factors: Sequence[Array]) -> Array:
    """The one OIHW weight that a chain of (grouped) convolutions stands for.

    The groups of every stage but the first follow from the shapes. Along each axis of the kernel
    at most one stage may be larger than 1; then any stride and dilation is right.
    """
    whole = np.asarray(factors[0])
    for factor in factors[1:]:
        outputs, inside = factor.shape[:2]
        groups = len(whole) // inside
        before = whole.reshape(groups, inside, -1)
        after = factor.transpose(0, 2, 3, 1).reshape(groups, -1, inside)
        x, y = (a * b for a, b in zip(whole.shape[2:], factor.shape[2:], strict=True))
        # Axes: outputs, taps of this stage, inputs, taps of those before; of each pair one is 1.
        product = (after @ before).reshape(outputs, -1, whole.shape[1], x * y // _taps(factor))
        if _taps(factor) == 1:
            whole = product.reshape(outputs, whole.shape[1], x, y)
            continue
        shape = (outputs, *factor.shape[2:], whole.shape[1], *whole.shape[2:])
        spread = product.reshape(shape).transpose(0, 3, 1, 4, 2, 5)
        whole = spread.reshape(outputs, whole.shape[1], x, y)
    return np.ascontiguousarray(whole)


def _taps(factor: Array) -> int:
    return int(factor.shape[2] * factor.shape[3])


def permutation(order: Sequence[int] | np.ndarray) -> Array:
    """The 1x1 weight ``(C, C, 1, 1)`` whose output channel i is input channel ``order[i]``."""
    return np.eye(len(order))[np.asarray(order)][:, :, None, None]


def channel_order(weight: np.ndarray) -> np.ndarray | None:
    """Inverse of `permutation`: the order, or None for any other weight."""
    f, c, x, y = weight.shape
    if f != c or (x, y) != (1, 1):
        return None
    flat = weight[:, :, 0, 0]
    order = flat.argmax(axis=1)
    exact = np.count_nonzero(flat) == f and np.all(flat[np.arange(f), order] == 1)
    return order if exact and len(np.unique(order)) == f else None
