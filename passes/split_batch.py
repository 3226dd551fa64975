"""Run the front of a network a few images at a time where the maps of a batch outgrow caches."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, is_constant, op_name, static_shape

# Bytes of maps that a large cache shared by some cores keeps from one kernel to the next.
_CACHE_BYTES = 8 << 20
# Maps that a kernel of a residual network touches: its input, its output, what it adds.
_MAPS = 3

# Operators that treat each image alone as long as they leave the first axis as it is.
_ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "nn.relu", "nn.relu6", "clip", "nn.leakyrelu",
    "sigmoid", "tanh", "nn.silu", "nn.gelu", "erf",
}  # fmt: skip
_WINDOWS = {"nn.conv2d", "nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d"}
# What may follow the pieces: an operator that would not have joined the kernel before it.
_STARTS = {*_WINDOWS, "mean", "matmul", "reshape", "permute_dims"}


@tvm.transform.module_pass(opt_level=0, name="SplitBatch")
class SplitBatch:
    """``y = g(f(x))`` on a batch becomes ``y = g(concat(f(x[0:b]), f(x[b:2b]), ...))``.

    ``f`` is the front of the network, up to the last map that takes more than `_CACHE_BYTES` for
    the whole batch: done in pieces, the maps between its layers stay in the caches. ``g``, whose
    maps are small and whose weights are many, still reads each weight once. Networks without such
    maps, or with an operator in front that mixes images, are left as they are.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        splitter = _Splitter(mod)
        return splitter.run() if splitter.pieces > 1 else mod


class _Splitter(Rewriter):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.pieces = 1
        shape = static_shape(self.func.params[0]) if len(self.func.params) == 1 else None
        if self.bindings is None or not shape or shape[0] < 2:
            return
        self.batch, self.input = shape[0], self.func.params[0]
        self.front = self.bindings[: self._cut()]
        if self.front:
            largest = max(self._image_bytes(binding.var) for binding in self.front)
            fitting = max(1, _CACHE_BYTES // (_MAPS * largest))
            piece = max(n for n in range(1, self.batch + 1) if self.batch % n == 0 and n <= fitting)
            self.pieces = self.batch // piece

    def _image_bytes(self, var: relax.Var) -> int:
        return 4 * math.prod((static_shape(var) or (1,))[1:])

    def _cut(self) -> int:
        """How many bindings the front has; 0 if there is nothing to split."""
        assert self.bindings is not None
        images = {self.input}
        last_use = {}
        for index, binding in enumerate(self.bindings):
            for var in relax.analysis.free_vars(binding.value):
                last_use[var] = index
        for var in relax.analysis.free_vars(self.func.body.body):
            last_use[var] = len(self.bindings)
        large = 0
        for index, binding in enumerate(self.bindings[:-1]):
            if not self._is_by_image(binding, images):
                return 0
            images.add(binding.var)
            if self.batch * self._image_bytes(binding.var) > _CACHE_BYTES:
                large = index + 1
            alive = [var for var in images if last_use.get(var, -1) > index]
            after = op_name(self.bindings[index + 1].value)
            if alive == [binding.var] and after in _STARTS:
                following = self.bindings[index + 1 :]
                beyond = max((self._image_bytes(b.var) for b in following), default=0)
                if large and self.batch * beyond <= _CACHE_BYTES:
                    return index + 1
        return 0

    def _is_by_image(self, binding: Any, images: set[Any]) -> bool:
        """Whether an operator makes each image of its result of one image of its operands."""
        value, shape = binding.value, static_shape(binding.var)
        if not isinstance(value, relax.Call) or not shape or shape[0] != self.batch:
            return False
        name, attrs = op_name(value), value.attrs
        data = list(value.args[0].fields) if name == "concat" else list(value.args)
        maps = [arg for arg in data if isinstance(arg, relax.Var)]
        if not maps or any(arg not in images for arg in maps):
            return False
        rank = len(static_shape(maps[0]) or ())
        if name in _ELEMENTWISE:
            constants = [static_shape(arg) for arg in data if is_constant(arg)]
            shapes = [static_shape(arg) for arg in maps]
            spread = all(s is not None and (len(s) < rank or s[0] == 1) for s in constants)
            return spread and all(s == shapes[0] for s in shapes)
        if name in _WINDOWS:
            return isinstance(value.args[0], relax.Var) and len(maps) == 1
        if name == "concat":
            return len(maps) == len(data) and int(attrs.axis) % rank != 0
        if name == "nn.pad":
            return not any(int(width) for width in list(attrs.pad_width)[:2])
        if name == "strided_slice":
            axes = value.args[1]
            return isinstance(axes, relax.Tuple) and all(
                int(axis.value) % rank != 0 for axis in axes.fields
            )
        return False

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        """The front writes all of its pieces at its last binding; what follows is copied."""
        last = self.front[-1].var
        if any(var.same_as(binding.var) for binding in self.front[:-1]):
            return None
        if not var.same_as(last):
            return self.emit(self.substitute(value))
        size = self.batch // self.pieces
        outputs = []
        for piece in range(self.pieces):
            start = piece * size
            image = relax.op.strided_slice(self.input, [0], [start], [start + size])
            self.values[self.input] = self.emit(image)
            for binding in self.front:
                self.values[binding.var] = self.emit(self.substitute(binding.value))
            outputs.append(self.values[last])
        return self.emit(relax.op.concat(outputs, axis=0))
