"""Discrete Fourier transforms of small sizes as straight-line code, generated from butterflies."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from .linear_code import LinearCode, Number, Operation

LARGEST = 256


class _Term(NamedTuple):
    """A symbol with a sign; 0 for a value known to be zero."""

    sign: int
    symbol: int


_ZERO = _Term(0, -1)
_Complex: TypeAlias = tuple[_Term, _Term]


class _Algebra:
    """Sums, differences and multiples of symbols, each computed once and none trivially."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.operations: list[Operation] = []
        self._known: dict[Operation, int] = {}

    def _symbol(self, operation: Operation) -> int:
        if operation not in self._known:
            self._known[operation] = self.inputs + len(self.operations)
            self.operations.append(operation)
        return self._known[operation]

    def add(self, a: _Term, b: _Term) -> _Term:
        """``a + b``; signs become subtractions."""
        if not a.sign or not b.sign:
            return a if a.sign else b
        if a.symbol == b.symbol:
            return self.times(2, a) if a.sign == b.sign else _ZERO
        if a.symbol > b.symbol:
            a, b = b, a
        return _Term(a.sign, self._symbol(Operation(1, a.symbol, a.sign * b.sign, b.symbol)))

    def subtract(self, a: _Term, b: _Term) -> _Term:
        """``a - b``."""
        return self.add(a, negative(b))

    def times(self, factor: Number, a: _Term) -> _Term:
        """``factor * a``."""
        sign = a.sign if factor > 0 else -a.sign
        if not a.sign or factor == 0:
            return _ZERO
        if abs(factor) == 1:
            return _Term(sign, a.symbol)
        size: Number = -factor if factor < 0 else factor
        return _Term(sign, self._symbol(Operation(size, a.symbol)))

    def rotate(self, a: _Complex, turn: float) -> _Complex:
        """``a * exp(-2 pi i turn)``."""
        c, s = math.cos(2 * math.pi * turn), -math.sin(2 * math.pi * turn)
        real = self.subtract(self.times(c, a[0]), self.times(s, a[1]))
        return real, self.add(self.times(s, a[0]), self.times(c, a[1]))

    def sum(self, a: _Complex, b: _Complex) -> _Complex:
        """``a + b``."""
        return self.add(a[0], b[0]), self.add(a[1], b[1])

    def code(self, outputs: Sequence[_Term]) -> LinearCode:
        """The program that computes ``outputs``."""
        symbols: list[int | None] = []
        for term in outputs:
            symbol = term.symbol
            if term.sign < 0:
                symbol = self._symbol(Operation(-1, symbol))
            symbols.append(symbol if term.sign else None)
        return LinearCode(self.inputs, tuple(self.operations), tuple(symbols))


def negative(a: _Term) -> _Term:
    """``-a``, without an operation."""
    return _Term(-a.sign, a.symbol)


def _minus(a: _Complex) -> _Complex:
    return negative(a[0]), negative(a[1])


def _conjugate(a: _Complex) -> _Complex:
    return a[0], negative(a[1])


def _by_minus_i(a: _Complex) -> _Complex:
    return a[1], negative(a[0])


def _real_dft(algebra: _Algebra, x: Sequence[_Term]) -> list[_Complex]:
    """Frequencies 0 to N/2 of real values, by decimation in time with split radix.

    X[k] is that of the even values plus those of the values 1 and 3 modulo 4, turned by k and 3k.
    As these three are spectra of real values, a quarter of the turns gives all of X.
    """
    size = len(x)
    if size == 1:
        return [(x[0], _ZERO)]
    if size == 2:
        return [(algebra.add(*x), _ZERO), (algebra.subtract(*x), _ZERO)]
    even = _real_dft(algebra, x[0::2])
    first, third = _real_dft(algebra, x[1::4]), _real_dft(algebra, x[3::4])
    quarter, half = size // 4, size // 2
    spectrum: list[_Complex] = [(_ZERO, _ZERO)] * (half + 1)
    for k in range(quarter // 2 + 1):
        a = _turned(algebra, first, k, k / size)
        b = _turned(algebra, third, k, 3 * k / size)
        total, difference = algebra.sum(a, b), algebra.sum(a, _minus(b))
        spectrum[k] = algebra.sum(even[k], total)
        spectrum[half - k] = _conjugate(algebra.sum(even[k], _minus(total)))
        turned = _by_minus_i(difference)
        spectrum[quarter + k] = algebra.sum(_conjugate(even[quarter - k]), turned)
        if k:
            across = _conjugate(even[quarter - k]), _minus(turned)
            spectrum[quarter - k] = _conjugate(algebra.sum(*across))
    return spectrum


def _turned(algebra: _Algebra, spectrum: list[_Complex], k: int, turn: float) -> _Complex:
    value = spectrum[k]
    eighths = round(8 * turn)
    if math.isclose(8 * turn, eighths, abs_tol=1e-12) and eighths % 2 and not value[1].sign:
        # Both parts are the same multiple, which the floating-point sine would hide.
        part = algebra.times(math.sqrt(0.5), value[0])
        real = part if eighths % 8 in (1, 7) else negative(part)
        return real, negative(part) if eighths % 8 in (1, 3) else part
    return value if turn == 0 else algebra.rotate(value, turn)


def _check(size: int) -> None:
    if not 1 <= size <= LARGEST or size & (size - 1):
        raise ValueError(f"size must be a power of two up to {LARGEST}, not {size}")


@functools.cache
def real_dft(size: int) -> LinearCode:
    """The discrete Fourier transform of ``size`` real values, frequencies 0 to size / 2.

    Outputs are the real frequencies first (0, then size / 2), then real and imaginary part of each
    in between: as many values as inputs. The operations are ``2 N log2 N - 4 N + 6``; see
    Sorensen, Jones, Heideman and Burrus, "Real-valued fast Fourier transform algorithms" (1987).

    Raises ValueError unless ``size`` is a power of two up to ``LARGEST``.
    """
    _check(size)
    algebra = _Algebra(size)
    spectrum = _real_dft(algebra, [_Term(1, i) for i in range(size)])
    ends = [spectrum[0][0]] if size == 1 else [spectrum[0][0], spectrum[-1][0]]
    return algebra.code(ends + [part for value in spectrum[1 : size // 2] for part in value])


@functools.cache
def complex_dft(size: int) -> LinearCode:
    """The discrete Fourier transform of ``size`` complex values.

    Inputs and outputs are real and imaginary part of each value. Made of two transforms of real
    values, it takes the ``4 N log2 N - 6 N + 8`` operations of the complex split radix; see Duhamel
    and Hollmann, "Split radix FFT algorithm" (1984).

    Raises ValueError unless ``size`` is a power of two up to ``LARGEST``.
    """
    _check(size)
    algebra = _Algebra(2 * size)
    real, imaginary = (
        _real_dft(algebra, [_Term(1, 2 * i + part) for i in range(size)]) for part in range(2)
    )
    outputs: list[_Complex] = [(_ZERO, _ZERO)] * size
    for k, (a, b) in enumerate(zip(real, imaginary, strict=True)):
        times_i = negative(b[1]), b[0]
        outputs[k] = algebra.sum(a, times_i)
        if 0 < k < size - k:
            across = _conjugate(b)
            outputs[size - k] = algebra.sum(_conjugate(a), (negative(across[1]), across[0]))
    return algebra.code([part for value in outputs for part in value])


@functools.cache
def transposed(code: LinearCode) -> LinearCode:
    """Code for the transposed matrix, by turning the flow of ``code`` around.

    That of `complex_dft` is the inverse transform times its size. That of `real_dft` is too, once
    all but the real frequencies are doubled.
    """
    algebra = _Algebra(len(code.outputs))
    terms = [_ZERO] * (code.inputs + len(code.operations))
    for row, symbol in enumerate(code.outputs):
        if symbol is not None:
            terms[symbol] = algebra.add(terms[symbol], _Term(1, row))
    for index in reversed(range(len(code.operations))):
        operation, term = code.operations[index], terms[code.inputs + index]
        for factor, symbol in (
            (operation.left_factor, operation.left),
            (operation.right_factor, operation.right),
        ):
            if symbol is not None:
                terms[symbol] = algebra.add(terms[symbol], algebra.times(factor, term))
    return algebra.code(terms[: code.inputs])


def shortened(code: LinearCode, outputs: Sequence[int]) -> LinearCode:
    """The part of ``code`` that computes the given outputs alone."""
    chosen = [code.outputs[i] for i in outputs]
    needed = {symbol for symbol in chosen if symbol is not None}
    for index in reversed(range(len(code.operations))):
        if code.inputs + index in needed:
            operation = code.operations[index]
            needed.add(operation.left)
            if operation.right is not None:
                needed.add(operation.right)
    number = {symbol: symbol for symbol in range(code.inputs)}
    operations: list[Operation] = []
    for index, operation in enumerate(code.operations):
        if code.inputs + index in needed:
            number[code.inputs + index] = code.inputs + len(operations)
            right = None if operation.right is None else number[operation.right]
            operations.append(
                Operation(
                    operation.left_factor, number[operation.left], operation.right_factor, right
                )
            )
    renamed = tuple(None if symbol is None else number[symbol] for symbol in chosen)
    return LinearCode(code.inputs, tuple(operations), renamed)


def restricted(code: LinearCode, inputs: Sequence[int]) -> LinearCode:
    """``code`` for vectors that are zero but in the places ``inputs``, which alone it reads."""
    algebra = _Algebra(len(inputs))
    values = [_ZERO] * code.inputs
    for number, place in enumerate(inputs):
        values[place] = _Term(1, number)

    def combine(
        left_factor: Number, left: _Term, right_factor: Number, right: _Term | None
    ) -> _Term:
        scaled = algebra.times(left_factor, left)
        return scaled if right is None else algebra.add(scaled, algebra.times(right_factor, right))

    outputs = code.apply(values, combine)
    return algebra.code([_ZERO if term is None else term for term in outputs])


@functools.cache
def odd_dft(size: int) -> LinearCode:
    """The odd frequencies of ``size`` real values and as many zeros behind them.

    Outputs are real and imaginary part of the frequencies 1, 3 ... size - 1 of ``2 * size``.

    Raises ValueError unless ``size`` is a power of two up to half of ``LARGEST``.
    """
    _check(2 * size)
    ends = 2  # the real frequencies, which come first
    odd = [ends + 2 * (k - 1) + part for k in range(1, size, 2) for part in range(2)]
    return shortened(restricted(real_dft(2 * size), range(size)), odd)
