"""Where the pixels of a resized map come from, as ``image.resize2d`` says it."""

from __future__ import annotations

import numpy as np
from tvm import relax

TRANSFORMATIONS = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def tables_of(
    call: relax.Call, size: tuple[int, ...], out_size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The `table` of the rows and of the columns of an ``image.resize2d``.

    Raises ValueError for other layouts than NCHW, for cubic interpolation, and as `table`.
    """
    attrs, method = call.attrs, str(call.attrs.method)
    if str(attrs.layout) != "NCHW" or method not in ("linear", "nearest_neighbor"):
        raise ValueError(f"{method} in {attrs.layout}")
    rounding = None if method == "linear" else str(attrs.rounding_method)
    rows, columns = (
        table(*extents, str(attrs.coordinate_transformation_mode), rounding)
        for extents in zip(size, out_size, strict=True)
    )
    return rows, columns


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
