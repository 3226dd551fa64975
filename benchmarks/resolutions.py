"""Multi-resolution against the other forms on kernels of 7, 11 and 31 taps, to docs/forms.md.

    python benchmarks/resolutions.py

The 7x7 kernels are the first layer of ResNet-50, at its stride of 2, and the same filters at stride
1. No network here has larger ones, so those are banks of Gabor filters as first layers learn them,
of random directions, wavelengths and phases. Inputs are patches of photos; errors are measured on
patches that did not fit the factors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from forms_page import HEADINGS, write
from networks import NETWORKS
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.decompose.moments import InputMoments, MomentAccumulator
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import collect_layers

SHARES = (1 / 20, 1 / 8, 1 / 4, 1 / 2)
NAMES = ("multiresolution", "separable", "linear_combination", "cp", "shared_factor")
IMAGES, PIXELS = 60, 96


@dataclass(frozen=True)
class Case:
    """A layer: what it is called, its shape and its weight."""

    name: str
    geometry: ConvGeometry
    weight: np.ndarray


def gabors(side: int, filters: int, channels: int, seed: int = 0) -> np.ndarray:
    """Filters ``(F, C, side, side)``: waves under a Gaussian, each of one random colour."""
    rng = np.random.default_rng(seed)
    row, column = np.indices((side, side)) - (side - 1) / 2
    angle = rng.uniform(0, np.pi, (filters, 1, 1))
    length = np.exp(rng.uniform(np.log(2.5), np.log(side), (filters, 1, 1)))
    width = side * rng.uniform(0.15, 0.25, (filters, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (filters, 1, 1))
    along = row * np.cos(angle) + column * np.sin(angle)
    waves = np.exp(-(row**2 + column**2) / (2 * width**2)) * np.cos(
        2 * np.pi * along / length + phase
    )
    colours = rng.standard_normal((filters, channels, 1, 1))
    return colours * waves[:, None]


def cases(first: ConvGeometry, weight: np.ndarray) -> Iterator[Case]:
    """The layers of the table; ``first`` is that of ResNet-50, ``weight`` its filters."""
    pad = (3, 3, 3, 3)
    for stride in (2, 1):
        geometry = replace(first, height=PIXELS, width=PIXELS, stride=(stride, stride), padding=pad)
        yield Case("ResNet-50, first layer", geometry, weight)
    for side, stride, filters, channels in ((11, 4, 64, 3), (11, 1, 64, 3), (31, 1, 32, 1)):
        pad = (side // 2,) * 4
        geometry = ConvGeometry(
            channels, filters, PIXELS, PIXELS, (side, side), (stride, stride), pad
        )
        yield Case("Gabor filters", geometry, gabors(side, filters, channels))


def moments(geometry: ConvGeometry, images: np.ndarray) -> InputMoments:
    """Moments of the patches of ``images`` (n, 3, height, width), in grey for one channel."""
    if geometry.in_channels == 1:
        images = images.mean(axis=1, keepdims=True)
    gather = MomentAccumulator(geometry, 256)
    gather.update(images)
    return gather.moments()


def errors(case: Case, given: InputMoments, unseen: InputMoments, name: str) -> list[str]:
    """A cell for each share: the error, with the rank for multi-resolution."""
    form, geometry = FORMS[name], case.geometry
    if form.refuse(geometry):
        return ["-"] * len(SHARES)
    fitter = form.fitter(case.weight, geometry, given)
    cells = []
    for share in SHARES:
        fits = {r: fitter.fit(r) for r in form.ranks(geometry, 1, (share,))}
        lost = {r: form.error(case.weight, f, geometry, given) for r, f in fits.items()}
        if not lost:
            cells.append("-")
            continue
        best = min(lost, key=lambda rank: lost[rank])
        error = form.error(case.weight, fits[best], geometry, unseen)
        text = f"{error:.4f}".removeprefix("0")
        cells.append(f"{text} {best}" if name == "multiresolution" else text)
    return cells


def main() -> int:
    network = next(n for n in NETWORKS if n.name == "resnet50-imagenet")
    if network.missing:
        print(f"error: {network.missing}")
        return 2
    (photos, _), final = network.data()
    assert final is not None
    middle = slice(64, 64 + PIXELS)
    fit, others = (x[:IMAGES, :, middle, middle] for x in (photos, final[0]))
    layer = collect_layers(normalise(load_model(network.model)))[0]
    assert layer.geometry is not None
    headings = " | ".join(f"at {share:.3g}" for share in SHARES)
    lines = [f"| layer | shape | form | {headings} |", "|---|---|---|" + "---|" * len(SHARES)]
    for case in cases(layer.geometry, layer.weight.astype(np.float64)):
        given, unseen = moments(case.geometry, fit), moments(case.geometry, others)
        shape = str(case.geometry).split(" @")[0]
        for name in NAMES:
            cells = " | ".join(errors(case, given, unseen, name))
            lines.append(f"| {case.name} | {shape} | {HEADINGS.get(name, name)} | {cells} |")
            print(lines[-1], flush=True)
    write("resolutions", "\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
