"""Conversion of maps between plain NCHW and channel blocks, by transposing squares in registers."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .isa import VectorISA


def emit_block(batch: int, channels: int, height: int, width: int, isa: VectorISA) -> tirx.PrimFunc:
    """Build ``(N, C, H, W) -> (N, ceil(C / lanes), H, W, lanes)``; channels beyond C are zero."""
    return _emit(batch, channels, height, width, isa, to_blocks=True)


def emit_unblock(
    batch: int, channels: int, height: int, width: int, isa: VectorISA
) -> tirx.PrimFunc:
    """Build ``(N, ceil(C / lanes), H, W, lanes) -> (N, C, H, W)``, dropping channels beyond C."""
    return _emit(batch, channels, height, width, isa, to_blocks=False)


def transpose(em: Emitter, rows: Sequence[ir.Expr]) -> list[ir.Expr]:
    """Emit the transpose of a square of ``lanes`` vectors (Eklundh's exchange of halves)."""
    current, distance = list(rows), 1
    while distance < em.lanes:
        lanes = range(em.lanes)
        # Lane l of the second vector of a pair is number lanes + l of their concatenation.
        upper = [em.lanes + (k ^ distance) if k & distance else k for k in lanes]
        lower = [em.lanes + k if k & distance else k ^ distance for k in lanes]
        for i in lanes:
            if not i & distance:
                pair = (current[i], current[i + distance])
                current[i] = em.shuffle(pair, upper)
                current[i + distance] = em.shuffle(pair, lower)
        distance *= 2
    return current


def _emit(
    batch: int, channels: int, height: int, width: int, isa: VectorISA, to_blocks: bool
) -> tirx.PrimFunc:
    blocks = -(-channels // isa.lanes)
    plain_shape = (batch, channels, height, width)
    blocked_shape = (batch, blocks, height, width, isa.lanes)
    em = Emitter(isa)
    source = em.argument("x", plain_shape if to_blocks else blocked_shape)
    target = em.argument("y", blocked_shape if to_blocks else plain_shape)
    move_map(em, source, target, batch, channels, height * width, to_blocks)
    return em.finish()


def move_map(
    em: Emitter,
    source: tirx.Buffer,
    target: tirx.Buffer,
    batch: int,
    channels: int,
    pixels: int,
    to_blocks: bool,
) -> None:
    """Emit the copy of a plain map to a blocked one, or back, as a parallel loop."""
    lanes = em.lanes
    blocks = -(-channels // lanes)
    squares = max(1, -(-pixels // lanes))
    with em.loop(batch * blocks * squares, "parallel", prefix="task") as task:
        map_index = em.bind_index(quotient(task, squares), "map")
        block = em.bind_index(remainder(map_index, blocks), "block")
        image = quotient(map_index, blocks)
        # The last square overlaps the one before it.
        first = clamp_high(remainder(task, squares) * lanes, max(0, pixels - lanes))
        plain = em.bind_index((image * channels + block * lanes) * pixels + first, "plain")
        blocked = em.bind_index((map_index * pixels + first) * lanes, "blocked")

        def move(count: int) -> None:
            copy = _move_square if pixels >= lanes else _move_pixels
            copy(em, source, target, (plain, blocked), count, pixels, to_blocks)

        rest = channels % lanes
        if rest == 0:
            move(lanes)
        elif blocks == 1:
            move(rest)
        else:
            with em.when(tirx.LT(block, blocks - 1)):
                move(lanes)
            with em.when(tirx.EQ(block, blocks - 1)):
                move(rest)


def _move_square(
    em: Emitter,
    source: tirx.Buffer,
    target: tirx.Buffer,
    offsets: tuple[Index, Index],
    count: int,
    pixels: int,
    to_blocks: bool,
) -> None:
    """Move ``count`` channels of ``lanes`` pixels; offsets are those of plain and blocked map."""
    plain, blocked = offsets
    if to_blocks:
        rows = [em.load(source, plain + i * pixels) for i in range(count)]
        rows += [em.constant(0)] * (em.lanes - count)
        for i, row in enumerate(transpose(em, rows)):
            em.store(target, row, blocked + i * em.lanes)
    else:
        rows = [em.load(source, blocked + i * em.lanes) for i in range(em.lanes)]
        for i, row in enumerate(transpose(em, rows)[:count]):
            em.store(target, row, plain + i * pixels)


def _move_pixels(
    em: Emitter,
    source: tirx.Buffer,
    target: tirx.Buffer,
    offsets: tuple[Index, Index],
    count: int,
    pixels: int,
    to_blocks: bool,
) -> None:
    """Move ``count`` channels of a map of fewer than ``lanes`` pixels, one value at a time."""
    plain, blocked = offsets
    with em.loop(pixels, prefix="p") as pixel:
        for i in range(em.lanes if to_blocks else count):
            at_plain = plain + i * pixels + pixel
            at_blocked = blocked + pixel * em.lanes + i
            if not to_blocks:
                em.store_scalar(target, em.scalar(source, at_blocked), at_plain)
            elif i < count:
                em.store_scalar(target, em.scalar(source, at_plain), at_blocked)
            else:
                em.store_scalar(target, tirx.FloatImm("float32", 0.0), at_blocked)
