"""Fold pads of the map into the padding of the convolution or pooling that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, op_name, static_shape

_NOT_NEGATIVE = ("nn.relu", "nn.relu6", "sigmoid")


@tvm.transform.module_pass(opt_level=0, name="FoldPads")
class FoldPads:
    """``nn.pad`` of rows and columns disappears where its reader can pad by itself.

    Zeros join the padding of a convolution, and of an average that counts its padding. They join
    that of a maximum, which ignores its padding, where they cannot win: what they surround has no
    negative values and no window lies wholly on them.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Folder(mod).run()


@dataclass
class _Pad:
    """A pad that is written only if a reader wants it."""

    original: relax.Call
    source: relax.Expr
    sides: tuple[int, int, int, int]  # top, left, bottom, right
    not_negative: bool
    written: relax.Expr | None = None


class _Folder(Rewriter):
    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        name = op_name(value)
        if name == "nn.pad":
            pad = self._pad(value)
            if pad is not None:
                return pad
        elif name in ("nn.conv2d", "nn.max_pool2d", "nn.avg_pool2d"):
            pad = self.values.get(value.args[0])
            if isinstance(pad, _Pad):
                folded = self._fold(name, value, pad)
                if folded is not None:
                    return self.emit(folded)
        return self.emit(self.substitute(value))

    def _pad(self, value: relax.Call) -> _Pad | None:
        widths = [int(width) for width in value.attrs.pad_width]
        if str(value.attrs.pad_mode) != "constant" or float(value.attrs.pad_value) != 0.0:
            return None
        if len(widths) != 8 or any(widths[:4]):
            return None
        top, bottom, left, right = widths[4:]
        source = value.args[0]
        producer = next((b.value for b in self.bindings or [] if b.var.same_as(source)), None)
        return _Pad(
            value,
            self.substitute(source),
            (top, left, bottom, right),
            op_name(producer) in _NOT_NEGATIVE,
        )

    def _fold(self, name: str, value: relax.Call, pad: _Pad) -> relax.Expr | None:
        attrs = value.attrs
        layout = attrs.data_layout if name == "nn.conv2d" else attrs.layout
        if str(layout) != "NCHW":
            return None
        old = tuple(int(p) for p in attrs.padding)
        padding = [a + b for a, b in zip(old, pad.sides, strict=True)]
        if name == "nn.conv2d":
            return relax.op.nn.conv2d(
                pad.source,
                self.substitute(value.args[1]),
                strides=attrs.strides,
                padding=padding,
                dilation=attrs.dilation,
                groups=attrs.groups,
                data_layout=attrs.data_layout,
                kernel_layout=attrs.kernel_layout,
                out_layout=attrs.out_layout,
                out_dtype=attrs.out_dtype,
            )
        pool = {
            "pool_size": attrs.pool_size,
            "strides": attrs.strides,
            "padding": padding,
            "dilation": attrs.dilation,
            "ceil_mode": attrs.ceil_mode,
        }
        if name == "nn.max_pool2d":
            if not pad.not_negative or not _each_window_sees_the_map(value, pad, padding):
                return None
            return relax.op.nn.max_pool2d(pad.source, **pool)
        if any(old) and not attrs.count_include_pad:
            return None
        return relax.op.nn.avg_pool2d(pad.source, **pool, count_include_pad=True)

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, _Pad):
            return value
        if value.written is None:
            pad = value.original
            value.written = self.emit(relax.Call(pad.op, [value.source], pad.attrs, pad.ty_args))
        return value.written


def _each_window_sees_the_map(value: relax.Call, pad: _Pad, padding: list[int]) -> bool:
    attrs = value.attrs
    source, out = static_shape(pad.source), static_shape(value)
    if source is None or out is None:
        return False
    for axis in (0, 1):
        size, stride = int(attrs.pool_size[axis]), int(attrs.strides[axis])
        dilation = int(attrs.dilation[axis])
        for index in range(out[2 + axis]):
            start = index * stride - padding[axis]
            taps = range(start, start + size * dilation, dilation)
            if not any(0 <= tap < source[2 + axis] for tap in taps):
                return False
    return True
