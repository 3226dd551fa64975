"""Fit the layers of a choice in order, to the original outputs given approximated inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import FORMS, InputMoments, PatchSampler
from tvm_lowrank.decompose.moments import SCARCE
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import POSITIONS
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.segments import Segments, State

# Multiplications and bytes of activations spent on running the network once, and the least samples.
_WORK = 2e12
_BYTES = 2 << 30
_FEWEST = 64
# Samples that are always enough if they give so many equations for each unknown.
_ENOUGH = 512
_PLENTY = 24
# Ridge of the regression, as a share of the mean variance of the inputs: unknowns over equations
# within these bounds.
_PULL = (0.01, 0.1)
# A layer that stays dense is refitted too, unless its patches are so large that the regression
# takes longer than it is worth.
_DENSE_PATCH = 1200


def refit(
    segments: Segments,
    choice: Choice,
    inputs: np.ndarray,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Refit every layer of a choice from the first factored one on, dense ones included.

    The original and the approximated network run side by side, a layer at a time. What a layer is
    to give is the original layer's output for the original input; its input is that of the
    approximated network. So a layer makes up for errors of those before it, as far as a linear map
    can. Where its output is added to another value that is known by then, the error of that value
    is added to the target: the sum comes out right.

    The target weight is the ridge regression ``B = (S + l I)^-1 (S_xy + l W)``, S the moments of
    the approximated inputs, pulled towards the original W; the factors are fitted to B under S, and
    the bias makes the mean output exact. Where samples are too few for the regression, B is W.

    Parameters
    ----------
    segments : Segments
    choice : dict
        Layer name to candidate; the dense one of a layer that may be refitted without another form.
        Layers left out keep their weights.
    inputs : np.ndarray
        Samples (n, ...); fewer are used for networks of many multiplications or large activations.
    seed : int
        Of the output positions that are drawn.
    report : callable
        Told how many layers of how many are done.

    Returns
    -------
    Choice
        With new factors, biases and errors (on the approximated inputs); times are unchanged, and
        so are candidates that were fitted to the weights alone.
    """
    layers = segments.layers
    done = dict(choice)
    wanted = _wanted(layers, choice)
    inputs = inputs[: affordable(segments, min(len(inputs), _plenty(layers, wanted)))]
    changed = [
        index
        for index, layer in enumerate(layers)
        if layer.name in choice and choice[layer.name].form != "dense"
    ]
    exact = rough = segments.start(inputs)
    for index in range(wanted[-1] + 1 if wanted else 0):
        name = layers[index].name
        if index in wanted:
            done[name] = _fit(segments, index, exact, rough, done[name], seed)
        following = segments.step(index, exact)
        if index < changed[0]:
            rough = following
        else:
            found = done.get(name)
            weight = None if found is None else (found.weight, found.bias)
            rough = segments.step(index, rough, weight)
        exact = following
        report(index + 1, wanted[-1] + 1)
    return done


def affordable(segments: Segments, samples: int) -> int:
    """How many samples a refit uses of so many."""
    work = sum(layer.geometry.multiplications for layer in segments.layers if layer.geometry)
    by_work = int(_WORK * segments.batch / max(work, 1))
    # Two networks, before and after a layer.
    by_bytes = _BYTES // max(1, 4 * segments.bytes_alive(segments.batch) // segments.batch)
    return min(samples, max(_FEWEST, min(by_work, by_bytes)))


def _plenty(layers: Sequence[ConvLayer], wanted: Sequence[int]) -> int:
    """Samples of which more would hardly change what the regressions of these layers find."""
    most = float(_ENOUGH)
    for layer in (layers[index] for index in wanted):
        if layer.geometry is not None and not layer.fully_connected:
            positions = min(POSITIONS, layer.geometry.out_height * layer.geometry.out_width)
            most = max(most, _PLENTY * _patch(layer) / positions)
    return math.ceil(most)


def _wanted(layers: Sequence[ConvLayer], choice: Choice) -> list[int]:
    """Which layers are refitted: from the first factored one on, what the choice holds."""
    found: list[int] = []
    for index, layer in enumerate(layers):
        candidate = choice.get(layer.name)
        if candidate is None or not _fits_data(candidate, layer):
            continue
        if candidate.form != "dense" or found:
            found.append(index)
    return found


def _fits_data(candidate: Candidate, layer: ConvLayer) -> bool:
    """Whether there are moments to refit it under, of one group.

    Else it stays as it is: fitted to the weights alone, or group by group.
    """
    if layer.geometry is None or layer.geometry.groups > 1:
        return False
    if candidate.form == "dense":
        return _patch(layer) <= _DENSE_PATCH
    return candidate.fitted == "data"


def _patch(layer: ConvLayer) -> int:
    assert layer.geometry is not None
    return int(np.prod(layer.geometry.weight_shape[1:]))


def _fit(
    segments: Segments, index: int, exact: State, rough: State, candidate: Candidate, seed: int
) -> Candidate:
    layer, piece = segments.layers[index], segments.piece(index)
    assert layer.geometry is not None and piece.source is not None
    pair = _Pair(layer, layer.geometry, seed)
    size = max(1, (64 << 20) // max(1, 4 * _patch(layer) * pair.patches.per_image))
    calls = max(1, size // segments.batch)
    for begin in range(0, len(exact), calls):
        one, other = exact[begin : begin + calls], rough[begin : begin + calls]
        g = layer.geometry
        shape = (-1, g.in_channels, g.height, g.width)
        original = segments.values(one, piece.source).reshape(shape)
        given = original
        if exact is not rough:
            given = segments.values(other, piece.source).reshape(shape)
        owed = None
        if piece.shortcut is not None and exact is not rough:
            shortcut = piece.shortcut
            owed = segments.values(one, shortcut) - segments.values(other, shortcut)
            owed = owed.reshape(-1, g.out_channels, g.out_height, g.out_width)
        pair.add(original, given, owed)
    return pair.refit(candidate)


class _Pair:
    """Moments of a layer's approximated inputs, and theirs with what it is to give."""

    def __init__(self, layer: ConvLayer, geometry: ConvGeometry, seed: int) -> None:
        self.geometry = geometry
        self.weight = layer.weight.astype(np.float64).reshape(len(layer.weight), -1)
        self.bias = layer.bias
        self.patches = PatchSampler(geometry, POSITIONS, seed)
        self._originals = PatchSampler(geometry, POSITIONS, seed)
        # Of the same seed and as many positions: it draws where the patches are drawn.
        out = ConvGeometry(
            geometry.out_channels,
            geometry.out_channels,
            geometry.out_height,
            geometry.out_width,
            (1, 1),
        )
        self._outputs = PatchSampler(out, POSITIONS, seed)
        size = self.weight.shape[1]
        self._products = np.zeros((size, size))
        self._cross = np.zeros((size, geometry.out_channels))
        self._sums, self._sums_out = np.zeros(size), np.zeros(geometry.out_channels)
        self._shift: np.ndarray | None = None
        self._shift_out: np.ndarray | None = None
        self._rows = 0

    def add(self, original: np.ndarray, given: np.ndarray, owed: np.ndarray | None) -> None:
        """Inputs (n, C, H, W) of both networks, and what the shortcut lacks (n, F, OH, OW)."""
        patches = self.patches.sample(given)
        source = patches if given is original else self._originals.sample(original)
        wanted = source @ self.weight.T.astype(np.float32) + self.bias
        if owed is not None:
            wanted += self._outputs.sample(owed)
        if self._shift is None:
            # Near the means, so that single precision loses little of the variance.
            self._shift, self._shift_out = patches.mean(axis=0), wanted.mean(axis=0)
        patches = patches - self._shift
        wanted = wanted - self._shift_out
        self._products += patches.T @ patches
        self._cross += patches.T @ wanted
        self._sums += patches.sum(axis=0, dtype=np.float64)
        self._sums_out += wanted.sum(axis=0, dtype=np.float64)
        self._rows += len(patches)

    def refit(self, candidate: Candidate) -> Candidate:
        assert self._shift is not None and self._shift_out is not None
        offset, offset_out = self._sums / self._rows, self._sums_out / self._rows
        covariance = self._products / self._rows - np.outer(offset, offset)
        covariance = (covariance + covariance.T) / 2
        cross = self._cross / self._rows - np.outer(offset, offset_out)
        moments = InputMoments(covariance, self._shift + offset, self._rows).shrunk()
        target = self._target(covariance, cross).reshape(self.geometry.weight_shape)
        if candidate.form == "dense":
            whole, factors, error = target, [target], 0.0
        else:
            form = FORMS[candidate.form]
            factors = form.fitter(target, self.geometry, moments).fit(candidate.rank)
            whole = form.reconstruct(factors, self.geometry)
            error = form.error(target, factors, self.geometry, moments)
        mean_output = self._shift_out.astype(np.float64) + offset_out
        return replace(
            candidate,
            factors=tuple(np.asarray(factor, np.float32) for factor in factors),
            bias=mean_output - whole.reshape(len(self.weight), -1) @ moments.mean,
            error=error,
        )

    def _target(self, covariance: np.ndarray, cross: np.ndarray) -> np.ndarray:
        """The dense weight (F, C * X * Y) that the factors are fitted to."""
        size = len(covariance)
        if self._rows < SCARCE * size:
            # The regression would learn the samples. So it is for fully connected layers, which see
            # one position a sample.
            return self.weight
        variance = max(float(covariance.diagonal().mean()), 1e-12)
        pull = float(np.clip(size / self._rows, *_PULL)) * variance
        damped = covariance + pull * np.eye(size)
        best = np.linalg.solve(damped, cross + pull * self.weight.T)
        return np.ascontiguousarray(best.T)
