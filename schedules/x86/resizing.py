"""Resizing of channel-blocked maps: the nearest pixel, or linear interpolation of four."""

from __future__ import annotations

import numpy as np
from tvm import ir, tirx

from .emitter import Emitter, Index, moving, quotient, remainder
from .isa import VectorISA

# Axes of a table: the pixel before, the one after, and the weight of the latter.
_BEFORE, _AFTER, _WEIGHT = range(3)

TRANSFORMATIONS = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def emit_resize(
    batch: int,
    channels: int,
    size: tuple[int, int],
    out_size: tuple[int, int],
    linear: bool,
    isa: VectorISA,
) -> tirx.PrimFunc:
    """Build ``(x, rows, columns, y)`` on blocked maps ``(N, ceil(C / lanes), H, W, lanes)``.

    ``rows`` and ``columns`` are `table`'s for each axis; without ``linear`` only the pixel before
    counts.
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


def table(size: int, out_size: int, transformation: str, rounding: str | None) -> np.ndarray:
    """Where the pixels of an axis come from, as float32 of shape (3, out_size).

    Two pixels of the input and the weight of the second; with a ``rounding`` (the nearest pixel)
    both are the same. ``transformation`` is how a pixel's place in the output becomes one in the
    input, as in ONNX's Resize. Places are exact fractions; those outside are the border's.

    Raises ValueError for a transformation or rounding that is not among `TRANSFORMATIONS` and
    `ROUNDINGS`.
    """
    number = np.arange(out_size)
    if transformation == "align_corners":
        over, under = number * (size - 1), max(out_size - 1, 1)
    elif transformation == "asymmetric":
        over, under = number * size, out_size
    elif transformation in ("half_pixel", "pytorch_half_pixel"):
        over, under = (2 * number + 1) * size - out_size, 2 * out_size
        if transformation == "pytorch_half_pixel" and out_size == 1:
            over = np.zeros_like(over)
    else:
        raise ValueError(f"transformation {transformation!r} is unknown")
    first = over // under
    weight = (over - first * under) / under
    if rounding is not None:
        rounded = {
            "floor": first,
            "ceil": -(-over // under),
            "round_prefer_floor": -(-(2 * over - under) // (2 * under)),
            "round_prefer_ceil": (2 * over + under) // (2 * under),
        }
        if rounding not in rounded:
            raise ValueError(f"rounding {rounding!r} is unknown")
        first, weight = rounded[rounding], np.zeros(out_size)
    second = first + (rounding is None)
    pixels = [np.clip(pixel, 0, size - 1) for pixel in (first, second)]
    return np.stack([*pixels, weight]).astype(np.float32)
