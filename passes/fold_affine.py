"""Fold per-channel scales and shifts (batch norm in inference) into the convolution before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant,
    constant_array,
    is_constant,
    op_name,
    static_shape,
)


@tvm.transform.module_pass(opt_level=0, name="FoldAffine")
class FoldAffine:
    """Chains of ``+ - * /`` with per-channel constants become part of the convolution they follow.

    Algebra: ``s * (W x + b) + t = (s W) x + (s b + t)``, computed in float64. A chain that follows
    something else becomes one multiplication and one addition. Every NCHW convolution with constant
    weights comes out as ``add(conv2d(x, W), bias[1, F, 1, 1])``, with a zero bias if it had none,
    so that later passes meet one shape only.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Folder(mod).run()


@dataclass
class _Affine:
    """``scale * base + shift`` a channel, not written yet; ``weight`` if base is a convolution."""

    base: relax.Expr
    scale: np.ndarray
    shift: np.ndarray
    weight: np.ndarray | None = None
    written: relax.Expr | None = None


class _Folder(Rewriter):
    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        name = op_name(value)
        if name == "nn.conv2d" and is_canonical_conv2d(value):
            weight = constant_array(value.args[1]).astype(np.float64)
            channels = weight.shape[0]
            return _Affine(self.substitute(value), np.ones(channels), np.zeros(channels), weight)
        if name in ("add", "subtract", "multiply", "divide"):
            folded = self._fold(name, value)
            if folded is not None:
                return folded
        return self.emit(self.substitute(value))

    def _fold(self, name: str, value: relax.Call) -> _Affine | None:
        left, right = value.args
        flipped = is_constant(left)
        tensor, const = (right, left) if flipped else (left, right)
        if not is_constant(const) or is_constant(tensor) or (flipped and name == "divide"):
            return None
        vector = _per_channel(const, tensor)
        if vector is None:
            return None
        source = self.values.get(tensor)
        if not isinstance(source, _Affine) or self.users[tensor] > 1 or source.written is not None:
            ones = np.ones_like(vector)
            source = _Affine(self.substitute(tensor), ones, np.zeros_like(vector))
        scale, shift = source.scale, source.shift
        if name == "add":
            shift = shift + vector
        elif name == "subtract":
            sign = -1.0 if flipped else 1.0
            scale, shift = sign * scale, sign * (shift - vector)
        elif name == "multiply":
            scale, shift = scale * vector, shift * vector
        else:
            scale, shift = scale / vector, shift / vector
        return _Affine(source.base, scale, shift, source.weight)

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, _Affine):
            return value
        if value.written is None:
            value.written = self._write(value)
        return value.written

    def _write(self, value: _Affine) -> relax.Expr:
        shape = (1, -1, 1, 1)
        if value.weight is not None:
            weight = constant(value.weight * value.scale.reshape(-1, 1, 1, 1))
            conv = value.base
            call = relax.Call(conv.op, [conv.args[0], weight], conv.attrs, conv.ty_args)
            return self.emit(relax.op.add(self.emit(call), constant(value.shift.reshape(shape))))
        out = value.base
        if (value.scale != 1.0).any():
            out = self.emit(relax.op.multiply(out, constant(value.scale.reshape(shape))))
        if (value.shift != 0.0).any():
            out = self.emit(relax.op.add(out, constant(value.shift.reshape(shape))))
        return out


def is_canonical_conv2d(call: relax.Call) -> bool:
    """Whether a conv2d is NCHW, with constant OIHW float32 weights and a static shape."""
    return (
        is_constant(call.args[1])
        and str(call.attrs.data_layout) == "NCHW"
        and str(call.attrs.kernel_layout) == "OIHW"
        and str(call.attrs.out_layout) == "NCHW"
        and static_shape(call.args[0]) is not None
        and static_shape(call.args[1]) is not None
    )


def _per_channel(const: relax.Expr, tensor: relax.Expr) -> np.ndarray | None:
    """A constant as one value a channel of a 4-D tensor, or None if it varies otherwise."""
    shape = static_shape(tensor)
    if shape is None or len(shape) != 4 or static_shape(const) is None:
        return None
    array = constant_array(const).astype(np.float64)
    if array.size == 1:
        return np.full(shape[1], array.reshape(-1)[0])
    if array.ndim in (3, 4) and array.shape[-3:] == (shape[1], 1, 1) and array.size == shape[1]:
        return array.reshape(-1)
    return None
