"""Does approximating a network improve it? On noisy, over-fitted and under-trained weights.

The paper's draft names denoising (sections 5.2 and 6.1) and measures nothing of it. Writes
docs/denoising.md and pictures of filters. Needs the torch extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tvm
from torch import nn
from torch.nn import functional as F
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank import demo
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, Fitter, InputMoments, bias_correction
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.metrics import Quality, judge
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.report.svg import document, image, text
from tvm_lowrank.target import host_target
from tvm_lowrank.threads import set_threads

DOCS = Path(__file__).resolve().parents[1] / "docs"
FORMS_TRIED = ("linear_combination", "tucker2")
SHARES = (0.75, 0.5, 0.25)
NOISE = (0.3, 0.6)
EPOCHS = {"under-trained": 6, "over-fitted": 60}


@dataclass(frozen=True)
class Found:
    """What an approximation at a share of the multiplications does to a damaged network."""

    network: str
    form: str
    fitted: str
    share: float
    quality: Quality


class Subject:
    """A network whose weights are inputs, with the data that fits and judges it."""

    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod = normalise(mod)
        self.layers = collect_layers(self.mod)
        timer = KernelTimer(host_target(), TuningRecords(None, "denoising", 1), trials=1)
        self.segments = Segments(self.mod, self.layers, timer)
        self.fit, _ = demo.calibration()
        self.inputs, self.labels = demo.evaluation()

    @property
    def changed(self) -> list[ConvLayer]:
        """Layers that the forms are tried on: kernels of more than one tap."""
        plain = [layer for layer in self.layers if layer.geometry and not layer.fully_connected]
        return [layer for layer in plain if max(layer.geometry.kernel) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128, help="that moments are taken from")
    args = parser.parse_args()
    set_threads()
    found: list[Found] = []
    base: dict[str, float] = {}
    subject = Subject(load_model(demo.model_path()))
    clean = subject.segments.run(subject.inputs)
    base["trained"] = _accuracy(clean, subject.labels)
    pictures = [("trained", subject.layers[0].weight)]
    rng = np.random.default_rng(args.seed)
    for noise in (0.0, *NOISE):
        name = f"noise {noise:g}" if noise else "trained"
        weights = {layer.name: _noisy(layer, noise, rng) for layer in subject.changed}
        found += _try(subject, name, weights, args, base)
        if noise == NOISE[1]:
            first = subject.layers[0]
            pictures.append((name, weights[first.name][0]))
            for form in FORMS_TRIED:
                noisy = weights[first.name][0]
                whole = _approximation(first, noisy, form, 0.5, _fitter(first, noisy, form, None))
                pictures.append((f"{form}, half", whole))
    for name, epochs in EPOCHS.items():
        subject = Subject(_small_network(epochs, args.seed))
        weights = {layer.name: (layer.weight, layer.bias) for layer in subject.changed}
        found += _try(subject, name, weights, args, base)
    (DOCS / "denoising.svg").write_text(_drawing(pictures), encoding="utf-8")
    (DOCS / "denoising.md").write_text(_page(found, base, args), encoding="utf-8")
    return 0


def _noisy(
    layer: ConvLayer, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    spread = noise * layer.weight.std()
    added = spread * rng.standard_normal(layer.weight.shape)
    return (layer.weight + added).astype(np.float32), layer.bias


def _try(
    subject: Subject,
    name: str,
    weights: dict[str, tuple[np.ndarray, np.ndarray]],
    args: argparse.Namespace,
    base: dict[str, float],
) -> list[Found]:
    """Every form at every share, fitted to the weights and to the damaged network's own data."""
    before = subject.segments.run(subject.inputs, weights)
    base[name] = _accuracy(before, subject.labels)
    moments = _moments(subject, weights, args)
    found = []
    for form in FORMS_TRIED:
        for fitted, given in (("weights", {}), ("data", moments)):
            fitters = {
                layer.name: _fitter(layer, weights[layer.name][0], form, given.get(layer.name))
                for layer in subject.changed
            }
            for share in SHARES:
                changed = {}
                for layer in subject.changed:
                    weight, bias = weights[layer.name]
                    known = given.get(layer.name)
                    whole = _approximation(layer, weight, form, share, fitters[layer.name])
                    shift = 0 if known is None else bias_correction(weight, whole, known)
                    changed[layer.name] = (whole, bias + shift)
                after = subject.segments.run(subject.inputs, changed)
                quality = judge(after, before, subject.labels, "top1")
                found.append(Found(name, form, fitted, share, quality))
                print(name, form, fitted, share, f"{-quality.drop:+.2f}", flush=True)
    return found


def _moments(
    subject: Subject, weights: dict[str, tuple[np.ndarray, np.ndarray]], args: argparse.Namespace
) -> dict[str, InputMoments]:
    """Of the inputs of each layer in the network with these weights."""
    fit = subject.fit[: args.samples]
    return input_moments(subject.segments, subject.changed, fit, args.seed, weights=weights)


def _fitter(
    layer: ConvLayer, weight: np.ndarray, form_name: str, moments: InputMoments | None
) -> Fitter | None:
    """What fits the weight at any rank; None where the form does not suit the layer."""
    form, geometry = FORMS[form_name], layer.geometry
    if geometry is None or form.refuse(geometry):
        return None
    return form.fitter(weight.astype(np.float64), geometry, moments, refine=False)


def _approximation(
    layer: ConvLayer,
    weight: np.ndarray,
    form_name: str,
    share: float,
    fitter: Fitter | None,
) -> np.ndarray:
    """The weight that the form's factors stand for; the weight itself where it has no rank."""
    form, geometry = FORMS[form_name], layer.geometry
    assert geometry is not None
    ranks = form.ranks(geometry, 1, (share,))
    if fitter is None or not ranks:
        return weight
    return form.reconstruct(fitter.fit(ranks[-1])).astype(np.float32)


def _small_network(epochs: int, seed: int) -> tvm.IRModule:
    """A network trained on the 512 calibration images alone: far too few for its weights."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
        layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    inputs, labels = (torch.from_numpy(np.asarray(a)) for a in demo.calibration())
    labels = labels.long()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(inputs[chosen]), labels[chosen]).backward()
            optimiser.step()
    program = torch.export.export(net.eval(), (torch.zeros(1, 3, 32, 32),))
    return load_model(program)


def _accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * float((outputs.argmax(1) == labels).mean())


def _drawing(pictures: Sequence[tuple[str, np.ndarray]], count: int = 10, pixel: int = 6) -> str:
    """Rows of the first filters' green channel."""
    parts, height = [], 0.0
    for name, weight in pictures:
        scale = float(np.abs(pictures[0][1][:count, 1]).max())
        parts.append(text(5, height + 20, name))
        for index in range(count):
            side = pixel * weight.shape[3] + 6
            parts.append(image(weight[index, 1], 160 + index * side, height + 5, pixel, scale))
        height += pixel * weight.shape[2] + 10
    return document(160 + count * side, height + 5, parts)


def _page(found: Sequence[Found], base: dict[str, float], args: argparse.Namespace) -> str:
    better = [f for f in found if f.quality.interval and f.quality.interval[1] < 0]
    worse = [f for f in found if f.quality.interval and f.quality.interval[0] > 0]
    lines = [
        "# Does approximation denoise?",
        "",
        "Written by `benchmarks/denoising.py`. The paper's draft says that redundancy of filters",
        "exposes a network to overfitting and leaves denoising by low rank to be looked at (5.2,",
        "6.1). Here every convolution of more than one tap is approximated at a share of its",
        "multiplications, layer by layer, and the top-1 accuracy on the demo's 1,000 test images",
        "is compared with that of the network it approximates. *Noise s* adds Gaussian",
        "noise of s standard deviations of each layer's weights to the trained demo network;",
        f"*under-trained* and *over-fitted* are small networks trained for "
        f"{EPOCHS['under-trained']} and {EPOCHS['over-fitted']} epochs",
        "on the 512 calibration images alone. Factors are fitted to the (damaged) weights, or to",
        f"the damaged network's own outputs on {args.samples} of those images.",
        "",
        f"Of {len(found)} approximations {len(better)} are better than the network they "
        "approximate at the 95 %",
        f"level, {len(worse)} are worse; chance alone would make "
        f"about {0.025 * len(found):.0f} better.",
        "",
        "Points of top-1 gained, the half width of the 95 % interval behind it:",
        "",
        "| network | top-1 | form | fitted to | "
        + " | ".join(f"{100 * share:.0f} %" for share in SHARES)
        + " |",
        "|---|---|---|---|" + "---|" * len(SHARES),
    ]
    for name in base:
        for form in FORMS_TRIED:
            for fitted in ("weights", "data"):
                row = {
                    f.share: f.quality
                    for f in found
                    if (f.network, f.form, f.fitted) == (name, form, fitted)
                }
                cells = [_cell(row[share]) for share in SHARES]
                lines.append(
                    f"| {name} | {base[name]:.1f} % | {form} | {fitted} | "
                    + " | ".join(cells)
                    + " |"
                )
    lines += ["", "Bold: better at the 95 % level.", ""]
    lines += [
        "Filters of the first layer (green channel): as trained, with noise, and the noisy ones",
        "approximated at half the multiplications, to the weights alone:",
        "",
        "![filters](denoising.svg)",
    ]
    return "\n".join(lines) + "\n"


def _cell(quality: Quality) -> str:
    assert quality.interval is not None
    low, high = quality.interval
    words = f"{-quality.drop:+.1f} ± {(high - low) / 2:.1f}"
    return f"**{words}**" if high < 0 else words


if __name__ == "__main__":
    sys.exit(main())
