"""The matrices of the Cook-Toom (Winograd) algorithm F(m, r), in exact rational arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from .linear_code import LinearCode, linear_code

Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]

# Magnitudes of the pairs of points (p, -p) by their number. Found by a search over fractions with
# few bits for the least `Transform.amplification`, over m and r from 2 to 7; constants that are
# dyadic with few bits are exact in float32. (For F(4, 3), 5/8 and 3/2 halve the error of 1 and 2.)
_PAIRS: dict[int, tuple[Fraction, ...]] = {
    0: (),
    1: (Fraction(1),),
    2: (Fraction(5, 8), Fraction(3, 2)),
    3: (Fraction(1, 2), Fraction(1), Fraction(2)),
    4: (Fraction(3, 8), Fraction(7, 8), Fraction(5, 4), Fraction(2)),
}
# The same where 0 is no point, because their number is even.
_PAIRS_WITHOUT_ZERO: dict[int, tuple[Fraction, ...]] = {
    1: (Fraction(1),),
    2: (Fraction(3, 8), Fraction(5, 4)),
    3: (Fraction(3, 8), Fraction(7, 8), Fraction(3, 2)),
    4: (Fraction(1, 4), Fraction(5, 8), Fraction(5, 4), Fraction(2)),
}
MOST_POINTS = 10


@dataclass(frozen=True)
class Transform:
    """F(m, r): m outputs of a correlation with r taps by ``points`` multiplications.

    ``output @ ((filter @ g) * (input @ d))`` is the correlation of ``d`` (length ``points``) with
    ``g`` (length r). The three are known as A^T (m x points), G (points x r) and
    B^T (points x points). Rows of B^T end in 1 and columns of A^T start with 1 where the point is
    finite; G, applied to weights ahead of time, carries all that scaling.
    """

    output: Matrix
    filter: Matrix
    input: Matrix

    @property
    def points(self) -> int:
        """Multiplications of the algorithm: values in the transformed domain."""
        return len(self.input)

    @property
    def amplification(self) -> float:
        """How much larger rounding errors are, relative to the result, than without transforms.

        The root mean square of the sum that makes up an output, its products taken as independent,
        over that of the output, for independent data of unit variance; of the worst output.
        """
        output, weights, data = (
            np.array(matrix, dtype=np.float64) ** 2
            for matrix in (self.output, self.filter, self.input)
        )
        variance = output @ (weights.sum(axis=1) * data.sum(axis=1))
        return float(np.sqrt(variance.max() / weights.shape[1]))


def interpolation_points(count: int) -> tuple[Fraction, ...]:
    """The ``count`` finite points used beside infinity: 0 if ``count`` is odd, and pairs (p, -p).

    Raises ValueError for more points than float32 bears.
    """
    if not 0 <= count < MOST_POINTS:
        raise ValueError(f"count must be from 0 to {MOST_POINTS - 1}, not {count}")
    pairs, odd = divmod(count, 2)
    magnitudes = _PAIRS[pairs] if odd or not pairs else _PAIRS_WITHOUT_ZERO[pairs]
    return (Fraction(0),) * odd + tuple(sign * p for p in magnitudes for sign in (1, -1))


@functools.cache
def cook_toom(outputs: int, taps: int) -> Transform:
    """The transform F(``outputs``, ``taps``) with ``outputs + taps - 1`` points.

    One tap, or one output, needs no interpolation: its matrices hold only zeros and ones.

    Toom's and Cook's algorithm by the transposition principle; see Blahut, "Fast Algorithms for
    Signal Processing" (2010), chapter 5, and Lavin and Gray, arXiv:1509.09308.

    Raises ValueError if either is not positive or there are more than ``MOST_POINTS`` points.
    """
    if outputs < 1 or taps < 1:
        raise ValueError(f"outputs and taps must be positive, not {outputs} and {taps}")
    if outputs == 1 or taps == 1:
        ones = ((Fraction(1),),)
        unit = _identity(max(outputs, taps))
        if taps == 1:
            return Transform(unit, ones * outputs, unit)
        return Transform((ones[0] * taps,), unit, unit)
    points = interpolation_points(outputs + taps - 2)
    return from_points(points, outputs, taps)


@functools.cache
def transform_code(outputs: int, taps: int, matrix: str) -> LinearCode:
    """The code of F(``outputs``, ``taps``)'s ``"input"`` or ``"output"`` matrix."""
    return linear_code(getattr(cook_toom(outputs, taps), matrix))


def from_points(points: Sequence[Fraction], outputs: int, taps: int) -> Transform:
    """The transform from ``outputs + taps - 2`` different finite points and infinity.

    Raises ValueError for another number of points.
    """
    if len(set(points)) != len(points) or len(points) != outputs + taps - 2:
        raise ValueError(f"points must be {outputs + taps - 2} different ones, not {list(points)}")
    zero, one = Fraction(0), Fraction(1)
    data, weights = [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = one
        for other in others:
            scale *= point - other
        data.append((*_product(others), zero))
        weights.append(tuple(point**k / scale for k in range(taps)))
    data.append(_product(list(points)))
    weights.append((zero,) * (taps - 1) + (one,))
    output = tuple(
        (*(point**k for point in points), one if k == outputs - 1 else zero) for k in range(outputs)
    )
    return Transform(output, tuple(weights), tuple(data))


def _product(roots: list[Fraction]) -> tuple[Fraction, ...]:
    """The coefficients of the polynomial with these roots, from the constant to the leading 1."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        for power, coefficient in enumerate(coefficients):
            shifted[power] -= root * coefficient
        coefficients = shifted
    return tuple(coefficients)


def _identity(size: int) -> Matrix:
    return tuple(tuple(Fraction(int(i == j)) for j in range(size)) for i in range(size))
