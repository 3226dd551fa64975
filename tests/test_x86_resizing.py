"""Resizing of blocked maps: where pixels come from, and the kernel."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.passes.resize_tables import ROUNDINGS, TRANSFORMATIONS, table
from tvm_lowrank.schedules.x86.resizing import emit_resize
from x86_support import CPUS, block, run, runnable_isa, unblock

HALF = Fraction(1, 2)
ROUNDED = {
    "floor": floor,
    "ceil": ceil,
    "round_prefer_floor": lambda x: ceil(x - HALF),
    "round_prefer_ceil": lambda x: floor(x + HALF),
}


def place(number, size, out_size, transformation):
    """The formulas of ONNX's Resize, in fractions."""
    scale = Fraction(size, out_size)
    if transformation == "asymmetric":
        return number * scale
    if transformation == "align_corners":
        return Fraction(number * (size - 1), out_size - 1) if out_size > 1 else Fraction(0)
    if transformation == "pytorch_half_pixel" and out_size == 1:
        return Fraction(0)
    return (number + HALF) * scale - HALF


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 60), st.sampled_from(TRANSFORMATIONS))
def test_pixels_come_from_where_the_formulas_say(size, out_size, transformation):
    places = [place(number, size, out_size, transformation) for number in range(out_size)]
    for rounding in ROUNDINGS:
        first, second, weight = table(size, out_size, transformation, rounding)
        nearest = [min(max(ROUNDED[rounding](x), 0), size - 1) for x in places]
        assert list(first) == nearest == list(second) and not weight.any()
    first, second, weight = table(size, out_size, transformation, None)
    inside = [min(max(x, 0), size - 1) for x in places]
    between = first + (second - first) * weight
    np.testing.assert_allclose(between, np.array(inside, float), atol=1e-5)
    assert ((second - first) <= 1).all() and ((weight >= 0) & (weight < 1)).all()


def test_other_transformations_are_refused():
    with pytest.raises(ValueError, match="tf_crop_and_resize"):
        table(4, 8, "tf_crop_and_resize", None)
    with pytest.raises(ValueError, match="'round'"):
        table(4, 8, "half_pixel", "round")


def interpolated(x, axis, steps):
    first, second, weight = steps
    at = [1] * x.ndim
    at[axis] = -1
    low, high = (np.take(x, pixels.astype(int), axis) for pixels in (first, second))
    return low + (high - low) * weight.astype(np.float64).reshape(at)


@pytest.mark.parametrize("name", CPUS)
def test_any_map(name):
    isa = runnable_isa(name)
    sizes = st.integers(1, 13)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        st.tuples(st.integers(1, 2), st.integers(1, 37), sizes, sizes),
        st.tuples(st.integers(1, 27), st.integers(1, 27)),
        st.sampled_from(TRANSFORMATIONS),
        st.sampled_from([None, "floor"]),
    )
    def check_one(shape, out_size, transformation, rounding):
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        tables = [
            table(*pair, transformation, rounding) for pair in zip(shape[2:], out_size, strict=True)
        ]
        expected = x.astype(np.float64)
        for axis, steps in zip((2, 3), tables, strict=True):
            expected = interpolated(expected, axis, steps)
        func = emit_resize(*shape[:2], shape[2:], out_size, rounding is None, isa)
        blocked = block(x, isa.lanes)
        out_shape = (*blocked.shape[:2], *out_size, isa.lanes)
        y = unblock(run(func, isa, [blocked, *tables], out_shape), shape[1])
        assert np.abs(y - expected).max() < 1e-6 * max(1, np.abs(x).max())

    check_one()
