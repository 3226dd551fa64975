"""Alternating least squares for CP decompositions, kept stable by bounding the terms' norms.

A tensor ``(F, C, ...)`` is approximated by K rank-1 terms; a factor is ``(dimension, K)`` for each
mode. All factors but the outputs' have unit columns. tensorly's `parafac` minimises the same
error; here each sweep needs only two products with the tensor, and nothing of size ``D K`` is
formed for each mode, which is what makes deep layers affordable.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_lowrank.decompose.moments import Array
from tvm_lowrank.decompose.projection import solve_gram

RIDGE = 1e-10
# The sum of squared norms of the terms, as a multiple of the tensor's, above which it is corrected,
# and how much the error may grow by that.
INTENSITY = 4.0
SLACK = 1.01
EXACT = 1e-14


class OrthogonalTerms:
    """Terms of SVDs of a tensor, taken slice by slice: where alternating least squares starts.

    The spatial modes are turned to their principal axes; each slice ``(F, C)`` along those is
    decomposed by its SVD. The terms are orthogonal, so no two of them can cancel each other: a
    start from which alternating least squares does not degenerate. All of them are the tensor
    itself. Where decomposing the kernel of each pair of channels takes fewer terms, that is done
    instead. Decomposed once, for all ranks.
    """

    def __init__(self, tensor: Array):
        """Of a tensor ``(F, C, ...)``."""
        self.tensor = tensor
        f, c, *spatial = tensor.shape
        taps = int(np.prod(spatial))
        pairs = f * c * (min(spatial) if len(spatial) > 1 else 1)
        terms = _tap_terms if pairs < taps * min(f, c) else _slice_terms
        self._values, self._columns = terms(tensor)
        self._order = np.argsort(-self._values.reshape(-1), kind="stable")

    def largest(self, rank: int) -> list[Array]:
        """Factors ``(dimension, rank)`` of the largest terms; all of them where there are fewer."""
        which, term = np.divmod(self._order[:rank], self._values.shape[1])
        outputs, *rest = self._columns(which, term)
        return [outputs * self._values[which, term], *rest]


_Columns = Callable[[np.ndarray, np.ndarray], list[Array]]


def _slice_terms(tensor: Array) -> tuple[Array, _Columns]:
    """Singular values ``(slices, terms)`` and what gives the unit columns of chosen terms."""
    f, c, *spatial = tensor.shape
    axes = [_principal(tensor, mode) for mode in range(2, tensor.ndim)]
    turned = tensor
    for mode, axis in enumerate(axes, 2):
        turned = np.moveaxis(np.tensordot(turned, axis, axes=(mode, 0)), -1, mode)
    slices = np.moveaxis(turned.reshape(f, c, -1), 2, 0)
    left, values, right = np.linalg.svd(slices, full_matrices=False)

    def columns(which: np.ndarray, term: np.ndarray) -> list[Array]:
        places = np.unravel_index(which, spatial)
        turns = [axis[:, place] for axis, place in zip(axes, places, strict=True)]
        return [left[which, :, term].T, right[which, term].T, *turns]

    return values, columns


def _tap_terms(tensor: Array) -> tuple[Array, _Columns]:
    """As `_slice_terms`, of the kernel of each pair of channels."""
    f, c, *spatial = tensor.shape
    kernels = tensor.reshape(f * c, *spatial)
    if len(spatial) == 1:
        values = np.linalg.norm(kernels, axis=1, keepdims=True)
        pieces = [kernels[:, None] / np.maximum(values, np.finfo(float).tiny)[:, :, None]]
    else:
        left, values, right = np.linalg.svd(kernels, full_matrices=False)
        pieces = [left.transpose(0, 2, 1), right]

    def columns(which: np.ndarray, term: np.ndarray) -> list[Array]:
        row, column = np.divmod(which, c)
        return [np.eye(f)[row].T, np.eye(c)[column].T, *(p[which, term].T for p in pieces)]

    return values, columns


def _principal(tensor: Array, mode: int) -> Array:
    flat = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
    return np.linalg.eigh(flat @ flat.T)[1][:, ::-1]


def terms_to_tensor(factors: list[Array]) -> Array:
    """The tensor that the factors stand for."""
    shape = tuple(len(factor) for factor in factors)
    return np.asarray(factors[0] @ _features(factors[1:]).T).reshape(shape)


def intensity(factors: list[Array]) -> float:
    """Sum of the squared norms of the terms."""
    return float(np.sum(np.prod([np.sum(factor**2, axis=0) for factor in factors], axis=0)))


def alternate(
    tensor: Array,
    start: list[Array],
    sweeps: int = 30,
    correct: bool = True,
    tolerance: float = 1e-4,
) -> list[Array]:
    """Joint least squares over all terms, one mode after the other.

    ``correct`` bounds the terms by the error-preserving correction of Phan et al. (2020, "Stable
    low-rank tensor decomposition for compression of convolutional neural network"): where the
    terms' norms outgrow the tensor's (degeneracy: terms that nearly cancel), each mode in turn is
    replaced by the one of least norm whose error is within `SLACK` of the present one. Stops when
    a sweep gains less than ``tolerance`` of the error.
    """
    factors = _normalised(start)
    energy = float(np.sum(tensor**2))
    last = np.inf
    for sweep in range(sweeps):
        # The first sweep reads the start's outputs, later ones those of the sweep before.
        _update(tensor, factors, energy, None)
        error = _fit_outputs(tensor, factors, energy, None)
        if error <= EXACT * energy:
            break
        if correct and intensity(factors) > INTENSITY * energy:
            bound = SLACK * error
            _update(tensor, factors, energy, bound)
            _fit_outputs(tensor, factors, energy, bound)
        if sweep and last - error < tolerance * error:
            break
        last = error
    return factors


def _normalised(factors: list[Array]) -> list[Array]:
    """The same terms with unit columns in all factors but the first."""
    outputs, rest = factors[0].copy(), []
    for factor in factors[1:]:
        norms = np.linalg.norm(factor, axis=0)
        safe = np.where(norms > 0, norms, 1.0)
        rest.append(factor / safe)
        outputs *= norms
    return [outputs, *rest]


def _update(tensor: Array, factors: list[Array], energy: float, bound: float | None) -> None:
    """Least squares for every mode but the outputs', which take the scale."""
    shape, rank = tensor.shape, factors[0].shape[1]
    # The scale sits in one factor; a mode is solved with the outputs at unit norm.
    scale = np.linalg.norm(factors[0], axis=0)
    outputs = factors[0] / np.where(scale > 0, scale, 1.0)
    seen = (tensor.reshape(shape[0], -1).T @ outputs).reshape(*shape[1:], rank)
    for mode in range(1, tensor.ndim):
        part = seen
        for other in range(tensor.ndim - 1, 0, -1):
            if other != mode:
                axis = other - 1
                part = np.sum(part * _along(factors[other], axis, part.ndim), axis=axis)
        gram = outputs.T @ outputs
        for other in range(1, tensor.ndim):
            if other != mode:
                gram = gram * (factors[other].T @ factors[other])
        solved = _solve(gram, part.reshape(shape[mode], rank), energy, bound)
        scale = np.linalg.norm(solved, axis=0)
        factors[mode] = solved / np.where(scale > 0, scale, 1.0)
    factors[0] = outputs * scale


def _along(factor: Array, axis: int, dimensions: int) -> Array:
    shape = [1] * dimensions
    shape[axis], shape[-1] = factor.shape
    return factor.reshape(shape)


def _fit_outputs(tensor: Array, factors: list[Array], energy: float, bound: float | None) -> float:
    """Least squares for the outputs' factor; returns the squared error."""
    cross = tensor.reshape(len(tensor), -1) @ _features(factors[1:])
    gram = np.ones((cross.shape[1],) * 2)
    for factor in factors[1:]:
        gram *= factor.T @ factor
    factors[0] = _solve(gram, cross, energy, bound)
    fitted = float(np.sum((factors[0] @ gram) * factors[0]))
    return max(energy - 2 * float(np.sum(cross * factors[0])) + fitted, 0.0)


def _features(factors: list[Array]) -> Array:
    """Column-wise Kronecker product, ``(D, K)``."""
    whole = factors[0]
    for factor in factors[1:]:
        whole = (whole[:, None] * factor[None]).reshape(-1, whole.shape[1])
    return whole


def _solve(gram: Array, cross: Array, energy: float, bound: float | None) -> Array:
    """``cross @ inv(gram + l I)``: l almost 0, or as large as the squared error ``bound`` lets.

    With ``cross`` and ``gram`` turned to the eigenvectors of ``gram`` the error is a sum over
    eigenvalues e of ``cross^2 (e + 2 l) / (e + l)^2``; it grows with l.
    """
    # No eigenvalue is larger than the largest sum of a row.
    low = RIDGE * float(np.abs(gram).sum(axis=0).max()) + np.finfo(float).tiny
    if bound is None:
        damped = gram.copy()
        damped[np.diag_indices_from(damped)] += low
        return solve_gram(damped, cross)
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    turned = cross @ vectors
    weight = np.sum(turned**2, axis=0)
    high = 1e4 * float(values[-1]) + low

    def error(damping: float) -> float:
        return energy - float(np.sum(weight * (values + 2 * damping) / (values + damping) ** 2))

    for _ in range(40):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return np.asarray((turned / (values + low)) @ vectors.T)
