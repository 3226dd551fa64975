"""Fit the chosen factors once more, in order, to the original outputs given approximated inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import FORMS, InputMoments, PatchSampler, relative_error
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import POSITIONS, gathered
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.trial import TrialNetwork

# Multiplications spent on running the network for the refit of one layer, and the least samples.
_WORK = 1e11
_FEWEST = 64


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
    order = [n for n in layers if n in choice and choice[n].form != "dense"]
    targets = _targets(observer, [layers[name] for name in order], inputs, seed)
    done = dict(choice)
    replaced: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in order:
        done[name] = _refit_layer(
            observer, layers[name], choice[name], inputs, targets.pop(name), replaced, seed
        )
        replaced[name] = (done[name].weight, done[name].bias)
    return done


def _targets(
    observer: TrialNetwork, layers: list[ConvLayer], inputs: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Outputs (samples * positions, F) of the original layers at the sampled positions."""
    samplers = {layer.name: PatchSampler(layer.geometry, POSITIONS, seed) for layer in layers}  # type: ignore[arg-type]
    found: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    for _, activations in gathered(observer, inputs, list(found)):
        for layer in layers:
            patches = samplers[layer.name].sample(activations[layer.name])
            flat = layer.weight.reshape(len(layer.weight), -1)
            found[layer.name].append(patches @ flat.T + layer.bias)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _refit_layer(
    observer: TrialNetwork,
    layer: ConvLayer,
    candidate: Candidate,
    inputs: np.ndarray,
    target: np.ndarray,
    replaced: Mapping[str, tuple[np.ndarray, np.ndarray]],
    seed: int,
) -> Candidate:
    geometry, weight = layer.geometry, layer.weight
    assert geometry is not None
    sampler = PatchSampler(geometry, POSITIONS, seed)
    mean_target = target.mean(axis=0, dtype=np.float64)
    size = int(np.prod(geometry.weight_shape[1:]))
    products, cross = np.zeros((size, size)), np.zeros((size, len(weight)))
    shift: np.ndarray | None = None
    sums = np.zeros(size)
    row = 0
    for _, activations in gathered(observer, inputs, [layer.name], replaced):
        patches = sampler.sample(activations[layer.name])
        if shift is None:
            shift = patches.mean(axis=0)
        patches -= shift
        wanted = target[row : row + len(patches)] - mean_target.astype(np.float32)
        products += patches.T @ patches
        cross += patches.T @ wanted
        sums += patches.sum(axis=0, dtype=np.float64)
        row += len(patches)
    assert shift is not None
    offset = sums / row
    moments = InputMoments(products / row - np.outer(offset, offset), shift + offset, row)
    exact = weight.reshape(len(weight), -1).astype(np.float64)
    pull = np.clip(size / row, 0.01, 0.1) * max(float(moments.covariance.diagonal().mean()), 1e-12)
    damped = moments.covariance + pull * np.eye(size)
    best = np.linalg.solve(damped, cross / row + pull * exact.T).T.reshape(weight.shape)
    form = FORMS[candidate.form]
    factors = form.fitter(best, geometry, moments).fit(candidate.rank)
    whole = form.reconstruct(factors)
    bias = mean_target - whole.reshape(len(weight), -1) @ moments.mean
    return replace(
        candidate,
        factors=tuple(np.asarray(factor, np.float32) for factor in factors),
        bias=bias,
        error=relative_error(best, whole, moments),
    )
