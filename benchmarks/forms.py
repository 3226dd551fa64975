"""Output error of every form at 1/4 and 1/2 of the operations, layer by layer, to docs/forms.md.

    python benchmarks/forms.py                      # every network
    python benchmarks/forms.py resnet20-cifar10     # one; the other sections stay

Factors are fitted to the moments of one set of samples; the error is measured on those of another.
Of layers that have the same shape in one network, the first is taken.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from networks import NETWORKS
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS, Bicluster, Form, relative_error
from tvm_lowrank.decompose.moments import InputMoments
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.trial import TrialNetwork
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target

PAGE = Path(__file__).resolve().parents[1] / "docs" / "forms.md"
SHARES = (1 / 4, 1 / 2)
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

    layer: ConvLayer
    errors: dict[str, list[float | None]] = field(default_factory=dict)


def rows(model: Path, fit: np.ndarray, held_out: np.ndarray, widest: int) -> Iterator[Row]:
    """The layers of a network, each measured before the next is looked at."""
    mod = normalise(load_model(model))
    layers = collect_layers(mod)
    chosen: dict[object, ConvLayer] = {}
    for layer in layers:
        g = layer.geometry
        if g is not None and g.groups == 1 and layer.weight[0].size <= widest:
            chosen.setdefault((g.weight_shape, g.stride), layer)
    timer = KernelTimer(host_target(), TuningRecords(None, "forms", 1), trials=1)
    observer = TrialNetwork(mod, layers, timer, expose=True)
    taken = list(chosen.values())
    given, unseen = (input_moments(observer, taken, x, 0) for x in (fit, held_out))
    for layer in taken:
        yield measured(layer, given.pop(layer.name), unseen.pop(layer.name))


def measured(layer: ConvLayer, given: InputMoments, unseen: InputMoments) -> Row:
    """Errors of every form; of several ranks at one share, that with least error when fitted."""
    geometry, row = layer.geometry, Row(layer)
    assert geometry is not None
    weight = layer.weight.astype(np.float64)
    for name, form in ENTRIES.items():
        if form.refuse(geometry):
            continue
        fitter = form.fitter(weight, geometry, given)
        row.errors[name] = []
        for share in SHARES:
            whole = [
                form.reconstruct(fitter.fit(rank)) for rank in form.ranks(geometry, 1, (share,))
            ]
            best = min(whole, key=lambda w: relative_error(weight, w, given), default=None)
            error = None if best is None else relative_error(weight, best, unseen)
            row.errors[name].append(error)
    return row


def section(name: str, samples: int, found: list[Row]) -> str:
    """A table of one network; the best form at each share in bold."""
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
        shape = str(row.layer.geometry).split(" @")[0]
        lines.append(f"| {row.layer.name} | {shape} | " + " | ".join(cells) + " |")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help="names; all by default")
    parser.add_argument("--samples", type=int, default=512, help="for each of the two sets")
    parser.add_argument(
        "--widest", type=int, default=600, help="skip layers that read more inputs an output"
    )
    options = parser.parse_args()
    for network in NETWORKS:
        if options.networks and network.name not in options.networks:
            continue
        if missing := network.missing:
            print(f"{network.name}: skipped, {missing}")
            continue
        (inputs, _), final = network.data()
        order = np.random.default_rng(0).permutation(len(inputs))
        shuffled = inputs[order]
        count = min(options.samples, len(inputs) if final is not None else len(inputs) // 2)
        others = shuffled[count : 2 * count] if final is None else final[0][:count]
        found: list[Row] = []
        for row in rows(network.model, shuffled[:count], others, options.widest):
            found.append(row)
            print(network.name, row.layer.name, row.layer.geometry, row.errors, flush=True)
            write(network.name, section(network.name, count, found))


if __name__ == "__main__":
    main()
