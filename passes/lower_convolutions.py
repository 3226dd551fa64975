"""Give convolutions, dense layers and pooling the plugin's x86 kernels, in a blocked layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.activations import find_activations
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter, Fuse
from tvm_lowrank.passes.graph import op_name, static_shape
from tvm_lowrank.passes.grow_epilogues import (
    ACTIVATIONS,
    append_step,
    lower_activation,
    lower_binary,
    lower_plain,
    lower_prelu,
)
from tvm_lowrank.passes.kernel_calls import WeightParameter, Weights
from tvm_lowrank.passes.lower_products import lower_convolution, lower_dense
from tvm_lowrank.passes.lower_reductions import (
    lower_global_pool,
    lower_layer_norm,
    lower_pool,
    lower_resize,
)
from tvm_lowrank.passes.lower_transposed import lower_transposed
from tvm_lowrank.passes.lower_views import (
    lower_concat,
    lower_take,
    lower_view,
    lower_window,
)
from tvm_lowrank.passes.raise_shuffles import RaiseShuffles
from tvm_lowrank.passes.split_batch import SplitBatch
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.layer import fully_connected_products

_SKIPPED = object()


@tvm.transform.module_pass(opt_level=0, name="LowerConvolutions")
class LowerConvolutions:
    """Dense and factored convolutions become ``call_tir`` of kernels on NCHW[x]c data.

    Values stay blocked from one kernel to the next and are converted only where an operator that
    knows no blocks reads them. Elementwise operators with a single reader join the kernel before
    them: bias, per-channel scale and shift, activations, the addition of another tensor.
    Transposition to channels last and flattening are other views of the same blocks. Convolutions
    that no kernel takes, other layouts and every other operator stay as they are, for TVM's own
    passes.

    Parameters
    ----------
    isa : VectorISA
        Vector width and registers of the target.
    choose : callable
        Takes a `ConvWorkload`, gives the schedule to emit it with.
    weights_as_parameters : bool
        Make packed weights and biases of the layers that plans name trailing parameters of
        ``main``; ``parameters_`` then tells their order after the pass has run.
    fuse : callable, optional
        Takes the `ChainWorkload` of convolutions that only feed each other, gives the schedule of
        one kernel for all of them, or for the last few, or None.
    blocked_inputs, blocked_outputs : bool
        Take the maps among the parameters of ``main`` in blocks, and return those of the tuple that
        it returns so (see `waits_in_blocks`): for a part of a network that is run alone.
    """

    def __init__(
        self,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights_as_parameters: bool = False,
        fuse: Fuse | None = None,
        blocked_inputs: bool = False,
        blocked_outputs: bool = False,
    ) -> None:
        self.isa = isa
        self.choose = choose
        self.weights_as_parameters = weights_as_parameters
        self.fuse = fuse
        self.blocked_inputs, self.blocked_outputs = blocked_inputs, blocked_outputs
        self.parameters_: list[WeightParameter] = []

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        weights = Weights.PARAMETERS if self.weights_as_parameters else Weights.CONSTANTS
        if weights is Weights.CONSTANTS:
            mod = SplitBatch()(mod)
        mod = RaiseShuffles()(mod)
        lowerer = _Lowerer(mod, self.isa, self.choose, weights, self.fuse)
        if self.blocked_inputs:
            lowerer.take_blocks()
        lowerer.give_blocks = self.blocked_outputs
        lowered = lowerer.run()
        self.parameters_ = lowerer.calls.parameters
        return lowered


def survey(
    mod: tvm.IRModule,
    isa: VectorISA,
    choose: Callable[[ConvWorkload], Schedule],
    fuse: Fuse | None = None,
) -> list[ConvWorkload]:
    """The single convolutions of a normalised module that `LowerConvolutions` gives kernels.

    One entry a call, in the network's order; ``choose`` and ``fuse`` are asked as they are there.
    No weight is laid out, so large networks are surveyed quickly.
    """
    lowerer = _Lowerer(RaiseShuffles()(SplitBatch()(mod)), isa, choose, Weights.ABSENT, fuse)
    lowerer.run()
    return lowerer.calls.workloads


class _Lowerer(BlockedRewriter):
    """Takes each operator to the module that knows what becomes of it."""

    def __init__(
        self,
        mod: tvm.IRModule,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights: Weights,
        fuse: Fuse | None,
    ) -> None:
        super().__init__(mod, isa, choose, weights, fuse)
        self.count = 0
        self.give_blocks = False
        self.products = fully_connected_products(mod)
        self.activations = find_activations(self.bindings or [], self.users)
        self.skipped = {var for found in self.activations.values() for var in found.inner}
        for found in self.activations.values():
            self.users[found.source] -= found.reads - 1

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var in self.skipped:
            return _SKIPPED
        if isinstance(value, relax.Tuple) and self.give_blocks:
            return self.emit(relax.Tuple([self.at_border(field) for field in value.fields]))
        name = op_name(value)
        result = None
        if var in self.activations:
            result = lower_activation(self, self.activations[var])
        elif name == "nn.conv2d":
            layer = f"conv{self.count}"
            self.count += 1
            result = lower_convolution(self, value, layer)
        elif name == "nn.conv2d_transpose":
            result = lower_transposed(self, value)
        elif name == "image.resize2d":
            result = lower_resize(self, value)
        elif name == "matmul":
            name_of_product, _ = self.products.get(var, (None, None))
            result = lower_dense(self, value, name_of_product)
        elif name in ("add", "multiply"):
            result = lower_binary(self, name, value)
        elif name in ACTIVATIONS:
            step = ACTIVATIONS[name](value)
            result = append_step(self, value.args[0], step, [])
            result = result or lower_plain(self, step, value.args[0])
        elif name == "nn.prelu":
            result = lower_prelu(self, value)
        elif name in ("nn.max_pool2d", "nn.avg_pool2d"):
            result = lower_pool(self, value)
        elif name in ("mean", "nn.adaptive_avg_pool2d"):
            result = lower_global_pool(self, name, value)
        elif name in ("reshape", "squeeze", "permute_dims"):
            result = lower_view(self, name, value, static_shape(var))
        elif name == "concat":
            result = lower_concat(self, value)
        elif name == "take":
            result = lower_take(self, value)
        elif name in ("strided_slice", "nn.pad"):
            result = lower_window(self, name, value, static_shape(var))
        elif name == "nn.layer_norm":
            result = lower_layer_norm(self, value)
        return result if result is not None else self._copy(var, value)

    def _copy(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        """The binding as it is, with what was left out of it for its sake."""
        found = self.activations.get(var)
        for inner in self.bindings or []:
            if found is not None and inner.var in found.inner:
                self.values[inner.var] = self.emit(self.substitute(inner.value))
        return self.emit(self.substitute(value))
