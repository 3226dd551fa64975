"""Times cuDNN's convolutions, through PyTorch, of the shapes in exported batches.

    python benchmarks/cudnn_layers.py batch

`tune --export-batch` makes such folders; their own `measure.py` times our kernels. What is found
is added to benchmarks/cudnn_layers.json at once, which `results_gpu.py page` sets beside our
records; what that has of a card already is not timed again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from gpu_runtimes import PRECISIONS, cudnn_layer

ROWS = Path(__file__).with_name("cudnn_layers.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: this machine has no GPU that PyTorch runs on", file=sys.stderr)
        return 2
    geometries = {}
    for folder in args.folders:
        for candidate in json.loads((folder / "manifest.json").read_text())["candidates"]:
            geometry = candidate["workload"]["geometry"]
            geometries[json.dumps(geometry, sort_keys=True)] = geometry
    for geometry in geometries.values():
        times(torch.cuda.get_device_name(), geometry)
    return 0


def times(gpu: str, geometry: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a convolution in each precision on this GPU, from the file if they are there.

    In the faster of the two layouts, infinite where cuDNN has neither.
    """
    rows = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else []
    row = next((r for r in rows if r["gpu"] == gpu and r["geometry"] == geometry), None)
    if row is None:
        row = {"gpu": gpu, "geometry": geometry}
        rows.append(row)
    missing = [name for name in PRECISIONS if name not in row]
    for name in missing:
        row[name] = min(_time(geometry, name, channels_last) for channels_last in (False, True))
    if missing:
        ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return {name: row[name] for name in PRECISIONS}


def _time(geometry: dict[str, Any], precision: str, channels_last: bool) -> float:
    try:
        return cudnn_layer(geometry, precision, channels_last)
    except (RuntimeError, ValueError):
        return math.inf


if __name__ == "__main__":
    sys.exit(main())
