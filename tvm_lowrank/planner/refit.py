"""Fit the chosen factors once more, in order, to the original outputs given approximated inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import FORMS, InputMoments, PatchSampler, relative_error
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import POSITIONS, gathered
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.trial import TrialNetwork

# Multiplications spent on running the network once, the least samples, and the most such runs.
_WORK = 1e11
_FEWEST = 64
_PASSES = 12


def refit(
    observer: TrialNetwork,
    choice: Choice,
    inputs: np.ndarray,
    seed: int,
) -> Choice:
    """Refit every factored layer of a choice, first to last.

    The layer's inputs are those of the network with all layers before it already approximated; its
    target is what the original layer gives for the original input. So a layer makes up for errors
    of those before it, as far as a linear map can. The target weight is the ridge regression
    ``B = (S + l I)^-1 (S_xy + l W)``, S the moments of the approximated inputs, pulled towards the
    original W; its factors are fitted under S, and the bias makes the mean output exact.

    Deep networks are refitted a group of neighbouring layers at a time, so that the network is run
    a bounded number of times; within a group the layers before are those not refitted yet.

    Parameters
    ----------
    observer : TrialNetwork
        Made with ``expose=True``.
    inputs : np.ndarray
        Samples (n, ...); fewer are used for networks of many multiplications.

    Returns
    -------
    Choice
        With new factors, biases and errors (on the approximated inputs); times are unchanged.
    """
    layers = observer.layers
    work = sum(layer.geometry.multiplications for layer in layers.values() if layer.geometry)
    inputs = inputs[: max(_FEWEST, int(_WORK * observer.batch / max(work, 1)))]
    order = [name for name in layers if name in choice and choice[name].form != "dense"]
    targets = {name: _Targets(layers[name], seed) for name in order}
    for _, activations in gathered(observer, inputs, order):
        for name, target in targets.items():
            target.add(activations[name])
    done = dict(choice)
    size = max(1, -(-len(order) // _PASSES))
    for group in (order[start : start + size] for start in range(0, len(order), size)):
        weights = {name: (done[name].weight, done[name].bias) for name in order}
        pairs = {name: _Pairs(layers[name], targets.pop(name), seed) for name in group}
        for _, activations in gathered(observer, inputs, group, weights):
            for name, pair in pairs.items():
                pair.add(activations[name])
        for name, pair in pairs.items():
            done[name] = pair.refit(done[name])
    return done


class _Targets:
    """Outputs (samples * positions, F) of an original layer at sampled positions."""

    def __init__(self, layer: ConvLayer, seed: int) -> None:
        assert layer.geometry is not None
        self.layer = layer
        self.sampler = PatchSampler(layer.geometry, POSITIONS, seed)
        self.parts: list[np.ndarray] = []

    def add(self, activations: np.ndarray) -> None:
        flat = self.layer.weight.reshape(len(self.layer.weight), -1)
        self.parts.append(self.sampler.sample(activations) @ flat.T + self.layer.bias)


class _Pairs:
    """Moments of approximated inputs, and theirs with the original outputs."""

    def __init__(self, layer: ConvLayer, targets: _Targets, seed: int) -> None:
        geometry = layer.geometry
        assert geometry is not None
        self.layer, self.geometry = layer, geometry
        self.sampler = PatchSampler(geometry, POSITIONS, seed)
        self.target = np.concatenate(targets.parts)
        self.mean_target = self.target.mean(axis=0, dtype=np.float64)
        self.size = int(np.prod(geometry.weight_shape[1:]))
        self.products = np.zeros((self.size, self.size))
        self.cross = np.zeros((self.size, geometry.out_channels))
        self.sums = np.zeros(self.size)
        self.shift: np.ndarray | None = None
        self.rows = 0

    def add(self, activations: np.ndarray) -> None:
        patches = self.sampler.sample(activations)
        if self.shift is None:
            self.shift = patches.mean(axis=0)
        patches -= self.shift
        wanted = self.target[self.rows : self.rows + len(patches)] - self.mean_target
        self.products += patches.T @ patches
        self.cross += patches.T @ wanted.astype(np.float32)
        self.sums += patches.sum(axis=0, dtype=np.float64)
        self.rows += len(patches)

    def refit(self, candidate: Candidate) -> Candidate:
        assert self.shift is not None
        offset = self.sums / self.rows
        covariance = self.products / self.rows - np.outer(offset, offset)
        moments = InputMoments(covariance, self.shift + offset, self.rows)
        weight = self.layer.weight.astype(np.float64)
        exact = weight.reshape(len(weight), -1)
        variance = max(float(covariance.diagonal().mean()), 1e-12)
        pull = float(np.clip(self.size / self.rows, 0.01, 0.1)) * variance
        damped = covariance + pull * np.eye(self.size)
        best = np.linalg.solve(damped, self.cross / self.rows + pull * exact.T)
        target = np.ascontiguousarray(best.T).reshape(self.geometry.weight_shape)
        form = FORMS[candidate.form]
        factors = form.fitter(target, self.geometry, moments).fit(candidate.rank)
        whole = form.reconstruct(factors)
        return replace(
            candidate,
            factors=tuple(np.asarray(factor, np.float32) for factor in factors),
            bias=self.mean_target - whole.reshape(len(weight), -1) @ moments.mean,
            error=relative_error(target, whole, moments),
        )
