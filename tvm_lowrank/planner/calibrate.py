"""What the data says about each layer: input moments, and how much the output minds its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tvm_lowrank.decompose.moments import InputMoments, MomentAccumulator
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.metrics import divergence
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.trial import TrialNetwork, Weights

# Output positions sampled of each image.
POSITIONS = 64
# Activations gathered before they enter the moments: one product of many rows is far cheaper than
# many products of few.
_HELD_BYTES = 256 << 20
# The error at which sensitivities are taken: small enough to be local, large enough to be seen.
_PROBE_ERROR = 0.08


def input_moments(
    observer: TrialNetwork,
    layers: Sequence[ConvLayer],
    inputs: np.ndarray,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, InputMoments]:
    """Second moments of the input patches of each given layer.

    Parameters
    ----------
    observer : TrialNetwork
        Made with ``expose=True``.
    layers : sequence of ConvLayer
        Layers to gather; the others are skipped.
    inputs : np.ndarray
        Samples (n, ...).
    """
    names = [layer.name for layer in layers]
    gather = {
        layer.name: MomentAccumulator(layer.geometry, POSITIONS, seed)
        for layer in layers
        if layer.geometry is not None
    }
    for done, activations in gathered(observer, inputs, names):
        for name, accumulator in gather.items():
            accumulator.update(activations[name])
        report(done)
    return {name: accumulator.moments() for name, accumulator in gather.items()}


def gathered(
    observer: TrialNetwork,
    inputs: np.ndarray,
    names: Sequence[str],
    weights: Weights | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Inputs of the named layers, many samples at a time, with the number of samples so far."""
    held: dict[str, list[np.ndarray]] = {name: [] for name in names}
    size = done = 0
    for outputs in observer.stream(inputs, weights, names):
        for name, value in zip(names, outputs[1:], strict=True):
            held[name].append(value)
            size += value.nbytes
        done += len(outputs[0])
        if size > _HELD_BYTES or done == len(inputs):
            yield done, {name: np.concatenate(values) for name, values in held.items()}
            for values in held.values():
                values.clear()
            size = 0


def sensitivities(
    trial: TrialNetwork,
    options: Mapping[str, Sequence[Candidate]],
    inputs: np.ndarray,
    original: np.ndarray,
    classifier: bool,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """How much the network's output moves for each unit of a layer's error, layer by layer.

    Each layer in turn is replaced by its candidate with an error near 0.08 and the network is run;
    the sensitivity is the divergence of the outputs over that error.
    """
    found = {}
    for done, (name, candidates) in enumerate(options.items()):
        lossy = [candidate for candidate in candidates if candidate.error > 0]
        probe = min(lossy, key=lambda c: abs(np.log(c.error / _PROBE_ERROR)))
        outputs = trial.run(inputs, {name: (probe.weight, probe.bias)})
        found[name] = divergence(outputs, original, classifier) / probe.error
        report(done + 1)
    return found
