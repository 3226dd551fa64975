"""The page docs/forms.md: its tables written from rows, and read back as rows.

What stands on the page is a record of what was measured, so that it can be added to.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tvm_lowrank.decompose import FORMS, Bicluster, Form

PAGE = Path(__file__).resolve().parents[1] / "docs" / "forms.md"
# Errors of four digits that are smaller have no ratio worth printing.
COMPARABLE = 0.005
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

# Whose factors are polished by `TermRegression`.
SUMS_OF_TERMS = {"cp", "cp3", "shared_factor", "bicluster"}

Errors = dict[str, list[float | None]]


@dataclass
class Row:
    """One layer: for each form, the held-out errors at 1/4 and 1/2 of the operations.

    None: no rank costs so little. ``by_pixel`` holds those at shares of the operations a pixel, for
    a layer whose padding does not keep its map's size: a chain's first stages then have more pixels
    than its output. Of a form's ranks at a share, ``refined`` were refined: those that fit best
    before. Descent on the forms that are sums of terms ended after ``iterations`` at most; 0 where
    the layer has no such form.
    """

    layer: str
    shape: str
    samples: int
    refined: int = 1
    iterations: int = 0
    errors: Errors = field(default_factory=dict)
    by_pixel: Errors = field(default_factory=dict)


class NoPlace(Exception):
    """The page has no place, or several, for a section."""


def place(layer: str) -> int:
    """Where a layer stands in its network."""
    return int(layer.lstrip("conv"))


def section(name: str, found: list[Row]) -> str:
    """A table of one network; the best form at each share in bold."""
    found = sorted(found, key=lambda row: place(row.layer))
    names = [n for n in ENTRIES if any(n in row.errors for row in found)]
    lines = [
        f"## {name}",
        "",
        "Fitted on so many samples, error on as many others; at 1/4 and 1/2 of the operations; "
        f"{found[0].refined} of a form's ranks refined.",
        "",
        "| layer | shape | samples | iterations | "
        + " | ".join(HEADINGS.get(n, n) for n in names)
        + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in found:
        fitted = f"{row.samples} | {row.iterations or '-'}"
        lines.append(f"| {row.layer} | {row.shape} | {fitted} | {_cells(names, row.errors)} |")
        if row.by_pixel not in ({}, row.errors):
            lines.append(f"| {row.layer} | by pixel | {fitted} | {_cells(names, row.by_pixel)} |")
    return "\n".join([*lines, "", _clustering(found), ""])


def _cells(names: list[str], errors: Errors) -> str:
    """Each form's errors, the best at each share in bold."""
    columns = list(zip(*errors.values(), strict=True))
    least = [min((e for e in column if e is not None), default=None) for column in columns]
    none: list[float | None] = [None] * len(least)
    return " | ".join(
        " / ".join(_cell(e, e == b) for e, b in zip(errors.get(n, none), least, strict=True))
        for n in names
    )


def _cell(error: float | None, best: bool) -> str:
    if error is None:
        return "-"
    text = f"{error:.4f}".removeprefix("0")
    return f"**{text}**" if best else text


def _clustering(found: list[Row]) -> str:
    """Of the errors as they are printed, so that a page read back says the same."""
    ratios = []
    for row in found:
        names = ("bicluster", "bicluster, contiguous")
        for pair in zip(*(row.errors.get(name, []) for name in names), strict=True):
            a, b = (round(error or 0.0, 4) for error in pair)
            ratios += [a / b] if min(a, b) >= COMPARABLE else []
    if not ratios:
        return "No layer of this network has groups to compare."
    better, worse = sum(r < 0.99 for r in ratios), sum(r > 1.01 for r in ratios)
    return (
        f"Clustered channels against contiguous slices: error {np.median(ratios):.2f} times as "
        f"large in the median of {len(ratios)} cases ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"lower by more than 1 % in {better}, higher in {worse} (errors of {COMPARABLE} and more)."
    )


def overall(found: list[Row]) -> str:
    """Which forms are best on the layers of all networks that have more than one tap."""
    found = [row for row in found if len(row.errors) > 1]
    lines = [f"Of {len(found)} layers with kernels larger than 1x1:", ""]
    for index, share in enumerate(("1/4", "1/2")):
        best: dict[str, int] = {}
        ratios = []
        for row in found:
            errors = {n: e[index] for n, e in row.errors.items() if e[index]}
            winner = min(errors, key=lambda name: errors[name])
            best[winner] = best.get(winner, 0) + 1
            dense = [errors[name] for name in ("separable", "tucker2") if name in errors]
            ratios += [min(dense) / errors[winner]] if dense else []
        names = sorted(best, key=lambda name: -best[name])
        lines.append(
            f"- At {share} of the operations "
            + ", ".join(f"{HEADINGS.get(n, n)} loses least on {best[n]}" for n in names)
            + f". The better of `separable` and Tucker-2 loses {np.median(ratios):.1f} times as "
            "much as the best in the median."
        )
    return "\n".join([*lines, f"- {_clustering(found)}", ""])


def on_page(name: str) -> list[Row]:
    """The rows of a network's section, to the digits printed; none where it has no table.

    All but the best form of a layer, which is bold, are read as a trace more than what is printed,
    so that it stays the best of those that are printed alike.
    """
    begin, end = re.escape(f"<!-- begin {name} -->\n"), re.escape(f"<!-- end {name} -->")
    text = re.search(f"{begin}(.*?){end}", PAGE.read_text(), re.S)
    head = text and re.search(r"; (\d+) of a form's", text[1])
    if not text or not head:
        return []
    lines = [line.strip("| ").split(" | ") for line in text[1].splitlines() if line[:2] == "| "]
    known = {HEADINGS.get(n, n): n for n in ENTRIES}
    found: dict[str, Row] = {}
    for layer, shape, samples, iterations, *cells in lines[1:]:
        if shape != "by pixel":
            most = 0 if iterations == "-" else int(iterations)
            found[layer] = Row(layer, shape, int(samples), int(head[1]), most)
        row = found[layer]
        for heading, cell in zip(lines[0][4:], cells, strict=True):
            errors = [_read(part) for part in cell.split(" / ")]
            if heading in known and errors != [None] * len(errors):
                (row.by_pixel if shape == "by pixel" else row.errors)[known[heading]] = errors
    return list(found.values())


def _read(cell: str) -> float | None:
    """What `_cell` wrote."""
    if cell == "-":
        return None
    return float(cell.strip("*")) + (1e-9 if cell.startswith("**") else 1e-6)


def write(name: str, text: str) -> None:
    """Put a section into its place on the page.

    NoPlace unless the page has one place for it: two lines ``<!-- begin NAME -->`` and
    ``<!-- end NAME -->``.
    """
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    page = PAGE.read_text()
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    if (places := len(re.findall(pattern, page, re.S))) != 1:
        raise NoPlace(f"{PAGE.name} has {places} places for {name}; one was expected")
    PAGE.write_text(re.sub(pattern, lambda _: begin + text + end, page, flags=re.S))


def finished(name: str, log: Path, refined: int) -> list[Row]:
    """The layers that earlier runs measured with as many refined ranks."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [*on_page(name), *(Row(**json.loads(line)) for line in lines)]
    # The log comes last because it has all digits.
    return list({r.layer: r for r in rows if r.refined == refined}.values())
