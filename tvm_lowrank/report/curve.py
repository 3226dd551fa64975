"""The speed/accuracy curve of a plan as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm_lowrank.plan import Plan
from tvm_lowrank.report.svg import COLOURS, document, text

_WIDTH, _HEIGHT, _LEFT, _TOP = 420, 260, 70, 30


def draw_curve(plan: Plan) -> str:
    """SVG text: drop against speed-up of the convolutions, with intervals and the budget.

    The speed-up is over the same network with no form changed, kernels alone. A point is a choice
    that was tried on the selection samples.
    """
    points = [
        (
            point["dense_us"] / point["microseconds"],
            point["drop"],
            point["interval"] or [point["drop"]] * 2,
            bool(point["recovered"]),
        )
        for point in plan.curve
    ]
    fastest = max([1.1, *(point[0] for point in points)])
    ends = [value for point in points for value in point[2]]
    low, high = min([0.0, *ends]), max([plan.max_drop, *ends])

    def place(speed: float, drop: float) -> tuple[float, float]:
        right = (speed - 1.0) / (fastest - 1.0)
        up = (drop - low) / max(high - low, 1e-9)
        return _LEFT + right * _WIDTH, _TOP + (1 - up) * _HEIGHT

    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        'stroke="black"/>',
        text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 34, "speed-up of the convolutions", "middle"),
        text(_LEFT, _TOP - 10, f"drop ({plan.metric}) on the selection samples"),
    ]
    for share in (0.0, 0.5, 1.0):
        speed, drop = 1 + share * (fastest - 1), low + share * (high - low)
        x, y = place(speed, drop)
        parts.append(text(x, _TOP + _HEIGHT + 16, f"{speed:.2f}x", "middle"))
        parts.append(text(_LEFT - 5, y + 4, f"{drop:.2f}", "end"))
    left, level = place(1.0, plan.max_drop)
    parts.append(_line(left, level, left + _WIDTH, level, "black", dashed=True))
    parts.append(text(left + 4, level - 4, "budget"))
    for index, (name, recovered) in enumerate((("refitted", False), ("trained", True))):
        chosen = sorted(point for point in points if point[3] is recovered)
        if chosen:
            parts += _series(chosen, place, COLOURS[index], join=not recovered)
            row = _TOP + 15 + 16 * index
            parts.append(f'<circle cx="{_LEFT + 12}" cy="{row}" r="4" fill="{COLOURS[index]}"/>')
            parts.append(text(_LEFT + 22, row + 4, name))
    return document(_LEFT + _WIDTH + 30, _TOP + _HEIGHT + 50, parts)


def _series(points: Sequence[Any], place: Any, colour: str, join: bool) -> list[str]:
    parts = []
    for speed, drop, (least, most), _ in points:
        (x, y), (_, top), (_, bottom) = place(speed, drop), place(speed, most), place(speed, least)
        parts.append(_line(x, top, x, bottom, colour))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    if join:
        line = " ".join("{:.1f},{:.1f}".format(*place(speed, drop)) for speed, drop, *_ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
    return parts


def _line(a: float, b: float, c: float, d: float, colour: str, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="{colour}"{dash}/>'
