"""Resizing of channel-blocked maps: the nearest pixel, or linear interpolation of four."""

from __future__ import annotations

from tvm import ir, tirx

from .emitter import Emitter, Index, moving, quotient, remainder
from .isa import VectorISA

# What `rows` and `columns` hold.
_BEFORE, _AFTER, _WEIGHT = range(3)


def emit_resize(
    batch: int,
    channels: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    linear: bool,
    isa: VectorISA,
) -> tirx.PrimFunc:
    """Build ``(x, rows, columns, y)`` on blocked maps ``(N, ceil(C / lanes), H, W, lanes)``.

    ``rows`` (3, OH) and ``columns`` (3, OW) are of each axis: the pixel before, the one after, and
    the weight of the latter; without ``linear`` only the first counts.
    """
    blocks, (height, width), (out_height, out_width) = -(-channels // isa.lanes), size, out_size
    em = Emitter(isa)
    x = em.argument("x", (batch, blocks, height, width, isa.lanes))
    rows = em.argument("rows", (3, out_height))
    columns = em.argument("columns", (3, out_width))
    y = em.argument("y", (batch, blocks, out_height, out_width, isa.lanes))

    def pixel_of(tables: tirx.Buffer, which: int, count: int, at: Index) -> Index:
        value = em.scalar(tables, at + which * count)
        return em.bind(tirx.Cast("int32", value), "pixel")

    def weight_of(tables: tirx.Buffer, count: int, at: Index) -> ir.Expr:
        return em.broadcast(tables, at + _WEIGHT * count)

    def between(first: ir.Expr, second: ir.Expr, weight: ir.Expr) -> ir.Expr:
        return em.bind(first + (second - first) * weight)

    lines = batch * blocks * out_height
    kind = moving(4 * lines * out_width * isa.lanes)
    with em.loop(lines, kind, prefix="line") as line:
        plane = em.bind_index(quotient(line, out_height) * height, "plane")
        row = em.bind_index(remainder(line, out_height), "row")
        upper = em.bind_index((plane + pixel_of(rows, _BEFORE, out_height, row)) * width, "upper")
        lower, down = upper, None
        if linear:
            lower = em.bind_index(
                (plane + pixel_of(rows, _AFTER, out_height, row)) * width, "lower"
            )
            down = weight_of(rows, out_height, row)
        with em.loop(out_width, prefix="column") as column:
            left = pixel_of(columns, _BEFORE, out_width, column)
            value = em.load(x, (upper + left) * isa.lanes)
            if down is not None:
                right = pixel_of(columns, _AFTER, out_width, column)
                along = weight_of(columns, out_width, column)
                value = between(value, em.load(x, (upper + right) * isa.lanes), along)
                below = em.load(x, (lower + left) * isa.lanes)
                below = between(below, em.load(x, (lower + right) * isa.lanes), along)
                value = between(value, below, down)
            em.store(y, value, (line * out_width + column) * isa.lanes)
    return em.finish()
