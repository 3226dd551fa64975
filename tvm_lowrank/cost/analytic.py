"""A roofline: microseconds of a convolution from its operations and its bytes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_lowrank.geometry import ConvGeometry

_DIRECT: Mapping[str, float] = {"direct": 1.0}
# Outputs of a tile along one axis that Winograd kernels are predicted with, and additions of a
# transform for each point and axis.
_TILES = (2, 4)
_ADDITIONS = 3
# Starting a parallel kernel and calling it from the VM, in microseconds.
_LAUNCH = 2.0


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best.

    ``gflops`` counts a multiplication and an addition as two operations, of all threads together;
    ``gigabytes`` is memory bandwidth a second, of a copy. ``readings`` are pairs of bytes, smallest
    first, and the gigabytes a second at which all threads read so many again and again; there may
    be none. Weights come from no nearer than what has room for those of the network, in bytes.
    """

    gflops: float
    gigabytes: float
    readings: tuple[tuple[int, float], ...] = ()
    network: int = 0

    def __str__(self) -> str:
        return f"{self.gflops:.0f} GF/s, {self.gigabytes:.1f} GB/s"

    def microseconds(
        self,
        stages: Sequence[ConvGeometry],
        lanes: int,
        algorithms: Mapping[str, float] = _DIRECT,
    ) -> float:
        """Predicted time of a chain of convolutions, each by the fastest of the algorithms.

        ``algorithms`` says how many times as long as at best each takes: 1 where nothing like it
        was measured. Output channels are counted in whole vectors of ``lanes``, as the kernels
        compute them. Good enough to rank candidates; what is chosen is measured.
        """
        return sum(self._one(stage, lanes, algorithms) for stage in stages)

    def _one(self, stage: ConvGeometry, lanes: int, algorithms: Mapping[str, float]) -> float:
        padded = -(-stage.out_channels // lanes) * lanes / stage.out_channels
        maps = (
            stage.batch * stage.in_channels * stage.height * stage.width
            + stage.batch * stage.out_channels * stage.out_height * stage.out_width
        )
        direct = self._time(2 * stage.multiplications * padded, stage.weight_count + maps)
        ways = [algorithms.get("direct", 1.0) * (direct + _LAUNCH)]
        if "winograd" in algorithms and _has_winograd(stage):
            for tile in _TILES:
                operations, weights = _winograd(stage, tile, padded)
                best = self._time(operations, weights + maps)
                ways.append(algorithms["winograd"] * (best + _LAUNCH))
        if "bfloat16" in algorithms and stage.groups < stage.in_channels:
            # Two products in the place of one, and half the bytes of weights.
            best = self._time(stage.multiplications * padded, stage.weight_count / 2 + maps)
            ways.append(algorithms["bfloat16"] * (best + _LAUNCH))
        return min(ways)

    def _time(self, operations: float, floats: float) -> float:
        return max(operations / (self.gflops * 1e3), 4 * floats / (self.gigabytes * 1e3))


def _has_winograd(stage: ConvGeometry) -> bool:
    plain = stage.stride == stage.dilation == (1, 1) and stage.groups == 1
    return plain and 1 < max(stage.kernel) <= 7


def _winograd(stage: ConvGeometry, tile: int, padded: float) -> tuple[float, float]:
    """Operations and transformed weights of F(tile, taps), per axis that has taps.

    The products, and the additions of the transforms: about three for each point of a tile along
    each axis, for each input channel before and each output channel after.
    """
    points, outputs, steps = [], [], 0
    for taps in stage.kernel:
        size = tile if taps > 1 else 1
        points.append(size + taps - 1)
        outputs.append(size)
        steps += taps > 1
    tiles = math.ceil(stage.out_height / outputs[0]) * math.ceil(stage.out_width / outputs[1])
    all_points, all_outputs = math.prod(points), math.prod(outputs)
    products = all_points * stage.in_channels * stage.out_channels * padded
    before = _ADDITIONS * steps * all_points * stage.in_channels
    after = _ADDITIONS * steps * math.sqrt(all_points * all_outputs) * stage.out_channels
    weights = all_points * stage.in_channels * stage.out_channels
    return 2 * stage.batch * tiles * (products + before + after), weights
