"""A chain of convolutions, and a factored fully connected layer, as PyTorch modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tvm_lowrank.decompose.compose import channel_order, permutation
from tvm_lowrank.extras import require_torch
from tvm_lowrank.geometry import ConvGeometry

torch: Any = require_torch()
nn: Any = torch.nn


class ChannelOrder(nn.Module):
    """Output channel i is input channel ``order[i]``; nothing to train."""

    def __init__(self, order: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("order", torch.from_numpy(np.ascontiguousarray(order, np.int64)))

    def forward(self, x: Any) -> Any:
        """(N, C, H, W) in the new order."""
        return x.index_select(1, self.order)


class FactoredConv2d(nn.Sequential):
    """The stages of a chain, to run and to train.

    Each stage is an ``nn.Conv2d``, after an ``nn.ZeroPad2d`` where its padding differs between the
    sides; stages that only reorder channels are `ChannelOrder`. The last ``nn.Conv2d`` has a bias.

    Parameters
    ----------
    stages : sequence of ConvGeometry
    weights : sequence of np.ndarray
        An OIHW weight a stage.
    bias : np.ndarray
        (F,), of the chain's output.
    gathers : collection of int
        The stages that only reorder channels.
    layer : str
        Name of the plan's layer that the chain stands for.
    """

    def __init__(
        self,
        stages: Sequence[ConvGeometry],
        weights: Sequence[np.ndarray],
        bias: np.ndarray,
        gathers: Collection[int] = (),
        layer: str = "",
    ) -> None:
        super().__init__()
        self.layer = layer
        last, bias = max(set(range(len(stages))) - set(gathers)), np.asarray(bias)
        for weight in reversed(weights[last + 1 :]):
            bias = bias[np.argsort(_order(weight))]
        for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
            if index in gathers:
                self.append(ChannelOrder(_order(weight)))
                continue
            for module in convolution(stage, weight, bias if index == last else None):
                self.append(module)

    def factors(self) -> tuple[np.ndarray, ...]:
        """The present OIHW weight of each stage, float32."""
        found = []
        for module in self:
            if isinstance(module, ChannelOrder):
                found.append(permutation(module.order.cpu().numpy()).astype(np.float32))
            elif isinstance(module, nn.Conv2d):
                found.append(to_array(module.weight))
        return tuple(found)

    def output_bias(self) -> np.ndarray:
        """The present bias (F,), in the order of the output's channels."""
        bias: Any = None
        for module in self:
            if isinstance(module, nn.Conv2d):
                bias = None if module.bias is None else to_array(module.bias)
            elif isinstance(module, ChannelOrder) and bias is not None:
                bias = bias[module.order.cpu().numpy()]
        assert bias is not None
        return bias

    def padding(self) -> tuple[int, int, int, int]:
        """Rows and columns of zeros that all stages add: top, left, bottom, right."""
        total = np.zeros(4, int)
        for module in self:
            if isinstance(module, nn.ZeroPad2d):
                left, right, top, bottom = module.padding
                total += (top, left, bottom, right)
            elif isinstance(module, nn.Conv2d):
                total += (*module.padding, *module.padding)
        top, left, bottom, right = (int(side) for side in total)
        return top, left, bottom, right


class FactoredLinear(nn.Sequential):
    """Two ``nn.Linear``, the second with the bias, to run and to train.

    Parameters
    ----------
    weights : pair of np.ndarray
        The OIHW weights of the form ``svd``.
    bias : np.ndarray
        (F,).
    layer : str
        Name of the plan's layer that they stand for.
    """

    def __init__(self, weights: Sequence[np.ndarray], bias: np.ndarray, layer: str = "") -> None:
        super().__init__(
            *(linear(w, b) for w, b in zip(weights, (None, np.asarray(bias)), strict=True))
        )
        self.layer = layer
        self.shapes = [weight.shape for weight in weights]

    def factors(self) -> tuple[np.ndarray, ...]:
        """The present OIHW weight of each stage, float32."""
        pairs = zip(self, self.shapes, strict=True)
        return tuple(to_array(module.weight).reshape(shape) for module, shape in pairs)

    def output_bias(self) -> np.ndarray:
        """The present bias (F,)."""
        return to_array(self[-1].bias)


def linear(weight: np.ndarray, bias: np.ndarray | None) -> Any:
    """An ``nn.Linear`` of an OIHW weight that reads its whole input."""
    flat = weight.reshape(len(weight), -1)
    made = nn.Linear(flat.shape[1], flat.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(_tensor(flat))
        if bias is not None:
            made.bias.copy_(_tensor(bias))
    return made


def convolution(geometry: ConvGeometry, weight: np.ndarray, bias: np.ndarray | None) -> list[Any]:
    """An ``nn.Conv2d``, after an ``nn.ZeroPad2d`` if its padding differs between the sides."""
    top, left, bottom, right = geometry.padding
    even = (top, left) == (bottom, right)
    made = nn.Conv2d(
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        (top, left) if even else 0,
        geometry.dilation,
        geometry.groups,
        bias=bias is not None,
    )
    with torch.no_grad():
        made.weight.copy_(_tensor(weight))
        if bias is not None:
            made.bias.copy_(_tensor(bias))
    return [made] if even else [nn.ZeroPad2d((left, right, top, bottom)), made]


def scale_outputs(
    weights: Sequence[np.ndarray], scale: np.ndarray, gathers: Collection[int] = ()
) -> tuple[np.ndarray, ...]:
    """The factors of a chain whose output channel f is ``scale[f]`` times that of the given one."""
    scaled = list(weights)
    for index in reversed(range(len(weights))):
        if index in gathers:
            scale = scale[np.argsort(_order(weights[index]))]
            continue
        product = weights[index].astype(np.float64) * scale.reshape(-1, 1, 1, 1)
        scaled[index] = product.astype(np.float32)
        break
    return tuple(scaled)


def to_array(tensor: Any) -> np.ndarray:
    """A copy of a tensor as a float32 array."""
    array: np.ndarray = tensor.detach().cpu().float().numpy()
    return array.copy()


def _order(weight: np.ndarray) -> np.ndarray:
    order = channel_order(weight)
    assert order is not None
    return order


def _tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
