"""What networks write as two reshapes and a transposition: channel shuffles, depth to space."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, constant, op_name, static_shape

# Of tensors.
Shape = tuple[int, ...]


@tvm.transform.module_pass(opt_level=0, name="RaiseShuffles")
class RaiseShuffles:
    """Gathers of channels, and transposed convolutions, for reshapes around a transposition.

    - (N, C, H, W) to (N, G, C / G, H, W), the axes of C swapped, and back: a ``take``;
    - (N, F s s, H, W), either (N, F, s, s, H, W) or (N, s, s, F, H, W), to (N, F, H s, W s): a
      ``conv2d_transpose`` of zeros and ones, which lowering knows for what it is.

    Parts that something else reads rule it out.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        raiser = _Raiser(mod)
        return raiser.run() if raiser.orders or raiser.weights else mod


class _Raiser(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.made = {binding.var: binding.value for binding in self.bindings or []}
        # What is shuffled, and the order of its channels, by the variable of the result.
        self.orders: dict[Any, tuple[relax.Expr, np.ndarray]] = {}
        # What depth to space takes, and the IOHW weight that does the same.
        self.weights: dict[Any, tuple[relax.Expr, np.ndarray]] = {}
        for var, value in self.made.items():
            if (parts := self._parts(value)) is None:
                continue
            if (order := _shuffled(*parts[1:], static_shape(var))) is not None:
                self.orders[var] = parts[0], order
            elif (weight := _spread(*parts[1:], static_shape(var))) is not None:
                self.weights[var] = parts[0], weight

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var in self.weights:
            source, weight = self.weights[var]
            _, _, *strides = weight.shape
            args = self.substitute(source), constant(weight)
            return self.emit(relax.op.nn.conv2d_transpose(*args, strides=strides))
        if var not in self.orders:
            return self.emit(self.substitute(value))
        source, order = self.orders[var]
        indices = relax.const(order.astype("int64"), "int64")
        return self.emit(relax.op.take(self.substitute(source), indices, axis=1))

    def _parts(self, value: Any) -> tuple[relax.Expr, Shape, Shape, list[int]] | None:
        """What is taken apart: its shape, that of its parts, and the order of their axes."""
        permuted = self._alone(value, "reshape")
        split = self._alone(permuted, "permute_dims")
        if permuted is None or split is None or op_name(split) != "reshape":
            return None
        source, axes = split.args[0], permuted.attrs.axes
        shape, parts = static_shape(source), static_shape(permuted.args[0])
        if shape is None or parts is None or len(shape) != 4 or axes is None:
            return None
        return source, shape, parts, [int(axis) for axis in axes]

    def _alone(self, value: Any, name: str) -> Any:
        """What made the operand of ``value``, a call of ``name``, if nothing else reads it."""
        if op_name(value) != name or self.users.get(value.args[0]) != 1:
            return None
        return self.made.get(value.args[0])


def _shuffled(shape: Shape, parts: Shape, axes: list[int], made: Shape | None) -> np.ndarray | None:
    """The order that channels come in, if they are shuffled."""
    batch, channels, *pixels = shape
    if made != shape or len(parts) < 4 or parts[0] != batch:
        return None
    if math.prod(parts[3:]) != math.prod(pixels) or axes != [0, 2, 1, *range(3, len(parts))]:
        return None
    return np.arange(channels).reshape(parts[1:3]).T.reshape(-1)


def _spread(shape: Shape, parts: Shape, axes: list[int], made: Shape | None) -> np.ndarray | None:
    """The weight (C, F, s, s) of zeros and ones that takes channels to pixels, if that is done."""
    batch, channels, height, width = shape
    if len(parts) != 6 or parts[0] != batch or parts[4:] != (height, width):
        return None
    numbers = np.arange(channels).reshape(parts[1:4])
    if axes == [0, 3, 4, 1, 5, 2]:
        numbers = numbers.transpose(2, 0, 1)
    elif axes != [0, 1, 4, 2, 5, 3]:
        return None
    filters, down, along = numbers.shape
    if made != (batch, filters, height * down, width * along):
        return None
    weight = np.zeros((channels, *numbers.shape), np.float32)
    np.put_along_axis(weight.reshape(channels, -1), numbers.reshape(1, -1), 1.0, axis=0)
    return weight
