"""What algorithms and schedules are picked by without a cost model, to compare one with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost.work import work_of

# Given a workload and its schedules, a score of each; the least is picked.
Score = Callable[[ConvWorkload, Sequence[Mapping[str, Any]]], np.ndarray]
NAMES = ("fewest operations", "the paper's formula", "always direct")


def scores(isa: Machine) -> dict[str, Score]:
    """The rules by their names."""
    return dict(zip(NAMES, (operations(isa), paper, direct), strict=True))


def operations(isa: Machine) -> Score:
    def score(workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
        works = [work_of(workload, schedule, isa) for schedule in schedules]
        return np.array([work.operations for work in works])

    return score


def paper(workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The costs of section 4.1, tiles M~ along both axes.

    ``F M N / Delta^2`` of the spatial convolution against
    ``N / (M~ - M) (M~ log M~ + F M~ / Delta^2 log (M~ / Delta^2))``.
    The transform of the weights is left out: it is done beforehand. The paper knows no Winograd.
    """
    g = workload.geometry
    decimation = g.stride[0] * g.stride[1]
    scores = []
    for schedule in schedules:
        if schedule["kernel"] == "winograd":
            scores.append(math.inf)
        elif schedule["kernel"] == "fft":
            chunks, size = 1.0, schedule["tile"][0] * schedule["tile"][1]
            for tile, taps, extent in zip(
                schedule["tile"], g.kernel, (g.height, g.width), strict=True
            ):
                chunks *= extent / max(tile - taps, 1) if tile > 1 else extent
            kept = max(size / decimation, 2.0)
            scores.append(
                chunks * (size * math.log2(size) + g.out_channels * kept * math.log2(kept))
            )
        else:
            taps = g.kernel[0] * g.kernel[1]
            scores.append(g.out_channels * taps * g.height * g.width / decimation)
    return np.array(scores)


def direct(workload: ConvWorkload, schedules: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([schedule["kernel"] in ("winograd", "fft") for schedule in schedules], float)
