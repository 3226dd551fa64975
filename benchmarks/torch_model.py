"""An ONNX network as a PyTorch module, for the operators of the networks compared here."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import fx, nn

Attributes = dict[str, Any]


def load_torch(path: str | Path) -> fx.GraphModule:
    """Read an ONNX file as a module of one input and one output, ready for inference.

    Batch norm is folded into convolutions before (by onnxslim), as one would for deployment.

    Raises
    ------
    ValueError
        The network has an operator, or a use of one, that is not converted here.
    """
    model = onnxslim.slim(onnx.load(str(path)))
    return _Converter(model.graph).convert().eval()


class _Converter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.source = graph
        self.arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}

    def convert(self) -> fx.GraphModule:
        inputs = [value for value in self.source.input if value.name not in self.arrays]
        if len(inputs) != 1 or len(self.source.output) != 1:
            raise ValueError("only networks of one input and one output are converted")
        self.values[inputs[0].name] = self.graph.placeholder("x")
        for node in self.source.node:
            convert = _CONVERTERS.get(node.op_type)
            if convert is None:
                raise ValueError(f"no conversion of operator {node.op_type} to PyTorch")
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            self.values[node.output[0]] = convert(self, node, attributes)
        self.graph.output(self.values[self.source.output[0].name])
        return fx.GraphModule(self.root, self.graph)

    def value(self, name: str) -> Any:
        """The graph's value of that name; a constant becomes a buffer of the module."""
        if name not in self.values:
            buffer = f"buffer{len(self.values)}"
            self.root.register_buffer(buffer, torch.from_numpy(self.array(name)))
            self.values[name] = self.graph.get_attr(buffer)
        return self.values[name]

    def array(self, name: str) -> np.ndarray:
        """A constant; ValueError if the name is computed."""
        if name not in self.arrays:
            raise ValueError(f"{name} is computed, but a constant is expected")
        return np.array(self.arrays[name])

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> fx.Node:
        """One call in the graph."""
        return self.graph.call_function(function, args, options)

    def module(self, module: nn.Module, x: str | fx.Node) -> fx.Node:
        """A call of a module with weights of its own, on a value or one of that name."""
        name = f"layer{len(list(self.root.children()))}"
        self.root.add_module(name, module)
        return self.graph.call_module(name, (self.value(x) if isinstance(x, str) else x,))


def _pads(attributes: Attributes, rank: int) -> tuple[int, ...]:
    """Pads as ONNX has them: those of all begins, then those of all ends."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError("auto_pad is not converted")
    return tuple(attributes.get("pads", [0] * 2 * rank))


def _pairs(pads: tuple[int, ...]) -> list[int]:
    """The pads as `torch.nn.functional.pad` takes them: the last axis first, begin beside end."""
    half = len(pads) // 2
    return [n for axis in reversed(range(half)) for n in (pads[axis], pads[half + axis])]


def _symmetric(attributes: Attributes, rank: int) -> tuple[int, ...]:
    """Pads of both sides, which PyTorch's pools want to be equal."""
    pads = _pads(attributes, rank)
    if pads[:rank] != pads[rank:]:
        raise ValueError(f"pads {pads} differ between the sides")
    return pads[:rank]


def _set(parameter: Any, array: np.ndarray) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(array))


def _conv(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    weight = to.array(node.input[1])
    rank = weight.ndim - 2
    if rank not in (1, 2):
        raise ValueError(f"convolutions over {rank} axes are not converted")
    groups = attributes.get("group", 1)
    pads = _pads(attributes, rank)
    even = pads[:rank] == pads[rank:]
    module = (nn.Conv1d, nn.Conv2d)[rank - 1](
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        tuple(attributes.get("strides", [1] * rank)),
        pads[:rank] if even else 0,
        tuple(attributes.get("dilations", [1] * rank)),
        groups,
        bias=len(node.input) > 2,
    )
    _set(module.weight, weight)
    if len(node.input) > 2:
        _set(module.bias, to.array(node.input[2]))
    if even:
        return to.module(module, node.input[0])
    padded = to.call(F.pad, to.value(node.input[0]), _pairs(pads))
    return to.module(module, padded)


def _norm(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    arrays = [to.array(name) for name in node.input[1:]]
    module = nn.BatchNorm2d(len(arrays[0]), eps=attributes.get("epsilon", 1e-5))
    for parameter, array in zip(
        (module.weight, module.bias, module.running_mean, module.running_var), arrays, strict=True
    ):
        _set(parameter, array)
    return to.module(module, node.input[0])


def _gemm(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    if attributes.get("transA", 0) or {attributes.get(k, 1.0) for k in ("alpha", "beta")} != {1.0}:
        raise ValueError("Gemm with transA, alpha or beta is not converted")
    weight = to.array(node.input[1])
    weight = weight if attributes.get("transB", 0) else np.ascontiguousarray(weight.T)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=len(node.input) > 2)
    _set(module.weight, weight)
    if len(node.input) > 2:
        _set(module.bias, np.broadcast_to(to.array(node.input[2]), (len(weight),)).copy())
    return to.module(module, node.input[0])


def _layer_norm(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    weight = to.array(node.input[1])
    if attributes.get("axis", -1) != -1:
        raise ValueError("LayerNormalization is converted for the last axis only")
    module = nn.LayerNorm(weight.shape, attributes.get("epsilon", 1e-5), bias=len(node.input) > 2)
    _set(module.weight, weight)
    if len(node.input) > 2:
        _set(module.bias, to.array(node.input[2]))
    return to.module(module, node.input[0])


def _pool(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    kernel = tuple(attributes["kernel_shape"])
    options: Attributes = {
        "kernel_size": kernel,
        "stride": tuple(attributes.get("strides", [1] * len(kernel))),
        "padding": _symmetric(attributes, len(kernel)),
        "ceil_mode": bool(attributes.get("ceil_mode", 0)),
    }
    if node.op_type == "MaxPool":
        options["dilation"] = tuple(attributes.get("dilations", [1] * len(kernel)))
        function = (F.max_pool1d, F.max_pool2d)[len(kernel) - 1]
        return to.call(function, to.value(node.input[0]), **options)
    options["count_include_pad"] = bool(attributes.get("count_include_pad", 0))
    function = (F.avg_pool1d, F.avg_pool2d)[len(kernel) - 1]
    return to.call(function, to.value(node.input[0]), **options)


def _global_pool(to: _Converter, node: Any, _attributes: Attributes) -> fx.Node:
    return to.call(torch.mean, to.value(node.input[0]), dim=(-1, -2), keepdim=True)


def _mean(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    axes = attributes.get("axes")
    if axes is None:
        axes = to.array(node.input[1]).tolist()
    keep = bool(attributes.get("keepdims", 1))
    return to.call(torch.mean, to.value(node.input[0]), dim=tuple(axes), keepdim=keep)


def _clip(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    low, high = (float(to.array(name)) if name else None for name in (*node.input[1:], "", "")[:2])
    low, high = attributes.get("min", low), attributes.get("max", high)
    if (low, high) == (0.0, 6.0):
        return to.call(F.relu6, to.value(node.input[0]))
    return to.call(torch.clamp, to.value(node.input[0]), low, high)


def _elementwise(function: Callable[..., Any]) -> Callable[..., fx.Node]:
    def convert(to: _Converter, node: Any, _attributes: Attributes) -> fx.Node:
        return to.call(function, *(to.value(name) for name in node.input))

    return convert


def _concat(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    return to.call(torch.cat, [to.value(name) for name in node.input], attributes["axis"])


def _flatten(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    return to.call(torch.flatten, to.value(node.input[0]), attributes.get("axis", 1))


def _reshaped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in another shape; 0 copies the extent at its place, as in ONNX."""
    return x.reshape([x.shape[i] if extent == 0 else extent for i, extent in enumerate(shape)])


def _reshape(to: _Converter, node: Any, _attributes: Attributes) -> fx.Node:
    return to.call(_reshaped, to.value(node.input[0]), tuple(to.array(node.input[1]).tolist()))


def _unsqueeze(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    axes = attributes["axes"] if "axes" in attributes else to.array(node.input[1]).tolist()
    if min(axes) < 0:
        raise ValueError("Unsqueeze of axes counted from the end is not converted")
    value = to.value(node.input[0])
    for axis in sorted(axes):
        value = to.call(torch.unsqueeze, value, axis)
    return value


def _pad(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    mode = attributes.get("mode", b"constant").decode()
    if mode != "constant" or len(node.input) > 3:
        raise ValueError("Pad is converted only with constants, along all axes")
    pads = to.array(node.input[1]).tolist()
    fill = float(to.array(node.input[2])) if len(node.input) > 2 and node.input[2] else 0.0
    return to.call(F.pad, to.value(node.input[0]), _pairs(tuple(pads)), "constant", fill)


def _slice(to: _Converter, node: Any, _attributes: Attributes) -> fx.Node:
    if len(node.input) < 4:
        raise ValueError("Slice is converted only with its axes as an input")
    starts, ends, axes = (to.array(name).tolist() for name in node.input[1:4])
    steps = to.array(node.input[4]).tolist() if len(node.input) > 4 else [1] * len(axes)
    if min(axes) < 0 or min(steps) < 1:
        raise ValueError("Slice of axes counted from the end, or backwards, is not converted")
    index = [slice(None)] * (max(axes) + 1)
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(*bounds)
    return to.call(operator.getitem, to.value(node.input[0]), tuple(index))


def _transpose(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    return to.call(torch.permute, to.value(node.input[0]), tuple(attributes["perm"]))


def _softmax(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    return to.call(torch.softmax, to.value(node.input[0]), attributes.get("axis", -1))


def _hard_sigmoid(to: _Converter, node: Any, attributes: Attributes) -> fx.Node:
    line = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    if not np.allclose(line, (1 / 6, 0.5)):
        raise ValueError(f"HardSigmoid of {line} is not converted, only x / 6 + 1 / 2")
    return to.call(F.hardsigmoid, to.value(node.input[0]))


def _identity(to: _Converter, node: Any, _attributes: Attributes) -> Any:
    return to.value(node.input[0])


_CONVERTERS: dict[str, Callable[[_Converter, Any, Attributes], Any]] = {
    "Conv": _conv,
    "BatchNormalization": _norm,
    "LayerNormalization": _layer_norm,
    "Gemm": _gemm,
    "MatMul": _elementwise(torch.matmul),
    "Relu": _elementwise(F.relu),
    "Sigmoid": _elementwise(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _elementwise(F.hardswish),
    "Tanh": _elementwise(torch.tanh),
    "Erf": _elementwise(torch.erf),
    "Gelu": _elementwise(F.gelu),
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(operator.truediv),
    "Clip": _clip,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _mean,
    "Concat": _concat,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Pad": _pad,
    "Slice": _slice,
    "Softmax": _softmax,
    "Dropout": _identity,
    "Identity": _identity,
}
