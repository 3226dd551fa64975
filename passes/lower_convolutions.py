"""Give convolutions, dense layers and pooling the plugin's x86 kernels, in a blocked layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.activations import Activation, find_activations
from tvm_lowrank.passes.blocked import (
    CHW,
    HWC,
    NCHW,
    NHWC,
    BlockedTensor,
    Elementwise,
    Gather,
    Pending,
    of_map,
    of_plain,
    view_of,
)
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant_array,
    is_constant,
    op_name,
    static_shape,
)
from tvm_lowrank.passes.kernel_calls import (
    Convolution,
    KernelCalls,
    Step,
    WeightParameter,
    Weights,
)
from tvm_lowrank.schedules.x86 import kernels, pooling
from tvm_lowrank.schedules.x86.chain import MOST_STAGES, ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.gather import ChannelRun, GatherWorkload
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.kernels import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import conv2d_geometry

# Activations that kernels apply to their result, with the step that each is.
_ACTIVATIONS: dict[str, Callable[[relax.Call], str]] = {
    "nn.relu": lambda call: "relu",
    "nn.relu6": lambda call: "clip:0.0:6.0",
    "clip": lambda call: ":".join(["clip", *(str(float(x.value)) for x in call.args[1:])]),
    "nn.leakyrelu": lambda call: f"leaky_relu:{float(call.attrs.alpha)}",
    "sigmoid": lambda call: "sigmoid",
    "tanh": lambda call: "tanh",
    "nn.silu": lambda call: "silu",
    "nn.gelu": lambda call: "gelu",
}
# Inputs of so few channels are read from NCHW as they are: blocking would mostly copy zeros.
PLAIN_CHANNELS = 4
_SKIPPED = object()

Fuse = Callable[[ChainWorkload], "FusedSchedule | None"]


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
        Make packed weights and biases of the conv2d layers trailing parameters of ``main``;
        ``parameters_`` then tells their order after the pass has run.
    fuse : callable, optional
        Takes the `ChainWorkload` of convolutions that only feed each other, gives the schedule of
        one kernel for all of them, or for the last few, or None.
    """

    def __init__(
        self,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights_as_parameters: bool = False,
        fuse: Fuse | None = None,
    ) -> None:
        self.isa = isa
        self.choose = choose
        self.weights_as_parameters = weights_as_parameters
        self.fuse = fuse
        self.parameters_: list[WeightParameter] = []

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        weights = Weights.PARAMETERS if self.weights_as_parameters else Weights.CONSTANTS
        lowerer = _Lowerer(mod, self.isa, self.choose, weights, self.fuse)
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
    lowerer = _Lowerer(mod, isa, choose, Weights.ABSENT, fuse)
    lowerer.run()
    return lowerer.calls.workloads


class _Lowerer(Rewriter):
    def __init__(
        self,
        mod: tvm.IRModule,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights: Weights,
        fuse: Fuse | None,
    ) -> None:
        super().__init__(mod)
        self.fuse = fuse
        self.calls = KernelCalls(self, isa, choose, weights)
        self.count = 0
        self.activations = find_activations(self.bindings or [], self.users)
        self.skipped = {var for found in self.activations.values() for var in found.inner}
        for found in self.activations.values():
            self.users[found.source] -= found.reads - 1

    # -- one operator each ---------------------------------------------------------------------

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var in self.skipped:
            return _SKIPPED
        name = op_name(value)
        result = None
        if var in self.activations:
            result = self._spelt_out(self.activations[var])
        elif name == "nn.conv2d":
            layer = f"conv{self.count}"
            self.count += 1
            result = self._convolution(value, layer)
        elif name == "matmul":
            result = self._dense(value)
        elif name in ("add", "multiply"):
            result = self._binary(name, value)
        elif name in _ACTIVATIONS:
            result = self._append(value.args[0], _ACTIVATIONS[name](value), [])
        elif name in ("nn.max_pool2d", "nn.avg_pool2d"):
            result = self._pool(name, value)
        elif name in ("mean", "nn.adaptive_avg_pool2d"):
            result = self._global_pool(name, value)
        elif name in ("reshape", "squeeze", "permute_dims"):
            result = self._view(name, value, static_shape(var))
        elif name == "concat":
            result = self._concatenate(value)
        elif name in ("strided_slice", "nn.pad"):
            result = self._window(name, value, static_shape(var))
        elif name == "nn.layer_norm":
            result = self._layer_norm(value)
        return result if result is not None else self._copy(var, value)

    def _copy(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        """The binding as it is, with what was left out of it for its sake."""
        found = self.activations.get(var)
        for inner in self.bindings or []:
            if found is not None and inner.var in found.inner:
                self.values[inner.var] = self.emit(self.substitute(inner.value))
        return self.emit(self.substitute(value))

    def _convolution(self, value: relax.Call, layer: str) -> BlockedTensor | None:
        if not is_canonical_conv2d(value):
            return None
        geometry = conv2d_geometry(value)
        data = self._tensor(value.args[0])
        if data.view != NCHW or self._refuses(geometry, self._in_block(geometry, data)):
            return None
        shape = (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width)
        conv = Convolution(geometry, constant_array(value.args[1]), layer)
        before = self._pending(value.args[0])
        if before is not None and not isinstance(before.operation, Convolution):
            before = None
        return of_map(shape, pending=Pending([data], conv, before))

    def _dense(self, value: relax.Call) -> BlockedTensor | None:
        left, right = value.args
        shape = static_shape(left)
        if shape is None or not is_constant(right) or is_constant(left):
            return None
        weight = constant_array(right)
        if weight.dtype != np.float32 or weight.ndim != 2:
            return None
        out_features = weight.shape[1]
        kernel = np.ascontiguousarray(weight.T)
        data = self._tensor(left)
        n, c, h, w = data.map
        if data.view == NHWC and data.channels_at_end:
            geometry = ConvGeometry(c, out_features, h, w, (1, 1), batch=n)
            out_shape = (*data.shape[:-1], out_features)
            out_map, view = (n, out_features, h, w), NHWC
            kernel = kernel.reshape(out_features, c, 1, 1)
        elif len(shape) == 2 and data.view in (CHW, HWC):
            # A flattened map is not taken apart: the dense layer is a convolution as large as it.
            geometry = ConvGeometry(c, out_features, h, w, (h, w), batch=n)
            out_shape, out_map, view = (n, out_features), (n, out_features, 1, 1), CHW
            if data.view == CHW:
                kernel = kernel.reshape(out_features, c, h, w)
            else:
                kernel = kernel.reshape(out_features, h, w, c).transpose(0, 3, 1, 2)
        else:
            return None
        if self._refuses(geometry, self._in_block(geometry, data)):
            return None
        pending = Pending([data], Convolution(geometry, np.ascontiguousarray(kernel), None))
        return BlockedTensor(out_shape, out_map, view, pending=pending)

    def _binary(self, name: str, value: relax.Call) -> BlockedTensor | None:
        left, right = value.args
        if is_constant(left) or is_constant(right):
            tensor, const = (right, left) if is_constant(left) else (left, right)
            return self._channelwise(name, tensor, const)
        if name != "add" or left.same_as(right) or static_shape(left) is None:
            return None
        first, second = self.values.get(left), self.values.get(right)
        if not isinstance(first, BlockedTensor) or not isinstance(second, BlockedTensor):
            return None
        if (first.shape, first.view, first.map) != (second.shape, second.view, second.map):
            return None
        # A kernel that is still open takes the addition along, one of its own is the last resort.
        pairs = [(right, left), (left, right)]
        pairs.sort(key=lambda pair: not self._takes_steps(pair[0]))
        for here, there in pairs:
            if self.values[here].is_blocked:
                other = self._blocked(self.values[there])
                return self._append(here, "residual", [other])
        return None

    def _channelwise(
        self, name: str, tensor: relax.Expr, const: relax.Expr
    ) -> BlockedTensor | None:
        source = self.values.get(tensor) if isinstance(tensor, relax.Var) else None
        if not isinstance(source, BlockedTensor) or not source.is_blocked:
            return None
        vector = _channel_vector(const, source)
        if vector is None:
            return None
        opened = self._open(tensor)
        _append_channelwise(_steps(opened), name, vector)
        return opened

    def _spelt_out(self, found: Activation) -> BlockedTensor | None:
        result = self._append(found.source, found.step, [])
        if result is not None and found.scale != 1:
            vector = np.full(result.channels, found.scale, np.float32)
            _append_channelwise(_steps(result), "multiply", vector)
        return result

    def _append(self, var: relax.Expr, step: str, operands: list[Any]) -> BlockedTensor | None:
        """The value of ``var`` with an epilogue step more, if it is in blocks."""
        source = self.values.get(var) if isinstance(var, relax.Var) else None
        if not isinstance(source, BlockedTensor) or not source.is_blocked:
            return None
        opened = self._open(var)
        _steps(opened).append((step, operands))
        return opened

    def _pool(self, name: str, value: relax.Call) -> BlockedTensor | None:
        source = self._blocked_map(value.args[0])
        attrs = value.attrs
        if source is None or str(attrs.layout) != "NCHW" or str(attrs.out_layout) != "NCHW":
            return None
        batch, channels, height, width = source.map
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
        shape = static_shape(value)
        if shape is None:
            return None
        if shape[2:] != (workload.out_height, workload.out_width):
            if workload.kind == "avg":
                return None  # how taps beyond the padding count is not settled
            workload = replace(workload, out_size=shape[2:])
        n, c, h, w = shape
        return of_map((n, c, h, w), blocked=self.calls.pool(self._blocked(source), workload))

    def _global_pool(self, name: str, value: relax.Call) -> BlockedTensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, BlockedTensor) or not source.is_blocked:
            return None
        axes = {NCHW: [2, 3], NHWC: [1, 2]}.get(source.view)
        if axes is None:
            return None
        if source.view == NHWC and (len(source.shape) != 4 or not source.channels_at_end):
            return None
        batch, channels, height, width = source.map
        if name == "mean":
            if sorted(int(a) % 4 for a in value.attrs.axis or []) != axes:
                return None
        elif source.view != NCHW:
            return None
        out = static_shape(value)
        views = {
            (batch, channels, 1, 1): NCHW,
            (batch, 1, 1, channels): NHWC,
            (batch, channels): CHW,
        }
        if out not in views:
            return None
        workload = pooling.PoolWorkload.global_average(batch, channels, height, width)
        pooled = self.calls.pool(self._blocked(source), workload)
        return BlockedTensor(out, (batch, channels, 1, 1), views[out], blocked=pooled)

    def _view(
        self, name: str, value: relax.Call, shape: tuple[int, ...] | None
    ) -> BlockedTensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, BlockedTensor) or not source.is_blocked or shape is None:
            return None
        order = None
        if name == "permute_dims":
            rank = len(source.shape)
            order = [int(axis) % rank for axis in value.attrs.axes or range(rank)[::-1]]
        view = view_of(source, shape, order)
        if view is None:
            return None
        if self._pending(value.args[0]) is None:
            return BlockedTensor(shape, source.map, view, blocked=self._blocked(source))
        return BlockedTensor(shape, source.map, view, pending=source.pending)

    def _concatenate(self, value: relax.Call) -> BlockedTensor | None:
        fields = value.args[0]
        if not isinstance(fields, relax.Tuple) or any(
            is_constant(field) for field in fields.fields
        ):
            return None
        sources = [self._tensor(field) for field in fields.fields]
        views = {source.view for source in sources}
        axis = value.attrs.axis
        if len(views) != 1 or axis is None or not any(source.is_blocked for source in sources):
            return None
        rank = len(sources[0].shape)
        (view,) = views
        channel_axis = {NCHW: 1, NHWC: 3}.get(view)
        if int(axis) % rank != channel_axis:
            return None
        if view == NHWC and not all(source.channels_at_end for source in sources):
            return None
        n, _, h, w = sources[0].map
        workload = GatherWorkload.concatenation(n, tuple(s.channels for s in sources), h, w)
        pending = Pending(sources, Gather(workload))
        shape = (n, workload.out_channels, h, w)
        if view == NHWC:
            return BlockedTensor((n, h, w, shape[1]), shape, view, pending=pending)
        return of_map(shape, pending=pending)

    def _window(
        self, name: str, value: relax.Call, shape: tuple[int, ...] | None
    ) -> BlockedTensor | None:
        source = self._blocked_map(value.args[0])
        if source is None or shape is None:
            return None
        n, c, h, w = source.map
        pending = self._pending(value.args[0])
        workload = GatherWorkload.concatenation(n, (c,), h, w)
        sources = [source]
        if pending is not None and isinstance(pending.operation, Gather):
            workload, sources = pending.operation.workload, pending.sources
        cut = _pad(value, workload) if name == "nn.pad" else _slice(value, workload)
        if cut is None or (n, cut.out_channels, *cut.out_size) != shape:
            return None
        return of_map((n, cut.out_channels, *cut.out_size), pending=Pending(sources, Gather(cut)))

    def _layer_norm(self, value: relax.Call) -> BlockedTensor | None:
        source = self.values.get(value.args[0])
        if not isinstance(source, BlockedTensor) or not source.is_blocked:
            return None
        attrs = value.attrs
        if not source.channels_at_end or source.channels % self.calls.isa.lanes:
            return None
        last = len(source.shape) - 1
        if [int(axis) % (last + 1) for axis in attrs.axes] != [last]:
            return None
        if not (attrs.center and attrs.scale and all(is_constant(arg) for arg in value.args[1:])):
            return None
        scale, shift = (constant_array(arg).reshape(-1) for arg in value.args[1:])
        blocked = self.calls.layer_norm(
            self._blocked(source), source.map, float(attrs.epsilon), (scale, shift)
        )
        return BlockedTensor(source.shape, source.map, source.view, blocked=blocked)

    # -- values in their layouts ---------------------------------------------------------------

    def _in_block(self, geometry: ConvGeometry, data: BlockedTensor) -> int:
        """1 if a convolution reads ``data`` plain, else the channels of a block."""
        flat = len(data.shape) == 2
        few = geometry.in_channels <= PLAIN_CHANNELS and geometry.groups == 1
        return 1 if data.plain is not None and (few or flat) else self.calls.isa.lanes

    def _refuses(self, geometry: ConvGeometry, in_block: int) -> bool:
        try:
            workload = ConvWorkload(geometry, in_block)
        except ValueError:
            return True
        return bool(kernels.refuse(workload, self.calls.isa))

    def _tensor(self, expr: relax.Expr) -> BlockedTensor:
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor):
            return value
        tensor = of_plain(static_shape(expr) or (), self.substitute(expr))
        if isinstance(expr, relax.Var):
            self.values[expr] = tensor
        return tensor

    def _blocked_map(self, expr: relax.Expr) -> BlockedTensor | None:
        """The value of ``expr`` if it is a map in blocks, seen as it is."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor) and value.is_blocked and value.view == NCHW:
            return value
        return None

    def _pending(self, expr: relax.Expr) -> Pending | None:
        """The pending operation behind ``expr``, if nothing else reads its result."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor) and self.users[expr] == 1:
            return value.pending
        return None

    def _takes_steps(self, expr: relax.Expr) -> bool:
        pending = self._pending(expr)
        return pending is not None and not isinstance(pending.operation, Gather)

    def _open(self, expr: relax.Expr) -> BlockedTensor:
        """A tensor like ``expr``'s whose pending operation takes further steps."""
        tensor = self.values[expr]
        pending = self._pending(expr)
        if pending is None or not self._takes_steps(expr):
            pending = Pending([of_map(tensor.map, blocked=self._blocked(tensor))], Elementwise())
        return BlockedTensor(tensor.shape, tensor.map, tensor.view, pending=pending)

    def _blocked(self, tensor: BlockedTensor) -> relax.Expr:
        if tensor.pending is not None:
            tensor.blocked = self._write(tensor.pending)
            tensor.pending = None
        if tensor.blocked is None:
            plain = tensor.plain
            if self._is_one_layout(tensor):
                lanes = self.calls.isa.lanes
                shape = (tensor.map[0], tensor.channels // lanes, 1, 1, lanes)
                tensor.blocked = self.emit(relax.op.reshape(plain, shape))
            else:
                if tensor.shape != tensor.map:
                    plain = self.emit(relax.op.reshape(plain, tensor.map))
                tensor.blocked = self.calls.block(plain, tensor.map)
        return tensor.blocked

    def _is_one_layout(self, tensor: BlockedTensor) -> bool:
        """Whether plain and blocked form have the same bytes: whole blocks of a single pixel."""
        return tensor.map[2:] == (1, 1) and tensor.channels % self.calls.isa.lanes == 0

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, BlockedTensor):
            return value
        if value.plain is None and self._is_one_layout(value):
            value.plain = self.emit(relax.op.reshape(self._blocked(value), value.shape))
        if value.plain is None:
            plain = self.calls.unblock(self._blocked(value), value.map)
            if value.view == NHWC or (value.view == HWC and value.map[2:] != (1, 1)):
                plain = self.emit(relax.op.permute_dims(plain, [0, 2, 3, 1]))
            if static_shape(plain) != value.shape:
                plain = self.emit(relax.op.reshape(plain, value.shape))
            value.plain = plain
        return value.plain

    def _write(self, pending: Pending) -> relax.Expr:
        operation, sources = pending.operation, pending.sources
        if isinstance(operation, Gather):
            return self.calls.gather([self._blocked(s) for s in sources], operation.workload)
        (data,) = sources
        if isinstance(operation, Elementwise):
            return self.calls.elementwise(self._blocked(data), data.map, operation.steps)
        in_block = self._in_block(operation.geometry, data)
        if in_block > 1:
            fused = self._write_chain(pending)
            if fused is not None:
                return fused
            return self.calls.convolve(self._blocked(data), in_block, operation)
        plain = data.plain
        if data.shape != data.map:
            plain = self.emit(relax.op.reshape(plain, data.map))
        return self.calls.convolve(plain, 1, operation)

    def _write_chain(self, pending: Pending) -> relax.Expr | None:
        """One kernel for a convolution and those before it, if ``fuse`` wants one."""
        if self.fuse is None:
            return None
        run = [pending]
        while len(run) < MOST_STAGES and run[0].before is not None:
            if self._in_block(run[0].before.operation.geometry, run[0].before.sources[0]) == 1:
                break
            run.insert(0, run[0].before)
        for start in range(len(run) - 1):
            links = run[start:]
            try:
                workload = ChainWorkload(
                    tuple(link.operation.workload(self.calls.isa.lanes) for link in links)
                )
            except ValueError:
                continue  # a residual is added in the middle
            if not workload.is_promising():
                continue
            schedule = self.fuse(workload)
            if schedule is None:
                return None
            links = links[-len(schedule.stages) :]
            source = self._blocked(links[0].sources[0])
            workload = workload.last(len(links))
            convs = [link.operation for link in links]
            return self.calls.convolve_chain(source, convs, workload, schedule)
        return None

    def extra_params(self) -> Sequence[relax.Var]:
        return self.calls.variables


def _steps(tensor: BlockedTensor) -> list[Step]:
    assert tensor.pending is not None and not isinstance(tensor.pending.operation, Gather)
    return tensor.pending.operation.steps


def _slice(value: relax.Call, workload: GatherWorkload) -> GatherWorkload | None:
    """``workload`` with a strided slice after it, or None."""
    if any(not isinstance(arg, relax.Tuple) for arg in value.args[1:]):
        return None
    try:
        axes, begins, ends, *more = (
            [int(field.value) for field in arg.fields] for arg in value.args[1:]
        )
    except AttributeError:
        return None
    strides = more[0] if more else [1] * len(axes)
    size = [workload.batch, workload.out_channels, *workload.out_size]
    begin, end, stride = [0] * 4, list(size), [1] * 4
    for axis, first, last, step in zip(axes, begins, ends, strides, strict=True):
        if step < 1:
            return None
        extent = size[axis % 4]
        begin[axis % 4] = min(max(first + extent if first < 0 else first, 0), extent)
        end[axis % 4] = min(max(last + extent if last < 0 else last, 0), extent)
        stride[axis % 4] = step
    count = [-(-(e - b) // s) for b, e, s in zip(begin, end, stride, strict=True)]
    if min(count) < 1 or count[0] != size[0] or stride[1] != 1:
        return None
    old = workload.stride
    return replace(
        workload,
        runs=_cut(workload.runs, begin[1], end[1]),
        out_size=(count[2], count[3]),
        origin=(
            workload.origin[0] + begin[2] * old[0],
            workload.origin[1] + begin[3] * old[1],
        ),
        stride=(old[0] * stride[2], old[1] * stride[3]),
    )


def _cut(runs: Sequence[ChannelRun], begin: int, end: int) -> tuple[ChannelRun, ...]:
    """The channels from ``begin`` to before ``end``."""
    kept, at = [], 0
    for run in runs:
        low, high = max(begin - at, 0), min(end - at, run.count)
        if low < high:
            kept.append(ChannelRun(run.source, run.first + low, high - low))
        at += run.count
    return tuple(kept)


def _pad(value: relax.Call, workload: GatherWorkload) -> GatherWorkload | None:
    """``workload`` with a constant pad after it, or None."""
    widths, fill = [int(w) for w in value.attrs.pad_width], float(value.attrs.pad_value)
    if str(value.attrs.pad_mode) != "constant" or len(widths) != 8 or any(widths[:2]):
        return None
    front, back, top, bottom, left, right = widths[2:]
    given = GatherWorkload.concatenation(
        workload.batch, workload.channels, workload.height, workload.width
    )
    cut = (workload.out_size, workload.origin, workload.stride)
    moved = cut != (given.out_size, given.origin, given.stride)
    filled = moved or any(run.source < 0 for run in workload.runs)
    if min(widths) < 0 or (filled and workload.fill != fill) or (moved and any(widths[4:])):
        return None
    runs = list(workload.runs)
    if front:
        runs.insert(0, ChannelRun(-1, 0, front))
    if back:
        runs.append(ChannelRun(-1, 0, back))
    rows, columns = workload.out_size
    return replace(
        workload,
        runs=tuple(runs),
        out_size=(rows + top + bottom, columns + left + right),
        origin=(workload.origin[0] - top, workload.origin[1] - left),
        fill=fill,
    )


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _channel_vector(const: relax.Expr, tensor: BlockedTensor) -> np.ndarray | None:
    """A constant operand of a tensor as one value a channel, or None."""
    if static_shape(const) is None:
        return None
    array, channels = constant_array(const), tensor.channels
    if array.size and (array == array.reshape(-1)[0]).all():
        return np.full(channels, array.reshape(-1)[0], np.float32)
    trailing = (channels,) if tensor.channels_at_end else (channels, 1, 1)
    if array.size == channels and array.shape[-len(trailing) :] == trailing:
        return array.reshape(-1)
    return None


def _append_channelwise(steps: list[Step], name: str, vector: np.ndarray) -> None:
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
