"""Channel orders (1x1 convolutions of zeros and ones) folded into the layers around them.

``conv(order(x))`` is ``conv'(x)`` with the weight's input channels in another order, and
``order(conv(x))`` likewise with its outputs; biases, activations, pooling and depthwise
convolutions between let an order through.
"""

from __future__ import annotations

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

from tvm_lowrank.decompose.compose import channel_order

_UNARY = {
    "nn.relu", "clip", "sigmoid", "tanh", "nn.silu", "nn.gelu", "nn.leakyrelu", "nn.max_pool2d",
    "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "negative", "abs", "sqrt", "exp",
}  # fmt: skip
_BINARY = {"add", "subtract", "multiply", "divide", "maximum", "minimum"}


@tvm.transform.module_pass(opt_level=0, name="FoldOrders")
class FoldOrders:
    """Fold each channel order downwards, else upwards; it stays where both ways are barred.

    A path is barred by a value that more than one operator reads, by an operator that mixes
    channels otherwise (concatenation, residual addition, grouped convolution, flattening), and by
    the function's input and result. With ``gathers=True`` what stays becomes a ``take``.
    """

    def __init__(self, gathers: bool = False) -> None:
        self.gathers = gathers

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Folder(mod, self.gathers).run()


class _Folder(Rewriter):
    def __init__(self, mod: tvm.IRModule, gathers: bool) -> None:
        super().__init__(mod)
        self.gathers = gathers
        self.made = {binding.var: binding.value for binding in self.bindings or []}
        self.readers: dict[Any, list[Any]] = {}
        for var, value in self.made.items():
            for read in relax.analysis.free_vars(value):
                self.readers.setdefault(read, []).append(var)
        # Constants that are replaced, by variable and argument; orders that are gone or left.
        self.arrays: dict[tuple[Any, int], np.ndarray] = {}
        self.gone: set[Any] = set()
        self.left: dict[Any, np.ndarray] = {}
        for var, value in self.made.items():
            order = self._order(var, value)
            if order is None:
                continue
            identity = np.array_equal(order, np.arange(len(order)))
            if identity or self._down(var, order) or self._up(value.args[0], order):
                self.gone.add(var)
            else:
                self.left[var] = order

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var in self.gone:
            return self.substitute(value.args[0])
        if var in self.left and self.gathers:
            indices = relax.const(self.left[var].astype("int64"), "int64")
            return self.emit(relax.op.take(self.substitute(value.args[0]), indices, axis=1))
        edits = {
            index: array for (owner, index), array in self.arrays.items() if owner.same_as(var)
        }
        if not edits:
            return self.emit(self.substitute(value))
        args = [
            constant(edits[index]) if index in edits else self.substitute(arg)
            for index, arg in enumerate(value.args)
        ]
        return self.emit(relax.Call(value.op, args, value.attrs, value.ty_args))

    def _order(self, var: Any, value: Any) -> np.ndarray | None:
        """The order that a convolution is, with those already folded into it, or None."""
        if op_name(value) != "nn.conv2d" or (weight := self._array(var, 1)) is None:
            return None
        attrs = value.attrs
        plain = all(int(s) == 1 for s in attrs.strides) and not any(int(p) for p in attrs.padding)
        if not plain or attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW":
            return None
        return channel_order(weight)

    def _down(self, var: Any, order: np.ndarray) -> bool:
        """Fold into what reads ``var``; True and the edits noted only if the path is free."""
        inverse = np.argsort(order)
        edits: dict[tuple[Any, int], np.ndarray] = {}
        while self.users.get(var, 0) == 1 and len(self.readers.get(var, [])) == 1:
            reader = self.readers[var][0]
            value, name = self.made[reader], op_name(self.made[reader])
            if name == "nn.conv2d" and value.args[0].same_as(var):
                weight = self._array(reader, 1)
                if weight is None:
                    return False
                if int(value.attrs.groups) == 1:
                    edits[reader, 1] = weight[:, inverse]
                    self.arrays |= edits
                    return True
            if not self._passes(reader, value, name, inverse, edits):
                return False
            var = reader
        return False

    def _up(self, var: Any, order: np.ndarray) -> bool:
        """Fold into what made ``var``."""
        edits: dict[tuple[Any, int], np.ndarray] = {}
        while var in self.made and self.users.get(var, 0) == 1:
            value, name = self.made[var], op_name(self.made[var])
            if var in self.gone or var in self.left:
                return False
            if name == "nn.conv2d" and int(value.attrs.groups) == 1:
                weight = self._array(var, 1)
                if weight is None:
                    return False
                edits[var, 1] = weight[order]
                self.arrays |= edits
                return True
            if not self._passes(var, value, name, order, edits):
                return False
            var = value.args[0]
        return False

    def _passes(
        self,
        var: Any,
        value: Any,
        name: str | None,
        order: np.ndarray,
        edits: dict[tuple[Any, int], np.ndarray],
    ) -> bool:
        """Whether an order of its channels may pass an operator, its constants reordered."""
        if name in _UNARY:
            return len(static_shape(value.args[0]) or ()) == 4
        index = 1
        if name == "nn.conv2d":
            weight = self._array(var, 1)
            depthwise = weight is not None and len(weight) == int(value.attrs.groups)
            if not depthwise:
                return False
        elif name not in _BINARY or not is_constant(value.args[1]):
            return False
        array = self._array(var, index)
        assert array is not None
        if array.size > 1:
            axis = 0 if name == "nn.conv2d" else array.ndim - 3
            if axis < 0 or array.shape[axis] != len(order):
                return name != "nn.conv2d" and (axis < 0 or array.shape[axis] == 1)
            edits[var, index] = np.take(array, order, axis=axis)
        return True

    def _array(self, var: Any, index: int) -> np.ndarray | None:
        if (var, index) in self.arrays:
            return self.arrays[var, index]
        arg = self.made[var].args[index]
        return constant_array(arg) if is_constant(arg) else None
