"""What the data says about each layer: the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tvm_lowrank.decompose.moments import InputMoments, MomentAccumulator
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.trial import TrialNetwork

# Output positions sampled of each image.
POSITIONS = 64
# Activations gathered before they enter the moments: one product of many rows is far cheaper than
# many products of few.
_HELD_BYTES = 256 << 20


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
    if not layers:
        return {}
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
    return {name: accumulator.moments().shrunk() for name, accumulator in gather.items()}


def gathered(
    observer: TrialNetwork,
    inputs: np.ndarray,
    names: Sequence[str],
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Inputs of the named layers, many samples at a time, with the number of samples so far."""
    held: dict[str, list[np.ndarray]] = {name: [] for name in names}
    size = done = 0
    for outputs in observer.stream(inputs, None, names):
        for name, value in zip(names, outputs[1:], strict=True):
            held[name].append(value)
            size += value.nbytes
        done += len(outputs[0])
        if size > _HELD_BYTES or done == len(inputs):
            yield done, {name: np.concatenate(values) for name, values in held.items()}
            for values in held.values():
                values.clear()
            size = 0
