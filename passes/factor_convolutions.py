"""Replace a convolution by the chain of smaller ones that a form makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.fold_orders import FoldOrders
from tvm_lowrank.passes.graph import Rewriter, constant, is_constant, op_name, static_shape

from tvm_lowrank.decompose.compose import channel_order
from tvm_lowrank.decompose.form import Branch
from tvm_lowrank.geometry import ConvGeometry


@dataclass(frozen=True)
class Chain:
    """What stands for one convolution: stages in order, an OIHW weight each, and the last's bias.

    ``bias`` has shape ``(F,)``; None keeps the original one. ``branches`` of a form that has
    several are summed; without, the stages are one chain.
    """

    stages: tuple[ConvGeometry, ...]
    weights: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None
    branches: tuple[Branch, ...] = ()


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
                shape = static_shape(var)
                assert shape is not None
                return self._emit_chain(self.substitute(value.args[0]), chain, shape)
        if name == "add" and value.args[0] in self.biases and is_constant(value.args[1]):
            bias = self.biases[value.args[0]].reshape(1, -1, 1, 1)
            return self.emit(relax.op.add(self.substitute(value.args[0]), constant(bias)))
        return self.emit(self.substitute(value))

    def _emit_chain(self, data: relax.Expr, chain: Chain, shape: tuple[int, ...]) -> relax.Expr:
        """All branches of a chain, and the sum of their results of that shape."""
        stages = list(zip(chain.stages, chain.weights, strict=True))
        total = None
        for branch in chain.branches or (Branch(len(stages)),):
            own, stages = stages[: branch.stages], stages[branch.stages :]
            out = self._cropped(data, branch.crop)
            for stage, weight in own:
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
            out = self._shuffled(out, branch.shuffle, shape)
            total = out if total is None else self.emit(relax.op.add(total, out))
        assert total is not None and not stages
        return total

    def _cropped(self, data: relax.Expr, crop: tuple[int, int, int, int]) -> relax.Expr:
        if not any(crop):
            return data
        high, wide = (static_shape(data) or (0, 0))[-2:]
        top, left, bottom, right = crop
        return self.emit(
            relax.op.strided_slice(data, [2, 3], [top, left], [high - bottom, wide - right])
        )

    def _shuffled(
        self, out: relax.Expr, shuffle: tuple[int, int], shape: tuple[int, ...]
    ) -> relax.Expr:
        if shuffle == (1, 1):
            return out
        high, wide = (static_shape(out) or (0, 0))[-2:]
        (u, v), (n, f, rows, columns) = shuffle, shape
        out = self.emit(relax.op.reshape(out, (n, f, u, v, high, wide)))
        out = self.emit(relax.op.permute_dims(out, [0, 1, 4, 2, 5, 3]))
        out = self.emit(relax.op.reshape(out, (n, f, high * u, wide * v)))
        if (high * u, wide * v) == (rows, columns):
            return out
        return self.emit(relax.op.strided_slice(out, [2, 3], [0, 0], [rows, columns]))
