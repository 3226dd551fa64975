"""Transformed networks on a GPU: planned on any machine, raced and judged where the GPU is.

    python benchmarks/results_gpu.py plan vgg6-cifar10 --batch 1 128 --folder planned
    python benchmarks/results_gpu.py plan vgg6-cifar10 --batch 128 --folder planned --half
    python benchmarks/results_gpu.py race --folder planned
    python benchmarks/results_gpu.py page

`race` adds to benchmarks/results_gpu.json what `page` makes docs/gpu.md and the goals in
docs/results.md of, with the figures that `compare.py --target cuda --rows` leaves in
benchmarks/compare_gpu.json, those of `cudnn_layers.py`, and the records of our kernels that ship.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gpu_page
import numpy as np
import results_page
import tvm
from compare_gpu import OURS, measure
from networks import NETWORKS, Network, keep_lossless
from tvm_lowrank.schedules.kernels import ALGORITHMS, REDUCED

from tvm_lowrank.cuda import gpu_name
from tvm_lowrank.data import Samples, input_shape, split
from tvm_lowrank.deploy import load
from tvm_lowrank.frontend import load_model
from tvm_lowrank.metrics import judge, metric_of
from tvm_lowrank.planner import Options, search
from tvm_lowrank.planner.verify import run_all

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("plan", "race", "page"))
    parser.add_argument("names", nargs="*", help="networks (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--half", action="store_true", help="allow TF32 and float16 kernels")
    parser.add_argument("--folder", type=Path, default=Path("planned"))
    args = parser.parse_args()
    if args.step == "race" and not tvm.cuda(0).exist:
        print("error: race measures on a GPU, and this machine has none", file=sys.stderr)
        return 2
    networks = [n for n in NETWORKS if not args.names or n.name in args.names]
    for network in networks if args.step != "page" else ():
        if network.missing:
            print(f"{network.name}: skipped, {network.missing}")
            continue
        for batch in args.batch:
            folder = args.folder / f"{network.name}-batch{batch}"
            half = folder.with_name(folder.name + "-half")
            if args.step == "plan" and args.half:
                _plan(network, batch, args.target, half, (*ALGORITHMS, "tf32", "half"))
            elif args.step == "plan":
                _plan(network, batch, args.target, folder, ALGORITHMS)
            else:
                for planned in (folder, half):
                    if planned.exists():
                        _race(network, batch, planned)
    DOCS.write_text(gpu_page.render(*gpu_page.read()), encoding="utf-8")
    results_page.write()
    return 0


def _plan(
    network: Network, batch: int, target: str, folder: Path, algorithms: Sequence[str]
) -> None:
    """Leave the transformed library, the one with no form changed, and the plan in the folder."""
    print(f"== {network.name}, batch {batch}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    data, final = network.data()
    judged = len(final[0]) if final is not None else len(data[0]) // 3
    plan = search(
        load_model(network.model, batch),
        target,
        Samples(*data),
        None if final is None else Samples(*final),
        Options(
            max_drop=network.budget(judged), metric=network.metric, algorithms=tuple(algorithms)
        ),
        folder / "records.jsonl",
        folder,
    )
    kept = keep_lossless(folder, plan.transformed)
    (folder / "lossless.json").write_text(json.dumps({"from": kept}), encoding="utf-8")
    plan.save(folder / "plan.json")
    print(plan.result, flush=True)


def _race(network: Network, batch: int, folder: Path) -> None:
    """Time the folder's libraries and PyTorch, judge the libraries, and keep the row."""
    data, final = network.data()
    mod = load_model(network.model, batch)
    classes = network.metric in (None, "top1", "disagreement")
    parts = split(
        mod, Samples(*data), None if final is None else Samples(*final), class_labels=classes
    )
    jobs = {"transformed": folder / "model.so", "lossless": folder / "lossless.so"}
    shape = input_shape(mod)
    times = {name: measure(OURS, path, shape) for name, path in jobs.items()}
    times |= {name: measure(name, network.model, shape) for name in gpu_page.PEERS}
    samples = parts.final
    outputs = {name: run_all(load(path), samples.inputs, batch) for name, path in jobs.items()}
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    reduced = {*REDUCED} & {name for layer in plan["layers"] for name in layer["algorithms"]}
    # What rounds is judged by the network that does not.
    original = network.reference(samples.inputs) if reduced else outputs["lossless"]
    labels = samples.labels
    quality = judge(
        outputs["transformed"],
        original,
        labels,
        metric_of(network.metric, labels is not None, parts.synthetic),
    )
    rows, _ = gpu_page.read()
    rows[folder.name] = {
        "network": network.name,
        "batch": batch,
        "gpu": gpu_name(),
        "median_ms": {n: t if isinstance(t, str) else t["median_ms"] for n, t in times.items()},
        "drop": quality.drop,
        "interval": quality.interval,
        "agreement": quality.agreement,
        "samples": quality.samples,
        "rounds": sorted(reduced),
        "error": _against_onnxruntime(
            network, samples.inputs[: gpu_page.CHECKED], outputs["lossless"][: gpu_page.CHECKED]
        ),
        "predicted_ms": plan["result"]["latency_after_ms"],
        "forms": dict(Counter(layer["form"] for layer in plan["layers"])),
        "lossless": json.loads((folder / "lossless.json").read_text(encoding="utf-8"))["from"],
    }
    gpu_page.ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(folder.name, rows[folder.name], flush=True)


def _against_onnxruntime(network: Network, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """Largest difference of outputs from ONNX Runtime's on the processor, over the largest one."""
    expected = network.reference(inputs)
    return float(np.abs(outputs - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    sys.exit(main())
