"""What a kernel has to do on a machine: its effort, and the maps that it reads and writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm_lowrank.cost.operations import FLOAT32_BYTES
from tvm_lowrank.schedules.effort import Effort
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import FAMILIES, schedule_from_json
from tvm_lowrank.schedules.x86.workload import ConvWorkload


@dataclass(frozen=True)
class Work:
    """Counts of one kernel for the whole batch.

    Attributes
    ----------
    effort : Effort
    input_bytes, output_bytes : float
        Maps in whole blocks of channels; a residual that is added counts as output.
    """

    effort: Effort
    input_bytes: float
    output_bytes: float

    @property
    def operations(self) -> float:
        """Multiply-adds as two each, and those of the transforms."""
        return 2 * self.effort.multiplications + self.effort.operations

    @property
    def map_bytes(self) -> float:
        """Both maps."""
        return self.input_bytes + self.output_bytes


def work_of(workload: ConvWorkload, schedule: Mapping[str, Any], machine: Machine) -> Work:
    """Count what a schedule, given as JSON values, makes of a workload.

    A family that does not count its effort has the multiplications of the definition.
    """
    return _work(workload, json.dumps(schedule, sort_keys=True), machine)


@functools.lru_cache(maxsize=1 << 14)
def _work(workload: ConvWorkload, text: str, machine: Any) -> Work:
    schedule, g = json.loads(text), workload.geometry
    count = FAMILIES[schedule["kernel"]].effort
    if count is not None:
        effort = count(workload, schedule_from_json(schedule), machine)
    else:
        effort = Effort(
            multiplications=float(g.multiplications),
            operations=0.0,
            products=g.multiplications / (2 * machine.lanes),
            transforms=0.0,
            weight_bytes=float(FLOAT32_BYTES * g.weight_count),
        )
    block = workload.in_block
    inputs = -(-g.in_channels // block) * block * g.height * g.width
    outputs = -(-g.out_channels // machine.lanes) * machine.lanes * g.out_height * g.out_width
    outputs *= 1 + ("residual" in workload.epilogue)
    return Work(
        effort, float(FLOAT32_BYTES * g.batch * inputs), float(FLOAT32_BYTES * g.batch * outputs)
    )
