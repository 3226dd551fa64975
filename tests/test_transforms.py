import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.transforms.cook_toom import (
    MOST_POINTS,
    cook_toom,
    from_points,
    interpolation_points,
)
from tvm_lowrank.schedules.transforms.linear_code import linear_code

SIZES = [
    (outputs, taps)
    for outputs in range(1, 9)
    for taps in range(1, 9)
    if outputs + taps - 1 <= MOST_POINTS
]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def combine(left_factor, left, right_factor, right):
    return left_factor * left + (0 if right is None else right_factor * right)


@pytest.mark.parametrize(("outputs", "taps"), SIZES)
def test_transforms_are_exact(outputs, taps):
    transform = cook_toom(outputs, taps)
    assert transform.points == outputs + taps - 1
    rng = np.random.default_rng(outputs * 10 + taps)
    data = [Fraction(int(v), 7) for v in rng.integers(-99, 99, transform.points)]
    weights = [Fraction(int(v), 3) for v in rng.integers(-99, 99, taps)]
    products = [
        a * b
        for a, b in zip(times(transform.filter, weights), times(transform.input, data), strict=True)
    ]
    expected = [sum(data[i + k] * weights[k] for k in range(taps)) for i in range(outputs)]
    assert times(transform.output, products) == expected


@pytest.mark.parametrize(("outputs", "taps"), SIZES)
def test_constants_of_the_data_are_exact_in_float32(outputs, taps):
    transform = cook_toom(outputs, taps)
    for row in (*transform.input, *transform.output):
        assert all(float(np.float32(float(value))) == value for value in row)


@pytest.mark.parametrize(("outputs", "taps"), [(4, 3), (6, 3), (2, 5), (4, 5), (3, 3)])
def test_points_amplify_errors_less_than_small_integers(outputs, taps):
    integers = [0, 1, -1, 2, -2, 3, -3][: outputs + taps - 2]
    usual = from_points([Fraction(p) for p in integers], outputs, taps)
    assert cook_toom(outputs, taps).amplification < 0.9 * usual.amplification
    assert cook_toom(1, taps).amplification == pytest.approx(1)


@pytest.mark.parametrize("count", range(MOST_POINTS))
def test_points_are_distinct(count):
    assert len(set(interpolation_points(count))) == count


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="positive"):
        cook_toom(0, 3)
    with pytest.raises(ValueError, match="count must be"):
        cook_toom(6, 6)
    with pytest.raises(ValueError, match="different"):
        from_points([Fraction(1), Fraction(1), Fraction(0)], 2, 3)
    with pytest.raises(ValueError, match="differ in length"):
        linear_code([[1, 2], [3]])


def test_operation_counts_of_the_literature():
    # Lavin and Gray: F(2, 3) takes 4 and 4 operations, F(4, 3) 12 and 10.
    small = cook_toom(2, 3)
    for matrix in (small.input, small.output):
        code = linear_code(matrix)
        assert (code.additions, code.multiplications, code.instructions) == (4, 0, 4)
    usual = from_points([Fraction(p) for p in (0, 1, -1, 2, -2)], 4, 3)
    assert linear_code(usual.input).instructions == 12
    assert linear_code(usual.output).instructions == 10
    assert linear_code(cook_toom(4, 3).input).instructions == 12
    assert linear_code(cook_toom(6, 3).input).instructions == 24


numbers = st.one_of(
    st.sampled_from([0, 0, 1, -1, 2]), st.fractions(-3, 3, max_denominator=4).filter(bool)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_code_computes_the_product(data):
    width = data.draw(st.integers(1, 7))
    matrix = data.draw(st.lists(st.lists(numbers, min_size=width, max_size=width), max_size=7))
    code = linear_code(matrix)
    vector = [Fraction(v) for v in range(3, 3 + (width if matrix else 0))]
    result = code.apply(vector, combine)
    assert [value or 0 for value in result] == times(matrix, vector)
    dense = sum(max(0, sum(v != 0 for v in row) - 1) for row in matrix)
    assert code.additions <= dense
    for operation in code.operations:
        assert operation.left_factor != 0
        assert (operation.right is None) == (operation.right_factor == 0)
        assert operation.right is not None or operation.left_factor != 1


def test_fourier_matrix_shares_its_sums():
    size = 8
    matrix = [
        [round(f(2 * math.pi * i * k / size), 15) for i in range(size)]
        for k in range(size // 2 + 1)
        for f in (math.cos, math.sin)
    ]
    code = linear_code(matrix)
    vector = np.random.default_rng(0).standard_normal(size)
    result = [value or 0.0 for value in code.apply(list(vector), combine)]
    np.testing.assert_allclose(result, np.array(matrix) @ vector, atol=1e-14)
    # A real FFT of 8 values: 20 additions, 2 multiplications.
    assert code.additions <= 22
    assert code.instructions <= 24
    assert result[1] == 0  # the sine of frequency 0, a row of zeros
