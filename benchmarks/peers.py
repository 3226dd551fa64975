"""Runtimes timed in turns, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Threads of a pool keep spinning for some ten milliseconds after their last work; they would take
# a core from the runtime whose turn is next.
_REST = 0.1
_TURNS = 6
_RUNS = 5
# Seconds a turn may take: slow networks run less often in a turn.
_TURN = 1.0
# Seconds for loading, which for torch.compile includes compiling twice.
_LOADING = 600.0


@dataclass(frozen=True)
class Timing:
    """What one runtime took: milliseconds a run, and `runtimes.Runtime.about`.

    ``outputs`` are those of the checked inputs, stacked.
    """

    median_ms: float
    minimum_ms: float
    runs: int
    about: str
    outputs: np.ndarray | None = None


def take_turns(
    jobs: dict[str, tuple[str, Path]],
    shape: tuple[int, ...],
    threads: int,
    seconds: float = 2.0,
    checks: np.ndarray | None = None,
) -> dict[str, Timing | str]:
    """Time of each job, or the reason why it does not run.

    Parameters
    ----------
    jobs
        Name to (runtime, file); the runtimes are those of `runtimes.LOADERS`.
    shape
        Of the input.
    threads
        That each runtime is told to use.
    seconds
        Spent on each job, apart from rests; each has six turns at least.
    checks
        Inputs (count, *shape) whose outputs are wanted.
    """
    workers: dict[str, _Worker] = {}
    found: dict[str, Timing | str] = {}
    outputs: dict[str, np.ndarray | None] = {}
    try:
        for name, (runtime, path) in jobs.items():
            worker = _Worker(runtime, path, shape, threads)
            try:
                worker.start()
                outputs[name] = None if checks is None else worker.outputs(checks)
                workers[name] = worker
            except PeerError as error:
                found[name] = str(error)
                worker.close()
        times = _turns(workers, found, seconds)
        for name, worker in workers.items():
            if name not in found:
                spent = times[name]
                found[name] = Timing(
                    statistics.median(spent), min(spent), len(spent), worker.about, outputs[name]
                )
    finally:
        for worker in workers.values():
            worker.close()
    return {name: found[name] for name in jobs}


def _turns(
    workers: dict[str, _Worker], found: dict[str, Timing | str], seconds: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in workers}
    deadline = time.perf_counter() + (seconds + _TURNS * _REST) * len(workers)
    turns = 0
    while workers.keys() - found.keys() and (turns < _TURNS or time.perf_counter() < deadline):
        for name, worker in workers.items():
            if name in found:
                continue
            time.sleep(_REST)
            try:
                times[name] += worker.time()
            except PeerError as error:
                found[name] = str(error)
        turns += 1
    return times


def outputs_of(
    runtime: str, path: Path, shape: tuple[int, ...], threads: int, checks: np.ndarray
) -> np.ndarray:
    """Outputs (count, ...) of a runtime for inputs (count, *shape).

    Raises PeerError if the runtime is missing or fails.
    """
    worker = _Worker(runtime, path, shape, threads)
    try:
        worker.start()
        return worker.outputs(checks)
    finally:
        worker.close()


class PeerError(Exception):
    """A runtime is missing, cannot load the network, or died."""


class _Worker:
    """A process of one runtime; it is asked by lines of JSON and answers by lines of JSON."""

    def __init__(self, runtime: str, path: Path, shape: tuple[int, ...], threads: int) -> None:
        count = str(threads)
        self.about = ""
        self._process = subprocess.Popen(
            [sys.executable, __file__, runtime, str(path), json.dumps(shape), count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TVM_NUM_THREADS": count, "OMP_NUM_THREADS": count},
        )

    def start(self) -> None:
        """Wait until the network is loaded."""
        guard = threading.Timer(_LOADING, self._process.kill)
        guard.start()
        try:
            self.about = self._read()
        finally:
            guard.cancel()

    def time(self) -> list[float]:
        """Milliseconds of some runs in a row."""
        return self._ask({"do": "time"})

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """The network's outputs, stacked."""
        with tempfile.TemporaryDirectory() as folder:
            source, result = Path(folder) / "inputs.npy", Path(folder) / "outputs.npy"
            np.save(source, inputs)
            self._ask({"do": "outputs", "inputs": str(source), "outputs": str(result)})
            return np.load(result)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: dict[str, str]) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"the process ended ({error})") from error
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]


def _work(runtime: str, path: str, shape: str, threads: str) -> None:
    # Libraries print; the answers go to a stream that only this function knows.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)

        def answer(**message: Any) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            _serve(runtime, path, tuple(json.loads(shape)), int(threads), answer)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer(error=f"{type(error).__name__}: {lines[0]}"[:200])


def _serve(runtime: str, path: str, shape: tuple[int, ...], threads: int, answer: Any) -> None:
    from runtimes import LOADERS

    loaded = LOADERS[runtime](path, shape, threads)
    run = loaded.bind(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    run()
    answer(value=loaded.about)
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "outputs":
            inputs = np.load(question["inputs"])
            results = [np.array(loaded.output(loaded.bind(x)())) for x in inputs]
            np.save(question["outputs"], np.stack(results))
            answer(value=None)
            continue
        run()  # brings the network back into the caches after the others' turns
        spent: list[float] = []
        while len(spent) < _RUNS and sum(spent) < 1e3 * _TURN:
            start = time.perf_counter()
            run()
            spent.append(1e3 * (time.perf_counter() - start))
        answer(value=spent)


if __name__ == "__main__":
    _work(*sys.argv[1:])
