"""Clusters of channels, orders folded into neighbours, modes chosen by cost, tensorly beside us."""

from __future__ import annotations

import numpy as np
import pytest
from forms_support import correlated_moments, example
from helpers import operators, relative, run
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac
from tvm import relax
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.fold_orders import FoldOrders

from tvm_lowrank.decompose import FORMS, Bicluster, cp, k_subspaces, partition, relative_error
from tvm_lowrank.geometry import ConvGeometry


def planted(clusters=3, size=8, dimension=2, ambient=12):
    """Points on random subspaces in a random order, and the subspace of each."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(clusters), size))
    bases = random.normal(size=(clusters, dimension, ambient))
    return np.stack([random.normal(size=dimension) @ bases[k] for k in labels]), labels


def test_k_subspaces_finds_planted_subspaces_in_balance():
    points, truth = planted()
    found = k_subspaces(points, 3, 2)
    assert np.bincount(found).tolist() == [8, 8, 8]
    together = truth[:, None] == truth[None]
    np.testing.assert_array_equal(found[:, None] == found[None], together)
    np.testing.assert_array_equal(found, k_subspaces(points, 3, 2))


def test_clusters_beat_slices_where_there_are_clusters():
    random = np.random.default_rng(1)
    geometry = ConvGeometry(8, 24, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    # Each filter is a sum of the four terms of its cluster, and the clusters share nothing.
    labels = random.permutation(np.repeat([0, 1], 12))
    basis = np.einsum("gkc,gkx,gky->gkcxy", *(random.normal(size=(2, 4, d)) for d in (8, 3, 3)))
    weight = np.einsum("fk,fkcxy->fcxy", random.normal(size=(24, 4)), basis[labels])
    errors = [
        np.sum((f.reconstruct(f.fitter(weight, geometry).fit((1, 2, 4))) - weight) ** 2)
        for f in (FORMS["bicluster"], Bicluster(contiguous=True))
    ]
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize(
    ("name", "rank"), [("bicluster", (2, 2, 8)), ("bicluster_separable", (2, 2, 4))]
)
def test_orders_vanish_between_dense_layers(name, rank):
    geometry, weight, moments = example()
    random = np.random.default_rng(0)
    before, after = random.normal(size=(8, 5, 1, 1)), random.normal(size=(4, 10, 3, 3))
    bias = random.normal(size=(1, 10, 1, 1))

    def const(array):
        return relax.const(array.astype("float32"))

    x = relax.Var("x", relax.TensorType((1, 5, 9, 9), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit(relax.op.nn.conv2d(x, const(before)))
            out = builder.emit(relax.op.nn.relu(out))
            out = builder.emit(relax.op.nn.conv2d(out, const(weight), padding=geometry.padding))
            out = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(out, const(bias)))))
            out = builder.emit_output(relax.op.nn.conv2d(out, const(after)))
        builder.emit_func_output(out)
    mod, form = builder.get(), FORMS[name]
    factors = form.fitter(weight, geometry, moments).fit(rank)
    stages = tuple(form.stages(geometry, rank))
    chain = Chain(stages, tuple(f.astype(np.float32) for f in factors))
    rewritten = FactorConvolutions({"conv1": chain}, gathers=True)(mod)
    # The order between two grouped stages has nowhere to go; those at the ends have.
    assert operators(rewritten)["take"] == len(form.gathers(geometry, rank)) - 2
    whole = FactorConvolutions(
        {"conv1": Chain((geometry,), (form.reconstruct(factors).astype(np.float32),))}
    )(mod)
    inputs = random.normal(size=(1, 5, 9, 9)).astype(np.float32)
    assert relative(run(rewritten, inputs), run(whole, inputs)) < 1e-4


@pytest.mark.parametrize(
    ("second", "inputs"), [([1, 2, 3, 0, 5, 4], 6), (range(6), 3)], ids=["folds too", "is none"]
)
def test_an_order_folds_into_the_next_order_through_a_depthwise_layer(second, inputs):
    rng = np.random.default_rng(3)
    weights = {
        "first": rng.standard_normal((6, 6, 1, 1)),
        "order": np.eye(6)[[2, 0, 1, 5, 3, 4]].reshape(6, 6, 1, 1),
        "depthwise": rng.standard_normal((6, 1, 3, 3)),
        "next_order": np.eye(6)[list(second)].reshape(6, 6, 1, 1),
        "last": rng.standard_normal((4, inputs, 1, 1)),
    }
    build = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 6, 5, 4), "float32"))
    with build.function("main", [x]):
        with build.dataflow():
            value = x
            for name, weight in weights.items():
                conv = relax.op.nn.conv2d(
                    build.emit(relax.op.nn.relu(value)) if name == "depthwise" else value,
                    relax.const(weight.astype(np.float32)),
                    padding=weight.shape[2] // 2,
                    groups=6 // weight.shape[1],
                )
                value = build.emit(conv)
            value = build.emit_output(value)
        build.emit_func_output(value)
    mod = build.get()
    folded = FoldOrders()(mod)
    data = rng.standard_normal((1, 6, 5, 4)).astype(np.float32)
    assert relative(run(folded, data), run(mod, data)) < 1e-6
    assert operators(folded)["nn.conv2d"] < operators(mod)["nn.conv2d"]


def test_cp_is_as_good_as_tensorly():
    _, weight, _ = example()
    ours = FORMS["cp"].reconstruct(cp(weight, 12))
    theirs = cp_to_tensor(parafac(weight, 12, n_iter_max=200, init="svd", random_state=0))
    assert np.sum((ours - weight) ** 2) < 1.05 * np.sum((theirs - weight) ** 2)


def test_modes_are_cut_where_it_costs_least():
    random = np.random.default_rng(0)
    geometry = ConvGeometry(12, 10, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    # Three directions of the inputs only: cutting those alone is exact.
    weight = np.einsum("fkxy,kc->fcxy", random.normal(size=(10, 3, 3, 3)), np.eye(3, 12))
    rank = partition(weight, geometry, 0.4)
    assert rank is not None and rank[0] < 12 and rank[2] == 10
    form = FORMS["tensor_train"]
    assert form.multiplications(geometry, rank) <= 0.4 * geometry.multiplications
    whole = form.reconstruct(form.fitter(weight, geometry).fit(rank))
    assert np.sum((whole - weight) ** 2) < 1e-6 * np.sum(weight**2)
    noise = random.normal(size=geometry.weight_shape)
    given = partition(noise, geometry, 0.5, correlated_moments(108))
    assert form.multiplications(geometry, given) <= 0.5 * geometry.multiplications
    error = relative_error(
        noise,
        form.reconstruct(form.fitter(noise, geometry, correlated_moments(108)).fit(given)),
        correlated_moments(108),
    )
    assert error < 0.5


def test_sizes_are_kept_at_the_least_cost():
    # Four points near the axes x, x, x, y: one of the three has to change, the one nearest to y.
    angles = np.array([0.0, 0.1, 0.3, 1.5])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = k_subspaces(points, 2, 1)
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize("name", ["bicluster", "bicluster_separable", "shared_factor", "cp", "cp3"])
def test_a_fitter_owes_nothing_to_the_ranks_before(name):
    geometry, weight, moments = example()
    ranks = FORMS[name].ranks(geometry, 1)[:5]
    together = FORMS[name].fitter(weight, geometry, moments)
    for rank in [*ranks, *ranks[::-1]]:
        alone = FORMS[name].fitter(weight, geometry, moments).fit(rank)
        for one, other in zip(together.fit(rank), alone, strict=True):
            np.testing.assert_array_equal(one, other)
