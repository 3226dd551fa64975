"""The inner product of batched matrix products: a block of rows times vectors of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high

# Elements of the right matrix to ask for ahead of their use. Each is used for a few rows only, so
# its way from outside of the second-level cache shows: 4 to 8 KB gain up to a half, 2 or 16 less.
_AHEAD = 1536


@dataclass(frozen=True)
class RegisterBlock:
    """``rows`` x ``vectors`` sums over ``segments`` times ``channels``; complex ones of two parts.

    The left matrix holds each segment's channels in blocks of the vector length, each as ``rows``
    vectors: ``(segments, ceil(channels / lanes), rows, lanes)``; its imaginary part is a second
    such matrix. The right one is ``(segments, channels, parts, vectors * lanes)``.
    """

    rows: int
    vectors: int
    channels: int
    segments: int = 1
    parts: int = 1

    @property
    def registers(self) -> int:
        """Vector registers: accumulators, a vector each of the right matrix, a broadcast."""
        return self.parts * (self.rows * self.vectors + self.vectors) + 1

    def emit(
        self,
        em: Emitter,
        left: tuple[tirx.Buffer, Index],
        right: tuple[tirx.Buffer, Index],
        store: Callable[[int, int, ir.Expr], None],
    ) -> None:
        """Multiply the matrices at two (buffer, offset) and ``store(row, vector, value)`` all sums.

        Values of channels beyond ``channels``, in the last block, are not read. What follows the
        right matrix in memory should be the one that is used next.
        """
        self.emit_parts(
            em, (left[0], left[1:]), right, lambda row, vector, of: store(row, vector, *of)
        )

    def emit_parts(
        self,
        em: Emitter,
        left: tuple[tirx.Buffer, tuple[Index, ...]],
        right: tuple[tirx.Buffer, Index],
        store: Callable[[int, int, tuple[ir.Expr, ...]], None],
    ) -> None:
        """Like `emit`, with an offset of the left matrix, and a value to store, for each part."""
        lanes, rows, vectors, parts = em.lanes, range(self.rows), range(self.vectors), self.parts
        sums = [[em.accumulators(self.vectors) for _ in rows] for _ in range(parts)]
        for of_part in sums:
            for accumulator in (a for of_row in of_part for a in of_row):
                em.store(accumulator, em.constant(0))
        blocks, width = -(-self.channels // lanes), parts * self.vectors * lanes
        extent: Index = lanes
        with em.loop(self.segments, prefix="segment") as s, em.loop(blocks, prefix="block") as k:
            if self.channels % lanes:
                extent = clamp_high(self.channels - k * lanes, lanes)
            block = s * blocks + k
            starts = [em.bind_index(at + block * (self.rows * lanes), "a") for at in left[1]]
            channel = s * self.channels + k * lanes
            right_base = em.bind_index(right[1] + channel * width, "b")
            with em.loop(extent, prefix="c") as c:
                b = em.bind_index(right_base + c * width, "b")
                columns = [em.load(right[0], b + j * lanes) for j in range(parts * self.vectors)]
                for j in range(parts * self.vectors):
                    em.prefetch(right[0], b + (_AHEAD + j * lanes))
                places = [em.bind_index(start + c, "a") for start in starts]
                for i in rows:
                    values = [em.broadcast(left[0], place + i * lanes) for place in places]
                    for j in vectors:
                        of_column = columns[j :: self.vectors]
                        _multiply_add(em, [of[i][j] for of in sums], values, of_column)
        for i in rows:
            for j in vectors:
                store(i, j, tuple(em.value_of(of_part[i][j]) for of_part in sums))


def _multiply_add(em: Emitter, sums: list[tirx.Buffer], a: list[ir.Expr], b: list[ir.Expr]) -> None:
    """``sums += a * b``, of real or of complex numbers."""
    em.multiply_add(sums[0], a[0], b[0])
    if len(sums) == 2:
        em.multiply_add(sums[1], a[0], b[1])
        em.store(sums[0], em.value_of(sums[0]) - a[1] * b[1])
        em.multiply_add(sums[1], a[1], b[0])
