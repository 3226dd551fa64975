"""Times the kernels of an exported batch: ``python measure.py [FOLDER]``.

Needs NumPy and TVM's runtime, nothing else: this file travels inside the batch. For each candidate
it appends a line to ``results.jsonl`` there, so a run that is interrupted goes on where it stopped.
Every library is run by a process of its own; what crashes or hangs there is a failed candidate.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, RESULTS, SCRIPT = "manifest.json", "results.jsonl", "measure.py"
# Medians of this many measurements, each of at least so many milliseconds.
REPEATS, MILLISECONDS = 5, 10
# Seconds that one candidate may take before its process is ended.
PATIENCE = 60.0


def main(arguments: list[str]) -> int:
    """Measure the batch in a folder; returns the exit code."""
    folder = Path(arguments[0] if arguments else Path(__file__).parent)
    manifest = json.loads((folder / MANIFEST).read_text())
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    os.environ["TVM_NUM_THREADS"] = str(manifest["threads"])
    if len(arguments) > 1:
        measure_candidates(folder, manifest, [int(index) for index in arguments[1:]])
        return 0
    mend(folder / RESULTS)
    todo = remaining(folder, manifest)
    print(f"{len(todo)} of {len(manifest['candidates'])} candidates to measure", flush=True)
    while todo:
        library = manifest["candidates"][todo[0]]["library"]
        group = [i for i in todo if manifest["candidates"][i]["library"] == library]
        failure = run_group(folder, group)
        left = remaining(folder, manifest)
        if failure and left and left[0] in group:
            # What stopped the process was the first candidate without a result.
            if len(left) == len(todo) and not (folder / RESULTS).exists():
                print(f"nothing can be measured: {failure}", file=sys.stderr)
                return 1
            append(folder, {"index": left[0], "us": None, "error": failure})
        todo = remaining(folder, manifest)
        print(f"{len(todo)} left", flush=True)
    return 0


def run_group(folder: Path, group: list[int]) -> str:
    """Measure candidates of one library in another process; why it failed, empty if it did not."""
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), *map(str, group)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE * len(group), check=False
        )
    except subprocess.TimeoutExpired:
        return "it took too long"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[-1][:300]


def mend(path: Path) -> None:
    """Take off what a run that was interrupted while it wrote has left of its last line."""
    data = path.read_bytes() if path.exists() else b""
    if not data.endswith(b"\n") and data:
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def remaining(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Candidates without a result, in order."""
    path = folder / RESULTS
    done = set()
    if path.exists():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if entry["batch"] == manifest["batch"]:
                done.add(entry["index"])
    return [index for index in range(len(manifest["candidates"])) if index not in done]


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Write a result down before anything else happens."""
    batch = json.loads((folder / MANIFEST).read_text())["batch"]
    with open(folder / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"batch": batch, **entry}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def measure_candidates(folder: Path, manifest: dict[str, Any], indices: list[int]) -> None:
    """Measure candidates of one library in this process."""
    import tvm

    device = tvm.device(manifest["device"], 0)
    if not device.exist:
        raise SystemExit(f"this machine has no device {manifest['device']!r}")
    name = str(device.device_name) if manifest["device"] == "cuda" else processor()
    module = tvm.runtime.load_module(str(folder / manifest["candidates"][indices[0]]["library"]))
    for index in indices:
        times = time_stages(module, manifest["candidates"][index], device)
        append(
            folder,
            {
                "index": index,
                "us": sum(statistics.median(stage) for stage in times),
                "spread": max(max(stage) / min(stage) for stage in times) - 1,
                "machine": name,
            },
        )


def time_stages(module: Any, candidate: dict[str, Any], device: Any) -> list[list[float]]:
    """Microseconds of each kernel of a candidate, measured a few times (on a GPU by its events)."""
    values = tensors(candidate, device)
    times = []
    for stage in candidate["stages"]:
        arguments = [values[name] for name in (*stage["reads"], stage["writes"])]
        function: Callable[..., Any] = module.time_evaluator(
            stage["function"], device, number=1, repeat=REPEATS, min_repeat_ms=MILLISECONDS
        )
        times.append([1e6 * seconds for seconds in function(*arguments).results])
    return times


def tensors(candidate: dict[str, Any], device: Any) -> dict[str, Any]:
    """Small random numbers for every value of a candidate."""
    import numpy as np
    import tvm

    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(1 << 14).astype(np.float32)
    return {
        name: tvm.runtime.tensor(np.resize(noise, value["shape"]).astype(value["dtype"]), device)
        for name, value in candidate["values"].items()
    }


def processor() -> str:
    """Name of this machine's processor with its numbers, as tuning records give it."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in found:
        return platform.processor() or platform.machine() or "unknown"
    numbers = [found.get(name, "") for name in ("cpu family", "model", "stepping")]
    return f"{found['model name']} ({'/'.join(numbers)})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
