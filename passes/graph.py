"""What every pass here shares: walking a Relax function binding by binding and writing it anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst


def is_constant(expr: Any) -> bool:
    """Whether ``expr`` is a tensor constant."""
    return isinstance(expr, GenericConst) and isinstance(expr.ty, relax.TensorType)


def constant_array(expr: Any) -> np.ndarray:
    """The value of a tensor constant."""
    return expr.value.numpy()


def constant(array: np.ndarray) -> relax.Expr:
    """A float32 tensor constant."""
    return relax.const(np.ascontiguousarray(array, dtype="float32"), "float32")


def op_name(expr: Any) -> str | None:
    """Name of the operator that ``expr`` calls, without the ``relax.`` prefix, or None."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return expr.op.name.removeprefix("relax.")
    return None


def is_dense(expr: Any) -> bool:
    """Whether ``expr`` is a product with a constant float32 matrix on the right."""
    if op_name(expr) != "matmul" or not is_constant(expr.args[1]):
        return False
    ty = expr.args[1].ty
    return len(ty.shape) == 2 and ty.dtype == "float32"


def static_shape(expr: relax.Expr) -> tuple[int, ...] | None:
    """Shape of a float32 tensor expression as integers, or None when it has none."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or ty.dtype != "float32" or ty.shape is None:
        return None
    try:
        return tuple(int(extent) for extent in ty.shape)
    except (TypeError, ValueError):
        return None


def dataflow_bindings(func: relax.Function) -> list[Any] | None:
    """Bindings of a function that is one straight line of dataflow, or None for any other."""
    bindings: list[Any] = []
    for block in func.body.blocks:
        if not isinstance(block, relax.DataflowBlock) and len(block.bindings) > 0:
            return None
        bindings.extend(block.bindings)
    if not all(isinstance(binding, relax.VarBinding) for binding in bindings):
        return None
    return bindings


class Rewriter:
    """Writes a function anew, one binding after the other.

    A subclass overrides `rewrite`, which sees each original binding in order and returns the value
    that stands for it: an expression, or an object of its own that `resolve` later turns into one
    (so that an operation can wait until it is known what follows it). ``users`` counts the
    readers of each original variable, the function's result included.
    """

    def __init__(self, mod: tvm.IRModule, name: str = "main") -> None:
        self.mod = mod
        self.name = name
        self.func = mod[name]
        self.bindings = dataflow_bindings(self.func)
        self.values: dict[Any, Any] = {}
        self.users: dict[Any, int] = {}
        # Without the function that is rewritten: the builder would rename the new one otherwise.
        others = {gvar: f for gvar, f in mod.functions.items() if gvar.name_hint != name}
        self.builder = relax.BlockBuilder(tvm.IRModule(others, attrs=mod.attrs))
        for binding in self.bindings or []:
            for var in relax.analysis.free_vars(binding.value):
                self.users[var] = self.users.get(var, 0) + 1
        for var in relax.analysis.free_vars(self.func.body.body):
            self.users[var] = self.users.get(var, 0) + 1

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        """Value that stands for ``var``; the default copies the binding."""
        return self.emit(self.substitute(value))

    def resolve(self, value: Any) -> relax.Expr:
        """Turn a value of `rewrite`'s making into an expression."""
        return value

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """Bind ``expr`` in the new function, unless it is a variable or a constant already."""
        if isinstance(expr, relax.Var) or is_constant(expr):
            return expr
        return self.builder.emit(expr)

    def substitute(self, expr: Any) -> Any:
        """``expr`` with the original's variables replaced by what stands for them."""
        if isinstance(expr, relax.Var):
            return self.resolve(self.values[expr]) if expr in self.values else expr
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.substitute(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.substitute(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self.substitute(arg) for arg in expr.args]
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr

    def result(self) -> relax.Expr:
        """What the new function returns."""
        return self.substitute(self.func.body.body)

    def params(self) -> Sequence[relax.Var]:
        """Parameters that stand for the original ones."""
        return list(self.func.params)

    def extra_params(self) -> Sequence[relax.Var]:
        """Parameters added after the original ones (known once every binding is written)."""
        return []

    def run(self) -> tvm.IRModule:
        """The module with its function written anew; unchanged if it is not plain dataflow."""
        if self.bindings is None:
            return self.mod
        attrs = dict(self.func.attrs.items()) if self.func.attrs else {}
        with self.builder.function(self.name, attrs=attrs):
            with self.builder.dataflow():
                for binding in self.bindings:
                    self.values[binding.var] = self.rewrite(binding.var, binding.value)
                result = self.builder.emit_output(self.result())
            self.builder.emit_func_output(result, [*self.params(), *self.extra_params()])
        return relax.transform.DeadCodeElimination([self.name])(self.builder.get())
