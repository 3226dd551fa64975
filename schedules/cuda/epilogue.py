"""What follows a convolution on each output value: bias, residual, affine, activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import parse_step

from tvm_lowrank.geometry import ConvGeometry

from .program import Shape


def operand_shapes(geometry: ConvGeometry, steps: Sequence[str]) -> dict[str, Shape]:
    """Names and shapes of what the steps read, in their order."""
    channels = (geometry.out_channels,)
    found: dict[str, Shape] = {}
    for index, step in enumerate(steps):
        name, _ = parse_step(step)
        if name == "bias":
            found[f"bias{index}"] = channels
        elif name == "residual":
            found[f"residual{index}"] = map_shape(geometry)
        elif name == "affine":
            found[f"scale{index}"] = channels
            found[f"shift{index}"] = channels
    return found


def map_shape(geometry: ConvGeometry) -> Shape:
    """NCHW shape of a convolution's output."""
    rows, columns = geometry.out_height, geometry.out_width
    return (geometry.batch, geometry.out_channels, rows, columns)


class Epilogue:
    """The steps of an epilogue inside a kernel that is being built.

    Creating one adds the parameters of `operand_shapes` to the function.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        steps: Sequence[str],
        channels_last: bool = False,
        map_dtype: str = "float32",
    ) -> None:
        """Add the parameters of ``steps``; maps among them may have channels last."""
        self._steps = steps
        self._channels_last = channels_last
        self.buffers = {}
        for name, shape in operand_shapes(geometry, steps).items():
            is_map = len(shape) == 4
            if channels_last and is_map:
                shape = (shape[0], *shape[2:], shape[1])
            self.buffers[name] = T.arg(name, T.buffer(shape, map_dtype if is_map else "float32"))

    def apply(self, value: ir.Expr, place: Sequence[ir.Expr]) -> ir.Expr:
        """The steps on the value at ``place``, its NCHW indices."""
        return apply_steps(self._steps, self.buffers, value, place, self._channels_last)


def apply_steps(
    steps: Sequence[str],
    buffers: Mapping[str, tirx.Buffer],
    value: ir.Expr,
    place: Sequence[ir.Expr],
    channels_last: bool = False,
) -> ir.Expr:
    """Epilogue steps on the value at ``place``, with ``buffers`` named as in `operand_shapes`."""
    channel = place[1]
    in_map = (place[0], *place[2:], place[1]) if channels_last else tuple(place)
    for index, step in enumerate(steps):
        name, numbers = parse_step(step)
        if name == "bias":
            value = value + buffers[f"bias{index}"][channel]
        elif name == "residual":
            value = value + buffers[f"residual{index}"][in_map].astype("float32")
        elif name == "affine":
            scale, shift = buffers[f"scale{index}"], buffers[f"shift{index}"]
            value = value * scale[channel] + shift[channel]
        else:
            value = activation(name, value, numbers)
    return value


def activation(name: str, value: ir.Expr, numbers: Sequence[float] = ()) -> ir.Expr:
    """An activation of `workload.EPILOGUE_STEPS` on one float32 value."""

    def number(x: float) -> ir.Expr:
        return tirx.const(x, "float32")

    def clip(x: ir.Expr, low: float, high: float) -> ir.Expr:
        x = x if math.isinf(low) else tirx.max(x, number(low))
        return x if math.isinf(high) else tirx.min(x, number(high))

    zero, one = number(0), number(1)
    if name == "relu":
        return tirx.max(value, zero)
    if name == "clip":
        return clip(value, numbers[0], numbers[1])
    if name == "leaky_relu":
        return tirx.max(value, zero) + number(numbers[0]) * tirx.min(value, zero)
    if name == "hard_sigmoid":
        return clip(value * number(1 / 6) + number(0.5), 0.0, 1.0)
    if name == "hard_swish":
        return value * clip(value * number(1 / 6) + number(0.5), 0.0, 1.0)
    if name == "tanh":
        return tirx.tanh(value)
    if name == "gelu":
        return value * number(0.5) * (one + tirx.erf(value * number(math.sqrt(0.5))))
    sigmoid = one / (one + tirx.exp(zero - value))
    return {"sigmoid": sigmoid, "silu": value * sigmoid}[name]
