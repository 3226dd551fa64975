"""Forms group by group: exactness, optimality, the moments of groups, and stock TVM."""

from __future__ import annotations

import numpy as np
import pytest
from forms_support import conv, expected_of, run_form
from helpers import relative, run
from test_decompose_relax import convolution, emitted_multiplications
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions

from tvm_lowrank.decompose import FORMS, InputMoments, MomentAccumulator, bias_correction
from tvm_lowrank.decompose.moments import relative_error
from tvm_lowrank.geometry import ConvGeometry

LAYERS = {
    "two groups": ConvGeometry(12, 12, 9, 8, (5, 3), (2, 1), (2, 1, 1, 0), groups=2),
    "depthwise": ConvGeometry(6, 12, 14, 13, (7, 7), padding=(3, 3, 3, 3), groups=6),
    "wide": ConvGeometry(12, 16, 6, 5, (1, 1), groups=4),
}
CASES = [
    (name, layer)
    for layer, geometry in LAYERS.items()
    for name, form in FORMS.items()
    if not form.refuse(geometry)
]


def example(geometry, samples=400):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=geometry.weight_shape)
    images = np.random.default_rng(1).normal(
        size=(samples, geometry.in_channels, geometry.height, geometry.width)
    )
    smooth = images + np.roll(images, 1, 2) + np.roll(images, 1, 3) + images[:, ::-1]
    gather = MomentAccumulator(geometry, 64)
    gather.update(smooth.astype(np.float32))
    return weight, gather.moments()


def test_cases_hold_what_the_algebra_allows():
    able = {layer: {n for n, at in CASES if at == layer} for layer in LAYERS}
    assert able["depthwise"] >= {"separable", "multiresolution", "linear_combination"}
    assert able["two groups"] >= {"separable", "tucker2", "cp", "cp3", "tensor_train"}
    assert able["wide"] == {"linear_combination"}
    assert FORMS["separable"].ranks(LAYERS["depthwise"], 8) == [4]  # 6 groups of 4 are 3 vectors
    assert FORMS["cp"].refuse(LAYERS["depthwise"]).startswith("in each of 6 groups: one input")


def test_moments_of_groups_are_the_diagonal_blocks():
    grouped = LAYERS["two groups"]
    weight, moments = example(grouped)
    assert moments.groups == 2 and moments.covariance.shape == (2, 90, 90)
    whole = example(ConvGeometry(12, 12, 9, 8, (5, 3), (2, 1), (2, 1, 1, 0)))[1]
    for g in range(2):
        rows = slice(90 * g, 90 * (g + 1))
        own = moments.group(g)
        np.testing.assert_allclose(own.covariance, whole.covariance[rows, rows], atol=1e-5)
        np.testing.assert_allclose(own.mean, whole.mean[rows], atol=1e-6)
    other = weight + 0.1
    dense, near = np.zeros((12, 180)), np.zeros((12, 180))
    for g in range(2):
        rows, columns = slice(6 * g, 6 * (g + 1)), slice(90 * g, 90 * (g + 1))
        dense[rows, columns] = weight[rows].reshape(6, -1)
        near[rows, columns] = other[rows].reshape(6, -1)
    assert relative_error(weight, other, moments) == pytest.approx(
        relative_error(dense, near, whole), rel=1e-4
    )
    np.testing.assert_allclose(
        bias_correction(weight, other, moments), bias_correction(dense, near, whole), atol=1e-5
    )
    with pytest.raises(ValueError, match="moments of 2 groups for a weight of 4"):
        four = ConvGeometry(12, 12, 9, 8, (5, 3), groups=4)
        FORMS["separable"].fitter(np.ones(four.weight_shape), four, moments)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_groups_are_exact_at_full_rank_and_run_as_one_chain(name, layer):
    form, geometry = FORMS[name], LAYERS[layer]
    weight, moments = example(geometry)
    shape = (2, geometry.in_channels, geometry.height, geometry.width)
    inputs = np.random.default_rng(1).normal(size=shape)
    for given in (None, InputMoments.identity(geometry), moments):
        fitter = form.fitter(weight, geometry, given, refine=False)
        full = fitter.fit(form.full_rank(geometry))
        lost = form.reconstruct(full, geometry) - weight
        assert np.linalg.norm(lost) < 1e-5 * np.linalg.norm(weight)
        errors = []
        for rank in form.ranks(geometry, 1)[:: max(1, len(form.ranks(geometry, 1)) - 1)]:
            factors = fitter.fit(rank)
            value = run_form(inputs, form, geometry, rank, factors)
            expected = expected_of(inputs, form, geometry, factors)
            np.testing.assert_allclose(value, expected, atol=1e-9 * np.abs(expected).max())
            errors.append(form.error(weight, factors, geometry, given or moments))
        assert len(errors) < 2 or errors[-1] < errors[0] < 1
    assert np.abs(conv(inputs, weight, geometry)).max() > 0


@pytest.mark.parametrize("layer", ["two groups", "depthwise"])
def test_data_of_groups_help(layer):
    form, geometry = FORMS["separable"], LAYERS[layer]
    weight, moments = example(geometry)
    rank = form.ranks(geometry, 1)[-1]
    blind, seeing = (
        form.error(weight, form.fitter(weight, geometry, given).fit(rank), geometry, moments)
        for given in (None, moments)
    )
    assert seeing < 0.98 * blind


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_compiled_groups_equal_their_reconstruction(name, layer):
    form, geometry = FORMS[name], LAYERS[layer]
    ranks = form.ranks(geometry, 1)
    if not ranks:
        pytest.skip("no rank saves anything")
    weight, moments = example(geometry, 20)
    factors = form.fitter(weight, geometry, moments, refine=False).fit(ranks[-1])
    bias = np.arange(geometry.out_channels)
    mod = convolution(geometry, weight, bias)
    chain = Chain(
        tuple(form.stages(geometry, ranks[-1])),
        tuple(np.asarray(f, np.float32) for f in factors),
        branches=form.branches(geometry, ranks[-1]),
    )
    rewritten = FactorConvolutions({"conv0": chain})(mod)
    shape = (1, geometry.in_channels, geometry.height, geometry.width)
    inputs = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    dense = expected_of(inputs, form, geometry, factors) + bias.reshape(1, -1, 1, 1)
    assert relative(run(rewritten, inputs), np.maximum(dense, 0)) < 1e-4
    assert emitted_multiplications(rewritten) == form.multiplications(geometry, ranks[-1])
