"""Turns a constant matrix times a vector of symbols into short straight-line code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias, TypeVar

Number: TypeAlias = "int | float | Fraction"
Value = TypeVar("Value")

# Digits to which ratios of floating-point coefficients count as equal.
_DIGITS = 12


@dataclass(frozen=True)
class Operation:
    """A new symbol ``left_factor * left + right_factor * right``.

    ``right`` is None, with factor 0, where the symbol is only scaled. Factors are never 0, and at
    most one of two differs from 1 and -1 unless the matrix leaves no choice.
    """

    left_factor: Number
    left: int
    right_factor: Number = 0
    right: int | None = None


@dataclass(frozen=True)
class LinearCode:
    """Straight-line code for a matrix-vector product.

    Symbols are numbered: first the ``inputs`` entries of the vector, then the results of
    ``operations`` in order. ``outputs`` names the symbol of each row, None for a row of zeros.
    """

    inputs: int
    operations: tuple[Operation, ...]
    outputs: tuple[int | None, ...]

    @property
    def additions(self) -> int:
        """Additions and subtractions."""
        return sum(operation.right is not None for operation in self.operations)

    @property
    def multiplications(self) -> int:
        """Multiplications by constants."""
        return sum(
            (abs(operation.left_factor) != 1)
            + (operation.right is not None and abs(operation.right_factor) != 1)
            for operation in self.operations
        )

    @property
    def instructions(self) -> int:
        """Instructions on a processor with fused multiply-add."""
        return sum(
            2 if operation.right is not None and _is_general(operation) else 1
            for operation in self.operations
        )

    def apply(
        self,
        values: Sequence[Value],
        combine: Callable[[Number, Value, Number, Value | None], Value],
    ) -> list[Value | None]:
        """Run the code on ``values``; the entry of a row of zeros is None.

        ``combine(left_factor, left, right_factor, right)`` does one operation; ``right`` is None
        where it is only a scaling.
        """
        symbols = list(values)
        for operation in self.operations:
            right = None if operation.right is None else symbols[operation.right]
            symbols.append(
                combine(
                    operation.left_factor, symbols[operation.left], operation.right_factor, right
                )
            )
        return [None if output is None else symbols[output] for output in self.outputs]


def linear_code(matrix: Sequence[Sequence[Number]]) -> LinearCode:
    """Code for ``matrix`` times a vector, with common two-term sums computed once.

    Greedy, after Paar ("Optimized arithmetic for Reed-Solomon encoders", 1997) extended to
    coefficients: the sum ``x_j + ratio * x_i`` that occurs, up to a factor, in the most rows
    becomes a symbol of its own, until no sum occurs twice. Among equals, sums without a
    multiplication come first, then those of the last symbols, which keep the factor 1 of rows that
    end in it. It finds the even and odd parts that rows of points p and -p
    share, and the sums and differences that columns of such points share.

    Raises ValueError if the rows differ in length.
    """
    width = len(matrix[0]) if matrix else 0
    if any(len(row) != width for row in matrix):
        raise ValueError("the rows of the matrix differ in length")
    rows = [{i: c for i, c in enumerate(row) if c != 0} for row in matrix]
    operations = _share_sums(rows, width)
    outputs = [_sum_row(row, operations, width) for row in rows]
    return LinearCode(width, tuple(operations), tuple(outputs))


def _is_general(operation: Operation) -> bool:
    return abs(operation.left_factor) != 1 and abs(operation.right_factor) != 1


def _ratio(numerator: Number, denominator: Number) -> Number:
    if isinstance(numerator, float) or isinstance(denominator, float):
        return float(f"{numerator / denominator:.{_DIGITS}e}")
    return Fraction(numerator) / Fraction(denominator)


_Pair: TypeAlias = "tuple[int, int, Number]"


def _share_sums(rows: list[dict[int, Number]], width: int) -> list[Operation]:
    """Replace common sums in ``rows`` by new symbols; returns their operations."""
    users: defaultdict[_Pair, set[int]] = defaultdict(set)

    def pairs_with(number: int, symbol: int) -> list[_Pair]:
        row = rows[number]
        pairs = []
        for other in row:
            if other != symbol:
                low, high = min(other, symbol), max(other, symbol)
                pairs.append((low, high, _ratio(row[low], row[high])))
        return pairs

    def remove(number: int, symbol: int) -> Number:
        for pair in pairs_with(number, symbol):
            users[pair].discard(number)
        return rows[number].pop(symbol)

    def insert(number: int, symbol: int, factor: Number) -> None:
        rows[number][symbol] = factor
        for pair in pairs_with(number, symbol):
            users[pair].add(number)

    for number, row in enumerate(rows):
        given = dict(row)
        row.clear()
        for symbol, factor in given.items():
            insert(number, symbol, factor)
    operations: list[Operation] = []
    while users:
        pair = max(users, key=lambda p: (len(users[p]), abs(p[2]) == 1, p[1], p[0]))
        if len(users[pair]) < 2:
            break
        low, high, ratio = pair
        symbol = width + len(operations)
        operations.append(Operation(1, high, ratio, low))
        for number in sorted(users.pop(pair)):
            factor = remove(number, high)
            remove(number, low)
            insert(number, symbol, factor)
    return operations


def _sum_row(row: dict[int, Number], operations: list[Operation], width: int) -> int | None:
    """Append the operations that add up the terms of a row; returns the symbol of the sum."""
    if not row:
        return None
    # A term without a factor starts the sum, so that all others can be multiply-adds.
    terms = sorted(row.items(), key=lambda term: (term[1] != 1, abs(term[1]) != 1))
    (symbol, factor), *rest = terms
    if not rest:
        if factor == 1:
            return symbol
        operations.append(Operation(factor, symbol))
        return width + len(operations) - 1
    for other, other_factor in rest:
        operations.append(Operation(factor, symbol, other_factor, other))
        symbol, factor = width + len(operations) - 1, 1
    return symbol
