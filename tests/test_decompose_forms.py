"""The chains and the factors: exactness, equality with the dense convolution, optimality."""

from itertools import pairwise

import numpy as np
import pytest
from forms_support import correlated_moments, example, expected_of, run_form
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_lowrank.decompose import (
    FORMS,
    InputMoments,
    linear_combination,
    relative_error,
    separable,
    tucker2,
)
from tvm_lowrank.decompose.projection import SharedBasis
from tvm_lowrank.geometry import ConvGeometry

RANKS = {
    "linear_combination": [1, 3, 6, 9],
    "separable": [1, 4, 9, 16, 23],
    "tucker2": [(1, 10), (3, 10), (5, 10), (7, 10), (8, 10)],
    "cp": [1, 5, 10, 16, 22],
    "cp3": [1, 5, 10, 16, 22],
    "tensor_train": [(2, 4, 2), (4, 8, 5), (6, 12, 8), (7, 18, 10), (8, 23, 10)],
    "monochromatic": [(10, 1), (5, 2), (2, 4), (2, 6), (2, 7)],
    "monochromatic_separable": [(5, 1, 1), (5, 2, 3), (2, 4, 7), (2, 6, 12), (1, 8, 20)],
    "bicluster": [(2, 2, 1), (2, 2, 3), (2, 2, 5), (2, 2, 9), (1, 2, 16)],
    "bicluster_separable": [(2, 2, 1), (2, 2, 3), (2, 2, 6), (2, 2, 9), (2, 2, 11)],
    "shared_factor": [(1, 1, 1), (4, 1, 2), (6, 2, 1), (8, 2, 2), (8, 3, 2)],
    "multiresolution": [(1, 4, 1), (3, 2, 1), (5, 2, 1), (6, 2, 1)],
    "svd": [1, 4, 9, 13],
}
# Forms whose closed form is the optimum.
CLOSED = ("linear_combination", "svd", "multiresolution")


@pytest.fixture(scope="module")
def layer():
    return example()


@st.composite
def geometries(draw):
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    return ConvGeometry(
        in_channels=draw(st.integers(1, 8)),
        out_channels=draw(st.integers(1, 8)),
        height=max(1, reach[0] - padding[0] - padding[2]) + draw(st.integers(0, 6)),
        width=max(1, reach[1] - padding[1] - padding[3]) + draw(st.integers(0, 6)),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        batch=2,
    )


@given(geometry=geometries(), seed=st.integers(0, 1000), with_data=st.booleans())
@settings(max_examples=60, deadline=None)
def test_chain_equals_dense_convolution_with_reconstructed_weight(geometry, seed, with_data):
    random = np.random.default_rng(seed)
    f, c, x, y = geometry.weight_shape
    weight = random.normal(size=(f, c, x, y))
    moments = correlated_moments(c * x * y, seed) if with_data else None
    inputs = random.normal(size=(2, c, geometry.height, geometry.width))
    for form in FORMS.values():
        if form.refuse(geometry):
            continue
        rank = some_rank(form, geometry, seed)
        factors = form.fitter(weight, geometry, moments, refine=False).fit(rank)
        assert all(w.dtype == np.float64 and w.flags.c_contiguous for w in factors)
        value = run_form(inputs, form, geometry, rank, factors)
        expected = expected_of(inputs, form, geometry, factors)
        np.testing.assert_allclose(value, expected, atol=1e-9 * max(1, np.abs(expected).max()))


def some_rank(form, geometry, seed):
    """A rank that plans may be offered, the full one, or a single rank below the full one."""
    full = form.full_rank(geometry)
    offered = [*form.ranks(geometry, 1), full if isinstance(full, tuple) else 1 + seed % full]
    return offered[seed % len(offered)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_data", [False, True])
def test_full_rank_is_exact(name, with_data):
    geometry, weight, moments = example(name)
    form = FORMS[name]
    factors = form.fitter(weight, geometry, moments if with_data else None).fit(
        form.full_rank(geometry)
    )
    lost = form.reconstruct(factors, geometry) - weight
    assert np.linalg.norm(lost) < 1e-5 * np.linalg.norm(weight)
    assert form.error(weight, factors, geometry, moments) < 1e-10


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("refine", [False, True])
def test_error_falls_with_rank(name, refine):
    geometry, weight, moments = example(name)
    form = FORMS[name]
    fitter = form.fitter(weight, geometry, moments, refine=refine)
    ranks = RANKS[name]
    errors = [form.error(weight, fitter.fit(r), geometry, moments) for r in ranks]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert 0 <= errors[-1] < 0.3 < errors[0] < 1


@pytest.mark.parametrize("name", FORMS)
def test_data_beats_weights_and_refining_beats_closed_form(name):
    geometry, weight, moments = example(name)
    form = FORMS[name]

    def error(rank, given, refine):
        fitted = form.fitter(weight, geometry, given, refine=refine).fit(rank)
        return form.error(weight, fitted, geometry, moments)

    ranks = [*RANKS[name][1:-1:2], *([(3, 4), (5, 6)] if name == "tucker2" else [])]
    for rank in ranks:
        plain, data = error(rank, None, False), error(rank, moments, False)
        refined = error(rank, moments, True)
        assert data < plain
        assert refined <= data
        if name not in CLOSED:
            assert refined < 0.995 * data


def test_linear_combination_reaches_the_eigenvalue_tail(layer):
    _, weight, moments = layer
    damped = moments.covariance + moments.damping * np.eye(72)
    flat = weight.reshape(10, -1)
    values = np.linalg.eigvalsh(flat @ damped @ flat.T)
    metric = InputMoments(damped, moments.mean, moments.samples)
    random = np.random.default_rng(0)
    for rank in (1, 4, 9):
        filters, sums = linear_combination(weight, rank, moments)
        got = relative_error(weight, np.einsum("fkxy,kcuv->fcuv", sums, filters), metric)
        assert got == pytest.approx(values[:-rank].sum() / values.sum(), rel=1e-9)
        for _ in range(20):
            basis = np.linalg.qr(random.normal(size=(10, rank)))[0]
            other = (basis @ (basis.T @ flat)).reshape(weight.shape)
            assert relative_error(weight, other, metric) > got


def test_weight_only_separable_is_the_truncated_svd(layer):
    _, weight, _ = layer
    singular = np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(24, 30), compute_uv=False)
    vertical, horizontal = separable(weight, 7)
    lost = weight - np.einsum("kcxa,fkby->fcxy", vertical, horizontal)
    assert np.sum(lost**2) == pytest.approx(np.sum(singular[7:] ** 2), rel=1e-9)


def test_identity_moments_mean_weight_only():
    for name, form in FORMS.items():
        geometry, weight, _ = example(name)
        rank = RANKS[name][1]
        plain = form.fitter(weight, geometry).fit(rank)
        white = form.fitter(weight, geometry, InputMoments.identity(geometry)).fit(rank)
        for a, b in zip(plain, white, strict=True):
            np.testing.assert_array_equal(a, b)


def test_shared_basis_gradient_is_that_of_the_error(layer):
    _, weight, moments = layer
    shared = SharedBasis(weight.reshape(10, 8, 9), moments)
    random = np.random.default_rng(1)
    point, direction = random.normal(size=(2, 4, 8))
    for outputs in (None, 6):
        ahead, behind = (shared._solve(point + s * 1e-5 * direction, outputs) for s in (1, -1))
        slope = np.sum(shared._gradient(shared._solve(point, outputs)) * direction)
        assert (ahead.error - behind.error) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_core_is_least_squares_given_the_basis(layer):
    _, weight, moments = layer
    reduce, core = tucker2(weight, (4, 10), moments)
    form = FORMS["tucker2"]
    metric = InputMoments(
        moments.covariance + moments.damping * np.eye(72), moments.mean, moments.samples
    )
    best = relative_error(weight, form.reconstruct([reduce, core]), metric)
    random = np.random.default_rng(2)
    for _ in range(10):
        moved = core + 1e-3 * random.normal(size=core.shape)
        assert relative_error(weight, form.reconstruct([reduce, moved]), metric) > best


def test_tucker2_has_two_stages_at_full_output_rank(layer):
    geometry, weight, moments = layer
    assert [f.shape for f in tucker2(weight, (4, 10), moments)] == [(4, 8, 1, 1), (10, 4, 3, 3)]
    assert [f.shape for f in tucker2(weight, (4, 6))] == [
        (4, 8, 1, 1),
        (6, 4, 3, 3),
        (10, 6, 1, 1),
    ]
    assert len(FORMS["tucker2"].stages(geometry, (4, 10))) == 2
    assert len(FORMS["tucker2"].stages(geometry, (4, 6))) == 3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("multiple", [1, 4, 8, 16])
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(64, 64, 8, 8, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(64, 128, 56, 56, (3, 3), (2, 2), (0, 0, 1, 1)),
        ConvGeometry(3, 64, 224, 224, (7, 7), (2, 2), (3, 3, 3, 3)),
        ConvGeometry(512, 512, 7, 7, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(256, 64, 14, 14, (1, 1)),
        ConvGeometry(16, 16, 32, 1, (64, 1), padding=(31, 0, 32, 0)),
        ConvGeometry(2, 2, 4, 4, (3, 3)),
    ],
    ids=str,
)
def test_ranks_are_multiples_that_save(name, multiple, geometry):
    form = FORMS[name]
    ranks = form.ranks(geometry, multiple)
    if form.refuse(geometry):
        assert ranks == []
    costs = [form.multiplications(geometry, rank) for rank in ranks]
    assert costs == sorted(costs)
    assert all(cost < geometry.multiplications for cost in costs)
    assert len(set(ranks)) == len(ranks) <= 10
    own = geometry.in_channels, geometry.out_channels
    for rank in ranks:
        between = [stage.out_channels for stage in form.stages(geometry, rank)[:-1]]
        assert all(k % multiple == 0 or k in own for k in between)
    if geometry.in_channels >= 64 and multiple <= 8 and not form.refuse(geometry):
        assert len(ranks) >= 4
        assert costs[0] < 0.3 * geometry.multiplications
        assert costs[-1] > 0.6 * geometry.multiplications


def test_refusals_say_why():
    depthwise = ConvGeometry(8, 8, 5, 5, (3, 3), groups=8)
    grouped = ConvGeometry(8, 8, 5, 5, (3, 3), groups=2)
    for form in FORMS.values():
        assert form.refuse(depthwise) == "groups = channels: depthwise"
        assert form.by_group or form.refuse(grouped) == "groups = 2: grouped"
        if not form.keeps_memory and form.name != "multiresolution":
            assert form.refuse(ConvGeometry(8, 8, 5, 5, (3, 3))) is None
    single = ConvGeometry(8, 8, 9, 9, (7, 7), groups=8)
    assert "one output" in FORMS["linear_combination"].refuse(single)
    pointwise, column = ConvGeometry(8, 8, 5, 5, (1, 1)), ConvGeometry(8, 8, 9, 1, (9, 1))
    assert FORMS["linear_combination"].refuse(pointwise) is None
    assert "not fully connected" in FORMS["svd"].refuse(pointwise)
    assert "too small" in FORMS["multiresolution"].refuse(pointwise)
    apart = ConvGeometry(8, 8, 19, 19, (7, 7), dilation=(2, 2))
    assert "dilated" in FORMS["multiresolution"].refuse(apart)
    assert "1x1" in FORMS["tucker2"].refuse(pointwise)
    assert "9x1" in FORMS["separable"].refuse(column)
    assert FORMS["tucker2"].refuse(column) is None
    with pytest.raises(ValueError, match="9x1"):
        separable(np.ones(column.weight_shape), 1)
    with pytest.raises(ValueError, match="1x1"):
        tucker2(np.ones(pointwise.weight_shape), (1, 1))
    with pytest.raises(ValueError, match="depthwise"):
        FORMS["linear_combination"].fitter(np.ones(depthwise.weight_shape), depthwise)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("linear_combination", 0),
        ("linear_combination", 11),
        ("linear_combination", (2, 2)),
        ("separable", 25),
        ("tucker2", 3),
        ("tucker2", (9, 4)),
        ("tucker2", (2, 11)),
        ("tucker2", (0, 4)),
        ("svd", 18),
        ("multiresolution", (8, 2, 1)),
        ("multiresolution", (3, 1, 1)),
        ("multiresolution", (3, 4, 2)),
        ("multiresolution", (3, 2)),
    ],
)
def test_impossible_ranks_are_named(name, rank):
    geometry, weight, moments = example(name)
    for call in (
        lambda: FORMS[name].stages(geometry, rank),
        lambda: FORMS[name].fitter(weight, geometry, moments).fit(rank),
        lambda: FORMS[name].fitter(weight, geometry).fit(rank),
    ):
        with pytest.raises(ValueError, match="rank="):
            call()


def test_wrong_shapes_are_named():
    for name, form in FORMS.items():
        geometry, weight, _ = example(name)
        with pytest.raises(ValueError, match="weight"):
            form.fitter(weight[:2], geometry)
        with pytest.raises(ValueError, match="moments of 9"):
            form.fitter(weight, geometry, correlated_moments(9))
        with pytest.raises(ValueError, match="multiple=0"):
            form.ranks(geometry, 0)


def test_fitting_is_deterministic_and_leaves_its_arguments_alone():
    for name, form in FORMS.items():
        geometry, weight, moments = example(name)
        before = weight.copy(), moments.covariance.copy()
        rank = RANKS[name][1]
        fitter = form.fitter(weight, geometry, moments)
        first = fitter.fit(rank)
        fitter.fit(RANKS[name][2])
        for again in (fitter.fit(rank), form.fitter(weight, geometry, moments, seed=0).fit(rank)):
            for a, b in zip(first, again, strict=True):
                np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(before[0], weight)
        np.testing.assert_array_equal(before[1], moments.covariance)


def _degenerate(kind, size):
    moments = correlated_moments(size, samples=50_000)
    covariance = moments.covariance.copy()
    if kind == "dead channels":
        dead = size * 3 // 8
        covariance[:dead], covariance[:, :dead] = 0, 0
    elif kind == "all dead":
        covariance[:] = 0
    elif kind == "few samples":
        seen = np.random.default_rng(0).normal(size=(5, size))
        return InputMoments(seen.T @ seen / 5, np.zeros(size), 5)
    elif kind == "constant inputs":
        covariance = np.ones((size, size))
    elif kind == "tiny":
        covariance *= 1e-20
    return InputMoments(covariance, moments.mean, moments.samples)


@pytest.mark.parametrize(
    "kind", ["dead channels", "all dead", "few samples", "constant inputs", "tiny"]
)
@pytest.mark.parametrize("name", FORMS)
def test_degenerate_moments_do_not_blow_up(name, kind):
    geometry, weight, _ = example(name)
    form, moments = FORMS[name], _degenerate(kind, weight[0].size)
    fitter = form.fitter(weight, geometry, moments)
    for rank in [*RANKS[name], form.full_rank(geometry)]:
        factors = fitter.fit(rank)
        approximation = form.reconstruct(factors, geometry)
        assert np.isfinite(approximation).all()
        # Damping: what the data say nothing about still follows the weight.
        assert np.linalg.norm(approximation) < 2 * np.linalg.norm(weight)
        assert form.error(weight, factors, geometry, moments) <= 1
    assert np.linalg.norm(approximation - weight) < 1e-5 * np.linalg.norm(weight)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("with_data", [False, True])
def test_zero_and_partly_zero_weights(name, with_data):
    geometry, weight, moments = example(name)
    form, given = FORMS[name], moments if with_data else None
    ranks = [*RANKS[name], *([(3, 4)] if name == "tucker2" else [])]
    for rank in ranks:
        factors = form.fitter(np.zeros_like(weight), geometry, given).fit(rank)
        assert np.abs(form.reconstruct(factors, geometry)).max() < 1e-12
        assert [f.shape for f in factors] == [s.weight_shape for s in form.stages(geometry, rank)]
        pruned = weight.copy()
        pruned[2:], pruned[:, 3:] = 0, 0
        factors = form.fitter(pruned, geometry, given).fit(rank)
        assert np.isfinite(form.reconstruct(factors, geometry)).all()


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("name", sorted({"separable", "tucker2", "linear_combination", "cp"}))
def test_error_that_falls_out_of_a_fit_is_that_of_the_factors(layer, name, refine):
    geometry, weight, moments = layer
    form = FORMS[name]
    fitter = form.fitter(weight, geometry, moments, refine)
    for rank in reversed(form.ranks(geometry, 1)):  # smaller ranks take over what larger ones left
        factors, whole, error = form.fit(fitter, rank, weight, geometry, moments)
        np.testing.assert_array_equal(whole, form.reconstruct(factors, geometry))
        expected = form.error(weight, factors, geometry, moments)
        assert error == pytest.approx(expected, rel=1e-8, abs=1e-8)
        alone = form.fitter(weight, geometry, moments, refine).fit(rank)
        same = relative_error(weight, form.reconstruct(alone, geometry), moments)
        assert error == pytest.approx(same, rel=1e-6, abs=1e-8)
