"""Turn what a front end wrote as TIR back into operators that other passes know."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm_lowrank.passes.graph import Rewriter, constant_array, is_constant, op_name, static_shape


@tvm.transform.module_pass(opt_level=0, name="RaiseOperators")
class RaiseOperators:
    """``call_tir`` of a constant pad, or of a maximum or minimum with a number, as an operator.

    TVM's ONNX front end writes Pad and Clip as PrimFuncs. They are recognised by what they compute,
    not by their names, and become ``nn.pad``, ``nn.relu`` and ``clip``; others stay as they are.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return relax.transform.DeadCodeElimination(["main"])(_Raiser(mod).run())


class _Raiser(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        # Operand and bound of each maximum, for the minimum that makes a clip of it.
        self.maxima: dict[relax.Var, tuple[relax.Expr, float]] = {}

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if op_name(value) == "call_tir" and isinstance(value.args[1], relax.Tuple):
            raised = self._raise(self.mod[value.args[0]], list(value.args[1].fields), var)
            if raised is not None:
                return raised
        return self.emit(self.substitute(value))

    def _raise(self, func: Any, args: list[relax.Expr], var: relax.Var) -> relax.Expr | None:
        """The operator that a PrimFunc computes on ``args``, or None."""
        store = _only_store(func) if isinstance(func, tirx.PrimFunc) else None
        if store is None or len(func.params) != len(args) + 1:
            return None
        shape, out = static_shape(args[0]), static_shape(var)
        if shape is None or out is None:
            return None
        value = store.value
        if len(args) == 1:
            pads = _pad_of(store, (shape, out))
            if pads is None:
                return None
            widths, fill = pads
            return self.emit(relax.op.nn.pad(self.substitute(args[0]), widths, "constant", fill))
        if len(args) == 2 and is_constant(args[1]) and constant_array(args[1]).size == 1:
            if not isinstance(value, (tirx.Max, tirx.Min)) or not _reads_in_place(value.a, store):
                return None
            bound = float(constant_array(args[1]).reshape(-1)[0])
            if isinstance(value, tirx.Max):
                return self._maximum(args[0], bound, var)
            return self._minimum(args[0], bound)
        return None

    def _maximum(self, data: relax.Expr, bound: float, var: relax.Var) -> relax.Expr:
        source = self.substitute(data)
        self.maxima[var] = (source, bound)
        if bound == 0:
            return self.emit(relax.op.nn.relu(source))
        return self.emit(relax.op.clip(source, bound, float("inf")))

    def _minimum(self, data: relax.Expr, bound: float) -> relax.Expr:
        if data in self.maxima:  # what is not read any more goes with the dead code
            source, low = self.maxima[data]
            return self.emit(relax.op.clip(source, low, bound))
        return self.emit(relax.op.clip(self.substitute(data), float("-inf"), bound))


def _only_store(func: tirx.PrimFunc) -> tirx.BufferStore | None:
    """The store of a function that is one loop nest over one elementwise block, or None."""
    stmt = func.body
    while not isinstance(stmt, tirx.BufferStore):
        if isinstance(stmt, SBlockRealize):
            stmt = stmt.block
        elif isinstance(stmt, (SBlock, tirx.For)):
            stmt = stmt.body
        else:
            return None
    return stmt


def _reads_in_place(expr: Any, store: tirx.BufferStore) -> bool:
    """Whether ``expr`` loads from the very indices that are stored to."""
    if not isinstance(expr, TensorLoad) or len(expr.indices) != len(store.indices):
        return False
    return all(a.same_as(b) for a, b in zip(expr.indices, store.indices, strict=True))


def _pad_of(
    store: tirx.BufferStore, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[list[int], float] | None:
    """Widths (before, after for each axis) and fill of a store that pads, or None.

    ``shapes`` are those of the input and of the output.
    """
    value = store.value
    if getattr(getattr(value, "op", None), "name", None) != "prim.if_then_else":
        return None
    condition, inside, fill = value.args
    if not isinstance(fill, tirx.FloatImm) or not isinstance(inside, TensorLoad):
        return None
    if len(inside.indices) != len(store.indices):
        return None
    widths: list[int] = []
    expected: list[str] = []
    for out, at, size, new in zip(store.indices, inside.indices, *shapes, strict=True):
        if at.same_as(out):
            first = 0
        elif isinstance(at, tirx.Sub) and at.a.same_as(out) and isinstance(at.b, tirx.IntImm):
            first = int(at.b)
        else:
            return None
        widths += [first, new - size - first]
        if first:
            expected.append(f"{out} >= {first}")
        if widths[-1]:
            expected.append(f"{out} < {first + size}")
    if min(widths) < 0 or not expected:
        return None
    return (widths, float(fill.value)) if sorted(_terms(condition)) == sorted(expected) else None


def _terms(expr: Any) -> list[str]:
    """The comparisons with numbers that a condition is the conjunction of, as text."""
    if isinstance(expr, tirx.And):
        return _terms(expr.a) + _terms(expr.b)
    for kind, sign, flipped in (
        (tirx.GE, ">=", "<="),
        (tirx.LE, "<=", ">="),
        (tirx.LT, "<", ">"),
        (tirx.GT, ">", "<"),
    ):
        if isinstance(expr, kind) and isinstance(expr.b, tirx.IntImm):
            return [f"{expr.a} {sign} {int(expr.b)}"]
        if isinstance(expr, kind) and isinstance(expr.a, tirx.IntImm):
            return [f"{expr.b} {flipped} {int(expr.a)}"]
    return [str(expr)]
