"""The convolutions and fully connected layers of a network as plain values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    constant_array,
    dataflow_bindings,
    is_constant,
    is_dense,
    op_name,
    static_shape,
)

MATMUL = "matmul"


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """One ``conv2d`` of a normalised network, or one fully connected layer seen as a convolution.

    ``name`` is ``conv<i>`` or ``matmul<i>``, i its place among its like in the function. ``weight``
    is OIHW float32, ``bias`` has shape (F,). A layer that the plugin cannot read has no geometry,
    empty arrays and a ``reason``.
    """

    name: str
    geometry: ConvGeometry | None
    weight: np.ndarray
    bias: np.ndarray
    reason: str | None = None

    @property
    def fully_connected(self) -> bool:
        """Whether this is a product with a matrix in the network, not a convolution."""
        return is_fully_connected(self.name)


def is_fully_connected(name: str) -> bool:
    """Whether a layer of that name is a product with a matrix."""
    return name.startswith(MATMUL)


def collect_layers(mod: tvm.IRModule) -> list[ConvLayer]:
    """Every ``conv2d`` and every fully connected layer of a normalised ``main``, in order.

    Fully connected layers are products of ``(N, C)`` with a constant ``(C, F)``, plus a constant
    ``(F,)``. Each is a convolution as large as its input: 1x1 of a map of one pixel, or X x Y of
    the map ``(C', X, Y)`` that was flattened before it. Products that differ otherwise (of more
    axes, or without a bias to correct) are counted in the names and left out.

    Returns an empty list when ``main`` is not straight-line dataflow.
    """
    bindings = dataflow_bindings(mod["main"]) or []
    biases, products, layers = _biases(bindings), fully_connected_products(mod), []
    convolutions = 0
    for binding in bindings:
        call = binding.value
        if op_name(call) == "nn.conv2d":
            layers.append(_convolution(f"conv{convolutions}", call, biases.get(binding.var)))
            convolutions += 1
        elif binding.var in products:
            name, geometry = products[binding.var]
            weight = np.ascontiguousarray(constant_array(call.args[1]).T)
            weight = weight.reshape(geometry.weight_shape)
            layers.append(ConvLayer(name, geometry, weight, biases[binding.var]))
    return layers


def fully_connected_products(mod: tvm.IRModule) -> dict[relax.Var, tuple[str, ConvGeometry]]:
    """Name and geometry of the fully connected layers of `collect_layers`, by their variables."""
    bindings = dataflow_bindings(mod["main"]) or []
    made = {binding.var: binding.value for binding in bindings}
    biases = _biases(bindings)
    found: dict[relax.Var, tuple[str, ConvGeometry]] = {}
    count = 0
    for var, call in made.items():
        if not is_dense(call):
            continue
        name, count = f"{MATMUL}{count}", count + 1
        geometry, bias = product_geometry(call, made), biases.get(var)
        if geometry is not None and bias is not None and len(bias) == geometry.out_channels:
            found[var] = name, geometry
    return found


def product_geometry(call: relax.Call, made: Mapping[Any, Any]) -> ConvGeometry | None:
    """A product with a constant matrix as a convolution as large as its input, None if it is none.

    ``made`` are the values of the variables before it; of a flattened map it is a convolution.
    """
    shape = static_shape(call.args[0]) if is_dense(call) else None
    if shape is None or len(shape) != 2:
        return None
    batch, channels, height, width = _map_before(call.args[0], made) or (*shape, 1, 1)
    outputs = int(call.args[1].ty.shape[1])
    return ConvGeometry(channels, outputs, height, width, (height, width), batch=batch)


def _biases(bindings: list[Any]) -> dict[Any, np.ndarray]:
    """Constants (flattened) that are added to a variable, by that variable."""
    found = {}
    for binding in bindings:
        if op_name(binding.value) == "add":
            for tensor, const in itertools.permutations(binding.value.args):
                if isinstance(tensor, relax.Var) and is_constant(const):
                    found[tensor] = constant_array(const).reshape(-1)
    return found


def _convolution(name: str, call: relax.Call, bias: np.ndarray | None) -> ConvLayer:
    if not is_canonical_conv2d(call):
        reason = (
            f"layout {call.attrs.data_layout}/{call.attrs.kernel_layout} with dtype, shape or "
            "weights that are not float32, static and constant"
        )
        return ConvLayer(name, None, np.empty((0,) * 4), np.empty(0), reason)
    geometry = conv2d_geometry(call)
    if bias is None:
        bias = np.zeros(geometry.out_channels, np.float32)
    return ConvLayer(name, geometry, constant_array(call.args[1]), bias)


def _map_before(var: Any, made: Mapping[Any, Any]) -> tuple[int, int, int, int] | None:
    """Shape (N, C, H, W) of the map that was flattened to ``var``, or None."""
    value = made.get(var)
    if value is None or op_name(value) not in ("reshape", "flatten", "squeeze"):
        return None
    before, after = static_shape(value.args[0]), static_shape(var)
    if before is None or after is None or len(before) != 4 or before[0] != after[0]:
        return None
    n, c, h, w = before
    # Channels that come last were at no other place before: nothing is known of a map.
    return (n, c, h, w) if c > 1 else None


def conv2d_geometry(call: tvm.relax.Call) -> ConvGeometry:
    """The geometry of a canonical conv2d call."""
    data, weight = static_shape(call.args[0]), static_shape(call.args[1])
    assert data is not None and weight is not None
    batch, channels, height, width = data
    out_channels, _, kernel_h, kernel_w = weight
    attrs = call.attrs
    top, left, bottom, right = (int(p) for p in attrs.padding)
    stride_h, stride_w = (int(s) for s in attrs.strides)
    dilation_h, dilation_w = (int(d) for d in attrs.dilation)
    return ConvGeometry(
        in_channels=channels,
        out_channels=out_channels,
        height=height,
        width=width,
        kernel=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        padding=(top, left, bottom, right),
        dilation=(dilation_h, dilation_w),
        groups=int(attrs.groups),
        batch=batch,
    )
