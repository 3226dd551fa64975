"""What convolutions and dense layers become: pending convolutions of blocked maps."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm_lowrank.passes.blocked import (
    CHW,
    HWC,
    NCHW,
    NHWC,
    BlockedTensor,
    Pending,
    of_map,
)
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import constant_array, is_constant, static_shape
from tvm_lowrank.passes.kernel_calls import Convolution

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import conv2d_geometry


def lower_convolution(
    rewriter: BlockedRewriter, value: relax.Call, layer: str
) -> BlockedTensor | None:
    """A conv2d as a pending kernel; None if no kernel takes it."""
    if not is_canonical_conv2d(value):
        return None
    geometry = conv2d_geometry(value)
    data = rewriter.tensor(value.args[0])
    if data.view != NCHW or rewriter.refuses(geometry, rewriter.in_block(geometry, data)):
        return None
    shape = (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width)
    conv = Convolution(geometry, rewriter.array_of(value.args[1]), layer)
    before = rewriter.pending(value.args[0])
    if before is not None and not isinstance(before.operation, Convolution):
        before = None
    return of_map(shape, pending=Pending([data], conv, before))


def lower_dense(
    rewriter: BlockedRewriter, value: relax.Call, layer: str | None
) -> BlockedTensor | None:
    """A product with a constant matrix as a pending convolution; None if it is no such.

    ``layer`` is the name that plans have for it, if any.
    """
    left, right = value.args
    shape = static_shape(left)
    if shape is None or not is_constant(right) or is_constant(left):
        return None
    weight = constant_array(right)
    if weight.dtype != np.float32 or weight.ndim != 2:
        return None
    out_features = weight.shape[1]
    data = rewriter.tensor(left)
    n, c, h, w = data.map
    if data.view == NHWC and data.channels_at_end:
        geometry = ConvGeometry(c, out_features, h, w, (1, 1), batch=n)
        out_shape = (*data.shape[:-1], out_features)
        out_map, view = (n, out_features, h, w), NHWC
    elif len(shape) == 2 and data.view in (CHW, HWC):
        # A flattened map is not taken apart: the dense layer is a convolution as large as it.
        geometry = ConvGeometry(c, out_features, h, w, (h, w), batch=n)
        out_shape, out_map, view = (n, out_features), (n, out_features, 1, 1), CHW
    else:
        return None
    if rewriter.refuses(geometry, rewriter.in_block(geometry, data)):
        return None

    def arrange(kernel: np.ndarray) -> np.ndarray:
        """A view: packing copies it once."""
        if data.view == HWC:
            kernel = kernel.reshape(out_features, h, w, c).transpose(0, 3, 1, 2)
        return kernel.reshape(geometry.weight_shape)

    pending = Pending([data], Convolution(geometry, weight.T, layer, arrange=arrange))
    return BlockedTensor(out_shape, out_map, view, pending=pending)
