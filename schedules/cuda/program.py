"""What computes one convolution on a GPU: kernels in order, with the values between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm_lowrank.schedules.x86.workload import ConvWorkload

X, WEIGHTS, Y = "x", "weights", "y"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One kernel: the names of the values it reads, in order, and of the one it writes.

    One that ``turns`` gives a map another layout, which is left out where it has that already.
    """

    func: tirx.PrimFunc
    reads: tuple[str, ...]
    writes: str
    turns: bool = False


@dataclass(frozen=True)
class Program:
    """Kernels that run one after the other.

    ``shapes`` holds the shape and ``dtypes`` the type (float32 where it is not listed) of every
    value: ``x``, ``weights``, ``y``, the ``operands`` of the epilogue in the order of its steps,
    and what the stages hand on to each other. Where kernels work on maps with channels last,
    ``twins`` names for each NCHW map the value that is the same in that layout, with the values of
    a kind of `turn`; the stages that turn one into the other are among ``stages``.
    """

    stages: tuple[Stage, ...]
    shapes: Mapping[str, Shape]
    operands: tuple[str, ...] = ()
    dtypes: Mapping[str, str] | None = None
    twins: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""

    @classmethod
    def of_function(cls, func: tirx.PrimFunc) -> Program:
        """A kernel of a processor, whose last parameter is its result, as a program."""
        shapes = {p.name: tuple(int(extent) for extent in p.shape) for p in func.params}
        *reads, writes = shapes
        return cls((Stage(func, tuple(reads), writes),), shapes, tuple(reads[2:]))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the caller gives, in order."""
        return (X, WEIGHTS, *self.operands)

    def dtype(self, name: str) -> str:
        """Type of a value."""
        return (self.dtypes or {}).get(name, "float32")

    def named(self, names: Sequence[str]) -> dict[str, tirx.PrimFunc]:
        """The stages as functions of the given names, to be compiled with those of others."""
        return {
            name: stage.func.with_attr("global_symbol", name)
            for name, stage in zip(names, self.stages, strict=True)
        }

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """What the script of a batch has to know: stages under the given names, and all values."""
        return {
            "stages": [
                {
                    "function": name,
                    "reads": list(stage.reads),
                    "writes": stage.writes,
                    "turns": stage.turns,
                }
                for name, stage in zip(names, self.stages, strict=True)
            ],
            "values": {
                name: {"shape": list(shape), "dtype": self.dtype(name)}
                for name, shape in self.shapes.items()
            },
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the kernels read them."""
        size = 2 if self.dtype(WEIGHTS) == "float16" else 4
        return size * math.prod(self.shapes[WEIGHTS])


def moved_bytes(workload: ConvWorkload, weight_bytes: int) -> int:
    """Bytes that a convolution cannot avoid to move: its input, weights, residuals and output."""
    g = workload.geometry
    outputs = g.batch * g.out_channels * g.out_height * g.out_width
    maps = 1 + sum(step == "residual" for step in workload.epilogue)
    return 4 * (g.batch * g.in_channels * g.height * g.width + maps * outputs) + weight_bytes
