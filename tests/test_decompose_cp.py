"""CP: joint least squares against greedy deflation, stability, and the paper's operation count."""

from __future__ import annotations

import numpy as np
import pytest
from forms_support import correlated_moments, example

from tvm_lowrank.cost.operations import separable_ops_per_pixel
from tvm_lowrank.decompose import FORMS, als, cp, cp3, greedy_cp, relative_error
from tvm_lowrank.geometry import ConvGeometry


def deep_like(f=48, c=48, seed=0):
    """A weight like those of deep layers: channels mix with a slowly falling spectrum a tap."""
    random = np.random.default_rng(seed)
    taps = random.normal(size=(9, 9)) * np.array([1, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1])
    spectrum = np.arange(1, min(f, c) + 1) ** -0.4
    mixed = np.stack(
        [(random.normal(size=(f, len(spectrum))) * spectrum) @ random.normal(
            size=(len(spectrum), c)) for _ in range(9)], axis=-1)  # fmt: skip
    return (mixed @ taps).reshape(f, c, 3, 3)


def lost(weight, factors):
    return float(np.sum((weight - FORMS["cp"].reconstruct(factors)) ** 2) / np.sum(weight**2))


def test_greedy_deflation_is_slow_on_a_deep_layer():
    weight = deep_like()
    few, many = (lost(weight, greedy_cp(weight, k, sweeps=12)) for k in (24, 72))
    joint_few, joint_many = (lost(weight, cp(weight, k)) for k in (24, 72))
    assert joint_few < 0.95 * few
    assert joint_many < 0.85 * many


def test_greedy_deflation_degenerates_where_joint_terms_are_exact():
    # Three terms whose vectors lean the same way. Taking the best one away leaves more than three
    # (Stegeman and Comon 2010, "Subtracting a best rank-1 approximation may increase tensor rank").
    random = np.random.default_rng(1)
    parts = [random.normal(size=(d, 3)) + random.normal(size=(d, 1)) for d in (16, 12, 3, 3)]
    weight = np.einsum("fk,ck,xk,yk->fcxy", *parts)
    assert lost(weight, cp(weight, 3)) < 1e-10
    *spatial, outputs = greedy_cp(weight, 12)
    for terms, least in ((3, 1e-2), (6, 1e-3), (12, 1e-4)):
        assert lost(weight, [*(s[:terms] for s in spatial), outputs[:, :terms]]) > least


def test_greedy_terms_are_never_changed_again():
    weight = deep_like(8, 8)
    short, long = greedy_cp(weight, 3), greedy_cp(weight, 5)
    np.testing.assert_allclose(
        FORMS["cp"].reconstruct(short), FORMS["cp"].reconstruct([f[:3] for f in long[:3]]
        + [long[3][:, :3]]), atol=1e-12)  # fmt: skip
    errors = [lost(weight, greedy_cp(weight, k)) for k in (1, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)


def test_greedy_first_term_is_the_best_of_rank_one():
    weight = example()[1]
    assert lost(weight, greedy_cp(weight, 1)) == pytest.approx(
        lost(weight, cp(weight, 1)), rel=0.02
    )


def test_correction_keeps_a_degenerate_tensor_s_terms_bounded():
    # a a b + a b a + b a a has rank 3 but is the limit of tensors of rank 2 with unbounded terms.
    a, b = np.eye(4)[:2]
    term = np.einsum
    tensor = term("i,j,k->ijk", a, a, b) + term("i,j,k->ijk", a, b, a) + term("i,j,k->ijk", b, a, a)
    start = [np.random.default_rng(0).normal(size=(4, 2)) for _ in range(3)]
    free = als.alternate(tensor, start, 400, correct=False, tolerance=0)
    held = als.alternate(tensor, start, 400, correct=True, tolerance=0)
    energy = np.sum(tensor**2)
    assert als.intensity(free) > 10 * energy
    assert als.intensity(held) < 6 * energy
    assert np.sum((als.terms_to_tensor(held) - tensor) ** 2) < 0.25 * energy


def test_each_sweep_lowers_the_error():
    tensor = deep_like(12, 16).reshape(12, 16, 9)
    start = als.OrthogonalTerms(tensor).largest(20)
    errors = [
        np.sum((als.terms_to_tensor(als.alternate(tensor, start, n, False, 0)) - tensor) ** 2)
        for n in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < np.sum((als.terms_to_tensor(start) - tensor) ** 2)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (9, 4, 3, 5), (2, 3, 7, 7), (2, 3, 9)])
def test_orthogonal_terms_are_exact_together(shape):
    tensor = np.random.default_rng(1).normal(size=shape)
    f, c, *spatial = shape
    pairs = f * c * (min(spatial) if len(spatial) == 2 else 1)
    full = min(pairs, int(np.prod(spatial)) * min(f, c))
    np.testing.assert_allclose(
        als.terms_to_tensor(als.OrthogonalTerms(tensor).largest(full)), tensor, atol=1e-12
    )


def test_three_way_terms_hold_four_way_ones():
    _, weight, moments = example()
    for rank in (8, 24):
        four, three = cp(weight, rank, moments), cp3(weight, rank, moments)
        whole = [FORMS["cp"].reconstruct(four), FORMS["cp3"].reconstruct(three)]
        errors = [relative_error(weight, w, moments) for w in whole]
        assert errors[1] < errors[0]
    assert [f.shape for f in four] == [(24, 8, 1, 1), (24, 1, 3, 1), (24, 1, 1, 3), (10, 24, 1, 1)]


def test_the_chain_costs_what_table_1_says():
    c, f, k, side, stride = 6, 10, 4, 24, 2
    layer = ConvGeometry(c, f, side, side, (3, 5), (stride, stride), (1, 2, 1, 2))
    per_pixel = FORMS["cp"].multiplications(layer, k) / side**2
    assert per_pixel == separable_ops_per_pixel(c, f, (3, 5), k, stride)


def test_one_dimensional_kernels_take_three_stages():
    column = ConvGeometry(8, 8, 20, 1, (9, 1), (2, 1), (4, 0, 4, 0))
    assert [s.kernel for s in FORMS["cp"].stages(column, 4)] == [(1, 1), (9, 1), (1, 1)]
    assert "cp is the same" in FORMS["cp3"].refuse(column)
    weight = np.random.default_rng(0).normal(size=column.weight_shape)
    moments = correlated_moments(72)
    found = FORMS["cp"].fitter(weight, column, moments).fit(30)
    assert relative_error(weight, FORMS["cp"].reconstruct(found), moments) < 0.3


@pytest.mark.parametrize("seed", [0, 2])
def test_terms_that_make_a_weight_up_are_found_again_under_data(seed):
    # Descent is slow here: after 100 iterations .0003 and more of the output is still lost.
    random = np.random.default_rng(seed)
    a, b, c = (random.normal(size=(size, 28)) for size in (16, 16, 9))
    weight = np.einsum("fk,ck,tk->fct", a, b, c).reshape(16, 16, 3, 3)
    moments = correlated_moments(144, seed)
    factors = cp3(weight, 28, moments)
    whole = FORMS["cp3"].reconstruct(factors, ConvGeometry(16, 16, 8, 8, (3, 3)))
    assert relative_error(weight, whole, moments) < 1e-5
