"""A kernel in numbers, for a model that learns which schedules are fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm_lowrank.schedules.x86.workload import ConvWorkload


def features(
    workload: ConvWorkload, schedule: Mapping[str, Any], position: int, lanes: int, threads: int
) -> dict[str, float]:
    """Named numbers of a workload and one of its schedules; sizes are logarithms to base 2.

    Families differ in what their schedules hold, so a name that one lacks is simply missing.

    Parameters
    ----------
    workload : ConvWorkload
    schedule : dict
        The schedule as JSON values.
    position : int
        Its place in the family's space: what the family itself thinks of it.
    lanes, threads
        Of the target, and of the runtime.
    """
    g = workload.geometry
    sizes = {
        "in_channels": g.in_channels,
        "out_channels": g.out_channels,
        "out_height": g.out_height,
        "out_width": g.out_width,
        "kernel_height": g.kernel[0],
        "kernel_width": g.kernel[1],
        "stride": g.stride[0] * g.stride[1],
        "dilation": g.dilation[0] * g.dilation[1],
        "groups": g.groups,
        "batch": g.batch,
        "weights": g.weight_count,
        "inputs": g.batch * g.in_channels * g.height * g.width,
        "outputs": g.batch * g.out_channels * g.out_height * g.out_width,
        "multiplications": g.multiplications,
        "position": 1 + position,
    }
    found = {name: math.log2(size) for name, size in sizes.items()}
    found["plain"] = float(workload.in_block == 1)
    found["padded"] = float(any(g.padding))
    found["steps"] = float(len(workload.epilogue))
    family = schedule["kernel"]
    found[f"is {family}"] = 1.0
    for name, value in schedule.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            found[f"{family}.{name}={value}"] = 1.0
        else:
            found[f"{family}.{name}"] = math.log2(1 + abs(value))
    found.update(_register_tile(workload, schedule, lanes, threads))
    return found


def _register_tile(
    workload: ConvWorkload, schedule: Mapping[str, Any], lanes: int, threads: int
) -> dict[str, float]:
    """What follows from a tile of pixels by vectors: registers, waste, and how threads share."""
    if not all(isinstance(schedule.get(name), int) for name in ("tile", "vectors")):
        return {}  # a family that has no such tile
    g = workload.geometry
    pixels = schedule["tile"] * schedule.get("rows", 1)
    vectors = schedule["vectors"]
    tiles = g.batch * -(-g.out_height * g.out_width // pixels)
    groups = -(-g.out_channels // (lanes * vectors))
    tasks = groups * -(-tiles // schedule.get("chunk", 1))
    return {
        "accumulators": math.log2(pixels * vectors * schedule.get("chains", 1)),
        "loads": (pixels + vectors) / (pixels * vectors),
        "waste": tiles * pixels / (g.batch * g.out_height * g.out_width),
        "tasks a thread": math.log2(tasks / threads),
        "imbalance": -(-tasks // threads) * threads / tasks,
        "weights a group": math.log2(g.weight_count / groups),
    }
