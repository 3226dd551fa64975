"""Replace a product with a constant matrix by the product with its two thin factors."""

from __future__ import annotations

from collections.abc import Mapping
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
    op_name,
)


def collect_matmuls(mod: tvm.IRModule) -> dict[str, np.ndarray]:
    """Weights ``(C, F)`` of every ``matmul`` with a constant matrix in ``main``, by name.

    The names are ``matmul0``, ``matmul1``, ... in order.
    """
    found: dict[str, np.ndarray] = {}
    for binding in dataflow_bindings(mod["main"]) or []:
        if _is_dense(binding.value):
            found[f"matmul{len(found)}"] = constant_array(binding.value.args[1])
    return found


@tvm.transform.module_pass(opt_level=0, name="FactorMatmuls")
class FactorMatmuls:
    """``x @ W`` becomes ``(x @ A) @ B`` in plain Relax that stock TVM compiles.

    ``factors`` maps names as of `collect_matmuls` to the pair (A ``(C, K)``, B ``(K, F)``); other
    products stay as they are.
    """

    def __init__(self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.factors = dict(factors)

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Factorer(mod, self.factors).run()


class _Factorer(Rewriter):
    def __init__(
        self, mod: tvm.IRModule, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        super().__init__(mod)
        self.factors = factors
        self.count = 0

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if _is_dense(value):
            name = f"matmul{self.count}"
            self.count += 1
            if name in self.factors:
                out = self.substitute(value.args[0])
                for factor in self.factors[name]:
                    out = self.emit(relax.op.matmul(out, constant(factor)))
                return out
        return self.emit(self.substitute(value))


def _is_dense(value: Any) -> bool:
    """Whether a value is a product with a constant float32 matrix on the right."""
    if op_name(value) != "matmul" or not is_constant(value.args[1]):
        return False
    ty = value.args[1].ty
    return len(ty.shape) == 2 and ty.dtype == "float32"
