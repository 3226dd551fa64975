import math

import numpy as np
import pytest
from tvm_lowrank.schedules.transforms.fft_codelets import (
    complex_dft,
    real_dft,
    shortened,
    transposed,
)

SIZES = [2, 4, 8, 16, 32, 64, 128, 256]


def combine(left_factor, left, right_factor, right):
    return left_factor * left + (0 if right is None else right_factor * right)


def run(code, values):
    return np.array([0.0 if v is None else v for v in code.apply(list(values), combine)])


def half_spectrum(x):
    spectrum = np.fft.rfft(x)
    parts = [part for value in spectrum[1:-1] for part in (value.real, value.imag)]
    return np.array([spectrum[0].real, spectrum[-1].real, *parts])


def interleaved(values):
    return np.stack([values.real, values.imag], axis=1).ravel()


@pytest.mark.parametrize("size", SIZES)
def test_real_transform_and_its_inverse(size):
    x = np.random.default_rng(size).standard_normal(size)
    spectrum = run(real_dft(size), x)
    np.testing.assert_allclose(spectrum, half_spectrum(x), atol=1e-12 * size)
    doubled = np.concatenate([spectrum[:2], 2 * spectrum[2:]])
    np.testing.assert_allclose(
        run(transposed(real_dft(size)), doubled), size * x, atol=1e-12 * size
    )


@pytest.mark.parametrize("size", SIZES)
def test_complex_transform_and_its_inverse(size):
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    spectrum = run(complex_dft(size), interleaved(x))
    np.testing.assert_allclose(spectrum, interleaved(np.fft.fft(x)), atol=1e-12 * size)
    back = run(transposed(complex_dft(size)), spectrum)
    np.testing.assert_allclose(back, size * interleaved(x), atol=1e-12 * size)


def floating_point_operations(code):
    return code.additions + code.multiplications


@pytest.mark.parametrize("size", SIZES)
def test_operation_counts_are_those_of_the_split_radix(size):
    stages = round(math.log2(size))
    real, both = real_dft(size), complex_dft(size)
    assert floating_point_operations(real) == 2 * size * stages - 4 * size + 6
    assert floating_point_operations(both) == 4 * size * stages - 6 * size + 8
    # Turning a flow around exchanges inputs and outputs: here there are as many.
    for code in (real, both):
        assert floating_point_operations(transposed(code)) == floating_point_operations(code)


def test_additions_and_multiplications_of_the_literature():
    # The codelets of FFTW for real input: r2cf_8, r2cf_16, r2cf_32 and r2cf_64.
    for size, counts in {8: (20, 2), 16: (58, 12), 32: (156, 42), 64: (394, 124)}.items():
        code = real_dft(size)
        assert (code.additions, code.multiplications) == counts


@pytest.mark.parametrize("code", [real_dft(32), complex_dft(16), transposed(complex_dft(8))])
def test_no_operation_is_trivial_or_done_twice(code):
    assert len(set(code.operations)) == len(code.operations)
    for operation in code.operations:
        assert operation.left_factor != 0
        if operation.right is None:
            assert abs(operation.left_factor) != 1 or operation.left_factor == -1


def test_shortened_code_computes_fewer_outputs_with_less():
    code = transposed(real_dft(16))
    values = np.random.default_rng(0).standard_normal(16)
    part = shortened(code, range(5))
    np.testing.assert_array_equal(run(part, values), run(code, values)[:5])
    assert len(part.operations) < len(code.operations)


@pytest.mark.parametrize("size", [0, 12, 512])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        real_dft(size)
    with pytest.raises(ValueError, match="power of two"):
        complex_dft(size)
