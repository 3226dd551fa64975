"""A small builder of ONNX networks whose random weights are drawn only when the file is made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor to be drawn: ``normal`` (mean, deviation) or ``uniform`` (low, high).

    ``trained`` is False for what training does not learn (running statistics of batch norm).
    """

    shape: Shape
    kind: str
    first: float
    second: float
    trained: bool = True

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The tensor as float32."""
        if self.kind == "normal":
            values = rng.standard_normal(self.shape, np.float32)
            return values * np.float32(self.second) + np.float32(self.first)
        return rng.uniform(self.first, self.second, self.shape).astype(np.float32)


class Graph:
    """Collects nodes; each method adds one operator and returns the name of its result.

    Shapes are those of one sample, without the batch: ``(C, H, W)`` of a map, ``(F,)`` of a vector.
    Weights are scaled by fan-in (``gain / fan_in`` is their variance), so that values stay of order
    one: a gain of 2 suits inputs that come from a ReLU, 1 those that do not.

    Parameters
    ----------
    name : str
    image : tuple of int
        Shape of the input without the batch.
    batch : int
        Extent of the first dimension.
    """

    def __init__(self, name: str, image: Shape = (3, 224, 224), batch: int = 1) -> None:
        self.name = name
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.shapes: dict[str, Shape] = {"input": image}
        self.multiply_adds = 0

    # -- counts and the file -------------------------------------------------------------------

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(math.prod(weight.shape) for weight in self.weights.values() if weight.trained)

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that change when the network does."""
        text = "".join(node.SerializeToString(deterministic=True).hex() for node in self.nodes)
        text += repr((self.shapes["input"], self.weights, self.constants))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def model(self, output: str, seed: int = 0) -> onnx.ModelProto:
        """The network with its weights drawn from ``seed``."""
        rng = np.random.default_rng(seed)
        tensors = [numpy_helper.from_array(w.draw(rng), name) for name, w in self.weights.items()]
        tensors += [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.batch, *self.shapes[name]])
            for name in ("input", output)
        ]
        graph = helper.make_graph(self.nodes, self.name, ends[:1], ends[1:], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        return model

    # -- layers --------------------------------------------------------------------------------

    def conv(
        self,
        x: str,
        filters: int,
        kernel: int,
        stride: int = 1,
        pad: int | None = None,
        *,
        groups: int = 1,
        bias: bool = True,
        gain: float = 2.0,
    ) -> str:
        """A square convolution; without ``pad`` the map keeps its size (divided by the stride)."""
        channels, height, width = self.shapes[x]
        pad = (kernel - 1) // 2 if pad is None else pad
        height, width = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
        fan_in = channels // groups * kernel * kernel
        shape = (filters, channels // groups, kernel, kernel)
        inputs = [x, self._weight(Weight(shape, "normal", 0.0, math.sqrt(gain / fan_in)))]
        if bias:
            inputs.append(self._weight(Weight((filters,), "normal", 0.0, 0.1)))
        self.multiply_adds += height * width * filters * fan_in
        return self._node(
            "Conv",
            inputs,
            (filters, height, width),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            group=groups,
        )

    def norm(self, x: str, gain: float = 1.0) -> str:
        """Batch normalisation as trained networks have it; ``gain`` is the scale's mean."""
        channels = (self.shapes[x][0],)
        inputs = [
            x,
            self._weight(Weight(channels, "uniform", 0.8 * gain, 1.2 * gain)),
            self._weight(Weight(channels, "normal", 0.0, 0.1)),
            self._weight(Weight(channels, "normal", 0.0, 0.1, trained=False)),
            self._weight(Weight(channels, "uniform", 0.8, 1.2, trained=False)),
        ]
        return self._node("BatchNormalization", inputs, self.shapes[x])

    def linear(self, x: str, features: int) -> str:
        """A dense layer with bias on a vector."""
        (count,) = self.shapes[x]
        weight = Weight((features, count), "normal", 0.0, math.sqrt(2 / count))
        bias = Weight((features,), "normal", 0.0, 0.1)
        self.multiply_adds += features * count
        inputs = [x, self._weight(weight), self._weight(bias)]
        return self._node("Gemm", inputs, (features,), transB=1)

    def pointwise(self, x: str, features: int, gain: float = 1.0) -> str:
        """A dense layer over the last axis, as MatMul and Add."""
        *outer, count = self.shapes[x]
        shape = (*outer, features)
        weight = Weight((count, features), "normal", 0.0, math.sqrt(gain / count))
        self.multiply_adds += math.prod(shape) * count
        x = self._node("MatMul", [x, self._weight(weight)], shape)
        bias = self._weight(Weight((features,), "normal", 0.0, 0.1))
        return self._node("Add", [x, bias], shape)

    def layer_norm(self, x: str) -> str:
        """Layer normalisation over the last axis."""
        count = self.shapes[x][-1:]
        scale = self._weight(Weight(count, "uniform", 0.8, 1.2))
        shift = self._weight(Weight(count, "normal", 0.0, 0.1))
        return self._node("LayerNormalization", [x, scale, shift], self.shapes[x], epsilon=1e-6)

    def scale(self, x: str, low: float, high: float) -> str:
        """A trained factor a channel."""
        factor = self._weight(Weight((self.shapes[x][0], 1, 1), "uniform", low, high))
        return self._node("Mul", [x, factor], self.shapes[x])

    # -- what has no weights -------------------------------------------------------------------

    def relu(self, x: str) -> str:
        """``max(x, 0)``."""
        return self._node("Relu", [x], self.shapes[x])

    def relu6(self, x: str) -> str:
        """``min(max(x, 0), 6)``."""
        return self._node("Clip", [x, self._constant(0.0), self._constant(6.0)], self.shapes[x])

    def sigmoid(self, x: str) -> str:
        """``1 / (1 + exp(-x))``."""
        return self._node("Sigmoid", [x], self.shapes[x])

    def silu(self, x: str) -> str:
        """``x sigmoid(x)``."""
        return self.multiply(x, self.sigmoid(x))

    def hard_sigmoid(self, x: str) -> str:
        """``clip(x / 6 + 1 / 2, 0, 1)``."""
        return self._node("HardSigmoid", [x], self.shapes[x], alpha=1 / 6, beta=0.5)

    def hard_swish(self, x: str) -> str:
        """x times its hard sigmoid."""
        return self._node("HardSwish", [x], self.shapes[x])

    def gelu(self, x: str) -> str:
        """``x (1 + erf(x / sqrt 2)) / 2`` in the operators of an export."""
        shape = self.shapes[x]
        y = self._node("Div", [x, self._constant(math.sqrt(2.0))], shape)
        y = self._node("Erf", [y], shape)
        y = self._node("Add", [y, self._constant(1.0)], shape)
        y = self._node("Mul", [x, y], shape)
        return self._node("Mul", [y, self._constant(0.5)], shape)

    def add(self, x: str, y: str) -> str:
        """Sum of two tensors of one shape."""
        return self._node("Add", [x, y], self.shapes[x])

    def multiply(self, x: str, y: str) -> str:
        """Product of a tensor and one of its shape, or with one pixel."""
        return self._node("Mul", [x, y], self.shapes[x])

    def channels(self, x: str, first: int, last: int) -> str:
        """The channels from ``first`` to before ``last`` of a map."""
        bounds = [self._integers(value) for value in ((first,), (last,), (1,))]
        return self._node("Slice", [x, *bounds], (last - first, *self.shapes[x][1:]))

    def shuffle(self, x: str, groups: int) -> str:
        """Channels of groups in turns: the first of each, the second of each, and so on."""
        count, *size = self.shapes[x]
        split = (groups, count // groups, *size)
        y = self._node("Reshape", [x, self._integers((self.batch, *split))], split)
        y = self.transpose(y, (1, 0, 2, 3))
        shape = (count, *size)
        return self._node("Reshape", [y, self._integers((self.batch, *shape))], shape)

    def concat(self, parts: Sequence[str]) -> str:
        """Maps joined along their channels."""
        channels = sum(self.shapes[part][0] for part in parts)
        return self._node("Concat", list(parts), (channels, *self.shapes[parts[0]][1:]), axis=1)

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """Axes of a sample in another order, ``(1, 2, 0)`` for channels last."""
        shape = tuple(self.shapes[x][axis] for axis in order)
        return self._node("Transpose", [x], shape, perm=[0, *(axis + 1 for axis in order)])

    def flatten(self, x: str) -> str:
        """A vector of all values of a sample."""
        return self._node("Flatten", [x], (math.prod(self.shapes[x]),))

    def max_pool(self, x: str, kernel: int, stride: int, pad: int = 0, ceil: bool = False) -> str:
        """Maxima of windows; with ``ceil`` also of windows that the border cuts."""
        attributes: dict[str, Any] = {"pads": [pad] * 4, "ceil_mode": int(ceil)}
        return self._pool("MaxPool", x, kernel, stride, pad, ceil, attributes)

    def average_pool(self, x: str, kernel: int, stride: int) -> str:
        """Means of windows."""
        return self._pool("AveragePool", x, kernel, stride, 0, False, {})

    def global_pool(self, x: str) -> str:
        """Mean of each channel."""
        return self._node("GlobalAveragePool", [x], (self.shapes[x][0], 1, 1))

    def _pool(
        self,
        kind: str,
        x: str,
        kernel: int,
        stride: int,
        pad: int,
        ceil: bool,
        attributes: dict[str, Any],
    ) -> str:
        channels, *extents = self.shapes[x]
        slack = stride - 1 if ceil else 0
        size = [(extent + 2 * pad - kernel + slack) // stride + 1 for extent in extents]
        windows = {"kernel_shape": [kernel, kernel], "strides": [stride, stride]}
        return self._node(kind, [x], (channels, *size), **windows, **attributes)

    def _weight(self, weight: Weight) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = weight
        return name

    def _constant(self, value: float) -> str:
        name = f"c{value:g}"
        self.constants[name] = np.float32(value).reshape(())
        return name

    def _integers(self, values: Sequence[int]) -> str:
        name = "i" + "_".join(map(str, values))
        self.constants[name] = np.array(values, np.int64)
        return name

    def _node(self, kind: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        self.shapes[name] = shape
        return name
