"""Regression on features that are products of a channel vector and spatial vectors.

Every chain that ends in a 1x1 and otherwise has one number for each channel and tap is such a
regression: CP, biclustered CP, dictionaries shared between terms. Feature k is
``a_i(k) (x) b_j(k) [(x) c_h(k)]`` with vectors drawn from dictionaries; given those, the best
outputs' factor has a closed form, so the search is over the dictionaries alone (variable
projection, Golub and Pereyra 1973), as in `projection`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from tvm_lowrank.decompose.descent import minimise
from tvm_lowrank.decompose.form import usable
from tvm_lowrank.decompose.moments import Array, InputMoments
from tvm_lowrank.decompose.projection import solve_gram

GRAM_JITTER = 1e-13
# Multiplications that polishing a layer may spend, the most iterations it makes, and the share of
# the error that one must gain. Descent on sums of terms is slow and long: layers of 16 channels as
# of 256 still gain after a hundred iterations.
POLISH_BUDGET = 2.4e11
POLISH_ITERATIONS = 400
POLISH_TOLERANCE = 1e-5
EXACT = 1e-11


@dataclass
class Dictionaries:
    """Vectors ``(n, dimension)`` for the channels, then for each spatial mode; all C-contiguous.

    ``uses[m][k]`` is the row of ``vectors[m]`` in term k; ``mask`` (n, C) is 1 where a channel
    vector may differ from zero.
    """

    vectors: list[Array]
    uses: list[np.ndarray]
    mask: Array | None = None

    @classmethod
    def apart(cls, factors: list[Array], mask: Array | None = None) -> Dictionaries:
        """Each term with vectors of its own, from factors ``(dimension, K)``."""
        rank = factors[0].shape[1]
        own = np.arange(rank)
        return cls([np.ascontiguousarray(f.T) for f in factors], [own] * len(factors), mask)

    def features(self) -> Array:
        """``(K, D)``, D in order channel, row, column."""
        parts = [v[u] for v, u in zip(self.vectors, self.uses, strict=True)]
        whole = parts[0]
        for part in parts[1:]:
            whole = (whole[:, :, None] * part[:, None, :]).reshape(len(whole), -1)
        return whole


class TermRegression:
    """One weight ``(F, C, X, Y)`` under one layer's moments, or under none.

    The channels are whitened by L (x = L z). Dictionaries are in coordinates of z until `finish`.
    ``tensor`` is the weight in those coordinates.
    """

    def __init__(self, weight: Array, moments: InputMoments | None):
        """Copies the covariance once."""
        f, c, x, y = self.shape = weight.shape
        given = usable(moments, c * x * y)
        self._flat = np.asarray(weight, np.float64).reshape(f, -1)
        self._covariance: Array | None = None
        self._weighted = self._flat
        self._channels = np.eye(c)
        if given is not None:
            self._covariance = given.covariance.copy()
            self._covariance.reshape(-1)[:: c * x * y + 1] += given.damping
            shared = InputMoments(self._covariance, given.mean, given.samples)
            self._channels = shared.channel_covariance(c, x * y)
            self._weighted = self._flat @ self._covariance
        self._whiten(self._channels)

    def apart(self, blocks: np.ndarray) -> TermRegression:
        """The same, whitened block by block: what is confined to a block stays confined.

        ``blocks``: the block of each channel, shape (C,).
        """
        other = copy(self)
        other._whiten(self._channels * (blocks[:, None] == blocks[None, :]))
        return other

    def of(self, outputs: np.ndarray) -> TermRegression:
        """The regression for some of the weight's outputs alone."""
        other = copy(self)
        other.shape = (len(outputs), *self.shape[1:])
        other._flat, other._weighted = self._flat[outputs], self._weighted[outputs]
        other._read()
        return other

    def _whiten(self, channels: Array) -> None:
        """Take the coordinates in which the channels' covariance is the identity."""
        self._lower = np.asarray(np.linalg.cholesky(channels), np.float64)
        self._unwhitening = np.asarray(np.linalg.inv(self._lower), np.float64)
        self._read()

    def _read(self) -> None:
        """Bring the weight to those coordinates."""
        self._energy = float(np.sum(self._weighted * self._flat))
        turned = np.tensordot(self._flat.reshape(self.shape), self._lower, axes=(1, 0))
        self.tensor = np.ascontiguousarray(turned.transpose(0, 3, 1, 2))

    def finish(self, terms: Dictionaries, budget: float = POLISH_BUDGET) -> Array:
        """Polish in place, bring the channel vectors to the inputs' coordinates, fit the outputs.

        Returns the outputs' factor ``(F, K)``. ``budget``: multiplications that polishing may take.
        """
        size = self._weighted.shape[1]
        once = len(terms.uses[0]) * size * 2 * len(self._weighted)
        if self._covariance is not None:
            once += len(terms.uses[0]) * size * size
        iterations = min(POLISH_ITERATIONS, int(budget / once))
        outputs, error, _ = self._solve(terms, gradient=False)
        if iterations and error > EXACT * self._energy:
            self._balance(terms, outputs)
            self._descend(terms, iterations)
            outputs = self._solve(terms, gradient=False)[0]
        self.to_inputs(terms)
        return outputs

    def to_inputs(self, terms: Dictionaries) -> None:
        """Bring the channel vectors to the coordinates of the inputs, in place."""
        terms.vectors[0] = terms.vectors[0] @ self._unwhitening

    def _balance(self, terms: Dictionaries, outputs: Array) -> None:
        """Spread each vector's importance evenly over the modes, so that one step suits all."""
        strength = np.linalg.norm(outputs, axis=0) * np.linalg.norm(terms.features(), axis=1)
        for mode, (vectors, use) in enumerate(zip(terms.vectors, terms.uses, strict=True)):
            squares = np.bincount(use, strength**2, len(vectors))
            norms = np.linalg.norm(vectors, axis=1)
            wanted = np.maximum(squares, 1e-6 * squares.max()) ** (0.5 / len(terms.vectors))
            safe = np.where(norms > 0, norms, 1.0)
            terms.vectors[mode] = vectors * (wanted / safe)[:, None]

    def _descend(self, terms: Dictionaries, iterations: int) -> None:
        sizes = np.cumsum([v.size for v in terms.vectors])[:-1]
        best = (np.inf, terms.vectors)

        def objective(point: Array) -> tuple[float, Array]:
            nonlocal best
            parts = np.split(point, sizes)
            terms.vectors = [p.reshape(v.shape) for p, v in zip(parts, terms.vectors, strict=True)]
            _, error, slopes = self._solve(terms, gradient=True)
            if error < best[0]:
                best = error, terms.vectors
            return error, np.concatenate([s.reshape(-1) for s in slopes])

        start = np.concatenate([v.reshape(-1) for v in terms.vectors])
        scale = float(np.sum(start**2)) / max(self._energy, np.finfo(float).tiny)
        curvature = 0.05 * scale
        minimise(objective, start, iterations, curvature, POLISH_TOLERANCE)
        terms.vectors = best[1]

    def _solve(self, terms: Dictionaries, gradient: bool) -> tuple[Array, float, list[Array]]:
        """Best outputs ``(F, K)`` given the dictionaries, the squared error, and its gradient."""
        whitened = terms.vectors[0]
        plain = Dictionaries([whitened @ self._unwhitening, *terms.vectors[1:]], terms.uses)
        features = plain.features()
        seen = features if self._covariance is None else features @ self._covariance
        gram = seen @ features.T
        cross = self._weighted @ features.T
        level = float(np.trace(gram)) / len(gram) or 1.0
        gram[np.diag_indices_from(gram)] += GRAM_JITTER * level
        outputs = solve_gram(gram, cross)
        error = self._energy - float(np.sum(outputs * cross))
        if not gradient:
            return outputs, error, []
        pull = -2.0 * outputs.T @ (self._weighted - outputs @ seen)
        slopes = _gradients(pull, plain)
        slopes[0] = slopes[0] @ self._unwhitening.T
        if terms.mask is not None:
            slopes[0] *= terms.mask
        return outputs, error, slopes


def _gradients(pull: Array, terms: Dictionaries) -> list[Array]:
    """Gradients for the dictionaries from that for the features, ``(K, D)``."""
    parts = [v[u] for v, u in zip(terms.vectors, terms.uses, strict=True)]
    whole = pull.reshape(len(pull), *(part.shape[1] for part in parts))
    slopes = []
    for mode, (vectors, use) in enumerate(zip(terms.vectors, terms.uses, strict=True)):
        slope = whole
        for other in range(len(parts) - 1, -1, -1):
            if other != mode:
                shape = [len(pull)] + [1] * (slope.ndim - 1)
                shape[other + 1] = -1
                slope = np.sum(slope * parts[other].reshape(shape), axis=other + 1)
        gathered = np.zeros_like(vectors)
        np.add.at(gathered, use, slope)
        slopes.append(gathered)
    return slopes
