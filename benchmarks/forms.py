"""Output error of every form at 1/4 and 1/2 of the operations, layer by layer, to docs/forms.md.

    python benchmarks/forms.py                      # every network
    python benchmarks/forms.py resnet20-cifar10     # one; the other sections stay

Factors are fitted to the moments of one set of samples; the error is measured on those of another.
One layer of each shape comes first, then the others. Each layer is written to the page and to
``build/forms/NETWORK.jsonl`` as soon as it is done, and a run that starts again with the same
numbers of samples goes on after those; ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from networks import NETWORKS, Network
from tvm import IRModule
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, Bicluster, Form
from tvm_lowrank.decompose.moments import InputMoments
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.trial import TrialNetwork
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "forms.md"
SHARES = (1 / 4, 1 / 2)
# Of the moments that are held at once, both sets together.
MOMENT_BYTES = 1 << 30
Samples = np.ndarray
ENTRIES: dict[str, Form] = {**FORMS, "bicluster, contiguous": Bicluster(contiguous=True)}
HEADINGS = {
    "linear_combination": "lin. comb.",
    "tucker2": "Tucker-2",
    "tensor_train": "tensor train",
    "monochromatic": "mono",
    "monochromatic_separable": "mono sep.",
    "bicluster_separable": "bicl. sep.",
    "shared_factor": "shared",
    "bicluster, contiguous": "bicl. contig.",
}


@dataclass
class Row:
    """One layer: for each form, the held-out errors at `SHARES` (None: no rank costs so little)."""

    layer: str
    shape: str
    samples: int
    errors: dict[str, list[float | None]] = field(default_factory=dict)


def wanted(layers: list[ConvLayer], widest: int, one_a_shape: bool) -> list[ConvLayer]:
    """The layers to measure, one of each shape first."""
    first, others = [], []
    seen: set[object] = set()
    for layer in layers:
        g = layer.geometry
        if g is None or layer.fully_connected or g.groups != 1 or layer.weight[0].size > widest:
            continue
        (others if (g.weight_shape, g.stride) in seen else first).append(layer)
        seen.add((g.weight_shape, g.stride))
    return first if one_a_shape else first + others


def rows(
    mod: IRModule, layers: list[ConvLayer], taken: list[ConvLayer], fit: Samples, held_out: Samples
) -> Iterator[Row]:
    """The layers in ``taken``, each measured before the next is looked at.

    Moments are gathered for as many layers at a time as `MOMENT_BYTES` hold, which means running
    the network several times where there are many wide ones.
    """
    timer = KernelTimer(host_target(), TuningRecords(None, "forms", 1), trials=1)
    observer = TrialNetwork(mod, layers, timer, expose=True)
    waiting = list(taken)
    while waiting:
        group, held = [waiting.pop(0)], 0
        while waiting and held < MOMENT_BYTES:
            group.append(waiting.pop(0))
            held = sum(2 * 8 * layer.weight[0].size ** 2 for layer in group)
        given, unseen = (input_moments(observer, group, x, 0) for x in (fit, held_out))
        for layer in group:
            yield measured(layer, given.pop(layer.name), unseen.pop(layer.name), len(fit))
            gc.collect()


def measured(layer: ConvLayer, given: InputMoments, unseen: InputMoments, samples: int) -> Row:
    """Errors of every form, refined at the one of its ranks at a share that fits best without."""
    geometry = layer.geometry
    assert geometry is not None
    row = Row(layer.name, str(geometry).split(" @")[0], samples)
    weight = layer.weight.astype(np.float64)
    for name, form in ENTRIES.items():
        if form.keeps_memory or form.refuse(geometry):
            continue
        start = time.perf_counter()
        quick = form.fitter(weight, geometry, given, refine=False)
        fitter = form.fitter(weight, geometry, given)
        row.errors[name] = []
        for share in SHARES:
            ranks, error = form.ranks(geometry, 1, (share,)), None
            tried = [form.error(weight, quick.fit(r), geometry, given) for r in ranks]
            if ranks:
                best = fitter.fit(ranks[int(np.argmin(tried))])
                error = form.error(weight, best, geometry, unseen)
            row.errors[name].append(error)
        spent = time.perf_counter() - start
        print(f"  {layer.name} {name}: {row.errors[name]}, {spent:.1f} s", flush=True)
    return row


def place(layer: str) -> int:
    """Where a layer stands in its network."""
    return int(layer.lstrip("conv"))


def section(name: str, samples: int, found: list[Row]) -> str:
    """A table of one network; the best form at each share in bold."""
    found = sorted(found, key=lambda row: place(row.layer))
    names = [n for n in ENTRIES if any(n in row.errors for row in found)]
    lines = [
        f"## {name}",
        "",
        f"Fitted on {samples} samples, error on others; at 1/4 and 1/2 of the operations.",
        "",
        "| layer | shape | " + " | ".join(HEADINGS.get(n, n) for n in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in found:
        columns = list(zip(*row.errors.values(), strict=True))
        least = [min((e for e in column if e is not None), default=None) for column in columns]
        cells = [
            " / ".join(
                _cell(e, e == b) for e, b in zip(row.errors.get(n, [None] * 2), least, strict=True)
            )
            for n in names
        ]
        lines.append(f"| {row.layer} | {row.shape} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _clustering(found), ""])


def _cell(error: float | None, best: bool) -> str:
    if error is None:
        return "-"
    text = f"{error:.4f}".removeprefix("0")
    return f"**{text}**" if best else text


def _clustering(found: list[Row]) -> str:
    ratios = [
        a / b
        for row in found
        for a, b in zip(
            row.errors.get("bicluster", []),
            row.errors.get("bicluster, contiguous", []),
            strict=True,
        )
        if a is not None and b
    ]
    if not ratios:
        return "No layer of this network has groups to compare."
    better = sum(r < 0.99 for r in ratios)
    return (
        f"Clustered channels against contiguous slices: error {np.median(ratios):.2f} times as "
        f"large in the median of {len(ratios)} cases ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"lower by more than 1 % in {better}."
    )


def write(name: str, text: str) -> None:
    """Put a network's section into the page, in place of its last one."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    page = PAGE.read_text()
    block = begin + text + end
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if re.search(pattern, page, re.S):
        page = re.sub(pattern, lambda _: block, page, flags=re.S)
    else:
        page += "\n" + block
    PAGE.write_text(page)


def finished(log: Path, samples: int) -> list[Row]:
    """The layers that earlier runs measured with as many samples."""
    if not log.exists():
        return []
    found = [Row(**json.loads(line)) for line in log.read_text().splitlines()]
    return [row for row in found if row.samples == samples]


def run(network: Network, options: argparse.Namespace) -> None:
    """Measure what is missing of a network, writing its section after each layer."""
    (inputs, _), final = network.data()
    shuffled = inputs[np.random.default_rng(0).permutation(len(inputs))]
    count = min(options.samples, len(inputs) if final is not None else len(inputs) // 2)
    others = shuffled[count : 2 * count] if final is None else final[0][:count]
    mod = normalise(load_model(network.model))
    layers = collect_layers(mod)
    log = ROOT / "build" / "forms" / f"{network.name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        log.unlink(missing_ok=True)
    found = finished(log, count)
    done = {row.layer for row in found}
    taken = wanted(layers, options.widest, options.one_a_shape)
    missing = [layer for layer in taken if layer.name not in done]
    for row in rows(mod, layers, missing, shuffled[:count], others) if missing else ():
        found.append(row)
        with log.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        write(network.name, section(network.name, count, found))
        print(f"{network.name} {row.layer} {row.shape}: {len(found)} of {len(taken)}", flush=True)
    if found and not missing:
        write(network.name, section(network.name, count, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help="names; all by default")
    parser.add_argument("--samples", type=int, default=512, help="for each of the two sets")
    parser.add_argument(
        "--widest", type=int, default=5000, help="skip layers that read more inputs an output"
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
        run(network, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
