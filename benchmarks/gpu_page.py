"""The page of what was measured on a GPU, made of the figures that the scripts beside it leave."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_gpu import OURS, layer_table, table
from gpu_runtimes import PRECISIONS
from tvm_lowrank.schedules.cuda.channels_last import LastHalfSchedule
from tvm_lowrank.schedules.kernels import FAMILIES, REDUCED

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.shipped import shipped_records, survey_records

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
        "*Transformed* and *lossless* (no form changed, the fastest kernels) were planned",
        "without a GPU, from records and the trained cost model; the libraries were then timed,",
        "and judged on samples that neither fitted factors nor chose among plans. *Rounds*: which",
        "kernels were allowed beside those of float32, and are used. *Gain*: over the lossless",
        "library in float32. *Drop*: in points against the lossless library, where kernels round",
        "against ONNX Runtime (in brackets its 95 % interval). *Error*: of the lossless library",
        f"against ONNX Runtime on a processor, over {CHECKED} inputs. *Predicted*: the sum over",
        "convolutions and dense layers of the transformed library that planning went by.",
        "",
        "| network | batch | rounds | transformed | predicted | lossless | gain | "
        + " | ".join(PEERS)
        + " | drop | agreement | samples | error |",
        "|" + "---|" * (11 + len(PEERS)),
    ]
    lines += [_line(row, rows) for row in rows.values()]
    lines += [
        "",
        "## Layers",
        "",
        "Microseconds of one of many runs in a row: ours with bias and ReLU (and a residual where",
        "a network has one), the best on record (`tune --export-batch`, `measure.py`), cuDNN's",
        "without, in the faster of its two layouts (`python benchmarks/cudnn_layers.py`). Maps are",
        "in the layout of the kernel; what turning them would take is in no time. *TF32*: all",
        "kernels that round factors to 10 bits of mantissa, of float32 maps. *Float16*: maps are",
        "float16, too. *Over*: cuDNN's time over that of our fastest kernel of no less precision.",
        "",
        "| layer | float32 | kernel | "
        + " | ".join(
            f"{'' if name == 'float32' else f'{label} | '}cuDNN {label} | over"
            for name, label in PRECISIONS.items()
        )
        + " |",
        "|" + "---|" * (3 * len(PRECISIONS) + 2),
    ]
    lines += [_layer(row) for row in shapes]
    for row in compared:
        title = f"{row['network']}, batch {row['batch']}, kernels: {', '.join(row['algorithms'])}"
        lines += [table(title, row["runtimes"]), layer_table(row["layers"])]
    return "\n".join(lines) + "\n"


def layers() -> list[dict[str, Any]]:
    """Each shape that cuDNN was timed on, with the best on record of our kernels.

    ``float32``, ``tf32`` and ``half`` are ours in microseconds, where they are known, ``kernel``
    that of the first; those of cuDNN have ``cudnn_`` before them.
    """
    timed = json.loads(CUDNN.read_text(encoding="utf-8")) if CUDNN.exists() else []
    arch = "sm_90"
    files = [*shipped_records(arch), *survey_records(arch)]
    best: dict[str, dict[str, tuple[float, str]]] = {}
    records = TuningRecords(None, arch, 1, shipped=files)
    for key, place, schedule, us in records.rows():
        us = records.alone(key, schedule, place) or us
        times = best.setdefault(f"{place.machine} {_key(json.loads(key)['geometry'])}", {})
        precision = _precision(schedule["kernel"])
        times[precision] = min(times.get(precision, (math.inf, "")), (us, schedule["kernel"]))
    found = []
    for row in timed:
        ours = best.get(f"{row['gpu']} {_key(row['geometry'])}", {})
        if not ours.keys() >= {"float32", "tf32"}:
            continue
        found.append(
            {
                "gpu": row["gpu"],
                "geometry": row["geometry"],
                "kernel": ours["float32"][1].removeprefix("cuda_"),
                **{precision: us for precision, (us, _) in ours.items()},
                **{f"cudnn_{name}": row[name] for name in PRECISIONS if name in row},
            }
        )
    return found


def _precision(kernel: str) -> str:
    """Which of `PRECISIONS` a kernel is of."""
    if kernel == LastHalfSchedule.kernel:
        return "half"
    return "tf32" if FAMILIES[kernel].algorithm in REDUCED else "float32"


def _key(geometry: Mapping[str, Any]) -> str:
    return json.dumps(geometry, sort_keys=True)


def _layer(row: Mapping[str, Any]) -> str:
    geometry = ConvGeometry.from_json(row["geometry"])
    cells = [
        f"{geometry}, batch {geometry.batch}",
        f"{row['float32']:.1f}",
        row["kernel"],
    ]
    for precision in PRECISIONS:
        own = [f"{row[precision]:.1f}" if precision in row else "-"]
        known = f"cudnn_{precision}" in row
        cells += own if precision != "float32" else []
        cells += [f"{row[f'cudnn_{precision}']:.1f}" if known else "-"]
        cells += [f"{_advantage(row, precision):.2f}" if known else "-"]
    return "| " + " | ".join(cells) + " |"


def _advantage(row: Mapping[str, Any], precision: str) -> float:
    """cuDNN's time over that of our fastest kernel of no less precision."""
    order = list(PRECISIONS)
    allowed = order[: order.index(precision) + 1]
    return float(row[f"cudnn_{precision}"] / min(row[name] for name in allowed if name in row))


def _line(row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    times = row["median_ms"]
    interval = "" if row["interval"] is None else " ({:.2f} to {:.2f})".format(*row["interval"])
    cells = [
        row["network"],
        str(row["batch"]),
        _rounds(row),
        _time(times["transformed"]),
        _time(row["predicted_ms"]),
        _time(times["lossless"]) + _baseline(row),
        f"{_gain(row, rows):.2f}x",
        *(_time(times[name]) for name in PEERS),
        f"{row['drop']:.2f}{interval}",
        f"{row['agreement']:.1f} %",
        str(row["samples"]),
        f"{row['error']:.0e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _time(milliseconds: float | str) -> str:
    return f"{milliseconds:.3f}" if isinstance(milliseconds, float) else milliseconds


def _rounds(row: Mapping[str, Any]) -> str:
    """The kernels of less precision that a transformed library has."""
    return ", ".join(row.get("rounds", ())) or "-"


def _with(row: Mapping[str, Any]) -> str:
    return f", with {_rounds(row)}" if row.get("rounds") else ""


def _gain(row: Mapping[str, Any], rows: Mapping[str, Any]) -> float:
    """The time of the lossless library in float32 over that of the transformed one."""
    exact = next(
        (
            other
            for other in rows.values()
            if not other.get("rounds")
            and (other["network"], other["batch"]) == (row["network"], row["batch"])
        ),
        row,
    )
    return float(exact["median_ms"]["lossless"] / row["median_ms"]["transformed"])


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
    found = {
        ("dense 3x3 and 1x1 layers at equal precision: as fast as cuDNN or faster", "128"): [
            f"{label}: {_faster(known, precision)}"
            for precision, label in PRECISIONS.items()
            if (known := [r for r in wanted if precision in r and f"cudnn_{precision}" in r])
        ],
        ("ResNet-50 against PyTorch at equal precision: 1.5 times as fast", "1, 128"): [
            f"batch {row['batch']}, {PRECISIONS[precision]}: {_times(row, precision)}"
            for row in compared
            if row["network"] == "resnet50" and (precision := _allowed(row))
        ],
        ("transformed against dense networks, within 1 point: 1.5 times as fast", "1, 128"): [
            f"{row['network']}, batch {row['batch']}{_with(row)}: {_gain(row, rows):.2f} times"
            f"{_baseline(row)} at a drop of {row['drop']:.2f}"
            for row in rows.values()
        ],
    }
    lines = ["| goal | batch | result |", "|---|---|---|"]
    for (goal, batch), results in found.items():
        lines.append(f"| {goal} | {batch} | {'; '.join(results) or 'not measured'} |")
    return lines


def _allowed(row: Mapping[str, Any]) -> str:
    """The least of `PRECISIONS` that the kernels of a comparison may have."""
    return next((name for name in reversed(PRECISIONS) if name in row["algorithms"]), "float32")


def _times(row: Mapping[str, Any], precision: str) -> str:
    """How many times as long as ours PyTorch takes in a precision, in each of its ways."""
    others = [name for name in PRECISIONS if name != "float32"]
    found = {
        name: times["median_ms"] / row["runtimes"][OURS]["median_ms"]
        for name, times in row["runtimes"].items()
        if isinstance(times, dict) and name.startswith("torch")
        if (precision in name if precision in others else not any(o in name for o in others))
    }
    return ", ".join(f"{ratio:.2f} times ({name})" for name, ratio in found.items())


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
