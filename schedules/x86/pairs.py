"""Pairs of neighbouring channels in bfloat16: their arithmetic, and maps that are rounded to them.

A pair takes the place of one float32 value, so buffers and vectors of float32 hold them. TVM has no
name for the two instructions that are needed, and turns its own bfloat16 vectors into integers; so
both are functions of LLVM code that a kernel imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from tvm import ir, tirx

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, LoopKind, quotient, remainder

NO_BFLOAT16 = "bfloat16: the target has no instructions for it (AVX512-BF16)"

# Functions of 16 pairs, in vectors of float32: sums of products, and what rounds two vectors. LLVM
# puts their code where they are called.
_DOT, _ROUND = "lowrank_bfloat16_dot", "lowrank_bfloat16_round"
_CODE = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @{_DOT}(<16 x float> %sum, <16 x float> %a, <16 x float> %b) {{
  %c = bitcast <16 x float> %a to <32 x bfloat>
  %d = bitcast <16 x float> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %c, <32 x bfloat> %d)
  ret <16 x float> %r
}}
define <16 x float> @{_ROUND}(<16 x float> %first, <16 x float> %second) {{
  %c = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %second, <16 x float> %first)
  %r = bitcast <32 x bfloat> %c to <16 x float>
  ret <16 x float> %r
}}
"""  # noqa: E501


class PairEmitter(Emitter):
    """An `Emitter` whose products are of pairs, unless they stand within `single`.

    ``multiply_add`` and ``rounded`` must stand within a loop.
    """

    _single = False

    @contextmanager
    def single(self) -> Iterator[None]:
        """What the ``with`` block multiplies are single values of float32."""
        self._single = True
        yield
        self._single = False

    @contextmanager
    def loop(
        self, extent: Index, kind: LoopKind = "serial", start: Index = 0, prefix: str = "i"
    ) -> Iterator[Index]:
        """As of an `Emitter`; in an outermost one the functions that are called are known."""
        outermost = len(self._scopes) == 1
        with (
            super().loop(extent, kind, start, prefix) as variable,
            self.attribute("pragma_import_llvm", _CODE) if outermost else nullcontext(),
        ):
            yield variable

    def multiply_add(self, accumulator: tirx.Buffer, a: ir.Expr, b: ir.Expr) -> None:
        """Add both products of each lane's pairs to ``accumulator``."""
        if self._single:
            super().multiply_add(accumulator, a, b)
            return
        self.store(accumulator, self._call(_DOT, self.value_of(accumulator), a, b))

    def rounded(self, first: ir.Expr, second: ir.Expr) -> ir.Expr:
        """The values of two vectors one after the other as pairs, each rounded to nearest."""
        return self.bind(self._call(_ROUND, first, second), "pairs")

    def _call(self, name: str, *values: ir.Expr) -> ir.Expr:
        return tirx.call_pure_extern(f"float32x{self.lanes}", name, *values)


@dataclass(frozen=True)
class RoundedMap:
    """A map in blocks of channels, with its copy in blocks of pairs that a convolution reads.

    The copy holds the padding of ``geometry``, the convolution's own, and of a pointwise one only
    the pixels that it reads. It has ``width`` columns.
    """

    em: PairEmitter
    geometry: ConvGeometry
    width: int
    x: tirx.Buffer

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.geometry.in_channels // self.em.lanes)

    @property
    def pairs(self) -> int:
        """Blocks of pairs; the last may have one block of channels only."""
        return -(-self.blocks // 2)

    @property
    def _step(self) -> tuple[int, int]:
        """Rows and columns from one that is copied to the next."""
        return self.geometry.stride if self.geometry.kernel == (1, 1) else (1, 1)

    @property
    def _size(self) -> int:
        """Elements of a block of channels of an image."""
        return self.geometry.height * self.geometry.width * self.em.lanes

    def round_row(
        self, place: tuple[Index, Index, Index], copy: tirx.Buffer, target: Index
    ) -> None:
        """Round a row of the copy to ``target``: its image, block of pairs, and number."""
        em, geometry, (image, block, row) = self.em, self.geometry, place
        (rows, columns), (top, left) = self._step, geometry.padding[:2]
        target = em.bind_index(target, "to")
        line = em.bind_index(row * rows - top, "line")
        start = em.bind_index(
            (image * self.blocks + block * 2) * self._size + line * (geometry.width * em.lanes),
            "from",
        )
        # Columns of the copy that lie on the map.
        low = min(-(-left // columns), self.width)
        high = max(low, min((geometry.width - 1 + left) // columns + 1, self.width))

        def clear(begin: int, count: int) -> None:
            if count:
                with em.loop(count, prefix="column") as column:
                    em.store(copy, em.constant(0), target + (begin + column) * em.lanes)

        def move(second: bool) -> None:
            with em.loop(high - low, prefix="column") as column:
                at = em.bind_index(start + ((low + column) * columns - left) * em.lanes, "at")
                self._move(at, second, copy, target + (low + column) * em.lanes)

        def move_all() -> None:
            clear(0, low)
            if high > low:
                self._of_block(block, move)
            clear(high, self.width - high)

        if not any(geometry.padding):
            move_all()
            return
        inside = tirx.And(tirx.GE(line, 0), tirx.LT(line, geometry.height))
        with em.when(inside):
            move_all()
        with em.when(tirx.Not(inside)):
            clear(0, self.width)

    def round_pixels(
        self, first: Index, span: tuple[Index, Index], copy: tirx.Buffer, size: int
    ) -> None:
        """Round neighbouring pixels of a map that is not padded, all their channels.

        ``span`` are the pixels, counted from ``first``, the number of a pixel in the first block of
        channels of its image; in the copy they have the same places in each block of pairs, of
        ``size`` elements.
        """
        em, (begin, end) = self.em, span

        def move(block: Index, second: bool) -> None:
            start = em.bind_index(first * em.lanes + block * (2 * self._size), "from")
            to = em.bind_index(block * size, "to")
            with em.loop(end - begin, start=begin, prefix="pixel") as pixel:
                at = em.bind_index(pixel * em.lanes, "at")
                self._move(start + at, second, copy, to + at)

        self._each_block(move)

    def round_pixel(
        self, place: tuple[Index, Index], copy: tirx.Buffer, target: Index, size: int
    ) -> None:
        """Round a pixel of the copy, all its channels: its image, and its number in the map.

        Its first block of pairs goes to ``target``, the others ``size`` elements further each.
        """
        em, geometry, (image, pixel) = self.em, self.geometry, place
        (rows, columns), (top, left) = self._step, geometry.padding[:2]
        pixel = em.bind_index(pixel, "pixel")
        line = em.bind_index(quotient(pixel, self.width) * rows - top, "line")
        column = em.bind_index(remainder(pixel, self.width) * columns - left, "column")
        start = em.bind_index(
            image * (self.blocks * self._size) + (line * geometry.width + column) * em.lanes, "from"
        )

        def move(block: Index, second: bool) -> None:
            at = em.bind_index(start + block * (2 * self._size), "at")
            self._move(at, second, copy, target + block * size)

        if not any(geometry.padding):
            self._each_block(move)
            return
        inside = tirx.And(
            tirx.And(tirx.GE(line, 0), tirx.LT(line, geometry.height)),
            tirx.And(tirx.GE(column, 0), tirx.LT(column, geometry.width)),
        )
        with em.when(inside):
            self._each_block(move)
        with em.when(tirx.Not(inside)), em.loop(self.pairs, prefix="block") as block:
            em.store(copy, em.constant(0), target + block * size)

    def _move(self, at: Index, second: bool, copy: tirx.Buffer, target: Index) -> None:
        """Round a vector of the map, and the one a block further or zeros, to one of pairs."""
        values = self.em.load(self.x, at)
        others = self.em.load(self.x, at + self._size) if second else self.em.constant(0)
        self.em.store(copy, self.em.rounded(values, others), target)

    def _each_block(self, move: Callable[[Index, bool], None]) -> None:
        """Move all blocks of pairs, each told whether it has a second block of channels."""
        if whole := self.blocks // 2:
            with self.em.loop(whole, prefix="block") as block:
                move(block, True)
        if self.blocks % 2:
            move(whole, False)

    def _of_block(self, block: Index, move: Callable[[bool], None]) -> None:
        """Move both blocks of channels of a block of pairs, or the one that the last may have."""
        if self.blocks % 2 == 0:
            move(True)
            return
        if self.pairs > 1:
            with self.em.when(tirx.LT(block, self.pairs - 1)):
                move(True)
        with self.em.when(tirx.EQ(block, self.pairs - 1)):
            move(False)


def pair_rows(matrix: np.ndarray) -> np.ndarray:
    """Neighbouring rows of (..., 2 n, columns), rounded, as float32 that hold the pairs' bits."""
    bits = round_bits(matrix)
    return np.ascontiguousarray(bits[..., ::2, :] | bits[..., 1::2, :] << 16).view(np.float32)


def round_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest and to even, as uint32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
