"""Regression of a weight on one basis of its inputs that several taps share.

Separable and Tucker-2 chains are the same problem. Read the D inputs as ``p`` features seen at
``q`` taps (separable: ``p = C X``, ``q = Y``; Tucker-2: ``p = C``, ``q = X Y``). The first stage is
``A`` of shape (K, p), applied at every tap; the rest is a linear map ``B`` of shape (F, q K),
for Tucker-2 of limited rank. Given A, the best B has a closed form: least squares, followed by
reduced-rank regression (Izenman 1975). What is left is to search over A alone (variable
projection, Golub and Pereyra 1973), whose gradient needs no derivative of B.

Linear algebra is NumPy's only: SciPy's wheels bring a second OpenBLAS, and calls that alternate
between the two leave one's threads spinning against the other's (several times slower on two cores,
which is more than a Cholesky factor saves).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from tvm_lowrank.decompose.descent import minimise
from tvm_lowrank.decompose.moments import ROUNDING, Array, InputMoments

# Relative to the Gram matrix's mean diagonal; only there for exactly collinear rows.
GRAM_JITTER = 1e-13
# Multiplications that refining a layer may spend, and the most iterations it makes.
REFINE_BUDGET = 2e10
REFINE_ITERATIONS = 10
# Smallest curvature that is evened out, relative to the largest.
GAUGE_FLOOR = 1e-6
NEVER_DAMPED = 10**12


@dataclass
class _Seen:
    """A basis ``(K, p)`` and what the regression on it needs, all for each tap.

    ``seen`` is the basis times the covariance ``(q, K, q p)``, ``gram`` that times the basis
    ``(q, K, q, K)``, ``cross`` the weight times the covariance times the basis ``(F, q, K)``.
    """

    basis: Array
    seen: Array
    gram: Array
    cross: Array

    def leading(self, rank: int) -> _Seen:
        """The same for the first rows of the basis."""
        gram = self.gram[:, :rank, :, :rank]
        return _Seen(self.basis[:rank], self.seen[:, :rank], gram, self.cross[..., :rank])


@dataclass
class _Solution:
    """One basis with what is best given it; ``core`` is ``(outputs, q K)``, tap-major.

    ``target`` is what the core is to give, times the covariance.
    """

    regressors: _Seen
    core: Array
    mixing: Array | None
    error: float
    target: Array

    @property
    def basis(self) -> Array:
        return self.regressors.basis


def weight_basis(weight: Array) -> Array:
    """Right singular vectors ``(p, p)`` of a weight ``(F, p, q)`` unfolded over p, best first."""
    unfolded = weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])
    return np.linalg.eigh(unfolded.T @ unfolded)[1][:, ::-1]


class SharedBasis:
    """The regression for one weight ``(F, p, q)`` under one layer's moments (D = p q).

    Never factorises anything of size D; the largest are p x p and q K x q K.
    """

    def __init__(self, weight: Array, moments: InputMoments):
        """Factorise what all ranks share; copies the covariance once."""
        _, self.width, self.taps = weight.shape
        size = self.width * self.taps
        tap_major = moments.covariance.reshape(self.width, self.taps, self.width, self.taps)
        copied = np.array(tap_major.transpose(1, 0, 3, 2), order="C", copy=True)
        self._covariance = copied.reshape(size, size)
        self._covariance.reshape(-1)[:: size + 1] += moments.damping
        tapped = self._covariance.reshape(self.taps, self.width, self.taps, self.width)
        self._shared = sum(tapped[t, :, t, :] for t in range(self.taps)) / self.taps
        self._blocks: np.ndarray | None = None
        self._whiten(self._shared)
        flat = np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(len(weight), size)
        self._read(flat, flat @ self._covariance)

    def apart(self, blocks: np.ndarray) -> SharedBasis:
        """The same for `fit_blocks`; ``blocks`` (p,) is the block of each feature.

        Features are whitened block by block, so that a basis confined to a block stays confined.
        """
        other = copy(self)
        other._blocks = blocks
        other._whiten(self._shared * (blocks[:, None] == blocks[None, :]))
        other._read(self._flat, self._weighted)
        return other

    def _whiten(self, shared: Array) -> None:
        """Features are whitened by L: x = L z. The search runs in coordinates of z."""
        self._lower = np.linalg.cholesky(shared)
        self._unwhitening = np.linalg.inv(self._lower)

    def of(self, outputs: np.ndarray) -> SharedBasis:
        """The regression for some of the weight's outputs alone."""
        other = copy(self)
        other._read(self._flat[outputs], self._weighted[outputs])
        return other

    def _read(self, flat: Array, weighted: Array) -> None:
        """Take a weight ``(outputs, D)``, tap-major, and its product with the covariance."""
        self.outputs, self._flat, self._weighted = len(flat), flat, weighted
        self._energy = float(np.sum(weighted * flat))
        self._known: dict[int, _Seen] = {}
        rows = flat.reshape(-1, self.width) @ self._lower
        self._unfolded = rows.T @ rows
        if len(rows) < self.width:
            self._directions = np.linalg.svd(rows)[2].T
        else:
            self._directions = np.linalg.eigh(self._unfolded)[1][:, ::-1]

    def fit(
        self,
        rank: int,
        outputs: int | None = None,
        refine: bool = True,
        budget: float = REFINE_BUDGET,
    ) -> tuple[Array, Array, Array | None, float]:
        """Basis ``(K, p)``, core ``(F or K2, K, q)``, with ``outputs=K2`` mixing ``(F, K2)``.

        And the variance that is lost under the damped moments.

        The start is the SVD of the unfolding in whitened features (Zhang, Zou, He and Sun 2015,
        section 3, fit the output side so); ``refine`` then lowers the error, in about ``budget``
        multiplications.
        """
        outputs = None if outputs == self.outputs else outputs
        start = np.ascontiguousarray(self._directions[:, :rank].T)
        iterations = self._affordable(rank, budget) if refine and rank < self.width else 0
        best = self._best(self._leading(rank), outputs)
        if iterations and best.error > ROUNDING * self._energy:
            best = self._descend(start, best, outputs, iterations, rank)
        core = best.core.reshape(len(best.core), self.taps, rank).transpose(0, 2, 1)
        return best.basis, np.ascontiguousarray(core), best.mixing, best.error

    def fit_blocks(self, rank: int, refine: bool = True) -> tuple[Array, Array]:
        """Basis ``(G K, p)`` with K rows for each of the G blocks, and core ``(F, G K, q)``.

        As `fit`, each row reading one block only.
        """
        assert self._blocks is not None
        count = int(self._blocks.max()) + 1
        start = np.zeros((count * rank, self.width))
        for block in range(count):
            inside = np.flatnonzero(self._blocks == block)
            vectors = np.linalg.eigh(self._unfolded[np.ix_(inside, inside)])[1]
            rows = slice(block * rank, (block + 1) * rank)
            start[rows, inside] = vectors[:, : -rank - 1 : -1].T
        best = self._solve(start, None)
        iterations = self._affordable(len(start)) if refine else 0
        if iterations and best.error > ROUNDING * self._energy:
            best = self._descend(start, best, None, iterations, rank)
        core = best.core.reshape(self.outputs, self.taps, len(start)).transpose(0, 2, 1)
        return best.basis, np.ascontiguousarray(core)

    def given(self, basis: Array, outputs: int | None = None) -> tuple[Array, Array | None]:
        """The best core ``(F or K2, K, q)`` and mixing for a basis ``(K, p)``, as in `fit`."""
        outputs = None if outputs == self.outputs else outputs
        best = self._solve(basis @ np.linalg.inv(self._unwhitening), outputs)
        core = best.core.reshape(len(best.core), self.taps, len(basis)).transpose(0, 2, 1)
        return np.ascontiguousarray(core), best.mixing

    def _leading(self, rank: int) -> _Seen:
        """The first directions, worked out for all ranks up to the next power of two at once.

        Rounding depends on how many are worked out together; what a rank gives must not depend on
        which others were asked for.
        """
        count = min(1 << (rank - 1).bit_length(), self.width)
        if count not in self._known:
            self._known[count] = self._see(np.ascontiguousarray(self._directions[:, :count].T))
        return self._known[count].leading(rank)

    def _affordable(self, rank: int, budget: float = REFINE_BUDGET) -> int:
        size = self.width * self.taps
        once = size * (rank * size + self.outputs * rank * self.taps)
        return min(REFINE_ITERATIONS, int(budget / once))

    def _descend(
        self, start: Array, best: _Solution, outputs: int | None, iterations: int, together: int
    ) -> _Solution:
        """L-BFGS over the whitened basis; the error never rises above that of ``best``.

        Mixing the basis's rows changes nothing but the search's conditioning. They are mixed so
        that the core's Gram matrix, hence about half the Hessian, is the identity: 3 iterations
        then do what took 30. Only rows of one block, ``together`` after each other, mix; where
        ``start`` is zero outside of blocks it stays so.
        """
        gram = best.core.reshape(-1, len(start))
        gram = gram.T @ gram
        mixed = np.empty_like(start)
        for first in range(0, len(start), together):
            rows = slice(first, first + together)
            values, vectors = np.linalg.eigh(gram[rows, rows])
            scale = np.sqrt(np.maximum(values, GAUGE_FLOOR * max(values[-1], 0.0)))
            mixed[rows] = scale[:, None] * vectors.T @ start[rows]
        mask = 1.0
        if together < len(start):
            assert self._blocks is not None
            owners = np.arange(len(start)) // together
            mask = (owners[:, None] == self._blocks[None]).astype(float)

        def objective(whitened: Array) -> tuple[float, Array]:
            nonlocal best
            tried = self._solve(whitened, outputs)
            if tried.error < best.error:
                best = tried
            return tried.error, mask * self._gradient(tried)

        minimise(objective, mixed, iterations, inverse_curvature=0.5)
        return best

    def _solve(self, whitened: Array, outputs: int | None) -> _Solution:
        """Best core and mixing for the basis ``whitened @ inv(L)``."""
        return self._best(self._see(whitened), outputs)

    def _see(self, whitened: Array) -> _Seen:
        rank, width, taps = len(whitened), self.width, self.taps
        basis = whitened @ self._unwhitening
        seen = basis @ self._covariance.reshape(taps, width, taps * width)
        gram = (seen.reshape(-1, width) @ basis.T).reshape(taps, rank, taps, rank)
        cross = (self._weighted.reshape(-1, width) @ basis.T).reshape(self.outputs, taps, rank)
        return _Seen(basis, seen, gram, cross)

    def _best(self, given: _Seen, outputs: int | None) -> _Solution:
        size = self.taps * len(given.basis)
        gram, cross = given.gram.reshape(size, size).copy(), given.cross.reshape(-1, size)
        gram[np.diag_indices_from(gram)] += GRAM_JITTER * np.trace(gram) / len(gram)
        core = solve_gram(gram, cross)
        mixing, target, explained = None, self._weighted, float(np.sum(core * cross))
        if outputs is not None:
            values, vectors = np.linalg.eigh(core @ cross.T)
            mixing = np.ascontiguousarray(vectors[:, : -outputs - 1 : -1])
            core, target = mixing.T @ core, mixing.T @ self._weighted
            explained = float(values[-outputs:].sum())
        error = self._energy - explained
        return _Solution(given, core, mixing, error, target)

    def _gradient(self, found: _Solution) -> Array:
        """The error's gradient by the whitened basis."""
        seen = found.regressors.seen.reshape(found.core.shape[1], -1)
        residual = found.target - found.core @ seen
        pull = found.core.reshape(-1, len(found.basis)).T @ residual.reshape(-1, self.width)
        return -2.0 * pull @ self._unwhitening.T


def solve_gram(gram: Array, cross: Array) -> Array:
    """``cross @ inv(gram)``; the pseudo-inverse where the Gram matrix is singular."""
    try:
        solved = np.linalg.solve(gram, cross.T)
    except np.linalg.LinAlgError:
        solved = np.linalg.lstsq(gram, cross.T, rcond=None)[0]
    return np.ascontiguousarray(solved.T)


def seen_through(moments: InputMoments, basis: Array, taps: int) -> InputMoments:
    """Moments of ``basis @ x`` (K channels) at each tap, from those of x (p channels)."""
    rank, width = basis.shape
    blocks = moments.covariance.reshape(width, taps, width, taps)
    half = np.tensordot(basis, blocks, axes=(1, 0)).reshape(rank, taps, width, taps)
    whole = np.tensordot(half, basis, axes=(2, 1)).transpose(0, 1, 3, 2)
    covariance = whole.reshape(rank * taps, rank * taps)
    mean = (basis @ moments.mean.reshape(width, taps)).reshape(-1)
    # Without data the basis still stretches what it reads; so many samples mean no damping.
    samples = moments.samples or NEVER_DAMPED
    return InputMoments((covariance + covariance.T) / 2, mean, samples)
