"""Replace a convolution by the chain of smaller ones that a form makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.fold_orders import FoldOrders
from tvm_lowrank.passes.graph import Rewriter, constant, is_constant, op_name

from tvm_lowrank.decompose.compose import channel_order
from tvm_lowrank.geometry import ConvGeometry


@dataclass(frozen=True)
class Chain:
    """What stands for one convolution: stages in order, an OIHW weight each, and the last's bias.

    ``bias`` has shape ``(F,)``; None keeps the original one.
    """

    stages: tuple[ConvGeometry, ...]
    weights: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None


@tvm.transform.module_pass(opt_level=0, name="FactorConvolutions")
class FactorConvolutions:
    """Write each named convolution as its chain, in plain Relax that stock TVM compiles.

    ``chains`` maps a layer's name (``conv0``, ``conv1``, ... in the order of the normalised
    function) to its `Chain`; layers that it does not name stay as they are. The intermediate
    results carry no bias and no activation, so zero padding means the same in the chain as in the
    original and the chain equals the convolution with the reconstructed weight.

    A stage that only changes the order of channels is folded into the layer before or after where
    `FoldOrders` can. What is left of those stays a 1x1 convolution, which our kernels run in
    blocked layouts, or becomes a gather (``take``) with ``gathers=True``.
    """

    def __init__(self, chains: Mapping[str, Chain], gathers: bool = False) -> None:
        self.chains = dict(chains)
        self.gathers = gathers

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        weights = (weight for chain in self.chains.values() for weight in chain.weights)
        rewritten = _Factorer(mod, self.chains).run()
        if any(channel_order(weight) is not None for weight in weights):
            rewritten = FoldOrders(self.gathers)(rewritten)
        return rewritten


class _Factorer(Rewriter):
    def __init__(self, mod: tvm.IRModule, chains: Mapping[str, Chain]) -> None:
        super().__init__(mod)
        self.chains = chains
        self.count = 0
        self.biases: dict[Any, np.ndarray] = {}

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        name = op_name(value)
        if name == "nn.conv2d":
            chain = self.chains.get(f"conv{self.count}")
            self.count += 1
            if chain is not None:
                if chain.bias is not None:
                    self.biases[var] = chain.bias
                return self._emit_chain(self.substitute(value.args[0]), chain)
        if name == "add" and value.args[0] in self.biases and is_constant(value.args[1]):
            bias = self.biases[value.args[0]].reshape(1, -1, 1, 1)
            return self.emit(relax.op.add(self.substitute(value.args[0]), constant(bias)))
        return self.emit(self.substitute(value))

    def _emit_chain(self, out: relax.Expr, chain: Chain) -> relax.Expr:
        for stage, weight in zip(chain.stages, chain.weights, strict=True):
            out = self.emit(
                relax.op.nn.conv2d(
                    out,
                    constant(weight),
                    strides=stage.stride,
                    padding=stage.padding,
                    dilation=stage.dilation,
                    groups=stage.groups,
                )
            )
        return out
