"""A few shapes as SVG text: grey images, curves with logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf", "#000000", "#aec7e8", "#98df8a",
)  # fmt: skip
# Height of a group of bars in pixels.
BAR_HEIGHT = 28
_FONT = 'font-family="sans-serif" font-size="11"'


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """An SVG file of that many pixels."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words with their base line at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_FONT}>{escape(words)}</text>'


def image(
    values: np.ndarray, x: float, y: float, wide: float, scale: float, high: float | None = None
) -> str:
    """A matrix ``(rows, columns)`` in grey: black -scale, white +scale.

    An entry is ``wide`` x ``high`` pixels, a square if only one of those is given.
    """
    levels = np.clip(127.5 * (1 + values / (scale or 1.0)), 0, 255).round().astype(int)
    high = wide if high is None else high
    squares = "".join(
        f'<rect x="{x + column * wide:.1f}" y="{y + row * high:.1f}" width="{wide:.2f}" '
        f'height="{high:.2f}" fill="#{level:02x}{level:02x}{level:02x}"/>'
        for (row, column), level in np.ndenumerate(levels)
    )
    return f'<g shape-rendering="crispEdges">{squares}</g>'


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: float,
    y: float,
    width: float,
    height: float,
    across: str,
    up: str,
) -> list[str]:
    """Named curves of positive points in a frame, both axes logarithmic, the names beside it.

    A curve's line joins its points that lie below all before them. Colours go by name, so that a
    name has the same one in every frame of the same names.
    """
    points = np.array([point for curve in series.values() for point in curve], float)
    points = np.maximum(points.reshape(-1, 2), 1e-9)
    parts = _frame(x, y, width, height, across, up)
    if not len(points):
        return parts
    low, high = np.log10(points.min(axis=0)), np.log10(points.max(axis=0))
    span = np.maximum(high - low, 1e-3)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        share = (np.log10(np.maximum(point, 1e-9)) - low) / span
        return x + share[0] * width, y + (1 - share[1]) * height

    for axis in (0, 1):
        for exponent in _ticks(float(low[axis]), float(span[axis])):
            end, value = (exponent - low[axis]) / span[axis], 10**exponent
            label = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
            right, down = x + end * width, y + (1 - end) * height
            if axis == 0:
                parts.append(f'<path d="M{right:.1f} {y}v{height}" stroke="#e4e4e4"/>')
                parts.append(text(right, y + height + 15, label, "middle"))
            else:
                parts.append(f'<path d="M{x} {down:.1f}h{width}" stroke="#e4e4e4"/>')
                parts.append(text(x - 4, down + 4, label, "end"))
    for index, name in enumerate(sorted(series)):
        colour, curve = COLOURS[index % len(COLOURS)], series[name]
        placed = [place(point) for point in curve]
        lowest = np.minimum.accumulate([point[1] for point in curve])
        below = [n == 0 or value < lowest[n - 1] for n, value in enumerate(lowest)]
        front = [where for where, kept in zip(placed, below, strict=True) if kept]
        parts += _line(placed, front, colour)
        row = y + 12 + 15 * index
        parts.append(
            f'<rect x="{x + width + 10}" y="{row - 8}" width="9" height="9" fill="{colour}"/>'
        )
        parts.append(text(x + width + 24, row, name))
    return parts


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: float,
    y: float,
    width: float,
    height: float,
    across: str,
    up: str,
) -> list[str]:
    """Named lines through all of their points, from zero upwards, over a logarithmic axis.

    Marks on that axis are where the points are, those on the other at quarters.
    """
    points = np.array([point for line in series.values() for point in line], float).reshape(-1, 2)
    parts = _frame(x, y, width, height, across, up)
    if not len(points):
        return parts
    marks, most = sorted(set(points[:, 0])), float(points[:, 1].max()) or 1.0
    low, span = math.log(marks[0]), max(math.log(marks[-1] / marks[0]), 1e-3)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return x + (math.log(point[0]) - low) / span * width, y + (1 - point[1] / most) * height

    for mark in marks:
        at = place((mark, 0.0))[0]
        parts.append(f'<path d="M{at:.1f} {y}v{height}" stroke="#e4e4e4"/>')
        parts.append(text(at, y + height + 15, f"{mark:g}", "middle"))
    for quarter in range(5):
        down = y + (1 - quarter / 4) * height
        parts.append(f'<path d="M{x} {down:.1f}h{width}" stroke="#e4e4e4"/>')
        parts.append(text(x - 4, down + 4, f"{most * quarter / 4:.3g}", "end"))
    for index, (name, line) in enumerate(series.items()):
        colour, placed = COLOURS[index % len(COLOURS)], [place(point) for point in line]
        parts += _line(placed, placed, colour)
        parts.append(text(placed[-1][0] + 8, placed[-1][1] + 4, name))
    return parts


def _frame(x: float, y: float, width: float, height: float, across: str, up: str) -> list[str]:
    """A box with the names of its axes."""
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="black"/>',
        text(x + width / 2, y + height + 32, across, "middle"),
        text(x, y - 6, up),
    ]


def _line(
    points: Sequence[tuple[float, float]], joined: Sequence[tuple[float, float]], colour: str
) -> list[str]:
    """Dots at ``points`` and a line through ``joined``, in pixels."""
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in joined)
    line = f'<polyline points="{path}" fill="none" stroke="{colour}"/>'
    return [
        line,
        *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in points),
    ]


def _ticks(low: float, span: float) -> list[float]:
    """Exponents of 10 to mark: whole ones, with those of 2 and 5 between, or the ends and middle.

    The first of these that gives three marks.
    """
    exponents = range(math.floor(low), math.floor(low + span) + 1)
    for digits in ((1,), (1, 2, 5)):
        marks = [exponent + math.log10(digit) for exponent in exponents for digit in digits]
        inside = [mark for mark in marks if low <= mark <= low + span]
        if len(inside) > 2:
            return inside
    return [low, low + span / 2, low + span]


def scatter(
    points: Sequence[tuple[float, float]], x: float, y: float, size: float, across: str, up: str
) -> list[str]:
    """Positive points in a square frame, both axes of one logarithmic scale, with the diagonal."""
    values = np.maximum(np.array(points, float).reshape(-1, 2), 1e-9)
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    shares = (np.log10(values) - low) / max(high - low, 1e-3)
    parts = [
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="none" stroke="black"/>',
        f'<line x1="{x}" y1="{y + size}" x2="{x + size}" y2="{y}" stroke="#bbbbbb"/>',
        text(x + size / 2, y + size + 32, across, "middle"),
        text(x, y - 8, up),
    ]
    for share in (0.0, 0.5, 1.0):
        label = f"{10 ** (low + share * (high - low)):.3g}"
        parts.append(text(x + share * size, y + size + 15, label, "middle"))
        parts.append(text(x - 4, y + (1 - share) * size + 4, label, "end"))
    parts += [
        f'<circle cx="{x + a * size:.1f}" cy="{y + (1 - b) * size:.1f}" r="1.5" '
        f'fill="{COLOURS[0]}" fill-opacity="0.5"/>'
        for a, b in shares
    ]
    return parts


def bars(
    groups: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    x: float,
    y: float,
    width: float,
) -> list[str]:
    """Groups of horizontal bars from ``x`` on, one a name, their values behind them.

    A group takes `BAR_HEIGHT` pixels.
    """
    most = max((value for group in groups.values() for value in group.values()), default=1.0)
    height = (BAR_HEIGHT - 4) / len(names)
    parts = []
    for row, (label, group) in enumerate(groups.items()):
        top = y + row * BAR_HEIGHT
        parts.append(text(x - 6, top + BAR_HEIGHT / 2, label, "end"))
        for index, name in enumerate(names):
            value = group.get(name, 0.0)
            at, colour = top + index * height, COLOURS[index % len(COLOURS)]
            length = width * value / most
            parts.append(
                f'<rect x="{x}" y="{at:.1f}" width="{length:.1f}" height="{height - 1:.1f}" '
                f'fill="{colour}"/>'
            )
            words = f"{value:.1f}" + (f" {name}" if row == 0 else "")
            parts.append(text(x + length + 4, at + height - 2, words))
    return parts
