"""The page of what was measured on a GPU, made of the figures that the scripts beside it leave."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_gpu import OURS, layer_table, table
from tvm_lowrank.schedules.kernels import FAMILIES, REDUCED

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords, shipped_records, survey_records

HERE = Path(__file__).resolve().parent
ROWS, COMPARED = HERE / "results_gpu.json", HERE / "compare_gpu.json"
CUDNN = HERE / "cudnn_layers.json"
# What runs the original beside ours, of `gpu_runtimes.VARIANTS`.
PEERS = ("torch", "torch-tf32-channels-last")
# Inputs that ONNX Runtime checks.
CHECKED = 100


def render(rows: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> str:
    """The page, of the rows of transformed networks and those of `compare.py`."""
    shapes = layers()
    gpus = dict.fromkeys(row["gpu"] for row in (*rows.values(), *compared, *shapes))
    lines = [
        "# On a GPU",
        "",
        f"Measured on {', '.join(gpus)}; written by `python benchmarks/results_gpu.py page` from",
        "what `race` leaves, and `python benchmarks/compare.py resnet50 --target cuda --rows",
        "benchmarks/compare_gpu.json`. Medians of single runs in milliseconds by CUDA events, each",
        "runtime in a process of its own. The kernels: [CUDA](cuda.md).",
        "",
        *goals(rows, compared, shapes),
        "",
        "## Transformed networks",
        "",
        "Float32. *Transformed* and *lossless* (no form changed, the fastest kernels) were planned",
        "without a GPU, from records and the trained cost model; the libraries were then timed,",
        "and judged on samples that neither fitted factors nor chose among plans. *Drop*: in",
        "points against the lossless library (in brackets its 95 % interval). *Error*: of that",
        f"one against ONNX Runtime on a processor, over {CHECKED} inputs. *Predicted*: the sum",
        "over convolutions and dense layers of the transformed library that planning went by.",
        "",
        "| network | batch | transformed | predicted | lossless | gain | "
        + " | ".join(PEERS)
        + " | drop | agreement | samples | error |",
        "|" + "---|" * (10 + len(PEERS)),
    ]
    lines += [_line(row) for row in rows.values()]
    lines += [
        "",
        "## Layers",
        "",
        "Microseconds of one of many runs in a row: ours with bias and ReLU, the best on record",
        "(`tune --export-batch`, `measure.py`), cuDNN's without either, in the faster of its two",
        "layouts (`python benchmarks/cudnn_layers.py`). *Half*: float16 factors, which round as",
        "TF32 does, with maps in float32.",
        "",
        "| layer | float32 | kernel | cuDNN | its time over ours | TF32 | half | cuDNN TF32 | "
        "its time over the lesser |",
        "|" + "---|" * 9,
    ]
    lines += [_layer(row) for row in shapes]
    for row in compared:
        title = f"{row['network']}, batch {row['batch']}, kernels: {', '.join(row['algorithms'])}"
        lines += [table(title, row["runtimes"]), layer_table(row["layers"])]
    return "\n".join(lines) + "\n"


def layers() -> list[dict[str, Any]]:
    """Each shape that cuDNN was timed on, with the best on record of our kernels.

    ``float32``, ``tf32`` and ``half`` are ours in microseconds, ``kernel`` that of the first;
    ``cudnn_float32`` and ``cudnn_tf32`` are cuDNN's.
    """
    timed = json.loads(CUDNN.read_text(encoding="utf-8")) if CUDNN.exists() else []
    arch = "sm_90"
    files = [*shipped_records(arch), *survey_records(arch)]
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for key, (card, *_), schedule, us in TuningRecords(None, arch, 1, shipped=files).rows():
        algorithm = FAMILIES[schedule["kernel"]].algorithm
        precision = algorithm if algorithm in REDUCED else "float32"
        place = best.setdefault(f"{card} {_key(json.loads(key)['geometry'])}", {})
        place[precision] = min(place.get(precision, (math.inf, "")), (us, schedule["kernel"]))
    found = []
    for row in timed:
        ours = best.get(f"{row['gpu']} {_key(row['geometry'])}", {})
        if set(ours) != {"float32", *REDUCED}:
            continue
        found.append(
            {
                "gpu": row["gpu"],
                "geometry": row["geometry"],
                "kernel": ours["float32"][1].removeprefix("cuda_"),
                **{precision: us for precision, (us, _) in ours.items()},
                "cudnn_float32": row["float32"],
                "cudnn_tf32": row["tf32"],
            }
        )
    return found


def _key(geometry: Mapping[str, Any]) -> str:
    return json.dumps(geometry, sort_keys=True)


def _layer(row: Mapping[str, Any]) -> str:
    geometry = ConvGeometry.from_json(row["geometry"])
    cells = [
        f"{geometry}, batch {geometry.batch}",
        f"{row['float32']:.1f}",
        row["kernel"],
        f"{row['cudnn_float32']:.1f}",
        f"{_advantage(row, 'float32'):.2f}",
        f"{row['tf32']:.1f}",
        f"{row['half']:.1f}",
        f"{row['cudnn_tf32']:.1f}",
        f"{_advantage(row, 'tf32'):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _advantage(row: Mapping[str, Any], precision: str) -> float:
    """cuDNN's time over ours; where factors may be rounded, over that of the fastest kernel."""
    ours = (
        row["float32"] if precision == "float32" else min(row["float32"], row["tf32"], row["half"])
    )
    return float(row[f"cudnn_{precision}"] / ours)


def _line(row: Mapping[str, Any]) -> str:
    times = row["median_ms"]
    interval = "" if row["interval"] is None else " ({:.2f} to {:.2f})".format(*row["interval"])
    cells = [
        row["network"],
        str(row["batch"]),
        _time(times["transformed"]),
        _time(row["predicted_ms"]),
        _time(times["lossless"]) + _baseline(row),
        f"{_gain(row):.2f}x",
        *(_time(times[name]) for name in PEERS),
        f"{row['drop']:.2f}{interval}",
        f"{row['agreement']:.1f} %",
        str(row["samples"]),
        f"{row['error']:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _time(milliseconds: float | str) -> str:
    return f"{milliseconds:.3f}" if isinstance(milliseconds, float) else milliseconds


def _gain(row: Mapping[str, Any]) -> float:
    """The lossless library's time over the transformed one's."""
    times = row["median_ms"]
    return float(times["lossless"] / times["transformed"])


def _baseline(row: Mapping[str, Any]) -> str:
    """What the lossless library is where it is not of the fastest kernels."""
    return " (direct kernels only)" if row["lossless"] == "original.so" else ""


def goals(
    rows: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    shapes: Sequence[Mapping[str, Any]],
) -> list[str]:
    """A table of what is to be reached on a GPU, and what was."""
    wanted = [
        row
        for row in shapes
        if row["geometry"]["batch"] == 128
        and row["geometry"]["kernel"] in ([1, 1], [3, 3])
        and row["geometry"]["height"] > 1
    ]
    exact = [
        row for row in compared if row["network"] == "resnet50" and "tf32" not in row["algorithms"]
    ]
    found = {
        ("dense 3x3 and 1x1 layers at equal precision: as fast as cuDNN or faster", "128"): [
            f"{name}: {_faster(wanted, precision)}"
            for precision, name in (("float32", "float32"), ("tf32", "TF32"))
            if wanted
        ],
        ("ResNet-50 against PyTorch: 1.5 times as fast", "1"): [
            f"{peer}: {times['median_ms'] / row['runtimes'][OURS]['median_ms']:.2f} times"
            for row in exact
            for peer, times in row["runtimes"].items()
            if row["batch"] == 1 and isinstance(times, dict) and peer.startswith("torch")
        ],
        ("transformed against dense networks, within 1 point: 1.5 times as fast", "1, 128"): [
            f"{row['network']}, batch {row['batch']}: {_gain(row):.2f} times{_baseline(row)} at a "
            f"drop of {row['drop']:.2f}"
            for row in rows.values()
        ],
    }
    lines = ["| goal | batch | result |", "|---|---|---|"]
    for (goal, batch), results in found.items():
        lines.append(f"| {goal} | {batch} | {'; '.join(results) or 'not measured'} |")
    return lines


def _faster(rows: Sequence[Mapping[str, Any]], precision: str) -> str:
    """In how many layers our kernel is as fast as cuDNN's, and the quotients of times."""
    gains = [_advantage(row, precision) for row in rows]
    return (
        f"{sum(gain >= 1 for gain in gains)} of {len(gains)} shapes, cuDNN's time over ours "
        f"{min(gains):.2f} to {max(gains):.2f}, median {statistics.median(gains):.2f}"
    )


def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The rows of transformed networks and those of `compare.py`, as far as they are there."""
    rows = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    compared = json.loads(COMPARED.read_text(encoding="utf-8")) if COMPARED.exists() else []
    return rows, compared
