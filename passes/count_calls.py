"""What a lowered network calls: kernels of the plugin, and operators left to TVM."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import op_name

_PREFIX = "lowrank_"
# Reshapes of contiguous tensors, which TVM compiles to views of their memory.
_VIEWS = {"reshape", "squeeze", "expand_dims", "flatten"}


@dataclass(frozen=True)
class Calls:
    """How often ``main`` calls each kernel (by name, without numbers) and each other operator."""

    kernels: Counter[str]
    others: Counter[str]

    def __str__(self) -> str:
        kernels = ", ".join(f"{n} {name}" for name, n in self.kernels.most_common()) or "none"
        others = ", ".join(f"{n} {name}" for name, n in self.others.most_common()) or "none"
        return (
            f"{self.kernels.total()} calls of kernels ({kernels}); "
            f"{self.others.total()} left to TVM ({others})"
        )


def count_calls(mod: tvm.IRModule) -> Calls:
    """Count the calls of ``main``; reshapes, which cost nothing, are left out."""
    kernels: Counter[str] = Counter()
    others: Counter[str] = Counter()

    def visit(expr: relax.Expr) -> None:
        name = op_name(expr)
        if name is None or name in _VIEWS:
            return
        if name in ("call_tir", "call_tir_inplace"):
            name = expr.args[0].name_hint.rstrip("0123456789_")
        if name.startswith(_PREFIX):
            kernels[name.removeprefix(_PREFIX)] += 1
        else:
            others[name] += 1

    relax.analysis.post_order_visit(mod["main"], visit)
    return Calls(kernels, others)
