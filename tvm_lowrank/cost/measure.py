"""Timing kernels on the machine at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import tvm

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.passes.lower_convolutions import PLAIN_CHANNELS
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.kernels import (
    Schedule,
    default_schedule,
    emit,
    schedule_from_json,
    spaces,
)
from tvm_lowrank.schedules.x86.workload import ConvWorkload

_SECONDS = 0.03  # spent on running one candidate
_REFERENCE = ConvGeometry(64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))


class KernelTimer:
    """Measures convolution kernels, remembers every time in the records, and picks schedules.

    Parameters
    ----------
    target : tvm.target.Target
    records : TuningRecords
        Read before anything is measured, appended to after each measurement.
    trials : int
        Schedules tried for each workload, the most promising first.
    """

    def __init__(self, target: tvm.target.Target, records: TuningRecords, trials: int = 4) -> None:
        self.target = target
        self.isa = isa_of(target)
        self.records = records
        self.trials = trials
        self.measured = 0

    def microseconds(self, workload: ConvWorkload) -> float:
        """Time of the workload under its best schedule, measuring what is not on record."""
        key = workload.key()
        schedules = [
            schedule
            for space in spaces(workload, self.isa).values()
            for schedule in space[: self.trials]
        ]
        for schedule in schedules:
            if self.records.time(key, schedule.to_json()) is None:
                self.records.add(key, schedule.to_json(), self._run(workload, schedule))
                self.measured += 1
        best = self.records.best(key)
        return best[1] if best else math.inf

    def chain(self, stages: Sequence[ConvGeometry]) -> float:
        """Time of a chain of convolutions, the last with bias and ReLU, one kernel each.

        Grouped stages have no kernel of ours: infinite.
        """
        if any(stage.groups != 1 for stage in stages):
            return math.inf
        total = 0.0
        for index, stage in enumerate(stages):
            plain = index == 0 and stage.in_channels <= PLAIN_CHANNELS
            epilogue = ("bias", "relu") if index == len(stages) - 1 else ()
            total += self.microseconds(
                ConvWorkload(stage, 1 if plain else self.isa.lanes, epilogue)
            )
        return total

    def choose(self, workload: ConvWorkload) -> Schedule:
        """Best schedule on record for this convolution, else the default."""
        return self.known(workload) or default_schedule(workload, self.isa)

    def known(self, workload: ConvWorkload) -> Schedule | None:
        """Best schedule on record for this convolution, whatever its epilogue, or None."""
        found: list[tuple[float, Schedule]] = []
        for epilogue in (workload.epilogue, ("bias", "relu"), ()):
            same = ConvWorkload(workload.geometry, workload.in_block, epilogue)
            best = self.records.best(same.key())
            if best is not None:
                found.append((best[1], schedule_from_json(best[0])))
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def roofline(self) -> Roofline:
        """Peak of our own kernel on a layer that suits it, and bandwidth of a large copy."""
        workload = ConvWorkload(_REFERENCE, self.isa.lanes, ("bias", "relu"))
        microseconds = self.microseconds(workload)
        source = np.ones(16 << 20, np.float32)
        sink = np.empty_like(source)
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            np.copyto(sink, source)
            best = min(best, time.perf_counter() - start)
        gflops = 2 * _REFERENCE.multiplications / (microseconds * 1e3)
        return Roofline(gflops=gflops, gigabytes=2 * source.nbytes / best / 1e9)

    def _run(self, workload: ConvWorkload, schedule: Schedule) -> float:
        """Minimum over repeated single runs, in microseconds; infinite if it does not compile."""
        func = emit(workload, schedule, self.isa).with_attr("global_symbol", "main")
        try:
            module = tvm.compile(tvm.IRModule({"main": func}), target=self.target).jit()
            rng = np.random.default_rng(0)
            args = [
                tvm.runtime.tensor(rng.standard_normal(shape, np.float32) * 0.1)
                for shape in _argument_shapes(func)
            ]
            timer = module.time_evaluator
        except (RuntimeError, ValueError):
            return math.inf
        first = min(timer("main", tvm.cpu(), number=1, repeat=3)(*args).results)
        number = max(1, round(2e-4 / max(first, 1e-7)))
        repeat = int(min(max(_SECONDS / (first * number), 5), 60))
        return 1e6 * min(timer("main", tvm.cpu(), number=number, repeat=repeat)(*args).results)


def _argument_shapes(func: tvm.tirx.PrimFunc) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in param.shape) for param in func.params]
