"""Pooling, resizing, and normalisation over channels, of blocked maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax
from tvm_lowrank.passes.blocked import CHW, NCHW, NHWC, BlockedTensor, of_map
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter
from tvm_lowrank.passes.graph import constant_array, is_constant, op_name, static_shape
from tvm_lowrank.passes.resize_tables import tables_of
from tvm_lowrank.schedules.x86 import pooling


def lower_pool(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """Max and average pooling in one kernel; None for what it does not cover."""
    source = rewriter.blocked_map(value.args[0])
    workload = None if source is None else pool_workload(value, source.map)
    if source is None or workload is None:
        return None
    shape = (workload.batch, workload.channels, workload.out_height, workload.out_width)
    return of_map(shape, blocked=rewriter.calls.pool(rewriter.blocked(source), workload))


def pool_workload(
    value: relax.Call, source: tuple[int, int, int, int]
) -> pooling.PoolWorkload | None:
    """Max or average pooling of an NCHW map of such a shape; None for what has no kernel."""
    attrs = value.attrs
    if str(attrs.layout) != "NCHW" or str(attrs.out_layout) != "NCHW":
        return None
    batch, channels, height, width = source
    workload = pooling.PoolWorkload(
        kind="max" if op_name(value) == "nn.max_pool2d" else "avg",
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
    return workload


def lower_global_pool(
    rewriter: BlockedRewriter, name: str, value: relax.Call
) -> BlockedTensor | None:
    """The mean of each channel's map; None for means over other axes."""
    source = rewriter.values.get(value.args[0])
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
    pooled = rewriter.calls.pool(rewriter.blocked(source), workload)
    return BlockedTensor(out, (batch, channels, 1, 1), views[out], blocked=pooled)


def lower_layer_norm(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """Layer norm over the channels, the last axis there; None for other axes."""
    source = rewriter.values.get(value.args[0])
    if not isinstance(source, BlockedTensor) or not source.is_blocked:
        return None
    attrs = value.attrs
    if not source.channels_at_end or source.channels % rewriter.calls.isa.lanes:
        return None
    last = len(source.shape) - 1
    if [int(axis) % (last + 1) for axis in attrs.axes] != [last]:
        return None
    if not (attrs.center and attrs.scale and all(is_constant(arg) for arg in value.args[1:])):
        return None
    scale, shift = (constant_array(arg).reshape(-1) for arg in value.args[1:])
    blocked = rewriter.calls.layer_norm(
        rewriter.blocked(source), source.map, float(attrs.epsilon), (scale, shift)
    )
    return BlockedTensor(source.shape, source.map, source.view, blocked=blocked)


def lower_resize(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """The nearest pixel or linear interpolation; None for cubic, and for parts of the map."""
    source, shape = rewriter.blocked_map(value.args[0]), static_shape(value)
    if source is None or shape is None:
        return None
    try:
        tables = tables_of(value, source.map[2:], shape[2:])
    except ValueError:
        return None
    linear = str(value.attrs.method) == "linear"
    blocked = rewriter.calls.resize(rewriter.blocked(source), source.map, tables, linear)
    n, c, h, w = shape
    return of_map((n, c, h, w), blocked=blocked)


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second
