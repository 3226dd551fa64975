"""What a kernel will take, without measuring it: by counting, or as learnt from records."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.work import Work, work_of
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Starting a parallel loop, and calling a kernel, in microseconds.
_LOOP, _CALL = 1.5, 0.5
# Accumulators that hide the latency of multiply-add, for two units of a depth of four.
_ENOUGH_SUMS = 8.0
# Loads that a cycle sustains while two multiply-adds start.
_LOADS = 1.6
# Against the copy that the bandwidth was measured by: maps that were just written are this much
# nearer, and weights so much that fit into the last cache.
_NEAR, _SHARED = 8.0, 3.0
_SHARED_BYTES = 40 << 20


class CostModel(ABC):
    """Predicts the time of kernels on one machine with a number of threads."""

    @abstractmethod
    def predict(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Microseconds of each schedule, given as JSON values: an array ``(len(schedules),)``."""

    def pick(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> int:
        """Index of the schedule that is predicted fastest."""
        return int(np.argmin(self.predict(workload, schedules)))


class AnalyticModel(CostModel):
    """The paper's operation counts and the bytes moved, over the roofline of a machine.

    It needs no measurement but the machine's peak and bandwidth, which may as well be given for a
    machine that is not at hand. Multiply-adds and the stream of weights overlap; transforms and
    what passes through the caches come on top.

    Parameters
    ----------
    roofline : Roofline
        Of all threads together.
    isa : Machine
    threads : int
    """

    def __init__(self, roofline: Roofline, isa: Machine, threads: int) -> None:
        self.roofline = roofline
        self.isa = isa
        self.threads = threads

    def predict(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """See `CostModel.predict`."""
        works = [work_of(workload, schedule, self.isa.lanes) for schedule in schedules]
        return np.array([self.microseconds(work) for work in works])

    def microseconds(self, work: Work) -> float:
        """Time of counted work."""
        peak, bandwidth = self.roofline.gflops * 1e3, self.roofline.gigabytes * 1e3
        # Cycles of a step over those that its multiply-adds alone would take.
        step = max(work.sums, 2 * work.inputs / _LOADS, _ENOUGH_SUMS) / work.sums
        uneven = math.ceil(work.tasks / self.threads) * self.threads / work.tasks
        products = 2 * work.products * step * uneven / peak
        transforms = work.transforms * uneven / (work.share * peak)
        near = (work.map_bytes + 2 * work.scratch_bytes) / (_NEAR * bandwidth)
        fetch = work.weight_bytes / bandwidth
        if work.weight_bytes < _SHARED_BYTES:
            fetch /= _SHARED
        overlapped = max(products, fetch)
        return overlapped + transforms + near + _LOOP * work.stages + _CALL


def features(
    workload: ConvWorkload,
    schedule: Mapping[str, Any],
    model: AnalyticModel,
) -> dict[str, float]:
    """A kernel in numbers: shape, stage, algorithm, schedule, work, caches, threads, machine.

    Sizes are logarithms to base 2. Families differ in what their schedules hold; a name that one
    lacks is missing. The names, and those of the fields of each family, are what a saved model is
    checked against.
    """
    g = workload.geometry
    work = work_of(workload, schedule, model.isa.lanes)
    sizes = {
        "in channels": g.in_channels,
        "out channels": g.out_channels,
        "out height": g.out_height,
        "out width": g.out_width,
        "kernel height": g.kernel[0],
        "kernel width": g.kernel[1],
        "stride": g.stride[0] * g.stride[1],
        "dilation": g.dilation[0] * g.dilation[1],
        "groups": g.groups,
        "batch": g.batch,
        "multiplications": g.multiplications,
        "products": work.products,
        "transforms": 1 + work.transforms,
        "weight bytes": work.weight_bytes,
        "map bytes": work.map_bytes,
        "scratch bytes": 1 + work.scratch_bytes,
        "task bytes": 1 + work.task_bytes,
        "tasks a thread": work.tasks / model.threads,
        "sums": work.sums,
        "threads": model.threads,
        "lanes": model.isa.lanes,
    }
    found = {name: math.log2(size) for name, size in sizes.items()}
    found["saved"] = math.log2(g.multiplications / work.products)
    found["operations a byte"] = math.log2(work.products / (work.weight_bytes + work.map_bytes))
    found["loads a product"] = work.inputs / work.sums
    found["uneven"] = math.ceil(work.tasks / model.threads) * model.threads / work.tasks
    found["stages"] = float(work.stages)
    found["plain"] = float(workload.in_block == 1)
    found["padded"] = float(any(g.padding))
    # The stage of a form: only its last has an epilogue, the others differ in their kernel's shape.
    found["last"] = float(bool(workload.epilogue))
    found["pointwise"] = float(g.kernel == (1, 1))
    found["one-dimensional"] = float(min(g.kernel) == 1 < max(g.kernel))
    found["depthwise"] = float(g.groups == g.in_channels > 1)
    found["peak a thread"] = model.roofline.gflops / model.threads
    found["bandwidth"] = model.roofline.gigabytes
    found["analytic"] = math.log2(model.microseconds(work))
    family = schedule["kernel"]
    found[f"is {family}"] = 1.0
    for name, value in schedule.items():
        if name == "kernel":
            continue
        values = value if isinstance(value, list | tuple) else [value]
        for index, each in enumerate(values):
            label = f"{family}.{name}" + (f"[{index}]" if len(values) > 1 else "")
            if isinstance(each, str):
                found[f"{label}={each}"] = 1.0
            else:
                found[label] = math.log2(1 + abs(each))
    return found
