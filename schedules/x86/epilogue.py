"""What follows a convolution on its output vectors: biases, other maps, affine, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import ir, tirx

from . import activations
from .emitter import Emitter, Index, quotient
from .workload import parse_step

_ACTIVATIONS: dict[str, Callable[..., ir.Expr]] = {
    "clip": activations.clip,
    "leaky_relu": activations.leaky_relu,
    "sigmoid": activations.sigmoid,
    "silu": activations.silu,
    "hard_sigmoid": activations.hard_sigmoid,
    "hard_swish": activations.hard_swish,
    "tanh": activations.tanh,
    "gelu": activations.gelu,
}
# Steps of so many instructions that a copy for each register of a tile takes long to compile.
_LONG = ("sigmoid", "silu", "tanh", "gelu")


class Epilogue:
    """The steps of a workload's epilogue, with the parameters of the kernel they read.

    Creating one adds those parameters to the function of ``em``, in the order of the steps: a
    vector of ``channels`` values for a bias or the slopes of a PReLU, two (scale, shift) for an
    affine step, a map of shape ``map_shape`` for a residual, one of a single pixel for a gate. The
    other steps have none.
    """

    def __init__(
        self, em: Emitter, steps: Sequence[str], channels: int, map_shape: Sequence[int]
    ) -> None:
        """Add the parameters of ``steps``; ValueError for a step unknown or malformed."""
        self._em = em
        self._channels = channels
        batch, *_, lanes = map_shape
        self._image = math.prod(map_shape[1:]) if batch > 1 else 0
        self._steps: list[tuple[str, tuple[float, ...], tuple[tirx.Buffer, ...]]] = []
        for index, step in enumerate(steps):
            name, numbers = parse_step(step)
            buffers: tuple[tirx.Buffer, ...] = ()
            if name in ("bias", "prelu"):
                buffers = (em.argument(f"{name}{index}", (channels,)),)
            elif name == "residual":
                buffers = (em.argument(f"residual{index}", map_shape),)
            elif name == "gate":
                gates = (batch, channels // lanes, 1, 1, lanes)
                buffers = (em.argument(f"gate{index}", gates),)
            elif name == "affine":
                scale = em.argument(f"scale{index}", (channels,))
                buffers = (scale, em.argument(f"shift{index}", (channels,)))
            self._steps.append((name, numbers, buffers))

    @property
    def has_operands(self) -> bool:
        """Whether a step reads parameters of the kernel."""
        return any(buffers for _, _, buffers in self._steps)

    def store(
        self,
        y: tirx.Buffer,
        values: Sequence[Sequence[ir.Expr]],
        base: Index,
        stride: int,
        channel: Index,
        channel_step: int,
        pixel_stride: int | None = None,
    ) -> None:
        """Emit the steps on a register tile and store it in ``y``.

        ``values[j][i]`` belongs at offset ``base + j * stride + i * pixel_stride`` (a vector if not
        given) and to the channels from ``channel + j * channel_step`` on.
        """
        em, apart = self._em, pixel_stride or self._em.lanes
        is_long = any(name in _LONG for name, _, _ in self._steps)
        for j, line in enumerate(values):
            of_line = channel + j * channel_step
            for i, value in enumerate(line):
                position = base + (j * stride + i * apart)
                done = value if is_long else self.apply(value, of_line, position)
                em.store(y, done, position)
            if is_long:
                with em.loop(len(line), prefix="pixel") as pixel:
                    position = em.bind_index(base + j * stride + pixel * apart, "at")
                    em.store(y, self.apply(em.load(y, position), of_line, position), position)

    def apply(self, value: ir.Expr, channel: Index, position: Index) -> ir.Expr:
        """Emit the steps on one vector of output channels.

        ``channel`` is the offset of the vector among the channels, ``position`` its offset in the
        output map.
        """
        em = self._em
        for name, numbers, buffers in self._steps:
            if name == "bias":
                value = value + em.load(buffers[0], channel)
            elif name == "residual":
                value = value + em.load(buffers[0], position)
            elif name == "gate":
                at = channel
                if self._image:
                    at = em.bind_index(quotient(position, self._image) * self._channels + channel)
                value = value * em.load(buffers[0], at)
            elif name == "affine":
                value = value * em.load(buffers[0], channel) + em.load(buffers[1], channel)
            elif name == "relu":
                value = tirx.max(value, em.constant(0))
            elif name == "prelu":
                value = em.bind(value)
                slope = em.load(buffers[0], channel)
                value = tirx.max(value, em.constant(0)) + slope * tirx.min(value, em.constant(0))
            else:
                if name in _LONG:
                    # TVM's analysis looks through variables, in time exponential in their depth.
                    (held,) = em.accumulators(1)
                    em.store(held, value)
                    value = em.load(held)
                value = _ACTIVATIONS[name](em, value, *numbers)
        return value
