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
    """``rows`` x ``vectors`` accumulators, summed over ``channels``.

    The left matrix holds channels in blocks of the vector length, each as ``rows`` vectors:
    ``(ceil(channels / lanes), rows, lanes)``. The right one is ``(channels, vectors * lanes)``.
    """

    rows: int
    vectors: int
    channels: int

    @property
    def registers(self) -> int:
        """Vector registers: accumulators, a vector each of the right matrix, a broadcast."""
        return self.rows * self.vectors + self.vectors + 1

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
        lanes, rows, vectors = em.lanes, range(self.rows), range(self.vectors)
        sums = [em.accumulators(self.vectors) for _ in rows]
        for of_row in sums:
            for accumulator in of_row:
                em.store(accumulator, em.constant(0))
        blocks = -(-self.channels // lanes)
        extent: Index = lanes
        with em.loop(blocks, prefix="block") as block:
            if self.channels % lanes:
                extent = clamp_high(self.channels - block * lanes, lanes)
            left_base = em.bind_index(left[1] + block * (self.rows * lanes), "a")
            right_base = em.bind_index(right[1] + block * (lanes * self.vectors * lanes), "b")
            with em.loop(extent, prefix="c") as c:
                b = em.bind_index(right_base + c * (self.vectors * lanes), "b")
                columns = [em.load(right[0], b + j * lanes) for j in vectors]
                for j in vectors:
                    em.prefetch(right[0], b + (_AHEAD + j * lanes))
                a = em.bind_index(left_base + c, "a")
                for i in rows:
                    value = em.broadcast(left[0], a + i * lanes)
                    for accumulator, column in zip(sums[i], columns, strict=True):
                        em.multiply_add(accumulator, value, column)
        for i in rows:
            for j in vectors:
                store(i, j, em.value_of(sums[i][j]))
