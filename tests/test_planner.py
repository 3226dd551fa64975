"""Calibration, runs with other weights and refitting on a small network."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import small_network
from helpers import reference, relative, run
from onnx import TensorProto, helper, numpy_helper
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, InputMoments, PatchSampler
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.planner import segments as module
from tvm_lowrank.planner.calibrate import PLENTY, POSITIONS, input_moments, positions
from tvm_lowrank.planner.candidates import Candidate, propose
from tvm_lowrank.planner.refit import Refitter
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.planner.sensitivity import remembered, sensitivities
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target


class Bench:
    """The small network, its layers and pieces, and correlated inputs."""

    def __init__(self, model):
        self.model = model
        self.mod = normalise(load_model(model))
        self.layers = collect_layers(self.mod)
        timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
        self.segments = Segments(self.mod, self.layers, timer)
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((40, 3, 20, 20)).astype(np.float32)
        smooth = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3)) / 2
        self.inputs = np.ascontiguousarray(smooth[:, :, 1:19, 1:19])


@pytest.fixture(scope="module")
def bench(small):
    return Bench(small)


def plain(found, channels):
    """A map (n, C, H, W) of what may be in blocks of channels."""
    if found.ndim == 4:
        return found
    n, blocks, h, w, lanes = found.shape
    return np.moveaxis(found, 4, 2).reshape(n, blocks * lanes, h, w)[:, :channels]


def made(layer, form_name, rank, moments):
    form, weight = FORMS[form_name], layer.weight.astype(np.float64)
    factors = form.fitter(weight, layer.geometry, moments).fit(rank)
    stages = tuple(form.stages(layer.geometry, rank))
    factors = tuple(f.astype(np.float32) for f in factors)
    return Candidate(form_name, rank, stages, factors, layer.bias, 0.1, 1.0, 1.0)


def test_runs_equal_onnx_runtime_with_any_number_of_samples(bench):
    for count in (1, 5):
        x = bench.inputs[:count]
        assert relative(bench.segments.run(x), reference(bench.model, x)) < 1e-5


def test_replaced_weights_equal_a_network_rewritten_with_them(bench):
    layer = bench.layers[2]
    weight = np.random.default_rng(1).standard_normal(layer.weight.shape).astype(np.float32)
    bias = np.arange(24, dtype=np.float32)
    chain = Chain((layer.geometry,), (weight,), bias)
    expected = run(FactorConvolutions({"conv2": chain})(bench.mod), bench.inputs[:1])
    before = bench.segments.run(bench.inputs[:1])
    found = bench.segments.run(bench.inputs[:1], {"conv2": (weight, bias)})
    assert relative(found, expected) < 1e-5
    assert np.array_equal(bench.segments.run(bench.inputs[:1]), before)


def test_moments_are_those_of_what_layers_read(bench):
    layers = [bench.layers[5], bench.layers[0]]
    found = input_moments(bench.segments, layers, bench.inputs[:6], seed=0)
    assert set(found) == {"conv0", "conv5"}
    read = [batch["conv5"] for batch in bench.segments.inputs_of(["conv5"], bench.inputs[:6])]
    pixels = plain(np.concatenate(read), 32).transpose(0, 2, 3, 1).reshape(-1, 32)
    assert np.allclose(found["conv5"].mean, pixels.mean(0), atol=1e-5)
    assert np.allclose(found["conv5"].covariance, np.cov(pixels.T, bias=True), atol=1e-4)


def test_wide_patches_are_drawn_at_more_positions(bench):
    wide, narrow = ConvGeometry(256, 256, 14, 14, (3, 3)), ConvGeometry(64, 64, 14, 14, (3, 3))
    assert 96 * positions(wide, 96) >= PLENTY * 2304 > 96 * (positions(wide, 96) - 1)
    assert positions(narrow, 96) == positions(wide, 1000) == POSITIONS
    # A convolution of groups reads what one of them reads.
    assert positions(ConvGeometry(256, 256, 14, 14, (3, 3), groups=4), 96) == POSITIONS
    layer = next(layer for layer in bench.layers if layer.weight[0].size * PLENTY > 2 * POSITIONS)
    area = layer.geometry.out_height * layer.geometry.out_width
    found = input_moments(bench.segments, [layer], bench.inputs[:2], seed=0)[layer.name]
    assert found.samples == 2 * min(area, positions(layer.geometry, 2)) > 2 * POSITIONS


def test_what_judges_is_not_shrunk(bench):
    layers = [layer for layer in bench.layers if layer.geometry is not None]
    layer = max(layers, key=lambda layer: layer.weight[0].size)
    raw = input_moments(bench.segments, [layer], bench.inputs[:1], 0, shrink=False)[layer.name]
    read = next(bench.segments.inputs_of([layer.name], bench.inputs[:1]))[layer.name]
    patches = PatchSampler(layer.geometry, raw.samples).sample(read)
    np.testing.assert_allclose(raw.covariance, np.cov(patches.T, bias=True), atol=1e-5)
    drawn = input_moments(bench.segments, [layer], bench.inputs[:1], 0)[layer.name]
    np.testing.assert_array_equal(drawn.covariance, raw.shrunk().covariance)
    assert relative(drawn.covariance, raw.covariance) > 0.01


@pytest.fixture(scope="module")
def segments(bench):
    return bench.segments


def test_pieces_in_a_row_equal_the_network(bench, segments):
    expected = bench.segments.run(bench.inputs[:4])
    state = segments.start(bench.inputs[:4])
    assert relative(segments.finish(0, state), expected) < 1e-5
    for index in range(3):
        state = segments.step(index, state)
    assert relative(segments.finish(3, state), expected) < 1e-5
    replaced = (np.zeros_like(bench.layers[5].weight), bench.layers[5].bias)
    state = segments.step(4, segments.step(3, state))
    expected = bench.segments.run(bench.inputs[:4], {"conv5": replaced})
    assert relative(segments.finish(5, state, replaced), expected) < 1e-5


def test_layers_that_differ_in_their_weights_alone_run_in_one_library(monkeypatch):
    shape = ["N", 16, 4, 4]
    weights = [np.eye(16, dtype=np.float32)[:, :, None, None] * scale for scale in (2, 3, 5, 7)]
    graph = helper.make_graph(
        [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(4)],
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("x4", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    mod = normalise(load_model(helper.make_model(graph)))
    made, original = [], module.compile_module
    monkeypatch.setattr(
        module, "compile_module", lambda *args, **how: made.append(args) or original(*args, **how)
    )
    timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
    pieces = Segments(mod, collect_layers(mod), timer)
    # The first takes the input as it is, the last one alone returns what the network does.
    assert len(made) == 3
    x = np.ones((2, 16, 4, 4), np.float32)
    assert np.array_equal(pieces.finish(0, pieces.start(x)), 210 * x)


def test_inputs_of_layers_are_what_they_read(bench):
    x = bench.inputs[:3]
    (first,) = {len(batch["conv0"]) for batch in bench.segments.inputs_of(["conv0"], x)}
    assert first == 1
    read = [batch["conv0"] for batch in bench.segments.inputs_of(["conv0", "matmul0"], x)]
    assert np.array_equal(np.concatenate(read), x)
    last = next(iter(bench.segments.inputs_of(["matmul0"], x[:1])))["matmul0"]
    layer = bench.layers[-1]
    assert plain(last, 48).shape == (1, 48, 1, 1)  # of the dense layer, as a map
    weight = layer.weight.reshape(len(layer.weight), -1)
    given = plain(last, 48).reshape(1, -1) @ weight.T + layer.bias
    assert relative(given, reference(bench.model, x[:1])) < 1e-5
    zero = {"conv0": (np.zeros_like(bench.layers[0].weight), np.zeros_like(bench.layers[0].bias))}
    changed = next(iter(bench.segments.inputs_of(["conv1"], x, zero)))["conv1"]
    assert not changed.any()


def test_rows_that_fill_up_a_batch_are_left_out(bench):
    timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
    mod = normalise(load_model(bench.model, 3))
    threes = Segments(mod, collect_layers(mod), timer)
    x = bench.inputs[:5]
    assert relative(threes.run(x), reference(bench.model, x)) < 1e-5
    assert [len(b["conv1"]) for b in threes.inputs_of(["conv1"], x)] == [3, 2]


def test_fewer_samples_than_a_batch_are_repeated(bench):
    timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
    mod = normalise(load_model(bench.model, 3))
    pairs = Segments(mod, collect_layers(mod), timer)
    outputs = pairs.finish(0, pairs.start(bench.inputs[:2]))
    expected = bench.segments.run(bench.inputs[:2])
    assert relative(outputs, expected[[0, 1, 0]]) < 1e-5


def test_the_addition_behind_a_convolution_is_found(bench, segments):
    # conv2 is added to what conv1 reads; nothing is added to the others.
    assert segments.piece(2).shortcut == segments.piece(1).source
    others = [segments.piece(index).shortcut for index in (0, 1, 3, 4, 5)]
    assert others == [None] * 5


def test_sensitivity_of_a_layer_is_the_outputs_move_over_its_error(bench, segments):
    layer = bench.layers[1]
    lossy = made(layer, "separable", 16, InputMoments.identity(layer.geometry))
    original = bench.segments.run(bench.inputs)
    found = sensitivities(segments, {"conv1": [lossy]}, bench.inputs, False)
    moved = bench.segments.run(bench.inputs, {"conv1": (lossy.weight, lossy.bias)})
    expected = ((moved - original) ** 2).sum() / (original**2).sum() / 0.1
    assert found["conv1"] == pytest.approx(expected, rel=1e-4)


def test_sensitivities_are_measured_once_for_a_network_and_its_data(bench, tmp_path):
    path, calls = tmp_path / "sensitivity.json", []

    def measure():
        calls.append(1)
        return {"conv0": 0.1 + len(calls), "conv1": 1 / 3}

    def ask(mod=bench.mod, inputs=bench.inputs, wanted=("conv0", "conv1")):
        return remembered(path, mod, inputs, True, wanted, measure)

    first = ask()
    assert ask() == first and ask(wanted=("conv1",)) == {"conv1": 1 / 3} and len(calls) == 1
    assert ask(inputs=bench.inputs[:9]) != first and len(calls) == 2
    other = normalise(load_model(small_network(seed=5)))
    ask(mod=other), ask(mod=other)
    assert len(calls) == 3
    ask(mod=other, wanted=("conv0", "conv1", "conv4"))
    assert len(calls) == 4
    path.write_text("[]")
    with pytest.raises(LowRankError, match="delete the file"):
        ask()


def test_candidates_fill_whole_vectors_and_say_that_there_was_no_data():
    geometry = ConvGeometry(64, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1))
    weight = np.random.default_rng(0).standard_normal(geometry.weight_shape)
    weight *= 0.9 ** np.arange(64)[:, None, None]  # a spectrum that falls
    layer = ConvLayer("conv0", geometry, weight.astype(np.float32), np.zeros(64, np.float32))
    usable = SimpleNamespace(algorithms=("direct",))
    timer = SimpleNamespace(isa=isa_of(host_target()), usable=usable)
    roofline = Roofline(1e-3, 1e-3)
    found, _ = propose(layer, InputMoments.identity(geometry), list(FORMS), roofline, timer)
    assert len(found) >= 4 and {candidate.fitted for candidate in found} == {"weights"}
    between = {stage.out_channels for candidate in found for stage in candidate.stages[:-1]}
    assert all(channels % timer.isa.lanes == 0 for channels in between)


NAMES = {"conv1": ("separable", 16), "conv2": ("tucker2", (16, 24)), "conv5": (
    "linear_combination", 16)}  # fmt: skip


def chosen(bench, names=NAMES):
    by_name = {layer.name: layer for layer in bench.layers}
    moments = input_moments(bench.segments, [by_name[n] for n in names], bench.inputs[:30], seed=0)
    return {n: made(by_name[n], *names[n], moments[n]) for n in names}


def refit(segments, choice, inputs):
    options = {name: [candidate] for name, candidate in choice.items()}
    return Refitter(segments, options, inputs, seed=0).refit(choice)


def error(bench, choice, seen=slice(30, None)):
    held = bench.inputs[seen]
    original = bench.segments.run(held)
    outputs = bench.segments.run(held, {n: (c.weight, c.bias) for n, c in choice.items()})
    return np.linalg.norm(outputs - original)


def dense(layer):
    return Candidate("dense", 0, (layer.geometry,), (layer.weight,), layer.bias, 0.0, 1.0, 1.0)


def test_refitting_brings_the_output_nearer(bench, segments):
    choice, fit = chosen(bench), bench.inputs[:30]
    better = refit(segments, choice, fit)
    assert error(bench, better) < 0.9 * error(bench, choice)
    again = refit(segments, choice, fit)
    for name in NAMES:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(better[name].factors, again[name].factors, strict=True)
        )
        assert better[name].stages == choice[name].stages


def test_what_two_choices_begin_with_is_fitted_once_and_as_if_it_were_alone(
    bench, segments, monkeypatch
):
    first, fit = chosen(bench), bench.inputs[:30]
    other = chosen(bench, {**NAMES, "conv2": ("separable", 24)})
    second = {**first, "conv2": other["conv2"]}
    options = {name: [first[name], second[name]] for name in NAMES}
    fitted, original = [], Refitter._fit
    monkeypatch.setattr(
        Refitter,
        "_fit",
        lambda self, index, *rest: fitted.append(index) or original(self, index, *rest),
    )
    refitter = Refitter(segments, options, fit, seed=0)
    refitter.refit(first)
    assert fitted == [1, 2, 5]
    found = refitter.refit(second)
    assert fitted == [1, 2, 5, 2, 5]
    alone = Refitter(segments, options, fit, seed=0).refit(second)
    for name in NAMES:
        assert np.array_equal(found[name].weight, alone[name].weight)
        assert np.array_equal(found[name].bias, alone[name].bias)


def test_dense_layers_make_up_for_the_layers_before_them(bench, segments):
    fit = bench.inputs[:30]
    choice = chosen(bench, {"conv1": ("separable", 16)})
    alone = refit(segments, choice, fit)
    spare = {layer.name: dense(layer) for layer in bench.layers if layer.geometry.groups == 1}
    helped = refit(segments, {**spare, **choice}, fit)
    assert error(bench, helped) < 0.9 * error(bench, alone)
    # Nothing before the first factored layer has anything to make up for.
    assert helped["conv0"].factors[0] is bench.layers[0].weight
    assert helped["conv5"].factors[0] is not bench.layers[5].weight


def test_a_layer_makes_up_for_the_error_of_what_is_added_to_its_output(bench, segments):
    # conv0's output is both conv1's input and the shortcut around conv1 and conv2.
    fit, choice = bench.inputs[:30], chosen(bench, {"conv0": ("linear_combination", 16)})
    spare = {"conv2": dense(bench.layers[2])}

    def sum_error(weights):
        exact = rough = segments.start(bench.inputs[30:])
        for index in range(3):
            exact = segments.step(index, exact)
            rough = segments.step(index, rough, weights.get(f"conv{index}"))
        name = segments.piece(3).source
        both = zip(exact, rough, strict=True)
        return np.linalg.norm([e[name].numpy() - r[name].numpy() for e, r in both])

    found = refit(segments, {**spare, **choice}, fit)
    weights = {name: (c.weight, c.bias) for name, c in found.items()}
    # A regression of conv2's own output, the shortcut's error left out.
    blind = copy.copy(segments)
    blind.piece = lambda index: replace(segments.piece(index), shortcut=None)
    own = refit(blind, {**spare, **choice}, fit)
    unaware = {name: (c.weight, c.bias) for name, c in own.items()}
    assert sum_error(weights) < 0.95 * sum_error(unaware)
