"""Times the kernels of an exported batch: ``python measure.py [FOLDER]``.

Needs NumPy and TVM's runtime, nothing else: this file travels inside the batch. For each candidate
it appends a line to ``results.jsonl`` there, so a run that is interrupted goes on where it stopped.
Candidates are run by another process; one that crashes it or hangs in it is a failed candidate.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST, RESULTS, SCRIPT = "manifest.json", "results.jsonl", "measure.py"
# Medians of this many measurements, each of at least so many milliseconds.
REPEATS, MILLISECONDS = 5, 5
# Seconds without a result after which the process that measures is ended.
PATIENCE = 60.0
_POLL = 0.05


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
        failure = run(folder, todo)
        left = remaining(folder, manifest)
        if failure and left:
            # What stopped the process was the first candidate without a result.
            if len(left) == len(todo) and not (folder / RESULTS).exists():
                print(f"nothing can be measured: {failure}", file=sys.stderr)
                return 1
            append(folder, {"index": left[0], "us": None, "error": failure})
        todo = remaining(folder, manifest)
        print(f"{len(todo)} left", flush=True)
    return 0


def run(folder: Path, indices: list[int]) -> str:
    """Measure candidates in another process; why it ended early, empty if it did not."""
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), *map(str, indices)]
    results = folder / RESULTS
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = results.stat().st_size if results.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                process.kill()
                process.wait()
                return f"no result after {PATIENCE:.0f} s"
            time.sleep(_POLL)
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    code = process.returncode
    return "" if code == 0 else (lines or [f"exit code {code}"])[-1][:300]


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
    """Measure candidates in this process, in order."""
    import tvm

    if manifest["device"] == "cuda":
        # Of its own accord, TVM without its compiler loads the runtime of processors alone.
        try:
            ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
        except OSError as error:
            raise SystemExit(f"TVM's CUDA runtime cannot be loaded: {error}") from error
    device = tvm.device(manifest["device"], 0)
    if not device.exist:
        raise SystemExit(f"this machine has no device {manifest['device']!r}")
    name = str(device.device_name) if manifest["device"] == "cuda" else processor()
    library, module = None, None
    kept: dict[Any, Any] = {}
    for index in indices:
        candidate = manifest["candidates"][index]
        if candidate["library"] != library:
            library = candidate["library"]
            module = tvm.runtime.load_module(str(folder / library))
        answer = time_candidate(module, candidate, device, kept)
        append(folder, {"index": index, **answer, "machine": name})


def time_candidate(
    module: Any, candidate: dict[str, Any], device: Any, kept: dict[Any, Any] | None = None
) -> dict[str, float]:
    """``us``, the sum of the medians of a candidate's kernels, and ``spread``, the largest of any.

    Where some of them turn maps, ``alone`` is the sum of the others. ``kept``: see `tensors`.
    """
    times = time_stages(module, candidate, device, {} if kept is None else kept)
    medians = [statistics.median(stage) for stage in times]
    answer = {"us": sum(medians), "spread": max(max(stage) / min(stage) for stage in times) - 1}
    turns = [stage["turns"] for stage in candidate["stages"]]
    if any(turns):
        answer["alone"] = sum(us for us, turned in zip(medians, turns, strict=True) if not turned)
    return answer


def time_stages(
    module: Any, candidate: dict[str, Any], device: Any, kept: dict[Any, Any]
) -> list[list[float]]:
    """Microseconds of each kernel of a candidate, measured a few times (on a GPU by its events).

    One that turns a map is measured for the first candidate that has it. ``kept``: see `tensors`.
    """
    values = tensors(candidate, device, kept)
    times = []
    for stage in candidate["stages"]:
        if stage["function"] in kept:
            times.append(kept[stage["function"]])
            continue
        arguments = [values[name] for name in (*stage["reads"], stage["writes"])]
        function: Callable[..., Any] = module.time_evaluator(
            stage["function"], device, number=1, repeat=REPEATS, min_repeat_ms=MILLISECONDS
        )
        times.append([1e6 * seconds for seconds in function(*arguments).results])
        if stage["turns"]:
            kept[stage["function"]] = times[-1]
    return times


def tensors(candidate: dict[str, Any], device: Any, kept: dict[Any, Any]) -> dict[str, Any]:
    """A tensor for every value of a candidate: small random numbers, or what its kernels write.

    ``kept`` holds those of the candidate before, of which equal ones are used again: large maps
    take longer to make than kernels to time. By name it holds the times of what turns maps.
    """
    import numpy as np
    import tvm

    noise = 0.1 * np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32)
    written = {stage["writes"] for stage in candidate["stages"]}

    keys = {
        name: (name, tuple(value["shape"]), value["dtype"], name in written)
        for name, value in candidate["values"].items()
    }
    for key in [key for key in kept if isinstance(key, tuple) and key not in keys.values()]:
        del kept[key]
    for key in set(keys.values()) - set(kept):
        _, shape, dtype, is_written = key
        if is_written:
            kept[key] = tvm.runtime.empty(shape, dtype, device)
        else:
            kept[key] = tvm.runtime.tensor(np.resize(noise, shape).astype(dtype), device)
    return {name: kept[key] for name, key in keys.items()}


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
