"""The convolutions of a network as plain values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    constant_array,
    dataflow_bindings,
    is_constant,
    op_name,
    static_shape,
)


@dataclass(frozen=True)
class ConvLayer:
    """One ``conv2d`` of a normalised network.

    ``name`` is ``conv<i>``, i its place in the function. ``weight`` is OIHW float32, ``bias`` has
    shape (F,). A layer that the plugin cannot read has no geometry, empty
    arrays and a ``reason``.
    """

    name: str
    geometry: ConvGeometry | None
    weight: np.ndarray
    bias: np.ndarray
    reason: str | None = None


def collect_layers(mod: tvm.IRModule) -> list[ConvLayer]:
    """Every ``conv2d`` of a normalised module's ``main``, in order.

    Returns an empty list when ``main`` is not straight-line dataflow.
    """
    bindings = dataflow_bindings(mod["main"]) or []
    biases = {
        binding.value.args[0]: constant_array(binding.value.args[1]).reshape(-1)
        for binding in bindings
        if op_name(binding.value) == "add" and is_constant(binding.value.args[1])
    }
    layers: list[ConvLayer] = []
    for binding in bindings:
        call = binding.value
        if op_name(call) != "nn.conv2d":
            continue
        name = f"conv{len(layers)}"
        if not is_canonical_conv2d(call):
            reason = (
                f"layout {call.attrs.data_layout}/{call.attrs.kernel_layout} with dtype, shape or "
                "weights that are not float32, static and constant"
            )
            layers.append(ConvLayer(name, None, np.empty((0,) * 4), np.empty(0), reason))
            continue
        geometry = conv2d_geometry(call)
        weight = constant_array(call.args[1])
        bias = biases.get(binding.var, np.zeros(geometry.out_channels, np.float32))
        layers.append(ConvLayer(name, geometry, weight, bias))
    return layers


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
