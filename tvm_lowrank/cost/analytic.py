"""A roofline: microseconds of a convolution from its operations and its bytes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm_lowrank.geometry import ConvGeometry

# Starting a parallel kernel and calling it from the VM, in microseconds.
_LAUNCH = 2.0


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at best.

    ``gflops`` counts a multiplication and an addition as two operations, of all threads together;
    ``gigabytes`` is memory bandwidth a second.
    """

    gflops: float
    gigabytes: float

    def microseconds(self, stages: Sequence[ConvGeometry], lanes: int) -> float:
        """Predicted time of a chain of convolutions by the direct algorithm.

        Output channels are counted in whole vectors of ``lanes``, as the kernels compute them. Good
        enough to rank candidates; what is chosen is measured.
        """
        return sum(self._one(stage, lanes) for stage in stages)

    def _one(self, stage: ConvGeometry, lanes: int) -> float:
        padded = -(-stage.out_channels // lanes) * lanes / stage.out_channels
        compute = 2 * stage.multiplications * padded / (self.gflops * 1e3)
        floats = (
            stage.weight_count
            + stage.batch * stage.in_channels * stage.height * stage.width
            + stage.batch * stage.out_channels * stage.out_height * stage.out_width
        )
        return max(compute, 4 * floats / (self.gigabytes * 1e3)) + _LAUNCH
