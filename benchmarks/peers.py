"""Runtimes timed in turns, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Threads of a pool keep spinning for some ten milliseconds after their last work; they would take
# a core from the runtime whose turn is next.
_REST = 0.1


def take_turns(
    jobs: dict[str, tuple[str, Path]], shape: tuple[int, ...], threads: int, seconds: float = 2.0
) -> dict[str, float | str]:
    """Median milliseconds of each job, or the reason why it does not run.

    Parameters
    ----------
    jobs
        Name to (runtime, file); the runtimes are ``tvm``, ``onnxruntime`` and ``openvino``.
    shape
        Of the input.
    """
    workers: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, float | str] = {}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for name, (runtime, path) in jobs.items():
        worker = subprocess.Popen(
            [sys.executable, __file__, runtime, str(path), json.dumps(shape), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)},
        )
        answer = _ask(worker, 3)
        if isinstance(answer, str):
            found[name] = answer
            worker.kill()
        else:
            workers[name] = worker
    deadline = time.perf_counter() + (seconds + 6 * _REST) * len(workers)
    turns = 0
    while workers and (turns < 6 or time.perf_counter() < deadline):
        for name, worker in workers.items():
            time.sleep(_REST)
            answer = _ask(worker, 5)
            if not isinstance(answer, str):
                times[name] += answer
        turns += 1
    for name, worker in workers.items():
        worker.communicate("0\n")
        found[name] = statistics.median(times[name])
    return found


def _ask(worker: subprocess.Popen[str], runs: int) -> list[float] | str:
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(f"{runs}\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline() or '"the process ended"')
    except OSError as error:
        return str(error)


def _runner(runtime: str, path: str, shape: list[int], threads: int) -> Callable[[], object]:
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if runtime == "tvm":
        from tvm_lowrank import load

        network = load(path, threads)
        tensors = [network.tensor(data)]
        return lambda: network.call(tensors)
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: data}
        return lambda: session.run(None, feed)
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape(shape)
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    return lambda: request.infer([data])


def _work(runtime: str, path: str, shape: str, threads: str) -> None:
    try:
        run = _runner(runtime, path, json.loads(shape), int(threads))
        run()
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"[:200]), flush=True)
        return
    for line in sys.stdin:
        count = int(line)
        if count == 0:
            return
        run()  # brings the network back into the caches after the others' turns
        spent = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            spent.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(spent), flush=True)


if __name__ == "__main__":
    _work(*sys.argv[1:])
