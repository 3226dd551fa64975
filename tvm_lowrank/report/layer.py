"""One layer drawn: its filters before and after, errors of all forms, clusters of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_lowrank.decompose import FORMS, InputMoments, bicluster
from tvm_lowrank.decompose.clustering import order_of
from tvm_lowrank.decompose.form import Rank
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.report import svg

# Filters that are drawn, input channels of each, and the most rows of a drawn matrix.
_FILTERS, _CHANNELS, _MATRIX = 16, 4, 128
# Pixels: the longest side of a drawn matrix, and of an entry.
_SIDE, _LARGEST = 360.0, 40.0


@dataclass(frozen=True)
class Point:
    """One form at one rank: its share of the dense multiplications, its error, its weight."""

    form: str
    rank: Rank
    share: float
    error: float
    weight: np.ndarray

    @property
    def terms(self) -> int:
        """The rank as one number: the product of its parts."""
        return int(np.prod(self.rank))


def measure(
    weight: np.ndarray,
    geometry: ConvGeometry,
    moments: InputMoments | None,
    forms: Sequence[str] = tuple(FORMS),
) -> list[Point]:
    """Every form that can replace the layer, at all the ranks it offers, unrefined."""
    metric = moments or InputMoments.identity(geometry)
    points = []
    for name in forms:
        form = FORMS[name]
        if form.refuse(geometry):
            continue
        fitter = form.fitter(weight, geometry, moments, refine=False)
        for rank in form.ranks(geometry, 1):
            factors = fitter.fit(rank)
            whole = form.reconstruct(factors, geometry)
            share = form.multiplications(geometry, rank) / geometry.multiplications
            error = form.error(weight, factors, geometry, metric)
            points.append(Point(name, rank, share, error, whole))
    return points


def draw_filters(weight: np.ndarray, points: Sequence[Point], share: float) -> str:
    """Original and approximated filters side by side (Figure 9), each form near ``share``.

    A column of filters is one output channel, its rows are the input channels of the largest
    weights; each output channel has one grey scale, that of what is shown of the original.
    """
    nearest: dict[str, Point] = {}
    for point in points:
        best = nearest.get(point.form)
        if best is None or abs(point.share - share) < abs(best.share - share):
            nearest[point.form] = point
    shown = [("original", weight)]
    shown += [
        (
            f"{p.form}, rank {str(p.rank).strip('()')}, {100 * p.share:.0f} % of the operations, "
            f"error {p.error:.3f}",
            p.weight,
        )
        for p in nearest.values()
    ]
    filters, channels, x, y = (min(a, b) for a, b in zip(
        weight.shape, (_FILTERS, _CHANNELS, *weight.shape[2:]), strict=True))  # fmt: skip
    pixel = max(2.0, 24.0 / max(x, y))
    strongest = np.sort(np.argsort(-np.sum(weight**2, axis=(0, 2, 3)), kind="stable")[:channels])
    scales = np.abs(weight[:, strongest]).max(axis=(1, 2, 3))
    parts, top = [], 20.0
    for words, whole in shown:
        parts.append(svg.text(10, top, words))
        for f in range(filters):
            for row, c in enumerate(strongest):
                left, down = 10 + f * (y * pixel + 4), top + 6 + row * (x * pixel + 4)
                parts.append(svg.image(whole[f, c], left, down, pixel, float(scales[f])))
        top += channels * (x * pixel + 4) + 26
    return svg.document(max(420, 20 + filters * (y * pixel + 4)), top, parts)


def draw_errors(points: Sequence[Point]) -> str:
    """Error against rank and against operations, all forms, in one drawing.

    Each rank is a point; the line joins those that lose less than all cheaper ones.
    """
    by_rank: dict[str, list[tuple[float, float]]] = {}
    by_share: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda p: p.share):
        by_share.setdefault(point.form, []).append((point.share, point.error))
    for point in sorted(points, key=lambda p: p.terms):
        by_rank.setdefault(point.form, []).append((point.terms, point.error))
    lost = "error (share of the output's variance)"
    parts = svg.curves(by_rank, 60, 20, 330, 300, "rank (product of its parts)", lost)
    share = "share of the dense multiplications"
    parts += svg.curves(by_share, 630, 20, 330, 300, share, lost)
    return svg.document(1160, 370, parts)


def draw_clusters(
    weight: np.ndarray, moments: InputMoments | None, groups: tuple[int, int], seed: int = 0
) -> str:
    """Norms of the kernels of all pairs of channels, as they are and sorted by bicluster.

    Black is 0, white the largest.

    ValueError where the groups do not divide the channels.
    """
    found = bicluster(weight, groups, moments=moments, seed=seed)
    norms = np.linalg.norm(weight, axis=(2, 3))
    rows, columns = order_of(found.outputs), order_of(found.inputs)
    high, wide = (min(_LARGEST, _SIDE / size) for size in norms.shape)
    height, width = high * norms.shape[0], wide * norms.shape[1]
    second = 40 + max(width, 200)
    words = f"by cluster, {groups[1]} of outputs by {groups[0]} of inputs"
    parts = [svg.text(10, 14, "outputs by inputs, in order"), svg.text(second, 14, words)]
    scale = float(norms.max()) / 2
    for left, matrix in ((10.0, norms), (second, norms[rows][:, columns])):
        parts.append(svg.image(matrix - scale, left, 20, wide, scale, high))
    for cut in range(1, groups[0]):
        place = second + width * cut / groups[0]
        parts.append(f'<path d="M{place:.1f} 20v{height:.1f}" stroke="red"/>')
    for cut in range(1, groups[1]):
        place = 20 + height * cut / groups[1]
        parts.append(f'<path d="M{second:.1f} {place:.1f}h{width:.1f}" stroke="red"/>')
    return svg.document(second + max(width, 240) + 10, 30 + height, parts)


def write(
    name: str,
    weight: np.ndarray,
    geometry: ConvGeometry,
    moments: InputMoments | None,
    folder: Path,
    share: float = 0.25,
    seed: int = 0,
) -> list[Path]:
    """Draw a layer into ``folder``; the files written.

    Clusters are drawn where there are two groups of inputs or of outputs to find. LowRankError
    where no form can replace the layer.
    """
    points = measure(weight, geometry, moments)
    if not points:
        raise LowRankError(f"no form can replace {name} ({geometry}); name another layer")
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"filters": draw_filters(weight, points, share), "errors": draw_errors(points)}
    f, c = weight.shape[:2]
    groups = (2 if c % 2 == 0 and c > 2 else 1, 2 if f % 2 == 0 and f > 2 else 1)
    if groups != (1, 1) and max(f, c) <= _MATRIX:
        drawings["clusters"] = draw_clusters(weight, moments, groups, seed)
    paths = []
    for kind, drawing in drawings.items():
        paths.append(folder / f"{name}-{kind}.svg")
        paths[-1].write_text(drawing)
    return paths
