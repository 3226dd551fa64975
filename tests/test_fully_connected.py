"""Fully connected layers in plans: found, tried out, chosen by the memory they save, replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import operators, relative, run
from rich.console import Console
from tvm import relax
from tvm_lowrank.passes.factor_matmuls import FactorMatmuls, Factors
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, InputMoments
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import allocate
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.candidates import Candidate, confirm_memory, forms_for, propose
from tvm_lowrank.planner.refit import Refitter
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.report.tables import render
from tvm_lowrank.target import host_target


def network(seed=0):
    """A convolution, a flattened map of 8 x 6 x 5 into 40, and 40 into 12, each with a bias."""
    rng = np.random.default_rng(seed)

    def const(*shape, scale=1.0):
        return relax.const((scale * rng.standard_normal(shape)).astype("float32"))

    x = relax.Var("x", relax.TensorType((1, 4, 6, 5), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, const(8, 4, 3, 3, scale=0.2), padding=(1, 1)))
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, const(1, 8, 1, 1)))))
            y = builder.emit(relax.op.reshape(y, (1, 240)))
            y = builder.emit(relax.op.matmul(y, const(240, 40, scale=0.1)))
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, const(40)))))
            y = builder.emit(relax.op.matmul(y, const(40, 12, scale=0.2)))
            y = builder.emit_output(relax.op.add(y, const(12)))
        builder.emit_func_output(y)
    return normalise(builder.get())


@pytest.fixture(scope="module")
def bench():
    mod = network()
    timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
    layers = collect_layers(mod)
    inputs = np.random.default_rng(1).standard_normal((60, 4, 6, 5)).astype(np.float32)
    return SimpleNamespace(
        mod=mod,
        layers={layer.name: layer for layer in layers},
        segments=Segments(mod, layers, timer),
        inputs=inputs,
    )


def candidate(layer, rank, moments=None, **more):
    form = FORMS["svd"]
    factors = form.fitter(layer.weight.astype(np.float64), layer.geometry, moments).fit(rank)
    return Candidate(
        "svd",
        rank,
        tuple(form.stages(layer.geometry, rank)),
        tuple(f.astype(np.float32) for f in factors),
        layer.bias,
        form.error(layer.weight, factors, layer.geometry, moments or identity(layer)),
        1.0,
        geometry=layer.geometry,
        **more,
    )


def identity(layer):
    return InputMoments.identity(layer.geometry)


def test_layers_are_convolutions_as_large_as_their_input(bench):
    assert list(bench.layers) == ["conv0", "matmul0", "matmul1"]
    flat, last = bench.layers["matmul0"], bench.layers["matmul1"]
    assert flat.weight.shape == (40, 8, 6, 5) and flat.geometry.kernel == (6, 5)
    assert last.weight.shape == (12, 40, 1, 1) and last.bias.shape == (12,)
    assert flat.fully_connected and not bench.layers["conv0"].fully_connected
    assert forms_for(flat, ["dense", *FORMS]) == ["svd"]
    assert "svd" not in forms_for(bench.layers["conv0"], ["dense", *FORMS])


def test_moments_are_those_of_what_the_products_read(bench):
    names = ("matmul0", "matmul1")
    found = input_moments(bench.segments, [bench.layers[n] for n in names], bench.inputs, 0)
    read = list(bench.segments.inputs_of(names, bench.inputs))
    first, second = (np.concatenate([batch[name] for batch in read]) for name in names)
    assert first.shape[1:] == (8, 6, 5) and second.shape[1:] == (40, 1, 1)
    flat = first.reshape(60, -1)
    np.testing.assert_allclose(found["matmul0"].mean, flat.mean(0), atol=1e-5)
    # 60 samples of 240 inputs: few.
    seen = InputMoments(np.cov(flat.T, bias=True), flat.mean(0), len(flat))
    np.testing.assert_allclose(found["matmul0"].covariance, seen.shrunk().covariance, atol=1e-4)
    expected = np.maximum(
        flat @ bench.layers["matmul0"].weight.reshape(40, -1).T + bench.layers["matmul0"].bias, 0
    )
    np.testing.assert_allclose(second.reshape(60, -1), expected, rtol=1e-4, atol=1e-4)


def test_tried_weights_equal_the_rewritten_network(bench):
    taken = candidate(bench.layers["matmul0"], 9)
    bias = taken.bias + np.float32(0.5)
    found = bench.segments.run(bench.inputs[:2], {"matmul0": (taken.weight, bias)})
    mod = FactorMatmuls({"matmul0": Factors.of_stages(taken.factors, bias)})(bench.mod)
    assert operators(mod)["matmul"] == 3
    expected = np.concatenate([run(mod, x[None]) for x in bench.inputs[:2]])
    assert relative(found, expected) < 1e-5
    assert relative(expected, bench.segments.run(bench.inputs[:2])) > 1e-2


def refit(bench, choice):
    options = {name: [candidate] for name, candidate in choice.items()}
    return Refitter(bench.segments, options, bench.inputs[:40], seed=0).refit(choice)


def test_refitting_brings_the_output_nearer_and_leaves_blind_fits_alone(bench):
    layers = [bench.layers[name] for name in ("matmul0", "matmul1")]
    moments = input_moments(bench.segments, layers, bench.inputs[:40], 0)
    choice = {x.name: candidate(x, 6, moments[x.name]) for x in layers}
    held = bench.inputs[40:]
    original = bench.segments.run(held)

    def error(chosen):
        weights = {name: (c.weight, c.bias) for name, c in chosen.items()}
        return np.linalg.norm(bench.segments.run(held, weights) - original)

    assert error(refit(bench, choice)) < error(choice)
    blind = {name: replace(c, fitted="weights") for name, c in choice.items()}
    assert refit(bench, blind) == blind


def test_candidates_keep_fewer_weights_and_none_is_slower(bench):
    layer = bench.layers["matmul0"]
    dense = Candidate("dense", 0, (layer.geometry,), (layer.weight,), layer.bias, 0, 9, 10)
    tried = [candidate(layer, rank) for rank in (4, 8, 16, 32)]
    times = {4: 3.0, 8: 11.0, 16: 10.0, 32: 5.0}
    timer = SimpleNamespace(within=lambda stages, _limit: times[stages[0].out_channels])
    found = confirm_memory(tried, dense, timer, gigabytes=2.0)
    assert [c.rank for c in found] == [4, 16, 32, 0]  # 8 is slower than dense
    assert [c.cost_us for c in found] == [4 * c.weight_count / 2e3 for c in found]
    choice = allocate.for_time({"matmul0": found}, {"matmul0": 1.0}, found[1].cost_us)
    assert choice["matmul0"].rank == 16  # the least error that fits the memory, though 32 is faster


def test_without_data_candidates_are_fitted_to_weights_and_say_so(bench):
    layer = bench.layers["matmul0"]
    usable = SimpleNamespace(algorithms=("direct",))
    timer = SimpleNamespace(isa=isa_of(host_target()), usable=usable)
    roofline = Roofline(1e-3, 1e-3)
    found, _ = propose(layer, identity(layer), ["dense", "svd", "separable"], roofline, timer)
    assert {c.form for c in found} == {"svd"} and {c.fitted for c in found} == {"weights"}
    slow = Roofline(1e9, 1e9)  # nothing but starting kernels takes time
    assert "no form is predicted faster" in propose(layer, identity(layer), ["svd"], slow, timer)[1]
    known = input_moments(bench.segments, [layer], bench.inputs, 0)["matmul0"]
    found, _ = propose(layer, known, ["svd"], roofline, timer)
    assert {c.fitted for c in found} == {"data"}


def made_plan(bench, fitted):
    plans, factors = [], {}
    for name, layer in bench.layers.items():
        if name == "conv0":
            plans.append(LayerPlan(name, layer.geometry, stages=(layer.geometry,)))
            continue
        taken = candidate(layer, 7)
        factors[name] = (taken.factors, taken.bias)
        more = {"algorithms": ("direct",) * 2, "error": taken.error, "fitted": fitted}
        plans.append(LayerPlan(name, layer.geometry, "svd", 7, taken.stages, **more))
    target = json.loads(str(host_target()))
    return Plan(target, 1, 0, 1.0, "top1", tuple(plans), factors=factors)


def test_plans_bring_the_factors_back_and_compute_the_same_in_our_kernels(bench, tmp_path):
    plan = made_plan(bench, "weights")
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.layers[1].fitted == "weights"
    x = bench.inputs[:1]
    factored = loaded.factor(bench.mod)
    assert operators(factored)["matmul"] == 4
    expected = run(factored, x)
    weights = {name: (loaded_weight(plan, name), plan.factors[name][1]) for name in plan.factors}
    assert relative(expected, bench.segments.run(x, weights)) < 1e-4
    applied = loaded.apply(bench.mod)
    assert operators(applied)["lowrank_conv2d"] == 5
    assert relative(run(applied, x, target=host_target()), expected) < 1e-5


def loaded_weight(plan, name):
    layer = next(layer for layer in plan.layers if layer.name == name)
    return FORMS["svd"].reconstruct(plan.factors[name][0], layer.geometry)


def test_the_report_names_the_form_and_what_it_was_fitted_to(bench):
    figures = ("latency_before_ms", "latency_after_ms", "speedup", "output_error", "agreement",
               "weight_bytes_before", "weight_bytes_after", "kernel_weight_bytes")  # fmt: skip
    result = {
        **dict.fromkeys(figures, 1.0),
        "runs": 1, "batch": 1, "samples": 1, "accuracy_before": None, "synthetic_data": True,
    }  # fmt: skip
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(replace(made_plan(bench, "weights"), result=result)))
    text = captured.get()
    assert "svd" in text
    assert "fitted to the weights alone, not to data: matmul0, matmul1" in text
