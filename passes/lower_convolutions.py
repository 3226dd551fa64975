"""Give convolutions, dense layers and pooling the plugin's x86 kernels, in a blocked layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant,
    constant_array,
    is_constant,
    op_name,
    static_shape,
)
from tvm_lowrank.schedules.x86 import convolution, layout, packing, pooling
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvSchedule, ConvWorkload

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import conv2d_geometry

# Activations that a kernel applies to its result, and those that may run alone on blocked data
# (they keep the padding lanes of the last channel block finite).
_EPILOGUE_OPS = {"nn.relu": "relu", "sigmoid": "sigmoid"}
_BLOCKED_OPS = {"nn.relu", "sigmoid", "tanh", "clip", "nn.leakyrelu", "nn.silu", "nn.gelu"}
# Inputs of so few channels are read from NCHW as they are: blocking would mostly copy zeros.
PLAIN_CHANNELS = 4


@dataclass(frozen=True)
class WeightParameter:
    """A parameter that stands for a layer's weight or bias when weights are the function's inputs.

    ``pack`` takes the OIHW weight, or the bias of shape (F,), to the array that the kernel reads.
    """

    layer: str
    kind: str
    pack: Callable[[np.ndarray], np.ndarray]


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
        Takes a `ConvWorkload`, gives the `ConvSchedule` to emit it with.
    weights_as_parameters : bool
        Make packed weights and biases of the conv2d layers trailing parameters of ``main``;
        ``parameters_`` then tells their order after the pass has run.
    """

    def __init__(
        self,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], ConvSchedule],
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
        self.parameters_ = lowerer.parameters
        self.workloads_ = lowerer.workloads
        return lowered


@dataclass
class _Pending:
    """A convolution whose kernel is not written yet: its epilogue may still grow."""

    data: _Tensor
    weight: np.ndarray
    geometry: ConvGeometry
    layer: str | None
    steps: list[tuple[str, list[Any]]] = field(default_factory=list)


@dataclass
class _Tensor:
    """A value that is known plain (NCHW, or (N, C)), blocked, both, or still pending."""

    shape: tuple[int, ...]
    plain: relax.Expr | None = None
    blocked: relax.Expr | None = None
    pending: _Pending | None = None

    @property
    def nchw(self) -> tuple[int, int, int, int]:
        """The shape with the map that a flat (N, C) tensor lacks."""
        n, c, h, w = (*self.shape, 1, 1)[:4]
        return n, c, h, w


class _Lowerer(Rewriter):
    def __init__(
        self,
        mod: tvm.IRModule,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], ConvSchedule],
        weights_as_parameters: bool,
    ) -> None:
        super().__init__(mod)
        self.isa = isa
        self.choose = choose
        self.weights_as_parameters = weights_as_parameters
        self.parameters: list[WeightParameter] = []
        self.workloads: list[ConvWorkload] = []
        self.variables: list[relax.Var] = []
        self.kernels: dict[Any, tvm.ir.GlobalVar] = {}
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
        return _Tensor(shape, pending=_Pending(data, weight, geometry, layer))

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
        pending = _Pending(self._tensor(left), kernel, geometry, None)
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
            _append_channelwise(pending.steps, name, vector)
            return self._continue(tensor)
        if name != "add" or static_shape(left) is None or left.same_as(right):
            return None
        if static_shape(left) != static_shape(right):
            return None
        for here, there in ((right, left), (left, right)):
            pending = self._open(here)
            if pending is None or any(step == "residual" for step, _ in pending.steps):
                continue
            other = self._tensor(there)
            pending.steps.append(("residual", [self._blocked(other)]))
            return self._continue(here)
        first, second = self.values.get(left), self.values.get(right)
        if not (isinstance(first, _Tensor) and isinstance(second, _Tensor)):
            return None
        if (first.blocked or first.pending) and (second.blocked or second.pending):
            both = relax.op.add(self._blocked(first), self._blocked(second))
            return _Tensor(first.shape, blocked=self.emit(both))
        return None

    def _unary(self, name: str, value: relax.Call) -> _Tensor | None:
        pending = self._open(value.args[0])
        if pending is not None and name in _EPILOGUE_OPS:
            pending.steps.append((_EPILOGUE_OPS[name], []))
            return self._continue(value.args[0])
        source = self.values.get(value.args[0])
        if not isinstance(source, _Tensor) or not (source.blocked or source.pending):
            return None
        args = [self._blocked(source), *(self.substitute(arg) for arg in value.args[1:])]
        call = relax.Call(value.op, args, value.attrs, value.ty_args)
        return _Tensor(source.shape, blocked=self.emit(call))

    def _pool(self, name: str, value: relax.Call) -> _Tensor | None:
        source = self.values.get(value.args[0])
        attrs = value.attrs
        if not isinstance(source, _Tensor) or not (source.blocked or source.pending):
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
        return self._emit_pool(workload, source)

    def _global_pool(self, name: str, value: relax.Call) -> _Tensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, _Tensor) or not (source.blocked or source.pending):
            return None
        if len(source.shape) != 4:
            return None
        batch, channels, height, width = source.nchw
        out = static_shape(value)
        if name == "mean" and sorted(int(a) % 4 for a in value.attrs.axis or []) != [2, 3]:
            return None
        if out not in ((batch, channels, 1, 1), (batch, channels)):
            return None
        pooled = self._emit_pool(
            pooling.PoolWorkload("avg", batch, channels, height, width, (height, width), (1, 1)),
            source,
        )
        return _Tensor(out, blocked=pooled.blocked)

    def _emit_pool(self, workload: pooling.PoolWorkload, source: _Tensor) -> _Tensor:
        gvar = self._kernel(workload, lambda: pooling.emit_pool(workload, self.isa), workload.kind)
        shape = (workload.batch, workload.channels, workload.out_height, workload.out_width)
        call = relax.call_tir(gvar, [self._blocked(source)], self._blocked_type(shape))
        return _Tensor(shape, blocked=self.emit(call))

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

    def _blocked_type(self, shape: Sequence[int]) -> relax.TensorType:
        n, c, h, w = (*shape, 1, 1)[:4]
        return relax.TensorType((n, -(-c // self.isa.lanes), h, w, self.isa.lanes), "float32")

    def _blocked(self, tensor: _Tensor) -> relax.Expr:
        if tensor.pending is not None:
            tensor.blocked = self._write(tensor.pending)
            tensor.pending = None
        if tensor.blocked is None:
            n, c, h, w = tensor.nchw
            plain = tensor.plain
            if len(tensor.shape) == 2:
                plain = self.emit(relax.op.reshape(plain, tensor.nchw))
            gvar = self._kernel(
                ("block", tensor.nchw), lambda: layout.emit_block(n, c, h, w, self.isa), "block"
            )
            call = relax.call_tir(gvar, [plain], self._blocked_type(tensor.shape))
            tensor.blocked = self.emit(call)
        return tensor.blocked

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, _Tensor):
            return value
        if value.plain is None:
            n, c, h, w = value.nchw
            blocked = self._blocked(value)
            gvar = self._kernel(
                ("unblock", value.nchw),
                lambda: layout.emit_unblock(n, c, h, w, self.isa),
                "unblock",
            )
            call = relax.call_tir(gvar, [blocked], relax.TensorType(value.nchw, "float32"))
            value.plain = self.emit(call)
            if len(value.shape) == 2:
                value.plain = self.emit(relax.op.reshape(value.plain, value.shape))
        return value.plain

    # -- kernels -------------------------------------------------------------------------------

    def _write(self, pending: _Pending) -> relax.Expr:
        data, geometry, isa = pending.data, pending.geometry, self.isa
        few = geometry.in_channels <= PLAIN_CHANNELS or len(data.shape) == 2
        in_block = 1 if few and data.plain is not None else isa.lanes
        if in_block == 1:
            source = data.plain
            if len(data.shape) == 2:
                source = self.emit(relax.op.reshape(source, data.nchw))
        else:
            source = self._blocked(data)
        workload = ConvWorkload(geometry, in_block, tuple(name for name, _ in pending.steps))
        schedule = self.choose(workload)
        self.workloads.append(workload)
        gvar = self._kernel(
            (workload, schedule), lambda: convolution.emit(workload, schedule, isa), "conv2d"
        )
        args: list[relax.Expr] = [source, self._weight(pending, workload, schedule)]
        for index, (name, operands) in enumerate(pending.steps):
            if name == "bias" and index == 0:
                args.append(self._bias(pending, operands[0]))
            elif name in ("bias", "affine"):
                args += [constant(packing.pack_channels(vector, isa)) for vector in operands]
            else:
                args += operands
        shape = (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width)
        return self.emit(relax.call_tir(gvar, args, self._blocked_type(shape)))

    def _weight(
        self, pending: _Pending, workload: ConvWorkload, schedule: ConvSchedule
    ) -> relax.Expr:
        isa = self.isa

        def pack(weight: np.ndarray) -> np.ndarray:
            return packing.pack_weights(weight, workload, schedule, isa)

        return self._parameter_or_constant(pending.layer, "weight", pack, pending.weight)

    def _bias(self, pending: _Pending, vector: np.ndarray) -> relax.Expr:
        isa = self.isa

        def pack(bias: np.ndarray) -> np.ndarray:
            return packing.pack_channels(bias, isa)

        return self._parameter_or_constant(pending.layer, "bias", pack, vector)

    def _parameter_or_constant(
        self,
        layer: str | None,
        kind: str,
        pack: Callable[[np.ndarray], np.ndarray],
        array: np.ndarray,
    ) -> relax.Expr:
        packed = pack(np.asarray(array, np.float32))
        if layer is None or not self.weights_as_parameters:
            return constant(packed)
        variable = relax.Var(f"{layer}_{kind}", relax.TensorType(packed.shape, "float32"))
        self.variables.append(variable)
        self.parameters.append(WeightParameter(layer, kind, pack))
        return variable

    def _kernel(self, key: Any, make: Callable[[], Any], name: str) -> tvm.ir.GlobalVar:
        if key not in self.kernels:
            func = make().without_attr("global_symbol")
            self.kernels[key] = self.builder.add_func(func, f"lowrank_{name}")
        return self.kernels[key]

    def extra_params(self) -> Sequence[relax.Var]:
        return self.variables


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
