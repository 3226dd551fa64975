"""Return, beside the network's output, the input of every convolution (for calibration)."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, op_name


@tvm.transform.module_pass(opt_level=0, name="ExposeInputs")
class ExposeInputs:
    """``main`` returns ``(output, input of conv0, input of conv1, ...)`` instead of its output."""

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Exposer(mod).run()


class _Exposer(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.inputs: list[relax.Expr] = []

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        call = self.substitute(value)
        if op_name(value) == "nn.conv2d":
            self.inputs.append(call.args[0])
        return self.emit(call)

    def result(self) -> relax.Expr:
        return relax.Tuple([super().result(), *self.inputs])
