"""Every form as plain Relax: TVM's own compiler computes the same, and multiplies as often."""

from __future__ import annotations

import numpy as np
import pytest
from forms_support import correlated_moments, expected_of
from helpers import relative, run
from tvm import relax
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.graph import dataflow_bindings, op_name, static_shape

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.geometry import ConvGeometry

GEOMETRIES = {
    "same": ConvGeometry(8, 12, 8, 8, (3, 3), padding=(1, 1, 1, 1)),
    "strided": ConvGeometry(8, 12, 11, 10, (5, 3), (2, 2), (2, 0, 1, 1)),
    "dilated": ConvGeometry(8, 12, 10, 9, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2)),
    "pointwise": ConvGeometry(8, 12, 6, 5, (1, 1)),
    "large": ConvGeometry(8, 12, 16, 15, (7, 7), padding=(3, 3, 3, 3)),
    "large strided": ConvGeometry(8, 12, 24, 23, (7, 7), (2, 2), (1, 0, 2, 3)),
}


def convolution(geometry, weight, bias):
    """A module of one convolution with bias and ReLU."""
    g = geometry
    x = relax.Var("x", relax.TensorType((1, g.in_channels, g.height, g.width), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit(
                relax.op.nn.conv2d(
                    x,
                    relax.const(weight.astype("float32")),
                    g.stride,
                    g.padding,
                    g.dilation,
                    g.groups,
                )
            )
            out = builder.emit(
                relax.op.add(out, relax.const(bias.astype("float32").reshape(1, -1, 1, 1)))
            )
            out = builder.emit_output(relax.op.nn.relu(out))
        builder.emit_func_output(out)
    return builder.get()


def emitted_multiplications(mod):
    """Multiplications of every conv2d and matmul, from the shapes in the IR alone."""
    count = 0
    for binding in dataflow_bindings(mod["main"]):
        if op_name(binding.value) == "nn.conv2d":
            _, *per_output = static_shape(binding.value.args[1])
            count += int(np.prod(static_shape(binding.var)) * np.prod(per_output))
    return count


def chosen(form, geometry):
    """A cheap, a middling and the full rank."""
    ranks = form.ranks(geometry, 1)
    return [*ranks[:: max(1, len(ranks) - 1)], form.full_rank(geometry)]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_chain_equals_dense_reconstruction(name, geometry):
    form = FORMS[name]
    if reason := form.refuse(geometry):
        pytest.skip(reason)
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=geometry.weight_shape), random.normal(size=12)
    inputs = random.normal(size=(1, 8, geometry.height, geometry.width)).astype(np.float32)
    fitter = form.fitter(weight, geometry, correlated_moments(weight[0].size), refine=False)
    mod = convolution(geometry, weight, bias)
    for rank in chosen(form, geometry):
        factors = fitter.fit(rank)
        stages = tuple(form.stages(geometry, rank))
        weights = tuple(np.asarray(factor, np.float32) for factor in factors)
        chain = Chain(stages, weights, branches=form.branches(geometry, rank))
        rewritten = FactorConvolutions({"conv0": chain}, gathers=True)(mod)
        dense = expected_of(inputs, form, geometry, factors)
        expected = np.maximum(dense + bias.reshape(1, -1, 1, 1), 0)
        assert relative(run(rewritten, inputs), expected) < 1e-4
        assert emitted_multiplications(rewritten) == form.multiplications(geometry, rank)
