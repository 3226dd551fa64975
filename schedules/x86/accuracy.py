"""How far kernels are from exact results: bounds stated from what they compute."""

from __future__ import annotations

import math
from typing import Any

from .workload import ConvWorkload

# Half the distance of float32 values around 1: the most that one rounding adds, relatively.
_ROUNDING = 2.0**-24
# The same of bfloat16.
_BFLOAT16_ROUNDING = 2.0**-8
# Roundings outside of the sum: weights, transforms, the epilogue.
_FURTHER_ROUNDINGS = 4


def stated_error(terms: float, amplification: float = 1.0) -> float:
    """A bound of max|error| / max|result| for sums of ``terms`` products one after the other.

    For independent standard-normal data and maps of a hundred values or more, where it leaves a
    margin of about 3: roundings are independent and grow as the root of ``terms``, not as its
    worst case. ``amplification`` is that of transforms around the sums.
    """
    return _ROUNDING * amplification * (_FURTHER_ROUNDINGS + math.sqrt(terms))


def direct_error(workload: ConvWorkload, schedule: Any) -> float:
    """`stated_error` of a convolution by its definition, whatever the schedule."""
    _, channels, rows, columns = workload.geometry.weight_shape
    return stated_error(channels * rows * columns)


def bfloat16_error(workload: ConvWorkload, schedule: Any) -> float:
    """The stated error of sums in float32 whose products have two factors rounded to bfloat16."""
    return 2 * _BFLOAT16_ROUNDING
