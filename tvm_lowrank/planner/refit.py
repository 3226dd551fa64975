"""Fit the layers of a choice in order, to the original outputs given approximated inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import FORMS, InputMoments, PatchSampler
from tvm_lowrank.decompose.moments import SCARCE
from tvm_lowrank.decompose.projection import solve_gram
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import POSITIONS
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.segments import Segments, State

# Multiplications of one run of the network over all samples, bytes of activations and of what its
# layers are to give, and the least samples.
_WORK = 2e12
_BYTES = 2 << 30
_FEWEST = 64
# Samples that are always enough, and equations for each unknown of which more tell little.
_ENOUGH = 512
_PLENTY = 24
# Ridge of the regression, as a share of the mean variance of the inputs: unknowns over equations
# within these bounds.
_PULL = (0.01, 0.1)
# A layer that stays dense is refitted too, unless its patches are so large that the regression
# takes longer than it is worth.
_DENSE_PATCH = 1200


class Refitter:
    """Refits choices for one network, one after the other, on the same samples.

    What the original's layers give is worked out once. A choice that begins as an earlier one did
    takes over what was fitted there: a layer's fit depends on no layer behind it.

    Parameters
    ----------
    segments : Segments
    options : mapping
        Layer name to all candidates that choices may hold of it.
    inputs : np.ndarray
        Samples (n, ...); fewer are used for networks of many multiplications or large activations.
    seed : int
        Of the output positions that are drawn.
    """

    def __init__(
        self,
        segments: Segments,
        options: Mapping[str, Sequence[Candidate]],
        inputs: np.ndarray,
        seed: int,
    ) -> None:
        self.segments, self.seed = segments, seed
        self._fitted = [
            layer
            for layer in segments.layers
            if any(_fits_data(candidate, layer) for candidate in options.get(layer.name, ()))
        ]
        samples = min(len(inputs), _plenty(self._fitted))
        self.inputs = inputs[: affordable(segments, samples)]
        self._targets: dict[int, np.ndarray] = {}
        # Earlier choices with what became of them.
        self._known: list[tuple[Choice, Choice]] = []

    def refit(
        self, choice: Choice, report: Callable[[int, int], None] = lambda done, total: None
    ) -> Choice:
        """Refit every layer of a choice from the first factored one on, dense ones included.

        What a layer is to give is the original layer's output for the original input; its input is
        that of the approximated network. So a layer makes up for errors of those before it, as far
        as a linear map can. Where its output is added to another value that is known by then, the
        error of that value is added to the target: the sum comes out right.

        The target weight is the ridge regression ``B = (S + l I)^-1 (S_xy + l W)``, S the moments
        of the approximated inputs, pulled towards the original W; the factors are fitted to B under
        S, and the bias makes the mean output exact. Where samples are too few for the regression, B
        is W.

        Parameters
        ----------
        choice : dict
            Layer name to candidate; the dense one of a layer that may be refitted without another
            form. Layers left out keep their weights.
        report : callable
            Told how many layers of how many are done.

        Returns
        -------
        Choice
            With new factors, biases and errors (on the approximated inputs); times are unchanged,
            and so are candidates that were fitted to the weights alone.
        """
        layers, done = self.segments.layers, dict(choice)
        wanted = _wanted(layers, choice)
        if not wanted:
            return done
        if not self._targets:
            self._find_targets()
        common, earlier = self._longest(choice)
        state, changed = self.segments.start(self.inputs), False
        for index in range(wanted[-1] + 1):
            name = layers[index].name
            if index in wanted:
                if index < common:
                    done[name] = earlier[name]
                else:
                    done[name] = self._fit(index, state, done[name])
            found = done.get(name)
            changed = changed or (found is not None and found.form != "dense")
            weight = (found.weight, found.bias) if found is not None and changed else None
            if index < wanted[-1]:
                state = self.segments.step(index, state, weight)
            report(index + 1, wanted[-1] + 1)
        self._known.append((dict(choice), done))
        return done

    def _longest(self, choice: Choice) -> tuple[int, Choice]:
        """How many layers an earlier choice has in common with this one at most, and its fits."""
        names = [layer.name for layer in self.segments.layers]
        best: tuple[int, Choice] = (0, {})
        for other, fitted in self._known:
            differing = (i for i, n in enumerate(names) if choice.get(n) is not other.get(n))
            best = max(best, (next(differing, len(names)), fitted), key=lambda pair: pair[0])
        return best

    def _fit(self, index: int, state: State, candidate: Candidate) -> Candidate:
        """A layer's candidate, fitted to its target given the approximated state before it."""
        layer, target = self.segments.layers[index], self._targets[index]
        draw, sums = _Draw(layer, self._positions(layer), self.seed), _Sums(layer)
        done = 0
        for part in self._parts(layer, state):
            patches, other = self._drawn(draw, index, part)
            sums.add(patches, target[done : done + len(patches)] - other)
            done += len(patches)
        return sums.refit(candidate)

    def _drawn(self, draw: _Draw, index: int, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Patches of a layer's inputs and what is added to its outputs, as `_Draw` gives them."""
        drawn = [
            draw(self.segments.read(index, values), self.segments.shortcut(index, values))
            for values in state
        ]
        patches, others = ([pair[i] for pair in drawn] for i in (0, 1))
        return np.concatenate(patches), np.concatenate(others)

    def _find_targets(self) -> None:
        """What each layer gives in the original network, with what is added to that if anything."""
        state = self.segments.start(self.inputs)
        for index, layer in enumerate(self.segments.layers):
            if layer in self._fitted:
                draw = _Draw(layer, self._positions(layer), self.seed)
                weight = layer.weight.reshape(len(layer.weight), -1)
                found = []
                for part in self._parts(layer, state):
                    patches, other = self._drawn(draw, index, part)
                    found.append(patches @ weight.T + layer.bias.astype(np.float32) + other)
                self._targets[index] = np.concatenate(found)
            if index + 1 < len(self.segments.layers):
                state = self.segments.step(index, state)

    def _positions(self, layer: ConvLayer) -> int:
        """Output positions of each sample that give plenty of equations."""
        samples = max(len(self.inputs), self.segments.batch)
        return min(POSITIONS, math.ceil(_PLENTY * _patch(layer) / samples))

    def _parts(self, layer: ConvLayer, state: State) -> Iterator[State]:
        """A state in parts whose patches take some 64 MiB."""
        size = max(1, (64 << 20) // max(1, 4 * _patch(layer) * self._positions(layer)))
        calls = max(1, size // self.segments.batch)
        for begin in range(0, len(state), calls):
            yield state[begin : begin + calls]


def affordable(segments: Segments, samples: int) -> int:
    """How many samples a refit uses of so many."""
    geometries = [layer.geometry for layer in segments.layers if layer.geometry]
    work = sum(g.multiplications for g in geometries)
    by_work = int(_WORK * segments.batch / max(work, 1))
    # The network before and after a layer, and what all layers are to give.
    kept = sum(g.out_channels * min(POSITIONS, g.out_height * g.out_width) for g in geometries)
    alive = 2 * segments.bytes_alive(segments.batch) // segments.batch
    return min(samples, max(_FEWEST, min(by_work, _BYTES // max(1, alive + 4 * kept))))


def _plenty(layers: Sequence[ConvLayer]) -> int:
    """Samples of which more would hardly change what the regressions of these layers find."""
    most = float(_ENOUGH)
    for layer in layers:
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


class _Draw:
    """Draws patches of a layer's inputs, and what is added to its outputs at the same positions."""

    def __init__(self, layer: ConvLayer, positions: int, seed: int) -> None:
        g = layer.geometry
        assert g is not None
        self._patches = PatchSampler(g, positions, seed)
        # Of the same seed and as many positions: it draws where the patches are drawn.
        out = ConvGeometry(g.out_channels, g.out_channels, g.out_height, g.out_width, (1, 1))
        self._outputs = PatchSampler(out, positions, seed)

    def __call__(
        self, inputs: np.ndarray, other: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Patches (rows, C X Y) of inputs, and (rows, F) of ``other``, else (rows, 1) of 0."""
        patches = self._patches.sample(inputs)
        if other is None:
            return patches, np.zeros((len(patches), 1), np.float32)
        return patches, self._outputs.sample(other)


class _Sums:
    """Moments of a layer's approximated inputs, and theirs with what it is to give."""

    def __init__(self, layer: ConvLayer) -> None:
        assert layer.geometry is not None
        self.geometry = layer.geometry
        self.weight = layer.weight.astype(np.float64).reshape(len(layer.weight), -1)
        outputs, size = self.weight.shape
        self._products = np.zeros((size, size))
        self._cross = np.zeros((size, outputs))
        self._sums, self._sums_out = np.zeros(size), np.zeros(outputs)
        self._shift: np.ndarray | None = None
        self._shift_out: np.ndarray | None = None
        self._rows = 0

    def add(self, patches: np.ndarray, wanted: np.ndarray) -> None:
        """Patches (rows, C X Y) and what is wanted of them (rows, F)."""
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
            fitter = form.fitter(target, self.geometry, moments)
            factors, whole, error = form.fit(fitter, candidate.rank, target, self.geometry, moments)
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
        return solve_gram(damped, cross.T + pull * self.weight)
