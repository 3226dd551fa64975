"""Fully connected layers: the optimum, the memory it keeps, and the rewrite under stock TVM."""

from __future__ import annotations

import numpy as np
import pytest
from forms_support import correlated_moments
from helpers import relative, run
from tvm import relax
from tvm_lowrank.passes.factor_matmuls import FactorMatmuls, Factors, collect_matmuls

from tvm_lowrank.decompose import InputMoments, svd
from tvm_lowrank.decompose.svd import rank_within, weights_kept


def example():
    random = np.random.default_rng(0)
    return random.normal(size=(24, 17)), correlated_moments(24)


def lost(weight, factors, moments):
    difference = weight - factors[0] @ factors[1]
    return np.trace(difference.T @ moments.covariance @ difference)


def test_full_rank_is_exact_and_weight_only_is_the_truncated_svd():
    weight, moments = example()
    for given in (None, moments):
        first, second = svd(weight, 17, given)
        assert np.linalg.norm(first @ second - weight) < 1e-5 * np.linalg.norm(weight)
    singular = np.linalg.svd(weight, compute_uv=False)
    first, second = svd(weight, 5)
    assert np.sum((first @ second - weight) ** 2) == pytest.approx(np.sum(singular[5:] ** 2))


def test_data_beats_weights_and_reaches_the_optimum():
    weight, moments = example()
    damped = InputMoments(
        moments.covariance + moments.damping * np.eye(24), moments.mean, moments.samples
    )
    lower = np.linalg.cholesky(damped.covariance)
    singular = np.linalg.svd(lower.T @ weight, compute_uv=False)
    assert lost(weight, svd(weight, 5, moments), damped) == pytest.approx(np.sum(singular[5:] ** 2))
    assert lost(weight, svd(weight, 5, moments), moments) < lost(weight, svd(weight, 5), moments)


def test_rank_follows_the_share_of_weights_kept():
    assert rank_within((512, 256), 0.5) == 85
    assert rank_within((512, 256), 0.5, 16) == 80
    assert weights_kept((512, 256), 80) <= 0.5 * 512 * 256
    assert rank_within((8, 8), 0.5, 16) is None


@pytest.mark.parametrize("rank", [0, 18])
def test_impossible_ranks_are_named(rank):
    with pytest.raises(ValueError, match="rank="):
        svd(example()[0], rank)
    with pytest.raises(ValueError, match="matrix"):
        svd(np.ones((2, 2, 2)), 1)


def test_rewritten_product_equals_the_reconstruction_under_stock_tvm():
    weight, moments = example()
    x = relax.Var("x", relax.TensorType((3, 24), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit(relax.op.matmul(x, relax.const(weight.astype("float32"))))
            out = builder.emit_output(relax.op.nn.relu(out))
        builder.emit_func_output(out)
    mod = builder.get()
    assert [w.shape for w in collect_matmuls(mod).values()] == [(24, 17)]
    first, second = svd(weight, 6, moments)
    rewritten = FactorMatmuls({"matmul0": Factors((first, second))})(mod)
    kept = sum(w.size for w in collect_matmuls(rewritten).values())
    assert kept == weights_kept((24, 17), 6)
    inputs = np.random.default_rng(1).normal(size=(3, 24)).astype(np.float32)
    expected = np.maximum(inputs @ first @ second, 0)
    assert relative(run(rewritten, inputs), expected) < 1e-4
