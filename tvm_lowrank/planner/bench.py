"""Running the libraries of a search, or standing in for a machine that is not at hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tvm

from tvm_lowrank.build import compile_module, network_of
from tvm_lowrank.cost import layouts
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import PredictingTimer
from tvm_lowrank.passes.pipeline import factor
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import verify
from tvm_lowrank.target import host_target


class Bench(Protocol):
    """Runs built libraries; ``plan`` is always that of the library at ``path``.

    ``predicted`` says whether latencies come from a model.
    """

    predicted: bool

    def prepare(self) -> None:
        """Begin what takes seconds and can go on beside work whose time does not matter."""
        ...

    def outputs(self, plan: Plan, path: Path, inputs: np.ndarray) -> np.ndarray:
        """Outputs (samples, ...) for inputs (samples, ...)."""
        ...

    def race(self, entries: Sequence[tuple[Plan, Path]]) -> list[verify.Latency]:
        """Latency of each library, run in turns."""
        ...

    def one_thread(self, path: Path) -> float | None:
        """Median milliseconds on a single thread, None where that says nothing."""
        ...


class MeasuringBench:
    """Loads the libraries on this machine.

    Parameters
    ----------
    shape : tuple of int
        Of the network's input.
    threads : int
    gpu : bool
        Whether they run on a GPU, for which this machine's threads do not matter.
    """

    predicted = False

    def __init__(self, shape: tuple[int, ...], threads: int, gpu: bool = False) -> None:
        self.shape = shape
        self.threads = threads
        self.gpu = gpu
        self._alone = verify.single_threaded() if threads > 1 and not gpu else None

    def prepare(self) -> None:
        """Start the process that runs libraries on one thread."""
        if self._alone is not None:
            self._alone.start()

    def outputs(self, plan: Plan, path: Path, inputs: np.ndarray) -> np.ndarray:
        """Outputs of the library."""
        return verify.run_all(verify.load(path, self.threads), inputs, self.shape[0])

    def race(self, entries: Sequence[tuple[Plan, Path]]) -> list[verify.Latency]:
        """Measured latencies; of a library that is listed twice, once."""
        paths = [path for _, path in entries]
        distinct = list(dict.fromkeys(paths))
        if self._alone is not None:
            self._alone.wait()  # its start would disturb the race
        latencies = verify.take_turns(distinct, self.shape, self.threads)
        return [latencies[distinct.index(path)] for path in paths]

    def one_thread(self, path: Path) -> float | None:
        """Measured by another process; None on a GPU, and where more threads were not asked for."""
        return None if self._alone is None else verify.one_thread(self._alone, path, self.shape)


class PredictingBench:
    """Stands in for a machine that is not at hand.

    Latency is the sum of the kernels' times by ``timer``, predicted or measured on a server;
    outputs are those of the same plan built for this machine's processor, so that accuracy is
    measured, on other hardware.

    Parameters
    ----------
    normalised : tvm.IRModule
        The network.
    timer : KernelTimer
    batch : int
        Samples that the network takes at once.
    """

    def __init__(self, normalised: tvm.IRModule, timer: KernelTimer, batch: int) -> None:
        self.predicted = isinstance(timer, PredictingTimer)
        self.normalised = normalised
        self.timer = timer
        self.batch = batch

    def prepare(self) -> None:
        """Nothing takes long here."""

    def outputs(self, plan: Plan, path: Path, inputs: np.ndarray) -> np.ndarray:
        """Outputs of the plan on this machine's processor."""
        if rounded := plan.rounding():
            warnings.warn(
                "accuracy is measured in float32 here, without the rounding of "
                f"{' and '.join(rounded)} kernels",
                stacklevel=2,
            )
        host = host_target()
        twin = plan.for_target(host)
        module = twin.lower(factor(self.normalised, twin.chains()))
        return verify.run_all(network_of(compile_module(module, host)), inputs, self.batch)

    def race(self, entries: Sequence[tuple[Plan, Path]]) -> list[verify.Latency]:
        """Latencies of convolutions and dense layers alone; they count no runs."""
        return [self._latency(plan) for plan, _ in entries]

    def _latency(self, plan: Plan) -> verify.Latency:
        factored = factor(self.normalised, plan.chains())
        total = layouts.total(factored, self.timer, plan.scheduler())
        return verify.Latency(total / 1e3, total / 1e3, 0)

    def one_thread(self, path: Path) -> float | None:
        """Says nothing of a GPU."""
        return None
