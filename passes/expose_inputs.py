"""Return, beside the network's output, what every convolution and dense layer reads."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, op_name

from tvm_lowrank.layer import fully_connected_products


@tvm.transform.module_pass(opt_level=0, name="ExposeInputs")
class ExposeInputs:
    """``main`` returns ``(output, input of the first layer, ...)`` instead of its output.

    The layers are those of `collect_layers`, in that order; inputs of fully connected ones are maps
    (N, C, H, W) of their geometry.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Exposer(mod).run()


class _Exposer(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.inputs: list[relax.Expr] = []
        self.products = fully_connected_products(mod)

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        call = self.substitute(value)
        if op_name(value) == "nn.conv2d":
            self.inputs.append(call.args[0])
        elif var in self.products:
            _, g = self.products[var]
            shape = (g.batch, g.in_channels, g.height, g.width)
            self.inputs.append(self.emit(relax.op.reshape(call.args[0], shape)))
        return self.emit(call)

    def result(self) -> relax.Expr:
        return relax.Tuple([super().result(), *self.inputs])
