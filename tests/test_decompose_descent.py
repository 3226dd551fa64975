"""The small L-BFGS."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize

from tvm_lowrank.decompose.descent import minimise


def test_quadratic_reaches_its_minimum():
    random = np.random.default_rng(0)
    half = random.normal(size=(12, 12))
    matrix, target = half @ half.T + np.eye(12), random.normal(size=(3, 4))

    def objective(point):
        pull = matrix @ (point - target).reshape(-1)
        return 1.0 + 0.5 * float(pull @ (point - target).reshape(-1)), pull.reshape(3, 4)

    found = minimise(objective, np.zeros((3, 4)), 200, tolerance=0.0)
    np.testing.assert_allclose(found, target, atol=1e-5)


def test_rosenbrock_falls_at_every_iteration():
    def objective(point):
        return float(scipy.optimize.rosen(point)), scipy.optimize.rosen_der(point)

    start = np.array([-1.2, 1.0, 0.5, -0.3])
    values = [objective(minimise(objective, start, n))[0] for n in range(0, 100, 5)]
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] < 1e-4 * values[0]


@pytest.mark.parametrize("iterations", [0, 5])
def test_stationary_point_is_kept(iterations):
    found = minimise(lambda p: (1.0, np.zeros_like(p)), np.ones(3), iterations)
    np.testing.assert_array_equal(found, np.ones(3))


def test_a_gradient_that_lies_does_not_raise_the_value():
    def objective(point):
        return float(point @ point), -2 * point

    np.testing.assert_array_equal(minimise(objective, np.ones(3), 5), np.ones(3))
