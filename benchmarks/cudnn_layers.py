"""Times cuDNN's convolutions, through PyTorch, of the shapes in exported batches.

    python benchmarks/cudnn_layers.py batch

`tune --export-batch` makes such folders; their own `measure.py` times our kernels. What is found
goes to benchmarks/cudnn_layers.json, which `results_gpu.py page` sets beside our records.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from gpu_runtimes import cudnn_layer

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
    rows = [
        {
            "gpu": torch.cuda.get_device_name(),
            "geometry": geometry,
            **{name: fastest(geometry, name == "tf32") for name in ("float32", "tf32")},
        }
        for geometry in geometries.values()
    ]
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def fastest(geometry: dict[str, Any], tf32: bool) -> float:
    """Microseconds in the faster of the two layouts, infinite where cuDNN has neither."""
    return min(_time(geometry, tf32, channels_last) for channels_last in (False, True))


def _time(geometry: dict[str, Any], tf32: bool, channels_last: bool) -> float:
    try:
        return cudnn_layer(geometry, tf32, channels_last)
    except (RuntimeError, ValueError):
        return math.inf


if __name__ == "__main__":
    sys.exit(main())
