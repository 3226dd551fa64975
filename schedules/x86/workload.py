"""What a convolution kernel computes and how: the workload and its schedule, as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from tvm_lowrank.geometry import ConvGeometry

# The steps of an epilogue with how many numbers follow each name.
EPILOGUE_STEPS = {
    "bias": 0,
    "residual": 0,
    "gate": 0,
    "affine": 0,
    "relu": 0,
    "clip": 2,
    "leaky_relu": 1,
    "prelu": 0,
    "sigmoid": 0,
    "silu": 0,
    "hard_sigmoid": 0,
    "hard_swish": 0,
    "tanh": 0,
    "gelu": 0,
}
ORDERS = ("channels", "rows")


def parse_step(step: str) -> tuple[str, tuple[float, ...]]:
    """The name and the numbers of an epilogue step such as ``"clip:0:6"``.

    Raises ValueError for an unknown name, a wrong count of numbers, text that is no number, NaN,
    and bounds of a clip in the wrong order.
    """
    name, *texts = step.split(":")
    if name not in EPILOGUE_STEPS:
        raise ValueError(f"unknown epilogue step {step!r}; known are {', '.join(EPILOGUE_STEPS)}")
    if len(texts) != EPILOGUE_STEPS[name]:
        raise ValueError(f"epilogue step {step!r} takes {EPILOGUE_STEPS[name]} numbers")
    try:
        numbers = tuple(float(text) for text in texts)
    except ValueError:
        raise ValueError(f"epilogue step {step!r} holds text that is not a number") from None
    if any(math.isnan(number) for number in numbers):
        raise ValueError(f"epilogue step {step!r} holds NaN")
    if name == "clip" and numbers[0] > numbers[1]:
        raise ValueError(f"epilogue step {step!r}: the lower bound exceeds the upper")
    if name == "leaky_relu" and math.isinf(numbers[0]):
        raise ValueError(f"epilogue step {step!r}: the slope must be finite")
    return name, numbers


@dataclass(frozen=True)
class ConvWorkload:
    """One convolution of the network, with the layout of its input and what follows it.

    ``in_block`` is the number of channels in a block of the input: the vector length for an
    ``NCHWc`` input, 1 for a plain ``NCHW`` one. The output is always blocked by the vector length.
    ``epilogue`` names the steps applied to each output value, in any order and number:

    - ``"bias"``: add a value per channel;
    - ``"residual"``: add a map of the shape of the output;
    - ``"gate"``: multiply by a value per image and channel, a map of one pixel;
    - ``"affine"``: multiply by a scale per channel and add a shift per channel;
    - ``"relu"``: ``max(y, 0)``; ``"leaky_relu:ALPHA"``: ``ALPHA * y`` where y is negative;
      ``"prelu"``: the same by a slope per channel;
    - ``"clip:LOW:HIGH"``: ``min(max(y, LOW), HIGH)``, where a bound may be ``inf`` or ``-inf``;
    - ``"sigmoid"``, ``"tanh"``; ``"silu"``: ``y * sigmoid(y)``; ``"gelu"``: with the exact erf;
    - ``"hard_sigmoid"``: ``clip(y / 6 + 1 / 2, 0, 1)``; ``"hard_swish"``: y times that.

    Raises ValueError for groups that do not divide the channels, an empty output, and steps that
    `parse_step` does not take.
    """

    geometry: ConvGeometry
    in_block: int
    epilogue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        groups = self.geometry.groups
        if groups < 1 or self.geometry.in_channels % groups or self.geometry.out_channels % groups:
            raise ValueError(f"groups={groups} must divide the channels of {self.geometry}")
        if self.geometry.out_height < 1 or self.geometry.out_width < 1:
            raise ValueError(f"the output map of {self.geometry} is empty")
        for step in self.epilogue:
            parse_step(step)

    def key(self) -> str:
        """A stable text that identifies the workload in tuning records."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {
            "geometry": self.geometry.to_json(),
            "in_block": self.in_block,
            "epilogue": list(self.epilogue),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConvWorkload:
        """Rebuild a workload from `to_json`'s dictionary."""
        geometry = ConvGeometry.from_json(data["geometry"])
        return cls(geometry, data["in_block"], tuple(data["epilogue"]))


@dataclass(frozen=True)
class TiledSchedule:
    """Choices of a convolution in register tiles of its output; see `ConvSchedule`."""

    kernel: ClassVar[str]

    tile: int
    vectors: int
    order: str = "channels"
    chunk: int = 1
    chains: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, not {self.order!r}")

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls: type[Tiled], data: Mapping[str, Any]) -> Tiled:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


Tiled = TypeVar("Tiled", bound=TiledSchedule)


@dataclass(frozen=True)
class ConvSchedule(TiledSchedule):
    """The tunable choices of the direct convolution.

    - ``tile``: output pixels, along a row, of a register tile;
    - ``rows``: rows of a register tile; more than one only if ``tile`` is the whole width of the
      output. Narrow maps use it to read their weights less often, from a padded copy of the input;
    - ``vectors``: vectors of output channels of a register tile, a divisor of their number;
    - ``order``: what the parallel tasks run through last. ``"channels"`` finishes the whole map for
      one group of output channels before the next (its weights stay in cache), ``"rows"`` finishes
      all channels of a chunk of the map before the next (its input stays in cache);
    - ``chunk``: register tiles, in row-major order of the map, of one parallel task;
    - ``chains``: independent partial sums of one output value, which hide the latency of
      multiply-add where ``rows * tile * vectors`` accumulators are too few;
    - ``prefetch``: whether the tiles of a group of output channels ask for the weights of the next,
      each for its share, so that weights outside of the caches come in at an even rate.
    """

    kernel: ClassVar[str] = "direct"

    prefetch: bool = False
