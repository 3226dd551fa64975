"""Replace a product with a constant matrix by the product with its two thin factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant,
    constant_array,
    dataflow_bindings,
    is_constant,
    is_dense,
    op_name,
    static_shape,
)


def collect_matmuls(mod: tvm.IRModule) -> dict[str, np.ndarray]:
    """Weights ``(C, F)`` of every ``matmul`` with a constant matrix in ``main``, by name.

    The names are ``matmul0``, ``matmul1``, ... in order.
    """
    found: dict[str, np.ndarray] = {}
    for binding in dataflow_bindings(mod["main"]) or []:
        if is_dense(binding.value):
            found[f"matmul{len(found)}"] = constant_array(binding.value.args[1])
    return found


@dataclass(frozen=True)
class Factors:
    """Matrices ``(C, K)`` and ``(K, F)``, or one ``(C, F)``, and the bias (F,), None to keep it."""

    matrices: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None

    @classmethod
    def of_stages(cls, weights: Sequence[np.ndarray], bias: np.ndarray | None) -> Factors:
        """From OIHW weights: of the form ``svd``, or the one of a dense layer."""
        return cls(tuple(np.ascontiguousarray(w.reshape(len(w), -1).T) for w in weights), bias)


@tvm.transform.module_pass(opt_level=0, name="FactorMatmuls")
class FactorMatmuls:
    """``x @ W`` becomes ``(x @ A) @ B`` in plain Relax that stock TVM compiles.

    ``factors`` maps names as of `collect_matmuls` to `Factors`; other products stay as they are.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = dict(factors)

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Factorer(mod, self.factors).run()


class _Factorer(Rewriter):
    def __init__(self, mod: tvm.IRModule, factors: Mapping[str, Factors]) -> None:
        super().__init__(mod)
        self.factors = factors
        self.count = 0
        self.biases: dict[Any, np.ndarray] = {}

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if is_dense(value):
            factors = self.factors.get(f"matmul{self.count}")
            self.count += 1
            if factors is not None:
                if factors.bias is not None:
                    self.biases[var] = factors.bias
                out = self.substitute(value.args[0])
                for factor in factors.matrices:
                    out = self.emit(relax.op.matmul(out, constant(factor)))
                return out
        if op_name(value) == "add":
            for index, arg in enumerate(value.args):
                if arg in self.biases and is_constant(value.args[1 - index]):
                    shape = static_shape(value.args[1 - index])
                    assert shape is not None
                    bias = constant(self.biases[arg].reshape(shape))
                    return self.emit(relax.op.add(self.substitute(arg), bias))
        return self.emit(self.substitute(value))
