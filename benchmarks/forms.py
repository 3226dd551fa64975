"""Output error of every form at 1/4 and 1/2 of the operations, layer by layer, to docs/forms.md.

    python benchmarks/forms.py                      # every network
    python benchmarks/forms.py resnet20-cifar10     # one; the other sections stay
    python benchmarks/forms.py resnet20-cifar10 --layers conv3 conv16

Factors are fitted to the moments of one set of samples; the error is measured on those of another.
One layer of each shape comes first, then the others. Each layer is written to the page and, with
all its digits, to ``build/forms/NETWORK.jsonl`` as soon as it is done. Layers that stand on the
page or in that file with the same numbers of samples, refined ranks and iterations are not measured
again, so an interrupted run goes on and a layer can be added without the others; ``--fresh``
measures them again. The row of a layer that is not measured stays as it is, with its numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from forms_page import (
    ENTRIES,
    SUMS_OF_TERMS,
    NoPlace,
    Row,
    finished,
    on_page,
    overall,
    section,
    write,
)
from networks import NETWORKS, Network
from tvm import IRModule
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import Form, Rank
from tvm_lowrank.decompose.moments import InputMoments
from tvm_lowrank.decompose.terms import POLISH_ITERATIONS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target

ROOT = Path(__file__).resolve().parents[1]
SHARES = (1 / 4, 1 / 2)
# Of the moments that are held at once, both sets together.
MOMENT_BYTES = 1 << 30
Samples = np.ndarray


def wanted(layers: list[ConvLayer], widest: int, one_a_shape: bool) -> list[ConvLayer]:
    """The layers to measure: one of each shape first, of both those that read fewer inputs."""
    first, others = [], []
    seen: set[object] = set()
    for layer in layers:
        g = layer.geometry
        if g is None or layer.fully_connected or g.groups != 1 or layer.weight[0].size > widest:
            continue
        (others if (g.weight_shape, g.stride) in seen else first).append(layer)
        seen.add((g.weight_shape, g.stride))
    taken = [sorted(part, key=lambda layer: layer.weight[0].size) for part in (first, others)]
    return taken[0] if one_a_shape else taken[0] + taken[1]


def rows(
    mod: IRModule,
    layers: list[ConvLayer],
    taken: list[ConvLayer],
    fit: Samples,
    held_out: Samples,
    refined: int,
) -> Iterator[Row]:
    """The layers in ``taken``, each measured before the next is looked at.

    Moments are gathered for as many layers at a time as `MOMENT_BYTES` hold, which means running
    the network several times where there are many wide ones.
    """
    timer = KernelTimer(host_target(), TuningRecords(None, "forms", 1), trials=1)
    segments = Segments(mod, layers, timer)
    waiting = list(taken)
    while waiting:
        group, held = [waiting.pop(0)], 0
        while waiting and held < MOMENT_BYTES:
            group.append(waiting.pop(0))
            held = sum(2 * 8 * layer.weight[0].size ** 2 for layer in group)
        given = input_moments(segments, group, fit, 0)
        unseen = input_moments(segments, group, held_out, 0, shrink=False)
        for layer in group:
            row = Row(layer.name, str(layer.geometry).split(" @")[0], len(fit), refined)
            measure(row, layer, given.pop(layer.name), unseen.pop(layer.name))
            yield row
            gc.collect()


def measure(row: Row, layer: ConvLayer, given: InputMoments, unseen: InputMoments) -> None:
    """Fill in the errors of every form, of its ranks at a share the one that fits best."""
    geometry = layer.geometry
    assert geometry is not None
    padded = keeps_size(geometry)
    for name, form in ENTRIES.items():
        if form.keeps_memory or form.refuse(geometry):
            continue
        start = time.process_time()
        fits = Fits(form, layer, given, unseen, row.refined)
        row.errors[name] = [fits.error(share, geometry) for share in SHARES]
        if padded != geometry:
            row.by_pixel[name] = [fits.error(share, padded) for share in SHARES]
        spent = time.process_time() - start
        fitted = [f"{lost[0]:.4f}" for lost in fits.found.values()]
        print(
            f"  {layer.name} {name}: {row.errors[name]}, on the samples that fitted it "
            f"{', '.join(fitted)}, {spent:.1f} s",
            flush=True,
        )
    if not SUMS_OF_TERMS.isdisjoint(row.errors):
        row.iterations = POLISH_ITERATIONS


class Fits:
    """Errors of one form on one layer; each rank is fitted once."""

    def __init__(
        self,
        form: Form,
        layer: ConvLayer,
        given: InputMoments,
        unseen: InputMoments,
        refined: int,
    ):
        assert layer.geometry is not None
        self.form, self.geometry, self.given, self.unseen = form, layer.geometry, given, unseen
        self.weight = layer.weight.astype(np.float64)
        self.quick = form.fitter(self.weight, self.geometry, given, refine=False)
        self.fitter = form.fitter(self.weight, self.geometry, given)
        self.refined = refined
        self.found: dict[Rank, tuple[float, float]] = {}

    def error(self, share: float, counted: ConvGeometry) -> float | None:
        """Held-out error of the rank that fits best at a share of the operations of ``counted``."""
        ranks = self.form.ranks(counted, 1, (share,))
        if len(ranks) > self.refined:
            ranks.sort(key=lambda rank: self._lost(self.quick.fit(rank), self.given))
        for rank in ranks[: self.refined]:
            if rank not in self.found:
                factors = self.fitter.fit(rank)
                self.found[rank] = self._lost(factors, self.given), self._lost(factors, self.unseen)
        best = min((self.found[rank] for rank in ranks[: self.refined]), default=None)
        return best and best[1]

    def _lost(self, factors: list[np.ndarray], moments: InputMoments) -> float:
        return self.form.error(self.weight, factors, self.geometry, moments)


def keeps_size(geometry: ConvGeometry) -> ConvGeometry:
    """The layer padded so that a stage of stride 1 keeps the map's size; itself if it is."""
    ends = []
    for axis, size in enumerate((geometry.height, geometry.width)):
        whole = geometry.dilation[axis] * (geometry.kernel[axis] - 1)
        before, after = geometry.padding[axis], geometry.padding[axis + 2]
        if (geometry.out_height, geometry.out_width)[axis] != -(-size // geometry.stride[axis]):
            before, after = whole // 2, whole - whole // 2
        ends.append((before, after))
    (top, bottom), (left, right) = ends
    return replace(geometry, padding=(top, left, bottom, right))


def log_of(network: Network) -> Path:
    """Where the layers of a network are put down as they are done."""
    return ROOT / "build" / "forms" / f"{network.name}.jsonl"


def is_current(row: Row, samples: int) -> bool:
    """Whether a layer would be measured alike now."""
    return row.samples == samples and row.iterations in (0, POLISH_ITERATIONS)


def run(network: Network, options: argparse.Namespace) -> None:
    """Measure what is missing of a network, writing its section after each layer."""
    (inputs, _), final = network.data()
    shuffled = inputs[np.random.default_rng(0).permutation(len(inputs))]
    count = min(options.samples, len(inputs) if final is not None else len(inputs) // 2)
    others = shuffled[count : 2 * count] if final is None else final[0][:count]
    mod = normalise(load_model(network.model))
    layers = collect_layers(mod)
    log = log_of(network)
    log.parent.mkdir(parents=True, exist_ok=True)
    found = {row.layer: row for row in finished(network.name, log, options.refined)}
    done = {row.layer for row in found.values() if is_current(row, count) and not options.fresh}
    taken = wanted(layers, options.widest, options.one_a_shape)
    if options.layers:
        known = {layer.name: layer for layer in taken}
        if unknown := [name for name in options.layers if name not in known]:
            raise LowRankError(f"{network.name} has no layer {', '.join(unknown)} to measure")
        taken = [known[name] for name in options.layers]
    missing = [layer for layer in taken if layer.name not in done]
    data = shuffled[:count], others, options.refined
    for number, row in enumerate(rows(mod, layers, missing, *data) if missing else (), 1):
        found[row.layer] = row
        with log.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        write(network.name, section(network.name, list(found.values())))
        print(f"{network.name} {row.layer} {row.shape}: {number} of {len(missing)}", flush=True)
    if found and not missing:
        write(network.name, section(network.name, list(found.values())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help="names; all by default")
    parser.add_argument("--layers", nargs="+", help="only these, in this order; all by default")
    parser.add_argument("--samples", type=int, default=512, help="for each of the two sets")
    parser.add_argument(
        "--widest", type=int, default=5000, help="skip layers that read more inputs an output"
    )
    parser.add_argument(
        "--refined", type=int, default=2, help="of a form's ranks at a share; the first to fit best"
    )
    parser.add_argument("--one-a-shape", action="store_true", help="not every layer of one shape")
    parser.add_argument("--fresh", action="store_true", help="measure again what is on record")
    options = parser.parse_args()
    known = [network.name for network in NETWORKS]
    if unknown := [name for name in options.networks if name not in known]:
        print(f"error: no network {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    for network in NETWORKS:
        if options.networks and network.name not in options.networks:
            continue
        if network.missing:
            print(f"{network.name}: skipped, {network.missing}")
            continue
        try:
            run(network, options)
        except (NoPlace, LowRankError) as error:
            print(f"error: {error}")
            return 2
    found = [row for name in known for row in on_page(name)]
    if any(len(row.errors) > 1 for row in found):
        write("overall", overall(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
