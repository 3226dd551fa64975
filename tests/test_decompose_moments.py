"""Second moments of patches against brute force."""

import numpy as np
import pytest

from tvm_lowrank.decompose import (
    FORMS,
    InputMoments,
    MomentAccumulator,
    PatchSampler,
    bias_correction,
    relative_error,
)
from tvm_lowrank.geometry import ConvGeometry

GEOMETRIES = [
    ConvGeometry(3, 4, 7, 6, (3, 3), padding=(1, 1, 1, 1)),
    ConvGeometry(2, 4, 9, 8, (3, 2), (2, 1), (0, 2, 1, 0), (1, 3)),
    ConvGeometry(5, 4, 4, 4, (1, 1), (2, 2)),
    ConvGeometry(2, 4, 20, 1, (5, 1), (3, 1), (2, 0, 2, 0), (2, 1)),
]


def all_patches(inputs, g):
    top, left, bottom, right = g.padding
    padded = np.pad(inputs.astype(float), ((0, 0), (0, 0), (top, bottom), (left, right)))
    patches = []
    for image in padded:
        for i in range(g.out_height):
            for j in range(g.out_width):
                rows = i * g.stride[0] + g.dilation[0] * np.arange(g.kernel[0])
                columns = j * g.stride[1] + g.dilation[1] * np.arange(g.kernel[1])
                patches.append(image[:, rows[:, None], columns[None, :]].reshape(-1))
    return np.array(patches)


def images(g, count=6, seed=0, offset=3.0):
    random = np.random.default_rng(seed)
    shape = (count, g.in_channels, g.height, g.width)
    return (random.normal(size=shape) + offset).astype(np.float32)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_all_positions_equal_brute_force(geometry):
    inputs = images(geometry)
    accumulator = MomentAccumulator(geometry, positions_per_image=10_000)
    accumulator.update(inputs[:4])
    accumulator.update(inputs[4:])
    moments, patches = accumulator.moments(), all_patches(inputs, geometry)
    assert moments.samples == len(patches)
    np.testing.assert_allclose(moments.mean, patches.mean(axis=0), rtol=1e-5, atol=1e-5)
    expected = np.cov(patches.T, bias=True)
    np.testing.assert_allclose(moments.covariance, expected, atol=2e-5 * np.trace(expected))


def test_sampled_positions_are_distinct_patches_of_each_image():
    geometry = GEOMETRIES[1]
    inputs = images(geometry, count=1)
    picked = PatchSampler(geometry, positions_per_image=7, seed=4).sample(inputs)
    known = {patch.astype(np.float32).tobytes() for patch in all_patches(inputs, geometry)}
    assert len({patch.tobytes() for patch in picked}) == 7
    assert all(patch.tobytes() in known for patch in picked)


def test_sampling_estimates_the_moments_of_all_positions():
    geometry = GEOMETRIES[0]
    inputs = images(geometry, count=600)
    whole, sampled = MomentAccumulator(geometry, 10_000), MomentAccumulator(geometry, 9, seed=1)
    whole.update(inputs)
    sampled.update(inputs)
    exact = whole.moments().covariance
    assert sampled.samples == 600 * 9
    assert np.linalg.norm(sampled.moments().covariance - exact) < 0.1 * np.linalg.norm(exact)


def test_positions_depend_on_the_seed_and_not_on_the_batching():
    geometry = GEOMETRIES[0]
    inputs = images(geometry, count=8)

    def moments(seed, splits):
        accumulator = MomentAccumulator(geometry, 5, seed)
        for part in np.split(inputs, splits):
            accumulator.update(part)
        return accumulator.moments().covariance

    np.testing.assert_array_equal(moments(3, [4]), moments(3, [4]))
    np.testing.assert_allclose(moments(3, [1, 4, 5]), moments(3, []), atol=1e-4)
    assert np.abs(moments(4, []) - moments(3, [])).max() > 1e-2


def test_large_mean_keeps_the_variance():
    geometry = ConvGeometry(4, 4, 6, 6, (1, 1))
    inputs = images(geometry, count=50, offset=1000.0)
    accumulator = MomentAccumulator(geometry, 36)
    accumulator.update(inputs)
    expected = np.cov(all_patches(inputs, geometry).T, bias=True)
    np.testing.assert_allclose(accumulator.moments().covariance, expected, atol=1e-3)


def test_block_covariances_are_means_of_diagonal_blocks():
    geometry = GEOMETRIES[1]
    accumulator = MomentAccumulator(geometry, 100)
    accumulator.update(images(geometry))
    moments = accumulator.moments()
    s = moments.covariance.reshape(2, 3, 2, 2, 3, 2)
    channel = np.mean([s[:, x, y][:, :, x, y] for x in range(3) for y in range(2)], axis=0)
    np.testing.assert_allclose(moments.channel_covariance(2, 6), channel)
    column = np.mean([s[:, :, y][..., y] for y in range(2)], axis=0).reshape(6, 6)
    np.testing.assert_allclose(moments.column_covariance(2, (3, 2)), column)
    with pytest.raises(ValueError, match="7 x 2"):
        moments.block_covariance(7, 2)


def test_relative_error_and_bias_match_the_outputs():
    geometry = GEOMETRIES[0]
    inputs = images(geometry, count=20)
    accumulator = MomentAccumulator(geometry, 10_000)
    accumulator.update(inputs)
    moments, patches = accumulator.moments(), all_patches(inputs, geometry)
    random = np.random.default_rng(0)
    weight = random.normal(size=geometry.weight_shape)
    other = weight + 0.3 * random.normal(size=weight.shape)
    exact, approximate = (patches @ w.reshape(4, -1).T for w in (weight, other))
    expected = (exact - approximate).var(axis=0).sum() / exact.var(axis=0).sum()
    assert relative_error(weight, other, moments) == pytest.approx(expected, rel=1e-3)
    corrected = approximate + bias_correction(weight, other, moments)
    np.testing.assert_allclose(corrected.mean(axis=0), exact.mean(axis=0), atol=1e-4)


def test_relative_error_of_silent_layers():
    moments = InputMoments(np.diag([1.0, 0.0]), np.zeros(2), 10)
    silent = np.array([0.0, 1.0]).reshape(1, 2, 1, 1)
    assert relative_error(silent, silent * 2, moments) == 0.0
    assert relative_error(silent, silent + 1, moments) == float("inf")


def test_identity_and_damping():
    geometry = GEOMETRIES[0]
    white = InputMoments.identity(geometry)
    assert white.is_identity and white.damping == 0.0
    assert white.covariance.shape == (27, 27)
    few, many = (InputMoments(2 * np.eye(4), np.zeros(4), n) for n in (8, 10**4))
    assert many.damping == pytest.approx(2 * 4e-4)
    assert few.damping == pytest.approx(2 * 0.1)
    assert InputMoments(np.zeros((4, 4)), np.zeros(4), 8).damping > 0


def test_few_samples_do_not_promise_what_others_do_not_keep():
    # 60 inputs seen through 40 samples: a fully connected layer sees one position a sample.
    random = np.random.default_rng(3)
    mixing = random.normal(size=(60, 60)) * np.geomspace(1.0, 0.05, 60)[:, None]
    few, many = (random.normal(size=(n, 60)) @ mixing for n in (40, 20_000))
    seen = InputMoments(np.cov(few.T, bias=True), few.mean(axis=0), len(few))
    truth = InputMoments(np.cov(many.T, bias=True), many.mean(axis=0), len(many))
    weight = random.normal(size=(30, 60))
    geometry = ConvGeometry(60, 30, 1, 1, (1, 1))

    def errors(moments):
        factors = FORMS["svd"].fitter(weight.reshape(30, 60, 1, 1), geometry, moments).fit(20)
        found = FORMS["svd"].reconstruct(factors, geometry)
        return [relative_error(weight, found, m) for m in (moments, truth)]

    promised, kept = errors(seen)
    assert promised < 0.3 * kept
    expected, other = errors(seen.shrunk())
    assert 0.5 * other < expected < 2 * other
    assert other < 1.25 * kept
    # Of a group each what it is alone; plenty of samples are believed.
    both = InputMoments(np.stack([seen.covariance, 2 * seen.covariance]), np.zeros((2, 60)), 40)
    np.testing.assert_allclose(both.shrunk().covariance[1], 2 * seen.shrunk().covariance)
    assert truth.shrunk() is truth


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="positions_per_image=0"):
        MomentAccumulator(GEOMETRIES[0], 0)
    accumulator = MomentAccumulator(GEOMETRIES[0])
    with pytest.raises(ValueError, match="no images"):
        accumulator.moments()
    with pytest.raises(ValueError, match=r"\(N, 3, 7, 6\)"):
        accumulator.update(np.zeros((1, 3, 6, 7), np.float32))
    with pytest.raises(ValueError, match="do not agree"):
        InputMoments(np.eye(3), np.zeros(2), 1)
    with pytest.raises(ValueError, match="samples=0"):
        InputMoments(2 * np.eye(3), np.zeros(3), 0)
