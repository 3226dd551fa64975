"""Calibration, trial runs and refitting on a small network."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import reference, relative, run
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, InputMoments
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.planner.calibrate import input_moments, sensitivities
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.refit import refit
from tvm_lowrank.planner.trial import TrialNetwork
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target


class Bench:
    """The small network, its layers and trial networks, and correlated inputs."""

    def __init__(self, model):
        self.model = model
        self.mod = normalise(load_model(model))
        self.layers = collect_layers(self.mod)
        timer = KernelTimer(host_target(), TuningRecords(None, "t", 1), trials=1)
        self.trial = TrialNetwork(self.mod, self.layers, timer)
        self.observer = TrialNetwork(self.mod, self.layers, timer, expose=True)
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((40, 3, 20, 20)).astype(np.float32)
        smooth = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3)) / 2
        self.inputs = np.ascontiguousarray(smooth[:, :, 1:19, 1:19])


@pytest.fixture(scope="module")
def bench(small):
    return Bench(small)


def made(layer, form_name, rank, moments):
    form, weight = FORMS[form_name], layer.weight.astype(np.float64)
    factors = form.fitter(weight, layer.geometry, moments).fit(rank)
    stages = tuple(form.stages(layer.geometry, rank))
    factors = tuple(f.astype(np.float32) for f in factors)
    return Candidate(form_name, rank, stages, factors, layer.bias, 0.1, 1.0, 1.0)


def test_trial_runs_equal_onnx_runtime_with_any_number_of_samples(bench):
    for count in (1, 5):
        x = bench.inputs[:count]
        assert relative(bench.trial.run(x), reference(bench.model, x)) < 1e-5


def test_replaced_weights_equal_a_network_rewritten_with_them(bench):
    layer = bench.layers[2]
    weight = np.random.default_rng(1).standard_normal(layer.weight.shape).astype(np.float32)
    bias = np.arange(24, dtype=np.float32)
    chain = Chain((layer.geometry,), (weight,), bias)
    expected = run(FactorConvolutions({"conv2": chain})(bench.mod), bench.inputs[:1])
    before = bench.trial.run(bench.inputs[:1])
    found = bench.trial.run(bench.inputs[:1], {"conv2": (weight, bias)})
    assert relative(found, expected) < 1e-5
    assert np.array_equal(bench.trial.run(bench.inputs[:1]), before)


def test_moments_are_those_of_the_exposed_inputs(bench):
    layers = [bench.layers[0], bench.layers[5]]
    found = input_moments(bench.observer, layers, bench.inputs[:6], seed=0)
    assert set(found) == {"conv0", "conv5"}
    read = [out[1 + 5] for out in bench.observer.stream(bench.inputs[:6])]
    pixels = np.concatenate(read).transpose(0, 2, 3, 1).reshape(-1, 32)
    assert np.allclose(found["conv5"].mean, pixels.mean(0), atol=1e-5)
    assert np.allclose(found["conv5"].covariance, np.cov(pixels.T, bias=True), atol=1e-4)


def test_sensitivity_of_a_layer_is_the_outputs_move_over_its_error(bench):
    layer = bench.layers[1]
    lossy = made(layer, "separable", 16, InputMoments.identity(layer.geometry))
    original = bench.trial.run(bench.inputs)
    found = sensitivities(bench.trial, {"conv1": [lossy]}, bench.inputs, original, False)
    moved = bench.trial.run(bench.inputs, {"conv1": (lossy.weight, lossy.bias)})
    expected = ((moved - original) ** 2).sum() / (original**2).sum() / 0.1
    assert found["conv1"] == pytest.approx(expected, rel=1e-4)


def test_refitting_brings_the_output_nearer(bench):
    names = {"conv1": ("separable", 16), "conv2": ("tucker2", (16, 24)), "conv5": (
        "linear_combination", 16)}  # fmt: skip
    by_name = {layer.name: layer for layer in bench.layers}
    fit, held = bench.inputs[:30], bench.inputs[30:]
    moments = input_moments(bench.observer, [by_name[n] for n in names], fit, seed=0)
    choice = {n: made(by_name[n], *names[n], moments[n]) for n in names}
    original = bench.trial.run(held)

    def error(chosen):
        outputs = bench.trial.run(held, {n: (c.weight, c.bias) for n, c in chosen.items()})
        return np.linalg.norm(outputs - original)

    better = refit(bench.observer, choice, fit, seed=0)
    assert error(better) < 0.9 * error(choice)
    again = refit(bench.observer, choice, fit, seed=0)
    for name in names:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(better[name].factors, again[name].factors, strict=True)
        )
        assert better[name].stages == choice[name].stages
