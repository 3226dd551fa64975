"""What the data says about each layer: the second moments of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from tvm_lowrank.decompose.moments import InputMoments, MomentAccumulator
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.segments import Segments, Weight

# Output positions sampled of each image at least, and patches for each of their inputs below which
# more positions are: factors would fit what these images happen to have.
POSITIONS = 64
PLENTY = 8
# Activations gathered before they enter the moments: one product of many rows is far cheaper than
# many products of few.
_HELD_BYTES = 256 << 20


def input_moments(
    segments: Segments,
    layers: Sequence[ConvLayer],
    inputs: np.ndarray,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
    shrink: bool = True,
    weights: Mapping[str, Weight] | None = None,
) -> dict[str, InputMoments]:
    """Second moments of the input patches of each given layer, at `positions` of each sample.

    Parameters
    ----------
    segments : Segments
    layers : sequence of ConvLayer
        Layers to gather; the others are skipped.
    inputs : np.ndarray
        Samples (n, ...).
    seed : int
        Of the positions.
    report : callable
        Told how many samples are done.
    shrink : bool
        Whether factors are to be fitted to these samples: what other samples will have is then
        wanted (`InputMoments.shrunk`). False where samples that no factor was fitted to judge.
    weights : mapping, optional
        Of layers that the network is to run with instead of its own (see `Segments.run`).
    """
    if not layers:
        return {}
    names = [layer.name for layer in layers]
    gather = {
        layer.name: MomentAccumulator(layer.geometry, positions(layer.geometry, len(inputs)), seed)
        for layer in layers
        if layer.geometry is not None
    }
    for done, activations in gathered(segments.inputs_of(names, inputs, weights), len(inputs)):
        for name, accumulator in gather.items():
            accumulator.update(activations[name])
        report(done)
    found = {name: accumulator.moments() for name, accumulator in gather.items()}
    return {name: m.shrunk() for name, m in found.items()} if shrink else found


def positions(geometry: ConvGeometry, samples: int) -> int:
    """Output positions to draw of each of so many samples, as far as a map has them.

    `POSITIONS`, or as many as give `PLENTY` patches for each input of a patch. A layer whose
    patches are wide is then seen by ``PLENTY`` times their width at least, which takes 2 ``PLENTY``
    operations for each cubed input: seconds for 2304 of them.
    """
    width = math.prod(geometry.weight_shape[1:])
    return max(POSITIONS, math.ceil(PLENTY * width / samples))


def gathered(
    batches: Iterable[Mapping[str, np.ndarray]], samples: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Batches of layers' inputs put together, with the number of all samples so far."""
    held: dict[str, list[np.ndarray]] = {}
    size = done = 0
    for batch in batches:
        for name, value in batch.items():
            held.setdefault(name, []).append(value)
            size += value.nbytes
        done += len(next(iter(batch.values())))
        if size > _HELD_BYTES or done == samples:
            yield done, {name: np.concatenate(values) for name, values in held.items()}
            for values in held.values():
                values.clear()
            size = 0
