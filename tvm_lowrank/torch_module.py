"""A normalised Relax network as a PyTorch module, whatever it was imported from.

Its convolutions are modules to be trained, dense or as the chains of a choice; all else is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.extras import require_torch
from tvm_lowrank.layer import ConvLayer, fully_connected_products
from tvm_lowrank.passes.cut_at_convolutions import cut_at_convolutions
from tvm_lowrank.passes.graph import (
    constant_array,
    dataflow_bindings,
    is_constant,
    op_name,
    static_shape,
)
from tvm_lowrank.passes.resize_tables import tables_of
from tvm_lowrank.torch_layers import FactoredConv2d

torch: Any = require_torch()
nn: Any = torch.nn
F: Any = torch.nn.functional


class RelaxModule(nn.Module):
    """Runs ``main`` of a normalised module, for any number of samples at a time.

    Parameters
    ----------
    mod : tvm.IRModule
        Normalised; samples are the first axis of every value that depends on the input.
    layers : list of ConvLayer
        Of the same module, all that `collect_layers` gives.
    chains : dict
        Layer name to the chain that computes it; the others compute the original weight.

    Attributes
    ----------
    convolutions : torch.nn.ModuleDict
        Layer name to its `FactoredConv2d`, of a single stage where it is dense.
    borders : tuple of int
        Layers before which a single value is alive: where the network can be cut into blocks.

    Raises
    ------
    LowRankError
        The module is no plain dataflow, or has an operator that is not known here.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        layers: list[ConvLayer],
        chains: Mapping[str, FactoredConv2d] | None = None,
    ) -> None:
        super().__init__()
        bindings = dataflow_bindings(mod["main"])
        if bindings is None:
            raise LowRankError("the network has control flow; it cannot be trained here")
        self._bindings = bindings
        self._function = mod["main"]
        self._batch = int(self._function.params[0].ty.shape[0])
        self._products = fully_connected_products(mod)
        self.convolutions = nn.ModuleDict()
        for layer in layers:
            self.convolutions[layer.name] = (chains or {}).get(layer.name) or _dense(layer)
        self.borders = tuple(
            index - 1
            for index, piece in enumerate(cut_at_convolutions(mod))
            if index > 1 and len(piece.takes) == 1
        )
        self._steps = [self._step(binding) for binding in bindings]
        self._places = [i for i, binding in enumerate(bindings) if self._is_layer(binding)]

    def forward(self, x: Any) -> Any:
        """The network's first output (samples, ...)."""
        return self.run(x)[0]

    def run(
        self, x: Any, detach: bool = False, begin: int | None = None
    ) -> tuple[Any, dict[int, Any]]:
        """The output, and the input of the layers that ``borders`` names.

        With ``detach`` no gradient passes a border, so that each block learns from its own output.
        With ``begin``, one of ``borders``, x is what that layer reads: only what is behind runs.
        """
        start = 0 if begin is None else self._places[begin]
        entry = self._function.params[0]
        values = {entry if begin is None else self._bindings[start].value.args[0]: x}
        ends = {self._places[layer]: layer for layer in self.borders if layer != begin}
        seen: dict[int, Any] = {}
        for place in range(start, len(self._steps)):
            if place in ends:
                source = self._bindings[place].value.args[0]
                seen[ends[place]] = values[source]
                if detach:
                    values[source] = values[source].detach()
            values[self._bindings[place].var] = self._steps[place](values, len(x))
        found = self._value(self._function.body.body, values)
        return (found[0] if isinstance(found, tuple) else found), seen

    def _value(self, expr: Any, values: Mapping[Any, Any]) -> Any:
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(field, values) for field in expr.fields)
        return values.get(expr, expr)

    def _step(self, binding: Any) -> Callable[[dict[Any, Any], int], Any]:
        """What computes one binding from the values before it and the number of samples."""
        call, name = binding.value, op_name(binding.value)
        if isinstance(call, relax.TupleGetItem):
            return lambda values, _: values[call.tuple_value][call.index]
        if isinstance(call, relax.Var):
            return lambda values, _: values[call]
        if name == "nn.conv2d":
            module = self.convolutions[f"conv{self._count_before(binding)}"]
            return lambda values, _: module(values[call.args[0]])
        if binding.var in self._products:
            name, g = self._products[binding.var]
            product, size = self.convolutions[name], (g.in_channels, g.height, g.width)
            return lambda values, _: product(values[call.args[0]].reshape(-1, *size)).flatten(1)
        if name == "add" and is_constant(call.args[1]) and self._has_module(call.args[0]):
            return lambda values, _: values[call.args[0]]  # the bias, which its module has
        known = _OPERATORS.get(name or "")
        if known is None:
            raise LowRankError(
                f"recovery does not know the operator {name or type(call).__name__} of this "
                "network; leave it out"
            )
        shape = static_shape(binding.var)
        constants = [self._constant(arg) for arg in call.args]

        def run(values: dict[Any, Any], samples: int) -> Any:
            given = [
                self._value(arg, values) if constant is None else getattr(self, constant)
                for arg, constant in zip(call.args, constants, strict=True)
            ]
            wanted = None if shape is None else self._resized(shape, samples)
            return known(call, given, wanted)

        return run

    def _resized(self, shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
        return (samples, *shape[1:]) if shape and shape[0] == self._batch else shape

    def _constant(self, expr: Any) -> str | None:
        if not is_constant(expr):
            return None
        name = f"constant{len(list(self.buffers(recurse=False)))}"
        self.register_buffer(name, torch.from_numpy(np.array(constant_array(expr))))
        return name

    def _count_before(self, binding: Any) -> int:
        convolutions = [b for b in self._bindings if op_name(b.value) == "nn.conv2d"]
        return next(i for i, other in enumerate(convolutions) if other.var.same_as(binding.var))

    def _is_layer(self, binding: Any) -> bool:
        return op_name(binding.value) == "nn.conv2d" or binding.var in self._products

    def _has_module(self, expr: Any) -> bool:
        return any(b.var.same_as(expr) and self._is_layer(b) for b in self._bindings)


def _dense(layer: ConvLayer) -> FactoredConv2d:
    if layer.geometry is None:
        raise LowRankError(f"recovery cannot run {layer.name} ({layer.reason}); leave it out")
    return FactoredConv2d([layer.geometry], [layer.weight], layer.bias, (), layer.name)


# -- operators: the call, its arguments, and the shape of the result for these samples -------------


def _pair(values: Any) -> tuple[int, int]:
    found = [int(v) for v in values]
    return (found[0], found[-1])


def _pool(call: Any, args: list[Any], shape: Any) -> Any:
    attrs = call.attrs
    top, left, bottom, right = (int(p) for p in attrs.padding)
    kernel, stride = _pair(attrs.pool_size), _pair(attrs.strides)
    ceil = bool(attrs.ceil_mode)
    maximum = op_name(call) == "nn.max_pool2d"
    if (top, left) == (bottom, right) and 2 * top <= kernel[0] and 2 * left <= kernel[1]:
        if maximum:
            return F.max_pool2d(args[0], kernel, stride, (top, left), _pair(attrs.dilation), ceil)
        include = bool(attrs.count_include_pad)
        return F.avg_pool2d(args[0], kernel, stride, (top, left), ceil, include)
    if not maximum and not attrs.count_include_pad:
        raise LowRankError("recovery does not know average pooling with uneven pads; leave it out")
    fill = float("-inf") if maximum else 0.0
    padded = F.pad(args[0], (left, right, top, bottom), value=fill)
    if maximum:
        return F.max_pool2d(padded, kernel, stride, 0, _pair(attrs.dilation), ceil)
    return F.avg_pool2d(padded, kernel, stride, 0, ceil)


def _mean(call: Any, args: list[Any], shape: Any) -> Any:
    axes = [int(axis) for axis in call.attrs.axis] if call.attrs.axis is not None else None
    return args[0].mean(dim=axes, keepdim=bool(call.attrs.keepdims))


def _pad(call: Any, args: list[Any], shape: Any) -> Any:
    widths = [int(w) for w in call.attrs.pad_width]
    if str(call.attrs.pad_mode) != "constant":
        raise LowRankError(
            f"recovery does not know pads of mode {call.attrs.pad_mode}; leave it out"
        )
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]
    fill = float(args[1]) if len(args) > 1 and hasattr(args[1], "shape") else 0.0
    return F.pad(args[0], [side for pair in pairs for side in pair], value=fill)


def _slice(call: Any, args: list[Any], shape: Any) -> Any:
    axes, begins, ends = (_integers(arg) for arg in call.args[1:4])
    steps = _integers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    index = [slice(None)] * args[0].ndim
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        index[axis] = slice(begin, end, step)
    return args[0][tuple(index)]


def _integers(expr: Any) -> list[int]:
    return [int(getattr(field, "value", field)) for field in getattr(expr, "fields", expr)]


def _layer_norm(call: Any, args: list[Any], shape: Any) -> Any:
    axes = [int(axis) % args[0].ndim for axis in call.attrs.axes]
    sizes = [args[0].shape[axis] for axis in axes]
    if axes != list(range(args[0].ndim - len(axes), args[0].ndim)):
        raise LowRankError("recovery knows layer norm over the last axes only; leave it out")
    return F.layer_norm(args[0], sizes, args[1], args[2], float(call.attrs.epsilon))


def _clip(call: Any, args: list[Any], shape: Any) -> Any:
    low, high = (float(bound.value) for bound in call.args[1:])
    return args[0].clamp(low, high)


def _transposed(call: Any, args: list[Any], shape: Any) -> Any:
    attrs = call.attrs
    if str(attrs.data_layout) != "NCHW" or str(attrs.kernel_layout) != "IOHW":
        raise LowRankError(
            f"recovery does not know transposed convolutions in {attrs.data_layout}; leave it out"
        )
    stride, dilation = _pair(attrs.strides), _pair(attrs.dilation)
    more, groups = _pair(attrs.output_padding), int(attrs.groups)
    top, left, bottom, right = (int(p) for p in attrs.padding)
    whole = F.conv_transpose2d(*args[:2], None, stride, 0, more, groups, dilation)
    return whole[..., top : whole.shape[2] - bottom, left : whole.shape[3] - right]


def _resize(call: Any, args: list[Any], shape: Any) -> Any:
    found = args[0]
    try:
        tables = tables_of(call, tuple(found.shape[2:]), tuple(shape[2:]))
    except ValueError as error:
        raise LowRankError(f"recovery does not know resizing ({error}); leave it out") from error
    for axis, steps in zip((2, 3), tables, strict=True):
        low, high, weight = (torch.from_numpy(step).to(found.device) for step in steps)
        low, high = (found.index_select(axis, pixels.long()) for pixels in (low, high))
        found = torch.lerp(low, high, weight.reshape(-1, *[1] * (3 - axis)))
    return found


def _prelu(call: Any, args: list[Any], shape: Any) -> Any:
    slopes = args[1].reshape(-1)
    if len(slopes) > 1 and _axis(call) != 1:
        raise LowRankError("recovery knows slopes of a PReLU along the channels only; leave it out")
    return F.prelu(args[0], slopes)


def _axis(call: Any) -> int:
    return int(call.attrs.axis)


def _permute(call: Any, args: list[Any], shape: Any) -> Any:
    axes = call.attrs.axes
    return args[0].permute(*([int(a) for a in axes] if axes else range(args[0].ndim)[::-1]))


_OPERATORS: dict[str, Callable[[Any, list[Any], Any], Any]] = {
    "add": lambda call, args, shape: args[0] + args[1],
    "subtract": lambda call, args, shape: args[0] - args[1],
    "multiply": lambda call, args, shape: args[0] * args[1],
    "divide": lambda call, args, shape: args[0] / args[1],
    "maximum": lambda call, args, shape: torch.maximum(args[0], args[1]),
    "minimum": lambda call, args, shape: torch.minimum(args[0], args[1]),
    "matmul": lambda call, args, shape: args[0] @ args[1],
    "nn.relu": lambda call, args, shape: F.relu(args[0]),
    "nn.relu6": lambda call, args, shape: F.relu6(args[0]),
    "nn.leakyrelu": lambda call, args, shape: F.leaky_relu(args[0], float(call.attrs.alpha)),
    "nn.silu": lambda call, args, shape: F.silu(args[0]),
    "nn.gelu": lambda call, args, shape: F.gelu(args[0]),
    "nn.softmax": lambda call, args, shape: args[0].softmax(_axis(call)),
    "nn.log_softmax": lambda call, args, shape: args[0].log_softmax(_axis(call)),
    "nn.conv2d_transpose": _transposed,
    "nn.prelu": _prelu,
    "nn.max_pool2d": _pool,
    "nn.avg_pool2d": _pool,
    "nn.adaptive_avg_pool2d": lambda call, args, shape: F.adaptive_avg_pool2d(args[0], shape[2:]),
    "nn.layer_norm": _layer_norm,
    "nn.pad": _pad,
    "clip": _clip,
    "concat": lambda call, args, shape: torch.cat(list(args[0]), _axis(call)),
    "erf": lambda call, args, shape: args[0].erf(),
    "exp": lambda call, args, shape: args[0].exp(),
    "image.resize2d": _resize,
    "mean": _mean,
    "permute_dims": _permute,
    "reshape": lambda call, args, shape: args[0].reshape(shape),
    "sigmoid": lambda call, args, shape: args[0].sigmoid(),
    "sqrt": lambda call, args, shape: args[0].sqrt(),
    "squeeze": lambda call, args, shape: args[0].reshape(shape),
    "expand_dims": lambda call, args, shape: args[0].reshape(shape),
    "flatten": lambda call, args, shape: args[0].reshape(shape),
    "strided_slice": _slice,
    "take": lambda call, args, shape: args[0].index_select(_axis(call), args[1]),
    "tanh": lambda call, args, shape: args[0].tanh(),
}
