"""What a kernel will take, without measuring it: by counting, or as learnt from records."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.work import Work, work_of
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.family import Machine, Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# The constants fit the shipped survey. Starting a parallel loop, and calling a kernel, in
# microseconds.
_LOOP, _CALL = 1.2, 0.3
# Bytes that a core keeps to itself, and that all share.
_OWN_BYTES, _SHARED_BYTES = 1 << 20, 40 << 20
# Against the copy that the bandwidth was measured by: reading from memory and from the cache that
# all share, where no reading is on record; and what another thread has written, within the cores'
# own caches and beyond.
_READ, _SHARED, _EXCHANGED, _FAR = 2.0, 6.0, 2.2, 0.7
# Of the cycles that are counted, so many are taken; and of the shorter of fetching weights and
# multiplying by them, so much is not hidden behind the other.
_PRODUCTS, _TRANSFORMS, _EXPOSED = 0.92, 0.45, 0.35


class CostModel(ABC):
    """Predicts the time of kernels on one machine with a number of threads."""

    @abstractmethod
    def predict(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Microseconds of each schedule, given as JSON values: an array ``(len(schedules),)``."""

    def ranked(
        self, workload: ConvWorkload, schedules: Sequence[Schedule]
    ) -> list[tuple[float, Schedule]]:
        """Predicted microseconds and schedules, fastest first."""
        times = self.predict(workload, [schedule.to_json() for schedule in schedules])
        return [(float(times[i]), schedules[i]) for i in times.argsort(kind="stable")]

    def pick(self, workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> int:
        """Index of the schedule that is predicted fastest."""
        return int(np.argmin(self.predict(workload, schedules)))


class AnalyticModel(CostModel):
    """The paper's operation counts and the bytes moved, over the roofline of a machine.

    It needs no measurement but the machine's peak and bandwidth, which may as well be given for a
    machine that is not at hand. Multiply-adds and the stream of weights overlap; transforms and
    what passes through the caches come on top. Kernels of a GPU have a model of their own, with the
    published figures of its architecture.

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
        found = [self.stated(workload, schedule) for schedule in schedules]
        return np.array(
            [
                self.microseconds(work_of(workload, schedule, self.isa)) if us is None else us
                for us, schedule in zip(found, schedules, strict=True)
            ]
        )

    def stated(self, workload: ConvWorkload, schedule: Mapping[str, Any]) -> float | None:
        """Microseconds by the model that the kernel's family has of its own, None without one."""
        return kernels.predict(workload, kernels.schedule_from_json(schedule), self.isa)

    def microseconds(self, work: Work) -> float:
        """Time of counted work."""
        return sum(self.parts(work).values())

    def parts(self, work: Work) -> dict[str, float]:
        """Microseconds by what takes them."""
        effort, copy = work.effort, self.roofline.gigabytes * 1e3
        # A core's microseconds of a cycle: two multiply-adds of whole vectors.
        cycle = 4 * self.isa.lanes * self.threads / (self.roofline.gflops * 1e3)
        share = math.ceil(effort.tasks / self.threads) / effort.tasks
        products = _PRODUCTS * effort.products * share * cycle
        fetch = effort.weight_bytes / (1e3 * reading_rate(self.roofline, effort.weight_bytes))
        if effort.weight_bytes > _OWN_BYTES:
            fetch *= max(1.0, effort.weight_reads / self.threads)
        near = _OWN_BYTES * self.threads
        exchange = effort.exchange_bytes / (_EXCHANGED * copy)
        exchange += max(0.0, effort.exchange_bytes - near) / (_FAR * copy)
        return {
            "products": products,
            "weights": max(0.0, fetch - products) + _EXPOSED * min(fetch, products),
            "transforms": _TRANSFORMS * effort.transforms * share * cycle,
            "exchange": exchange,
            "start": _LOOP * effort.stages + _CALL,
        }


def reading_rate(roofline: Roofline, size: float) -> float:
    """Gigabytes a second at which all threads read ``size`` bytes of weights that no core has near.

    They come from where those of the network have their place. Between two sizes on record it
    follows both logarithms, as a cache runs out little by little; below the least and above the
    largest it is theirs. Without any it is so many times the copy.
    """
    size = max(size, roofline.network)
    if not roofline.readings:
        return roofline.gigabytes * (_SHARED if size <= _SHARED_BYTES else _READ)
    sizes, rates = np.log(roofline.readings).T
    return math.exp(np.interp(math.log(size), sizes, rates))


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
    work = work_of(workload, schedule, model.isa)
    effort = work.effort
    stated = model.stated(workload, schedule)
    parts = model.parts(work) if stated is None else {}
    total = sum(parts.values()) if stated is None else stated
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
        "products": effort.multiplications,
        "weight bytes": effort.weight_bytes,
        "weight reads": effort.weight_reads,
        "input reads": effort.input_reads,
        "map bytes": work.map_bytes,
        "exchange bytes": 1 + effort.exchange_bytes,
        "task bytes": 1 + effort.task_bytes,
        "tasks a thread": effort.tasks / model.threads,
        "threads": model.threads,
        "lanes": model.isa.lanes,
    }
    found = {name: math.log2(size) for name, size in sizes.items()}
    found["saved"] = math.log2(g.multiplications / effort.multiplications)
    found["cycles a product"] = math.log2(
        (effort.products + 1) * 2 * model.isa.lanes / effort.multiplications
    )
    found["operations a byte"] = math.log2(
        effort.multiplications / (effort.weight_bytes + work.map_bytes)
    )
    tasks = effort.tasks
    found["uneven"] = math.ceil(tasks / model.threads) * model.threads / tasks
    found["stages"] = float(effort.stages)
    for name, part in parts.items():
        found[f"share of {name}"] = part / total
    found["plain"] = float(workload.in_block == 1)
    found["padded"] = float(any(g.padding))
    # The stage of a form: only its last has an epilogue, the others differ in their kernel's shape.
    found["last"] = float(bool(workload.epilogue))
    found["pointwise"] = float(g.kernel == (1, 1))
    found["one-dimensional"] = float(min(g.kernel) == 1 < max(g.kernel))
    found["depthwise"] = float(g.groups == g.in_channels > 1)
    found["peak a thread"] = model.roofline.gflops / model.threads
    found["bandwidth"] = model.roofline.gigabytes
    if stated is None:
        found["reading"] = math.log2(reading_rate(model.roofline, effort.weight_bytes))
    found["analytic"] = math.log2(total)
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
