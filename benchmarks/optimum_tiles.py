"""The best Fourier tile for each size of input and kernel: figures 1 and 2 of the paper, today.

``python benchmarks/optimum_tiles.py [-o docs/optimum-tiles.svg]`` prints and draws, for both sets
of the paper's parameters, the optimum tile by its formula of section 4.1 and the one measured here,
among our Fourier kernels and our direct one, on one input channel. 0 is the spatial convolution.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import names
from transformed import prepare
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import host_target
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.report import svg
from tvm_lowrank.threads import processor, set_threads

# Stride (the paper's Delta) and outputs F of its two figures.
FIGURES = {"1": (4, 96), "2": (1, 256)}
SIZES = [32, 64, 128]
KERNELS = [3, 5, 7, 11, 15, 31]
TILES = (8, 16, 32, 64, 128, 256, 512)
_COLOURS = {
    0: "#ffffff", 8: "#deebf7", 16: "#c6dbef", 32: "#9ecae1", 64: "#6baed6", 128: "#4292c6",
    256: "#2171b5", 512: "#08519c",
}  # fmt: skip
_CELL = 34
_CALLS = 4


def operations(
    size: int, kernel: int, tile: int, stride: int, outputs: int, dimensions: int
) -> float:
    """Operations of the paper's section 4.1, logarithms to base 2; of the spatial one for tile 0.

    ``dimensions`` is 1 for the formula as it is printed, where sizes count values, and 2 for sizes
    along a side, each size that counts values being their square. The logarithm of the output's
    transform is 0 where a tile has less than one output.
    """
    n, m, t = (value**dimensions for value in (size, kernel, tile))
    if not tile:
        return outputs * m * n / stride**2
    chunks = (size / (tile - kernel)) ** dimensions
    forward, kept = t * math.log2(t), t / stride**2
    inverse = kept * max(0.0, math.log2(kept))
    return outputs * forward + chunks * (forward + outputs * inverse)


def by_formula(size: int, kernel: int, stride: int, outputs: int, dimensions: int) -> int:
    """The tile of the fewest operations."""
    allowed = [0, *(tile for tile in TILES if kernel < tile <= 2 * size + kernel)]
    return min(allowed, key=lambda t: operations(size, kernel, t, stride, outputs, dimensions))


def measured(size: int, kernel: int, stride: int, outputs: int) -> tuple[int, float]:
    """The tile of the fastest kernel, and its gain over the direct one.

    Square maps of one channel with "same" padding, weights packed ahead of time; of each size of
    tile the schedule that its family thinks best, of the direct kernels too.
    """
    target = host_target()
    isa = isa_of(target)
    half = kernel // 2
    geometry = ConvGeometry(
        1, outputs, size, size, (kernel, kernel), (stride, stride), padding=(half,) * 4
    )
    workload = ConvWorkload(geometry, 1)
    found = kernels.spaces(workload, isa, ("direct", "fft"))
    chosen = {0: found.pop("direct")[0]}
    for schedule in (s for space in found.values() for s in space):
        if schedule.tile[0] == schedule.tile[1]:
            chosen.setdefault(schedule.tile[0], schedule)
    with ThreadPoolExecutor(2) as pool:  # LLVM works outside of Python's lock
        made = pool.map(lambda s: prepare(workload, s, isa, target, 1), chosen.values())
        timed = dict(zip(chosen, made, strict=True))
    for _ in range(3):
        for each in timed.values():
            each.take_turn(_CALLS)
    best = min(timed, key=lambda tile: timed[tile].warm)
    return best, timed[0].warm / timed[best].warm


def table(
    title: str, choose: Callable[[int, int], tuple[int, float]]
) -> dict[tuple[int, int], int]:
    """Print the best tiles, with their gains where these are known; returns the tiles."""
    print(f"\n{title}\n\n| N \\ M | " + " | ".join(map(str, KERNELS)) + " |")
    print("|---" * (len(KERNELS) + 1) + "|")
    tiles = {}
    for size in SIZES:
        texts = []
        for kernel in KERNELS:
            tile, gain = choose(size, kernel)
            tiles[size, kernel] = tile
            texts.append(f"{tile} ({gain:.1f}x)" if gain > 1 else str(tile))
        print(f"| {size} | " + " | ".join(texts) + " |", flush=True)
    return tiles


def panel(tiles: dict[tuple[int, int], int], x: float, y: float, title: str) -> list[str]:
    """The tiles as a chart: N upwards, M to the right."""
    parts = [svg.text(x, y - 6, title)]
    for (size, kernel), tile in tiles.items():
        left = x + KERNELS.index(kernel) * _CELL
        top = y + (len(SIZES) - 1 - SIZES.index(size)) * _CELL
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_CELL}" height="{_CELL}" stroke="#888" '
            f'fill="{_COLOURS[tile]}"/>'
        )
        parts.append(svg.text(left + _CELL / 2, top + _CELL / 2 + 4, str(tile), "middle"))
    bottom = y + len(SIZES) * _CELL + 14
    for i, kernel in enumerate(KERNELS):
        parts.append(svg.text(x + (i + 0.5) * _CELL, bottom, str(kernel), "middle"))
    for i, size in enumerate(reversed(SIZES)):
        parts.append(svg.text(x - 5, y + (i + 0.5) * _CELL + 4, str(size), "end"))
    parts.append(svg.text(x + len(KERNELS) * _CELL / 2, bottom + 15, "kernel M", "middle"))
    return parts


def draw(figures: Sequence[str]) -> str:
    """All panels as an SVG file; prints their tables."""
    width, height = len(KERNELS) * _CELL + 70, len(SIZES) * _CELL + 80
    parts = []
    for row, name in enumerate(figures):
        stride, outputs = FIGURES[name]
        what = f"Figure {name} (stride {stride}, F = {outputs})"
        panels: dict[str, Callable[[int, int], tuple[int, float]]] = {
            "formula as printed": lambda n, m: (by_formula(n, m, stride, outputs, 1), 0),  # noqa: B023
            "formula, sides of squares": lambda n, m: (by_formula(n, m, stride, outputs, 2), 0),  # noqa: B023
            "measured": lambda n, m: measured(n, m, stride, outputs),  # noqa: B023
        }
        for column, (kind, choose) in enumerate(panels.items()):
            tiles = table(f"{what}: {kind}", choose)
            x, y = 45 + column * width, 40 + row * height
            parts += panel(tiles, x, y, f"{what}: {kind}")
    return svg.document(3 * width + 10, len(figures) * height + 10, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", default=",".join(FIGURES), metavar="A,B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--kernels", type=int, nargs="+", default=KERNELS, metavar="M")
    parser.add_argument("-o", "--output", type=Path, help="SVG file to write")
    args = parser.parse_args()
    figures = names("--figures", args.figures, list(FIGURES))
    SIZES[:], KERNELS[:] = args.sizes, args.kernels
    set_threads(args.threads)
    print(f"{args.threads} threads, {processor()}, compiled for {host_target().attrs['mcpu']}")
    picture = draw(figures)
    if args.output:
        args.output.write_text(picture)


if __name__ == "__main__":
    main()
