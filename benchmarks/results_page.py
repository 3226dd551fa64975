"""docs/results.md, of the rows in results.json: one for each network, budget and machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_page
from networks import NETWORKS

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results.md"
ROWS = Path(__file__).with_name("results.json")
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO f32", "torch": "PyTorch f32"}
# It may round too, so that rows of kernels that do are compared with it as well.
ROUNDING_PEER = "openvino-default"
# Inputs on which the lossless library is compared with ONNX Runtime.
CHECKED = 100

Row = dict[str, Any]


def keep(row: Row) -> None:
    """Put a row in the place of the one of its network, data and machine; write the page."""
    rows = _rows()
    places = [index for index, other in enumerate(rows) if _key(other) == _key(row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    write()


def write() -> None:
    """Write the page of the rows that are kept, with what was reached on a GPU."""
    DOCS.write_text(page(_rows()), encoding="utf-8")


def _rows() -> list[Row]:
    return list(json.loads(ROWS.read_text(encoding="utf-8"))) if ROWS.exists() else []


def _order(row: Row) -> tuple[bool, bool, bool, int]:
    names = [network.name for network in NETWORKS]
    place = names.index(row["name"]) if row["name"] in names else len(names)
    fitted = not row["recover"] and bool(row.get("unlabelled"))
    return bool(row.get("rounds")), row["recover"] > 0, fitted, place


def _key(row: Row) -> tuple[str, str, bool, bool, bool]:
    kind = row["recover"] > 0, bool(row.get("unlabelled")), bool(row.get("rounds"))
    return row["machine"], row["name"], *kind


def page(rows: list[Row]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make results` (`benchmarks/results.py`). Latencies are the least of all runs",
        "(in brackets the better median of two races) in milliseconds, batch 1, float32, each",
        "runtime in a process of its own, the processes taking turns; ours keeps its caller apart",
        "from TVM's threads ([deployment](deployment.md)). *Lossless* is the same",
        "network with no form changed, in the fastest kernels found; speed-ups are over the",
        "fastest of the other runtimes. Where kernels that round may be chosen (*with bfloat16*:",
        "`--algorithms direct winograd fft bfloat16`), OpenVINO also ran in the precision that it",
        "chooses by itself, bfloat16 on this processor; that speed-up is in its column. A",
        "machine's rows are of the day when it was at hand, and of the kernels that there were",
        "then. Accuracy is of the built",
        "library on samples that neither fitted factors nor chose among plans (they may reject a",
        "plan: see [architecture](architecture.md)): top-1, for crepe-tiny raw pitch accuracy",
        "within 50 cents on synthetic tones. Drops are of that, in points; for resnet50-imagenet",
        "the share of photos whose class is not the original's. *Trained* rows add label-free",
        "recovery (`--recover`).",
        "",
        "*Choices tried* are microseconds of all convolutions that a form can change, with the",
        "drop on the selection samples; the first is with no form changed. A choice keeps the",
        "budget if that holds the drop to be expected on other samples, with half its standard",
        "error.",
    ]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        lines += ["", f"## {machine}", ""]
        lines += _machine(sorted((row for row in rows if row["machine"] == machine), key=_order))
    lines += ["", "## On a GPU", "", *gpu_page.goals(*gpu_page.read(), gpu_page.layers())]
    lines += ["", "Layers and networks: [on a GPU](gpu.md)."]
    return "\n".join(lines) + "\n"


def _machine(rows: list[Row]) -> list[str]:
    """The table of one machine, its curves, and what was chosen."""
    lines = [
        "| network | transformed | speed-up | lossless | speed-up | "
        + " | ".join(PEERS.values())
        + " | OpenVINO's choice | accuracy | drop (95 % interval) | agreement | samples |",
        "|" + "---|" * (10 + len(PEERS)),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    measured = {row["name"] for row in rows}
    absent = [network.name for network in NETWORKS if network.name not in measured]
    if absent:
        lines += ["", f"Not measured: {', '.join(absent)}."]
    lines += ["", "Choices tried:", ""]
    lines += [f"- {_name(row)}: {_curve(row['curve'])}" for row in rows]
    lines += ["", "What limits the speed-up:", "", *map(_limit, rows)]
    return [*lines, "", "What was chosen:", "", *map(_chosen, rows)]


def _limit(row: Row) -> str:
    """How much forms can change at all, and between which times the budget ended."""
    latency, curve = row["latency"], row["curve"]
    if not curve:
        return f"- {_name(row)}: no form is faster in any layer"
    lossless, changed = 1e3 * latency["lossless"], curve[0]["dense_us"]
    share = f"{changed:.0f} of the lossless network's {lossless:.0f} us"
    if changed > lossless:  # kernels alone, at another time
        share = f"nearly all of the lossless network's {lossless:.0f} us"
    text = f"- {_name(row)}: {share} are layers that a form can make faster"
    kept = min((point["microseconds"] for point in curve if point["keeps"]), default=changed)
    missed = [
        (point["microseconds"], point["expected_drop"])
        for point in curve
        if not point["keeps"] and point["microseconds"] < kept
    ]
    if not missed:
        return f"{text}; no choice that was tried and faster than {kept:.0f} us missed the budget"
    slowest, drop = max(missed)
    return (
        f"{text}; the budget ended between {kept:.0f} us and {slowest:.0f} us, where a drop of "
        f"{drop:.2f} is to be expected"
    )


def _chosen(row: Row) -> str:
    forms, algorithms = (
        ", ".join(f"{count} {name}" for name, count in row[key].items())
        for key in ("forms", "algorithms")
    )
    reason = "" if row["transformed"] else f" ({row['reason']})"
    before, after = (row["result"][f"weight_bytes_{when}"] / 1e6 for when in ("before", "after"))
    # Rows of older versions do not have it.
    priced = f"; its layers are priced at {row['priced_us']:.0f} us" if "priced_us" in row else ""
    return (
        f"- {_name(row)}: {forms}{reason}; stages by {algorithms}; weights "
        f"{before:.2f} -> {after:.2f} MB{priced}; budget {row['max_drop']:.3g}; "
        f"{row['trials']} schedules tried a kernel; planning after calibration "
        f"{row['planning_seconds']:.0f} s{_stages(row)}; lossless differs from ONNX Runtime by "
        f"{row['error']:.0e} of the largest output at most, over {CHECKED} inputs"
    )


def _stages(row: Row) -> str:
    """Where the time of planning went, in brackets."""
    parts = [f"{stage} {seconds:.0f}" for stage, seconds in row.get("stages", {}).items()]
    return f" ({', '.join(parts)})" if parts else ""


def _name(row: Row) -> str:
    count, name = row.get("unlabelled"), str(row["name"])
    if row.get("rounds"):
        name += f" with {' and '.join(row['rounds'])}"
    if not row["recover"]:
        return f"{name}, fitted to {count} more inputs" if count else name
    more = f" on {count} more inputs" if count else ""
    return f"{name}, trained {row['recover']:g} min{more}"


def _cells(row: Row) -> list[str]:
    result, latency = row["result"], row["latency"]
    peers = [latency[peer] for peer in PEERS if isinstance(latency[peer], float)]
    gains = [
        f"{min(peers) / latency[name]:.2f}x" if peers else ""
        for name in ("transformed", "lossless")
    ]
    before, after = result["accuracy_before"], result["accuracy_after"]
    low, high = result["drop_interval"] or (float("nan"),) * 2
    return [
        _name(row),
        _both(row, "transformed"),
        f"**{gains[0]}**" if row["transformed"] else "original kept",
        _both(row, "lossless"),
        gains[1],
        *(_both(row, peer) for peer in PEERS),
        _rounding(row),
        f"{before:.2f} -> {after:.2f} %",
        f"{result['drop']:.2f} ({low:.2f} to {high:.2f})",
        f"{result['agreement']:.1f} %",
        str(result["samples"]),
    ]


def _rounding(row: Row) -> str:
    """Times of the peer that may round, and how many times as long they are as ours."""
    theirs = row["latency"].get(ROUNDING_PEER)
    if not isinstance(theirs, float):
        return "-"
    return f"{_both(row, ROUNDING_PEER)}, {theirs / row['latency']['transformed']:.2f}x"


def _curve(points: list[Row]) -> str:
    if not points:
        return "none"
    found = [f"{points[0]['dense_us']:.0f}"]
    for point in points:
        word = " trained" if point["recovered"] else ""
        found.append(f"{point['microseconds']:.0f} ({point['drop']:+.2f}{word})")
    return ", ".join(found)


def _both(row: Row, name: str) -> str:
    least, median = row["latency"][name], row["median"][name]
    return f"{least:.3f} ({median:.3f})" if isinstance(least, float) else str(least)
