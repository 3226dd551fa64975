"""Channel shuffles, which networks write as two reshapes and a transposition, as one gather."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, op_name, static_shape


@tvm.transform.module_pass(opt_level=0, name="RaiseShuffles")
class RaiseShuffles:
    """Reshape (N, C, H, W) to (N, G, C / G, H, W), swap the axes of C, and back: a ``take``.

    Parts that something else reads rule it out.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        raiser = _Raiser(mod)
        return raiser.run() if raiser.orders else mod


class _Raiser(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.made = {binding.var: binding.value for binding in self.bindings or []}
        # What is shuffled, and the order of its channels, by the variable of the result.
        self.orders: dict[Any, tuple[relax.Expr, np.ndarray]] = {}
        for var, value in self.made.items():
            found = self._shuffle(var, value)
            if found is not None:
                self.orders[var] = found

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var not in self.orders:
            return self.emit(self.substitute(value))
        source, order = self.orders[var]
        indices = relax.const(order.astype("int64"), "int64")
        return self.emit(relax.op.take(self.substitute(source), indices, axis=1))

    def _shuffle(self, var: Any, value: Any) -> tuple[relax.Expr, np.ndarray] | None:
        permuted = self._alone(value, "reshape")
        split = self._alone(permuted, "permute_dims")
        if permuted is None or split is None or op_name(split) != "reshape":
            return None
        source, axes = split.args[0], permuted.attrs.axes
        shape, parts = static_shape(source), static_shape(permuted.args[0])
        if shape is None or parts is None or len(shape) != 4 or static_shape(var) != shape:
            return None
        batch, channels, *pixels = shape
        if len(parts) < 4 or parts[0] != batch or math.prod(parts[3:]) != math.prod(pixels):
            return None
        if axes is None or [int(axis) for axis in axes] != [0, 2, 1, *range(3, len(parts))]:
            return None
        return source, np.arange(channels).reshape(parts[1:3]).T.reshape(-1)

    def _alone(self, value: Any, name: str) -> Any:
        """What made the operand of ``value``, a call of ``name``, if nothing else reads it."""
        if op_name(value) != name or self.users.get(value.args[0]) != 1:
            return None
        return self.made.get(value.args[0])
