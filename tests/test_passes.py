"""The passes: structure of the IR before and after, and the numbers it computes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from helpers import operators, reference, relative, run
from tvm import relax
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions, survey
from tvm_lowrank.passes.pipeline import factor, normalise
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.decompose.compose import channel_order
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.target import host_target


@pytest.fixture(scope="module")
def normalised(small):
    return normalise(load_model(small))


@pytest.fixture(scope="module")
def sample():
    return np.random.default_rng(1).standard_normal((1, 3, 18, 18)).astype(np.float32)


def lower(mod, **options):
    target = host_target()
    isa = isa_of(target)
    return LowerConvolutions(
        isa, lambda workload: default_schedule(workload, isa), **options
    ), target


def test_normalise_folds_batch_norm_into_the_convolution_before_it(normalised, small, sample):
    found = operators(normalised)
    assert not any("batch_norm" in name or name in ("divide", "subtract") for name in found)
    assert found["nn.conv2d"] == 6
    assert found["multiply"] == 1  # the batch norm that follows an activation
    assert relative(run(normalised, sample), reference(small, sample)) < 1e-5


def test_normalise_gives_every_convolution_a_bias(normalised):
    layers = [x for x in collect_layers(normalised) if not x.fully_connected]
    assert [layer.geometry.kernel for layer in layers] == [
        (5, 5), (3, 3), (3, 3), (3, 3), (3, 3), (1, 1),
    ]  # fmt: skip
    assert [layer.geometry.groups for layer in layers] == [1, 1, 1, 1, 32, 1]
    assert layers[3].geometry.padding == (1, 0, 1, 1)
    assert layers[2].geometry.dilation == (2, 2)
    for layer in layers:
        assert layer.bias.shape == (layer.geometry.out_channels,)


def test_a_scale_shared_by_two_readers_is_not_folded_twice():
    x = relax.Var("x", relax.TensorType((1, 4, 5, 5), "float32"))
    rng = np.random.default_rng(0)
    weight = relax.const(rng.standard_normal((6, 4, 3, 3)).astype("float32"))
    scale = relax.const(rng.uniform(1, 2, (1, 6, 1, 1)).astype("float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            conv = builder.emit(relax.op.nn.conv2d(x, weight))
            scaled = builder.emit(relax.op.multiply(conv, scale))
            out = builder.emit_output(relax.op.add(builder.emit(relax.op.nn.relu(conv)), scaled))
        builder.emit_func_output(out)
    mod = builder.get()
    data = rng.standard_normal((1, 4, 5, 5)).astype(np.float32)
    assert relative(run(normalise(mod), data), run(mod, data)) < 1e-5


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"multiresolution"}))
def test_factored_layers_equal_their_reconstruction_under_stock_compilation(
    name, normalised, sample
):
    form, chains, dense = FORMS[name], {}, {}
    for layer in collect_layers(normalised):
        if form.refuse(layer.geometry) or layer.fully_connected != form.keeps_memory:
            continue
        rank = form.ranks(layer.geometry, 1 if layer.fully_connected else 8)[-1:]
        if not rank:
            continue
        weight = layer.weight.astype(np.float64)
        factors = form.fitter(weight, layer.geometry, None).fit(rank[0])
        stages = tuple(form.stages(layer.geometry, rank[0]))
        chains[layer.name] = Chain(stages, tuple(factors), layer.bias + 0.5)
        whole = form.reconstruct(factors)
        dense[layer.name] = Chain((layer.geometry,), (whole,), layer.bias + 0.5)
    assert chains
    factored = factor(normalised, chains)
    if form.keeps_memory:
        (name, chain), one = chains.popitem(), np.eye(10)[:, :, None, None]
        dense = {name: Chain(chain.stages, (whole, one), chain.bias)}
        assert operators(factored)["matmul"] == 2
        assert relative(run(factored, sample), run(factor(normalised, dense), sample)) < 1e-5
        return
    added = sum(len(chain.stages) - 1 for chain in chains.values())
    weights = [weight for chain in chains.values() for weight in chain.weights]
    orders = sum(channel_order(weight) is not None for weight in weights)
    # A stage that only orders channels may have been folded into its neighbours.
    assert 6 + added - orders <= operators(factored)["nn.conv2d"] <= 6 + added
    expected = run(FactorConvolutions(dense)(normalised), sample)
    # Terms of a sum may be large and cancel.
    assert relative(run(factored, sample), expected) < 1e-4


def test_lowering_fuses_epilogues_and_converts_layouts_only_at_borders(normalised, small, sample):
    pass_, target = lower(normalised)
    lowered = pass_(normalised)
    found = operators(lowered)
    assert found["lowrank_conv2d"] == 7  # six convolutions and the dense layer
    # The input, of three channels, is read as it is, and ten numbers come out of their block.
    assert found["lowrank_unblock"] == 1 and found["lowrank_block"] == 0
    assert not {"nn.conv2d", "nn.relu", "multiply", "add"} & set(found)
    workloads = survey(normalised, pass_.isa, pass_.choose)
    assert len(workloads) == found["lowrank_conv2d"]
    epilogues = [workload.epilogue for workload in workloads]
    assert ("bias", "residual", "relu") in epilogues
    assert ("bias", "relu", "affine") in epilogues
    assert relative(run(lowered, sample, target=target), reference(small, sample)) < 1e-5


def test_branches_are_summed_by_our_kernels_too(normalised, sample):
    form, layer = FORMS["multiresolution"], collect_layers(normalised)[0]
    rank = (3, 2, 1)
    factors = form.fitter(layer.weight.astype(np.float64), layer.geometry, None).fit(rank)
    stages = tuple(form.stages(layer.geometry, rank))
    chain = Chain(stages, tuple(factors), branches=form.branches(layer.geometry, rank))
    factored = FactorConvolutions({"conv0": chain})(normalised)
    assert operators(factored)["nn.conv2d"] == 5 + len(stages)
    pass_, target = lower(factored)
    lowered = pass_(factored)
    assert operators(lowered)["lowrank_conv2d"] == 5 + len(stages) + 1
    assert relative(run(lowered, sample, target=target), run(factored, sample)) < 1e-5


def test_weights_as_parameters_compute_the_same(normalised, sample):
    pass_, target = lower(normalised, weights_as_parameters=True)
    lowered = pass_(normalised)
    layers = {layer.name: layer for layer in collect_layers(normalised)}
    assert len(pass_.parameters_) == 14
    packed = [
        p.pack(layers[p.layer].weight if p.kind == "weight" else layers[p.layer].bias)
        for p in pass_.parameters_
    ]
    assert relative(run(lowered, sample, *packed, target=target), run(normalised, sample)) < 1e-5


def test_control_flow_passes_through_untouched():
    x = relax.Var("x", relax.TensorType((2, 2), "float32"))
    cond = relax.Var("c", relax.TensorType((), "bool"))
    builder = relax.BlockBuilder()
    with builder.function("main", [cond, x]):
        branch = builder.emit(relax.If(cond, relax.SeqExpr([], x), relax.SeqExpr([], x)))
        builder.emit_func_output(branch)
    mod = builder.get()
    assert collect_layers(mod) == []
    tvm.ir.assert_structural_equal(FactorConvolutions({})(mod), mod)
