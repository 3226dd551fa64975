"""Give convolutions, dense layers and pooling the plugin's x86 kernels, in a blocked layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant_array,
    is_constant,
    op_name,
    static_shape,
)
from tvm_lowrank.passes.kernel_calls import Convolution, KernelCalls, Shape, WeightParameter
from tvm_lowrank.schedules.x86 import pooling
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.kernels import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import conv2d_geometry

# Activations that a kernel applies to its result, and those that may run alone on blocked data
# (they keep the padding lanes of the last channel block finite).
_EPILOGUE_OPS = {"nn.relu": "relu", "sigmoid": "sigmoid"}
_BLOCKED_OPS = {"nn.relu", "sigmoid", "tanh", "clip", "nn.leakyrelu", "nn.silu", "nn.gelu"}
# Inputs of so few channels are read from NCHW as they are: blocking would mostly copy zeros.
PLAIN_CHANNELS = 4


@tvm.transform.module_pass(opt_level=0, name="LowerConvolutions")
class LowerConvolutions:
    """Dense and factored convolutions become ``call_tir`` of kernels on NCHW[x]c data.

    Values stay blocked from one kernel to the next and are converted only where an operator that
    knows no blocks reads them. Elementwise operators with a single reader join the kernel before
    them: bias, per-channel scale and shift, ReLU, sigmoid, the addition of another tensor. Grouped
    convolutions, other layouts and every other operator stay as they are, for TVM's own passes.

    Parameters
    ----------
    isa : VectorISA
        Vector width and registers of the target.
    choose : callable
        Takes a `ConvWorkload`, gives the schedule to emit it with.
    weights_as_parameters : bool
        Make packed weights and biases of the conv2d layers trailing parameters of ``main``;
        ``parameters_`` then tells their order after the pass has run.
    """

    def __init__(
        self,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights_as_parameters: bool = False,
    ) -> None:
        self.isa = isa
        self.choose = choose
        self.weights_as_parameters = weights_as_parameters
        self.parameters_: list[WeightParameter] = []
        self.workloads_: list[ConvWorkload] = []

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        lowerer = _Lowerer(mod, self.isa, self.choose, self.weights_as_parameters)
        lowered = lowerer.run()
        self.parameters_ = lowerer.calls.parameters
        self.workloads_ = lowerer.calls.workloads
        return lowered


@dataclass
class _Tensor:
    """A value that is known plain (NCHW, or (N, C)), blocked, both, or still pending."""

    shape: tuple[int, ...]
    plain: relax.Expr | None = None
    blocked: relax.Expr | None = None
    pending: _Pending | None = None

    @property
    def nchw(self) -> Shape:
        """The shape with the map that a flat (N, C) tensor lacks."""
        n, c, h, w = (*self.shape, 1, 1)[:4]
        return n, c, h, w

    @property
    def is_blocked(self) -> bool:
        """Whether it is, or will be, there in blocks without a conversion."""
        return self.blocked is not None or self.pending is not None


@dataclass
class _Pending:
    """A convolution whose call is not written yet: its epilogue may still grow."""

    data: _Tensor
    conv: Convolution


class _Lowerer(Rewriter):
    def __init__(
        self,
        mod: tvm.IRModule,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights_as_parameters: bool,
    ) -> None:
        super().__init__(mod)
        self.calls = KernelCalls(self, isa, choose, weights_as_parameters)
        self.count = 0

    # -- one operator each ---------------------------------------------------------------------

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        name = op_name(value)
        result = None
        if name == "nn.conv2d":
            layer = f"conv{self.count}"
            self.count += 1
            result = self._convolution(value, layer)
        elif name == "matmul":
            result = self._dense(value)
        elif name in ("add", "multiply"):
            result = self._binary(name, value)
        elif name in _BLOCKED_OPS:
            result = self._unary(name, value)
        elif name in ("nn.max_pool2d", "nn.avg_pool2d"):
            result = self._pool(name, value)
        elif name in ("mean", "nn.adaptive_avg_pool2d"):
            result = self._global_pool(name, value)
        elif name in ("reshape", "squeeze"):
            result = self._flatten(value, static_shape(var))
        return result if result is not None else self.emit(self.substitute(value))

    def _convolution(self, value: relax.Call, layer: str) -> _Tensor | None:
        if not is_canonical_conv2d(value):
            return None
        geometry = conv2d_geometry(value)
        if geometry.groups != 1:
            return None
        data = self._tensor(value.args[0])
        shape = (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width)
        weight = constant_array(value.args[1])
        return _Tensor(shape, pending=_Pending(data, Convolution(geometry, weight, layer)))

    def _dense(self, value: relax.Call) -> _Tensor | None:
        left, right = value.args
        shape = static_shape(left)
        if shape is None or len(shape) != 2 or not is_constant(right) or is_constant(left):
            return None
        weight = constant_array(right)
        if weight.dtype != np.float32 or weight.ndim != 2:
            return None
        geometry = ConvGeometry(weight.shape[0], weight.shape[1], 1, 1, (1, 1), batch=shape[0])
        kernel = np.ascontiguousarray(weight.T)[:, :, None, None]
        pending = _Pending(self._tensor(left), Convolution(geometry, kernel, None))
        return _Tensor((shape[0], weight.shape[1]), pending=pending)

    def _binary(self, name: str, value: relax.Call) -> _Tensor | None:
        left, right = value.args
        if is_constant(left) or is_constant(right):
            tensor, const = (right, left) if is_constant(left) else (left, right)
            pending = self._open(tensor)
            if pending is None:
                return None
            vector = _channel_vector(const, self.values[tensor].shape)
            if vector is None:
                return None
            _append_channelwise(pending.conv.steps, name, vector)
            return self._continue(tensor)
        if name != "add" or static_shape(left) is None or left.same_as(right):
            return None
        if static_shape(left) != static_shape(right):
            return None
        for here, there in ((right, left), (left, right)):
            pending = self._open(here)
            if pending is None or any(step == "residual" for step, _ in pending.conv.steps):
                continue
            other = self._tensor(there)
            pending.conv.steps.append(("residual", [self._blocked(other)]))
            return self._continue(here)
        first, second = self.values.get(left), self.values.get(right)
        if not (isinstance(first, _Tensor) and isinstance(second, _Tensor)):
            return None
        if first.is_blocked and second.is_blocked:
            both = relax.op.add(self._blocked(first), self._blocked(second))
            return _Tensor(first.shape, blocked=self.emit(both))
        return None

    def _unary(self, name: str, value: relax.Call) -> _Tensor | None:
        pending = self._open(value.args[0])
        if pending is not None and name in _EPILOGUE_OPS:
            pending.conv.steps.append((_EPILOGUE_OPS[name], []))
            return self._continue(value.args[0])
        source = self.values.get(value.args[0])
        if not isinstance(source, _Tensor) or not source.is_blocked:
            return None
        args = [self._blocked(source), *(self.substitute(arg) for arg in value.args[1:])]
        call = relax.Call(value.op, args, value.attrs, value.ty_args)
        return _Tensor(source.shape, blocked=self.emit(call))

    def _pool(self, name: str, value: relax.Call) -> _Tensor | None:
        source = self.values.get(value.args[0])
        attrs = value.attrs
        if not isinstance(source, _Tensor) or not source.is_blocked:
            return None
        if str(attrs.layout) != "NCHW" or str(attrs.out_layout) != "NCHW" or len(source.shape) != 4:
            return None
        batch, channels, height, width = source.nchw
        workload = pooling.PoolWorkload(
            kind="max" if name == "nn.max_pool2d" else "avg",
            batch=batch,
            channels=channels,
            height=height,
            width=width,
            kernel=_pair(attrs.pool_size),
            stride=_pair(attrs.strides),
            padding=tuple(int(p) for p in attrs.padding),
            dilation=_pair(attrs.dilation),
            count_include_pad=bool(attrs.count_include_pad),
        )
        shape = (batch, channels, workload.out_height, workload.out_width)
        if shape != static_shape(value):
            return None  # ceil_mode gave it another size
        return _Tensor(shape, blocked=self.calls.pool(self._blocked(source), workload))

    def _global_pool(self, name: str, value: relax.Call) -> _Tensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, _Tensor) or not source.is_blocked:
            return None
        if len(source.shape) != 4:
            return None
        batch, channels, height, width = source.nchw
        out = static_shape(value)
        if name == "mean" and sorted(int(a) % 4 for a in value.attrs.axis or []) != [2, 3]:
            return None
        if out not in ((batch, channels, 1, 1), (batch, channels)):
            return None
        workload = pooling.PoolWorkload.global_average(batch, channels, height, width)
        return _Tensor(out, blocked=self.calls.pool(self._blocked(source), workload))

    def _flatten(self, value: relax.Call, shape: tuple[int, ...] | None) -> _Tensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, _Tensor) or shape is None or len(shape) not in (2, 4):
            return None
        if (*shape, 1, 1)[:4] != source.nchw or source.nchw[2:] != (1, 1):
            return None
        return _Tensor(shape, blocked=self._blocked(source))

    # -- values in their layouts ---------------------------------------------------------------

    def _tensor(self, expr: relax.Expr) -> _Tensor:
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, _Tensor):
            return value
        tensor = _Tensor(static_shape(expr) or (), plain=self.substitute(expr))
        if isinstance(expr, relax.Var):
            self.values[expr] = tensor
        return tensor

    def _open(self, expr: relax.Expr) -> _Pending | None:
        """The pending convolution behind ``expr``, if nothing else reads its result."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, _Tensor) and self.users[expr] == 1:
            return value.pending
        return None

    def _continue(self, expr: relax.Expr) -> _Tensor:
        tensor = self.values[expr]
        return _Tensor(tensor.shape, pending=tensor.pending)

    def _blocked(self, tensor: _Tensor) -> relax.Expr:
        if tensor.pending is not None:
            tensor.blocked = self._write(tensor.pending)
            tensor.pending = None
        if tensor.blocked is None:
            plain = tensor.plain
            if len(tensor.shape) == 2:
                plain = self.emit(relax.op.reshape(plain, tensor.nchw))
            tensor.blocked = self.calls.block(plain, tensor.nchw)
        return tensor.blocked

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, _Tensor):
            return value
        if value.plain is None:
            value.plain = self.calls.unblock(self._blocked(value), value.nchw)
            if len(value.shape) == 2:
                value.plain = self.emit(relax.op.reshape(value.plain, value.shape))
        return value.plain

    def _write(self, pending: _Pending) -> relax.Expr:
        data = pending.data
        few = pending.conv.geometry.in_channels <= PLAIN_CHANNELS or len(data.shape) == 2
        if data.plain is None or not few:
            return self.calls.convolve(self._blocked(data), self.calls.isa.lanes, pending.conv)
        plain = data.plain
        if len(data.shape) == 2:
            plain = self.emit(relax.op.reshape(plain, data.nchw))
        return self.calls.convolve(plain, 1, pending.conv)

    def extra_params(self) -> Sequence[relax.Var]:
        return self.calls.variables


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _channel_vector(const: relax.Expr, shape: tuple[int, ...]) -> np.ndarray | None:
    """A constant operand of a (N, C, H, W) or (N, C) tensor as one value a channel, or None."""
    if static_shape(const) is None:
        return None
    array = constant_array(const)
    channels = shape[1]
    if array.size == 1:
        return np.full(channels, array.reshape(-1)[0], np.float32)
    trailing = (channels,) if len(shape) == 2 else (channels, 1, 1)
    if array.size == channels and array.shape[-len(trailing) :] == trailing:
        return array.reshape(-1)
    return None


def _append_channelwise(steps: list[tuple[str, list[Any]]], name: str, vector: np.ndarray) -> None:
    """Add ``+ vector`` or ``* vector`` to an epilogue, merged with the step before it."""
    if name == "add" and not steps:
        steps.append(("bias", [vector]))
        return
    if not steps or steps[-1][0] != "affine":
        steps.append(("affine", [np.ones_like(vector), np.zeros_like(vector)]))
    scale, shift = steps[-1][1]
    steps[-1] = (
        "affine",
        [scale, shift + vector] if name == "add" else [scale * vector, shift * vector],
    )
