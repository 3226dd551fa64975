"""Clusters of equal size around subspaces: balanced, iterated k-subspaces."""

from __future__ import annotations

import numpy as np

from tvm_lowrank.decompose.moments import Array

ITERATIONS = 20
RESTARTS = 4


def k_subspaces(
    points: Array,
    clusters: int,
    dimension: int,
    seed: int = 0,
    restarts: int = RESTARTS,
) -> np.ndarray:
    """Labels ``(n,)`` of clusters of equal size, each near a subspace of its own.

    Parameters
    ----------
    points
        ``(n, d)``, or ``(n, d, t)`` for points that are t vectors each (all of them in the
        subspace of the point's cluster).
    clusters
        Divides n.
    dimension
        Of each subspace; 1 clusters directions whatever their signs.
    seed
        Of the restarts; the best of several is kept.

    Lloyd's iteration of Bradley and Mangasarian (2000, "k-plane clustering"), with an assignment
    that keeps the sizes equal. ValueError where ``clusters`` does not divide n.
    """
    n = len(points)
    if n % clusters:
        raise ValueError(f"clusters={clusters}: a divisor of the {n} points was expected")
    if clusters == 1:
        return np.zeros(n, int)
    if clusters == n or dimension >= points.shape[1]:
        return contiguous(n, clusters)
    vectors = _compressed(points.reshape(n, points.shape[1], -1))
    random = np.random.default_rng(seed)
    best, labels = np.inf, np.zeros(n, int)
    for restart in range(restarts):
        tried = contiguous(n, clusters)
        if restart:
            tried = random.permutation(tried)
        last = np.inf
        for _ in range(ITERATIONS):
            residuals = _residuals(vectors, tried, clusters, dimension)
            tried = _balanced(residuals)
            total = float(residuals[np.arange(n), tried].sum())
            if total >= last * (1 - 1e-9):
                break
            last = total
        if last < best:
            best, labels = last, tried
    return labels


def contiguous(n: int, clusters: int) -> np.ndarray:
    """Labels of equal slices in order: the baseline of every clustering."""
    return np.repeat(np.arange(clusters), n // clusters)


def order_of(labels: np.ndarray) -> np.ndarray:
    """The order in which the clusters' members lie one after the other."""
    return np.argsort(labels, kind="stable")


def _compressed(vectors: Array) -> Array:
    """The same inner products in fewer dimensions, where there are fewer vectors than those."""
    n, d, t = vectors.shape
    if n * t >= d:
        return vectors
    flat = vectors.transpose(0, 2, 1).reshape(n * t, d)
    triangular = np.asarray(np.linalg.qr(flat.T, mode="r"))
    return np.ascontiguousarray(triangular.T.reshape(n, t, -1).transpose(0, 2, 1))


def _residuals(vectors: Array, labels: np.ndarray, clusters: int, dimension: int) -> Array:
    """Energy ``(n, clusters)`` of each point outside of each cluster's principal subspace."""
    n, d, t = vectors.shape
    members = vectors[order_of(labels)].reshape(clusters, -1, d, t).transpose(0, 2, 1, 3)
    members = members.reshape(clusters, d, -1)
    if dimension <= members.shape[2] < d:
        bases = np.linalg.svd(members, full_matrices=False)[0][:, :, :dimension]
    else:
        bases = np.linalg.eigh(members @ members.transpose(0, 2, 1))[1][:, :, -dimension:]
    directions = bases.transpose(0, 2, 1).reshape(-1, d)
    inside = directions @ vectors.transpose(1, 0, 2).reshape(d, n * t)
    kept = np.sum(inside.reshape(clusters, dimension, n, t) ** 2, axis=(1, 3))
    return np.sum(vectors**2, axis=(1, 2))[:, None] - kept.T


def _balanced(costs: Array) -> np.ndarray:
    """Labels of least total cost ``(n, clusters)`` with equal sizes: an assignment to places."""
    from scipy.optimize import linear_sum_assignment  # slow to import, seldom needed

    size = len(costs) // costs.shape[1]
    places = linear_sum_assignment(np.repeat(costs, size, axis=1))[1]
    return np.asarray(places // size)
