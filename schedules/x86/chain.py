"""What a chain of convolutions computes, and how: as kernels of one or several of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from tvm_lowrank.schedules.kernels import Schedule, schedule_from_json

from .bfloat16_schedule import Bfloat16Schedule
from .depthwise import DepthwiseSchedule
from .groups import is_depthwise
from .workload import ConvSchedule, ConvWorkload

StageSchedule: TypeAlias = "ConvSchedule | DepthwiseSchedule | Bfloat16Schedule"

# Stages of the chains that networks have: expansion, depthwise, projection.
MOST_STAGES = 3


@dataclass(frozen=True)
class ChainWorkload:
    """Convolutions of which each reads the result of the one before, and nothing else does.

    Raises ValueError for fewer than two stages, for maps that do not fit, and for a residual or a
    gate before the last stage.
    """

    stages: tuple[ConvWorkload, ...]

    def __post_init__(self) -> None:
        """Check the values."""
        if len(self.stages) < 2:
            raise ValueError("a chain has at least two stages")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            made, read = before.geometry, after.geometry
            if (made.batch, made.out_channels, made.out_height, made.out_width) != (
                read.batch,
                read.in_channels,
                read.height,
                read.width,
            ):
                raise ValueError(f"{read} does not read what {made} makes")
            if {"residual", "gate"} & {*before.epilogue}:
                raise ValueError(f"{made} reads another map inside of the chain")

    def is_promising(self) -> bool:
        """Whether a kernel for several stages may gain anything.

        It does where a map costs more to move than to compute, around a depthwise convolution.
        Between dense convolutions it gains a few percent over direct kernels, and Winograd, which
        goes through whole maps, gains more (``benchmarks/fused.py``).
        """
        return any(is_depthwise(stage.geometry) for stage in self.stages)

    def last(self, count: int) -> ChainWorkload:
        """The chain of the last ``count`` stages."""
        return ChainWorkload(self.stages[-count:])

    def key(self) -> str:
        """A stable text that identifies the chain in tuning records."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"stages": [stage.to_json() for stage in self.stages]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChainWorkload:
        """Rebuild a chain from `to_json`'s dictionary."""
        return cls(tuple(ConvWorkload.from_json(stage) for stage in data["stages"]))


@dataclass(frozen=True)
class FusedSchedule:
    """The tunable choices of one kernel for a whole chain.

    - ``rows``: rows of the last map that a parallel task makes, with all that they need of the maps
      before;
    - ``stages``: the register tiles of each stage. Of a `ConvSchedule` or `Bfloat16Schedule`,
      ``tile``, ``vectors`` and ``chains`` count; the others keep their defaults.
    """

    kernel: ClassVar[str] = "fused"

    rows: int
    stages: tuple[StageSchedule, ...]

    @property
    def rounds(self) -> bool:
        """Whether a stage multiplies pairs of bfloat16."""
        return any(isinstance(stage, Bfloat16Schedule) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        stages = [stage.to_json() for stage in self.stages]
        return {"kernel": self.kernel, "rows": self.rows, "stages": stages}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FusedSchedule:
        """Rebuild a schedule from `to_json`'s dictionary; ValueError for stages of other kinds."""
        stages = tuple(schedule_from_json(stage) for stage in data["stages"])
        kinds = ConvSchedule | DepthwiseSchedule | Bfloat16Schedule
        if not all(isinstance(stage, kinds) for stage in stages):
            raise ValueError("a fused kernel has direct, depthwise and bfloat16 stages only")
        return cls(data["rows"], stages)


@dataclass(frozen=True)
class ChainSchedule:
    """The kernels of a chain, one after the other: of a single stage each, or fused."""

    kernel: ClassVar[str] = "chain"

    parts: tuple[Schedule | FusedSchedule, ...]

    @property
    def fused(self) -> FusedSchedule | None:
        """The kernel of the last stages, if it has several."""
        part = self.parts[-1]
        return part if isinstance(part, FusedSchedule) else None

    @property
    def is_separate(self) -> bool:
        """Whether every stage has a kernel of its own."""
        return not any(isinstance(part, FusedSchedule) for part in self.parts)

    def split(
        self, workload: ChainWorkload
    ) -> list[tuple[ConvWorkload | ChainWorkload, Schedule | FusedSchedule]]:
        """Each part with its share of the workload; ValueError if the stages do not add up."""
        counts = [len(p.stages) if isinstance(p, FusedSchedule) else 1 for p in self.parts]
        if sum(counts) != len(workload.stages):
            raise ValueError(f"{sum(counts)} stages in a chain of {len(workload.stages)}")
        found: list[tuple[ConvWorkload | ChainWorkload, Schedule | FusedSchedule]] = []
        rest: Sequence[ConvWorkload] = workload.stages
        for part, count in zip(self.parts, counts, strict=True):
            mine, rest = rest[:count], rest[count:]
            found.append((ChainWorkload(tuple(mine)) if count > 1 else mine[0], part))
        return found

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, "parts": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChainSchedule:
        """Rebuild a schedule from `to_json`'s dictionary; ValueError if it is of another kind."""
        if data.get("kernel") != cls.kernel:
            raise ValueError(f"kernel {data.get('kernel')!r} is not {cls.kernel!r}")
        return cls(
            tuple(
                FusedSchedule.from_json(part)
                if part.get("kernel") == FusedSchedule.kernel
                else schedule_from_json(part)
                for part in data["parts"]
            )
        )
