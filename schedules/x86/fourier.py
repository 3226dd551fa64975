"""Fourier transforms along one axis as vector code: straight-line, or two passes of small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Protocol

from tvm import ir, tirx
from tvm_lowrank.schedules.transforms.fft_codelets import (
    complex_dft,
    odd_dft,
    real_dft,
    shortened,
    transposed,
)

from .emitter import Emitter, Index
from .straight_line import run

# Sizes up to which one piece of straight-line code does a transform: larger ones spill most of
# their values and take LLVM seconds, as its time grows faster than the code.
_STRAIGHT_REAL = 32
_STRAIGHT_COMPLEX = 16

Load = Callable[[Index], ir.Expr]
Store = Callable[[Index, ir.Expr], None]


class Source(Protocol):
    """Where a spectrum is read: real values by their number, then complex ones by theirs."""

    def real(self, number: Index) -> ir.Expr:
        """A value at a real frequency."""
        ...

    def complex(self, number: Index) -> tuple[ir.Expr, ir.Expr]:
        """Real and imaginary part at a complex frequency."""
        ...


class Sink(Protocol):
    """Where a spectrum is written, numbered as in `Source`."""

    def put_real(self, number: Index, value: ir.Expr) -> None:
        """A value at a real frequency."""
        ...

    def put_complex(self, number: Index, real: ir.Expr, imaginary: ir.Expr) -> None:
        """Real and imaginary part at a complex frequency."""
        ...


@dataclass(frozen=True)
class Packed:
    """A spectrum in memory: the real values, then pairs, each ``step`` elements after the other."""

    em: Emitter
    buffer: tirx.Buffer
    base: Index
    step: int
    reals: int

    def real(self, number: Index) -> ir.Expr:
        """A value at a real frequency."""
        return self.em.load(self.buffer, self.base + number * self.step)

    def complex(self, number: Index) -> tuple[ir.Expr, ir.Expr]:
        """Real and imaginary part at a complex frequency."""
        at = self.base + (number * 2 + self.reals) * self.step
        return self.em.load(self.buffer, at), self.em.load(self.buffer, at + self.step)

    def put_real(self, number: Index, value: ir.Expr) -> None:
        """Store a value at a real frequency."""
        self.em.store(self.buffer, value, self.base + number * self.step)

    def put_complex(self, number: Index, real: ir.Expr, imaginary: ir.Expr) -> None:
        """Store real and imaginary part at a complex frequency."""
        at = self.base + (number * 2 + self.reals) * self.step
        self.em.store(self.buffer, real, at)
        self.em.store(self.buffer, imaginary, at + self.step)


def _halves(size: int) -> tuple[int, int]:
    """The sizes of the first and the second pass."""
    first = 1 << (size.bit_length() // 2)
    return first, size // first


def real_frequencies(size: int) -> list[int]:
    """The frequencies of the complex values of `RealTransform`, in their order.

    Together with 0 and size / 2, the real values, they are all, but for conjugates.
    """
    if size <= _STRAIGHT_REAL:
        return list(range(1, size // 2))
    first, second = _halves(size)
    return [
        *(first * k for k in range(1, second // 2)),
        *(first // 2 + first * k for k in range(second // 2)),
        *(j + first * k for j in range(1, first // 2) for k in range(second)),
    ]


class _Transform:
    """What both transforms share: the turns between two passes, and scratch memory."""

    def __init__(self, em: Emitter, size: int, straight: bool) -> None:
        self.em, self.size, self.straight = em, size, straight
        if straight:
            return
        self.first, self.second = _halves(size)
        self._turns = em.workspace(2 * size)
        for j in range(self.first):
            for n in range(self.second):
                angle = 2 * pi * j * n / size
                for part, value in enumerate((cos(angle), sin(angle))):
                    number = tirx.FloatImm("float32", value)
                    em.store_scalar(self._turns, number, 2 * (j * self.second + n) + part)

    def _turned(
        self, value: Sequence[ir.Expr], j: int, n: Index, forward: bool
    ) -> tuple[ir.Expr, ir.Expr]:
        """``value * exp(-+ 2 pi i j n / size)``."""
        em, at = self.em, (n + j * self.second) * 2
        c, s = em.broadcast(self._turns, at), em.broadcast(self._turns, at + 1)
        re, im = value
        if forward:
            return em.bind(re * c + im * s), em.bind(im * c - re * s)
        return em.bind(re * c - im * s), em.bind(im * c + re * s)


class RealTransform(_Transform):
    """The transform of ``size`` real vectors to 2 real and size / 2 - 1 complex ones.

    Creating one may emit a table of constants: do so outside of parallel loops. Two passes, with
    ``size = first * second``, transform the values ``n + second * m`` for each n, turn the results
    and transform them along n (Gentleman and Sande). The inverses are the transposed flows: the
    inverse transform times its size, once the complex values are doubled.
    """

    def __init__(self, em: Emitter, size: int) -> None:
        super().__init__(em, size, size <= _STRAIGHT_REAL)

    @property
    def scratch(self) -> int:
        """Vectors of scratch memory that a transform needs."""
        return 0 if self.straight else self.size

    def forward(self, load: Load, sink: Sink, scratch: tuple[tirx.Buffer, int]) -> None:
        """Transform the vectors ``load(0)`` to ``load(size - 1)``."""
        em = self.em
        if self.straight:
            values = run(em, real_dft(self.size), [load(i) for i in range(self.size)])
            _put(sink, values[2:], 0)
            sink.put_real(0, values[0])
            sink.put_real(1, values[1])
            return
        first, second = self.first, self.second
        buffer, base = scratch
        with em.loop(second, prefix="n") as n:
            inputs = [load(n + second * m) for m in range(first)]
            values = run(em, real_dft(first), inputs)
            at = em.bind_index(n * em.lanes + base, "at")
            em.store(buffer, values[0], at)
            em.store(buffer, values[1], at + second * em.lanes)
            for j in range(1, first // 2):
                turned = self._turned(values[2 * j : 2 * j + 2], j, n, True)
                for part, value in enumerate(turned):
                    em.store(buffer, value, at + (2 * j + part) * second * em.lanes)
        rows = [[self._at(scratch, row, n) for n in range(second)] for row in range(2)]
        values = run(em, real_dft(second), [em.load(*at) for at in rows[0]])
        sink.put_real(0, values[0])
        sink.put_real(1, values[1])
        _put(sink, values[2:], 0)
        _put(sink, run(em, odd_dft(second), [em.load(*at) for at in rows[1]]), second // 2 - 1)
        with em.loop(first // 2 - 1, prefix="j") as j:
            pairs = [em.load(*at) for n in range(second) for at in self._pair(scratch, j, n)]
            _put(
                sink,
                run(em, complex_dft(second), pairs),
                em.bind_index(j * second, "k") + second - 1,
            )

    def inverse(
        self, source: Source, store: Store, scratch: tuple[tirx.Buffer, int], outputs: int
    ) -> None:
        """``store(i, value)`` the first ``outputs`` values, and maybe some behind them."""
        em = self.em
        if self.straight:
            values = [source.real(0), source.real(1), *_get(source, 0, self.size // 2 - 1)]
            code = shortened(transposed(real_dft(self.size)), range(outputs))
            for i, value in enumerate(run(em, code, values)):
                store(i, value)
            return
        first, second = self.first, self.second
        buffer, base = scratch
        values = [source.real(0), source.real(1), *_get(source, 0, second // 2 - 1)]
        for n, value in enumerate(run(em, transposed(real_dft(second)), values)):
            em.store(buffer, value, self._at(scratch, 0, n)[1])
        values = _get(source, second // 2 - 1, second // 2)
        for n, value in enumerate(run(em, transposed(odd_dft(second)), values)):
            em.store(buffer, value, self._at(scratch, 1, n)[1])
        with em.loop(first // 2 - 1, prefix="j") as j:
            values = _get(source, em.bind_index(j * second, "k") + second - 1, second)
            turned = run(em, transposed(complex_dft(second)), values)
            places = [at for n in range(second) for at in self._pair(scratch, j, n)]
            for (_, at), value in zip(places, turned, strict=True):
                em.store(buffer, value, at)
        wanted = range(min(first, -(-outputs // second)))
        code = shortened(transposed(real_dft(first)), wanted)
        with em.loop(second, prefix="n") as n:
            at = em.bind_index(n * em.lanes + base, "at")
            loaded = [em.load(buffer, at + row * second * em.lanes) for row in range(first)]
            values = loaded[:2]
            for j in range(1, first // 2):
                values += self._turned(loaded[2 * j : 2 * j + 2], j, n, False)
            for m, value in enumerate(run(em, code, values)):
                store(n + m * second, value)

    def _at(
        self, scratch: tuple[tirx.Buffer, int], row: Index, n: int
    ) -> tuple[tirx.Buffer, Index]:
        return scratch[0], (row * self.second + n) * self.em.lanes + scratch[1]

    def _pair(
        self, scratch: tuple[tirx.Buffer, int], j: Index, n: int
    ) -> list[tuple[tirx.Buffer, Index]]:
        row = self.em.bind_index(j * 2 + 2, "row")
        return [self._at(scratch, row + part, n) for part in range(2)]


class ComplexTransform(_Transform):
    """The transform of ``size`` pairs of vectors; frequencies in their natural order."""

    def __init__(self, em: Emitter, size: int) -> None:
        super().__init__(em, size, size <= _STRAIGHT_COMPLEX)

    @property
    def scratch(self) -> int:
        """Vectors of scratch memory that a transform needs."""
        return 0 if self.straight else 2 * self.size

    def forward(
        self,
        load: Callable[[Index], tuple[ir.Expr, ir.Expr]],
        store: Callable[[Index, ir.Expr, ir.Expr], None],
        scratch: tuple[tirx.Buffer, int],
    ) -> None:
        """Transform the pairs ``load(0)`` to ``load(size - 1)``."""
        em = self.em
        if self.straight:
            values = run(em, complex_dft(self.size), _pairs(load, range(self.size)))
            for k in range(self.size):
                store(k, values[2 * k], values[2 * k + 1])
            return
        first, second = self.first, self.second
        buffer, base = scratch
        with em.loop(second, prefix="n") as n:
            inputs = _pairs(load, [n + second * m for m in range(first)])
            values = run(em, complex_dft(first), inputs)
            at = em.bind_index(n * (2 * em.lanes) + base, "at")
            for j in range(first):
                pair: Sequence[ir.Expr] = values[2 * j : 2 * j + 2]
                turned = self._turned(pair, j, n, True) if j else pair
                for part, value in enumerate(turned):
                    em.store(buffer, value, at + (2 * j * second + part) * em.lanes)
        with em.loop(first, prefix="j") as j:
            at = em.bind_index(j * (2 * second * em.lanes) + base, "at")
            pairs = [em.load(buffer, at + i * em.lanes) for i in range(2 * second)]
            values = run(em, complex_dft(second), pairs)
            for k in range(second):
                store(j + k * first, values[2 * k], values[2 * k + 1])

    def inverse(
        self,
        load: Callable[[Index], tuple[ir.Expr, ir.Expr]],
        store: Callable[[Index, ir.Expr, ir.Expr], None],
        scratch: tuple[tirx.Buffer, int],
        outputs: int,
    ) -> None:
        """``store(i, *pair)`` the first ``outputs`` pairs, and maybe some behind them."""
        em = self.em
        if self.straight:
            code = shortened(transposed(complex_dft(self.size)), range(2 * outputs))
            values = run(em, code, _pairs(load, range(self.size)))
            for i in range(outputs):
                store(i, values[2 * i], values[2 * i + 1])
            return
        first, second = self.first, self.second
        buffer, base = scratch
        with em.loop(first, prefix="j") as j:
            values = run(
                em,
                transposed(complex_dft(second)),
                _pairs(load, [j + k * first for k in range(second)]),
            )
            at = em.bind_index(j * (2 * second * em.lanes) + base, "at")
            for i, value in enumerate(values):
                em.store(buffer, value, at + i * em.lanes)
        wanted = min(first, -(-outputs // second))
        code = shortened(transposed(complex_dft(first)), range(2 * wanted))
        with em.loop(second, prefix="n") as n:
            at = em.bind_index(n * (2 * em.lanes) + base, "at")
            values = []
            for j in range(first):
                places = [at + (2 * j * second + part) * em.lanes for part in range(2)]
                pair = [em.load(buffer, place) for place in places]
                values += self._turned(pair, j, n, False) if j else pair
            values = run(em, code, values)
            for m in range(wanted):
                store(n + m * second, values[2 * m], values[2 * m + 1])


def _pairs(
    load: Callable[[Index], tuple[ir.Expr, ir.Expr]], places: Sequence[Index]
) -> list[ir.Expr]:
    return [part for place in places for part in load(place)]


def _put(sink: Sink, values: Sequence[ir.Expr], first: Index) -> None:
    for k in range(len(values) // 2):
        sink.put_complex(first + k, values[2 * k], values[2 * k + 1])


def _get(source: Source, first: Index, count: int) -> list[ir.Expr]:
    return [part for k in range(count) for part in source.complex(first + k)]
