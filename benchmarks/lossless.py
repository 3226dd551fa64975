"""The plugin's own entry in a comparison: a network tuned and built with nothing approximated."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm_lowrank.passes.count_calls import Calls, count_calls

from tvm_lowrank import Plan
from tvm_lowrank.frontend import load_model
from tvm_lowrank.planner import Options, search


@dataclass(frozen=True)
class Built:
    """A library, how it came about, and what its network calls.

    ``seconds`` are those of the whole search and build; ``measured`` kernels were timed in them,
    ``recorded`` ones were on record before.
    """

    library: Path
    mod: tvm.IRModule
    plan: Plan
    calls: Calls
    seconds: float
    measured: int
    recorded: int

    def __str__(self) -> str:
        return (
            f"built in {self.seconds:.0f} s, {self.measured} kernels measured, "
            f"{self.recorded} on record before"
        )


def build_lossless(
    model: Path,
    batch: int,
    threads: int,
    trials: int,
    algorithms: Sequence[str],
    records: Path,
    folder: Path,
) -> Built:
    """Tune and build a network into ``folder/model.so``.

    Raises LowRankError for a network that cannot be imported, and what TVM raises.
    """
    recorded = _lines(records)
    start = time.perf_counter()
    mod = load_model(model, batch)
    options = Options(
        forms=("dense",), algorithms=tuple(algorithms), threads=threads, trials=trials
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no data given")
        plan = search(mod, options=options, records=records, directory=folder)
    seconds = time.perf_counter() - start
    calls = count_calls(plan.apply(mod))
    measured = _lines(records) - recorded
    return Built(folder / "model.so", mod, plan, calls, seconds, measured, recorded)


def _lines(records: Path) -> int:
    return len(records.read_bytes().splitlines()) if records.exists() else 0
