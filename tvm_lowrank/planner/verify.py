"""The figures that are promised: accuracy and latency of built libraries, side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.deploy import Network, load
from tvm_lowrank.metrics import joined
from tvm_lowrank.threads import apart_from_pool

# Seconds that a race spends on each library, and a library alone on one thread.
RACE_SECONDS, ALONE_SECONDS = 2.0, 0.5


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run of a library: median and minimum over ``runs``."""

    median_ms: float
    minimum_ms: float
    runs: int


def run_all(network: Network, inputs: np.ndarray, batch: int) -> np.ndarray:
    """Outputs (samples, ...) of a library built for ``batch`` samples a call; several in a row."""
    parts = []
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        missing = batch - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        parts.append(joined(network(chunk)))
    return np.concatenate(parts)[: len(inputs)]


def take_turns(paths: list[Path], shape: tuple[int, ...], threads: int) -> list[Latency]:
    """Latency of several libraries, run in turns so that a change of the machine's speed hits all.

    Each turn runs every library a few times; about `RACE_SECONDS` are spent on each, or the time of
    eight turns if that is more, but of networks that take seconds only three.
    """
    seconds = RACE_SECONDS
    rng = np.random.default_rng(0)
    networks = [load(path, threads) for path in paths]
    inputs = [[n.tensor(rng.standard_normal(shape, np.float32))] for n in networks]
    times: list[list[float]] = [[] for _ in networks]
    for network, args in zip(networks, inputs, strict=True):
        for _ in range(3):
            network.call(args)
        network.wait()
    turns, start = 0, time.perf_counter()
    limits = [(math.inf, 3), (5 * seconds * len(networks), 8), (seconds * len(networks), math.inf)]
    with apart_from_pool():
        while any(time.perf_counter() - start < most and turns < count for most, count in limits):
            for network, args, spent in zip(networks, inputs, times, strict=True):
                network.call(args)  # brings its own weights back into the caches
                network.wait()
                for _ in range(3):
                    begin = time.perf_counter()
                    network.call(args)
                    network.wait()
                    spent.append(1e3 * (time.perf_counter() - begin))
            turns += 1
    return [Latency(statistics.median(spent), min(spent), len(spent)) for spent in times]


def single_threaded() -> Worker:
    """A process that runs libraries on one thread, since a pool of threads has one size."""
    return Worker(1, timeout=60 + 60 * ALONE_SECONDS, function=f"{__name__}:time_library")


def one_thread(worker: Worker, path: Path, shape: tuple[int, ...]) -> float | None:
    """Median milliseconds of a library that runs on a single thread; None if it did not run.

    Measured by ``worker``, of `single_threaded`, for `ALONE_SECONDS`.
    """
    found = worker.ask({"path": str(path), "shape": list(shape), "seconds": ALONE_SECONDS})
    return None if found is None else float(found)


def time_library(request: Mapping[str, Any]) -> float:
    """What the process of `single_threaded` does."""
    network = load(request["path"], 1)
    noise = np.random.default_rng(0).standard_normal(request["shape"], np.float32)
    args = [network.tensor(noise)]
    network.call(args)
    times: list[float] = []
    deadline = time.perf_counter() + request["seconds"]
    while len(times) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        network.call(args)
        network.wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
