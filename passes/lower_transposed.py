"""Transposed convolutions: the phases of their output by one convolution, then interleaved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm_lowrank.passes.blocked import NCHW, BlockedTensor, Interleave, Pending, of_map
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter
from tvm_lowrank.passes.graph import is_constant, static_shape
from tvm_lowrank.passes.kernel_calls import Convolution
from tvm_lowrank.schedules.x86.gather import runs_of
from tvm_lowrank.schedules.x86.interleave import InterleaveWorkload

from tvm_lowrank.decompose.compose import channel_order
from tvm_lowrank.geometry import ConvGeometry


def lower_transposed(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """A conv2d_transpose as a convolution that makes the phases of its output, interleaved.

    One that only moves channels to pixels (depth to space) needs no convolution. None for groups,
    dilation, and layouts other than NCHW.
    """
    attrs, shape, out = value.attrs, static_shape(value.args[0]), static_shape(value)
    plain = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    known = is_constant(value.args[1]) and shape is not None and out is not None
    if plain != ("NCHW", "IOHW", "NCHW") or not known or int(attrs.groups) != 1:
        return None
    assert shape is not None and out is not None
    data, weight = rewriter.tensor(value.args[0]), rewriter.array_of(value.args[1])
    if data.view != NCHW or any(int(d) != 1 for d in attrs.dilation) or weight.dtype != np.float32:
        return None
    stride = (int(attrs.strides[0]), int(attrs.strides[1]))
    axes = [
        phases_of(shape[2 + i], out[2 + i], weight.shape[2 + i], stride[i], int(attrs.padding[i]))
        for i in (0, 1)
    ]
    if None in axes:
        return None
    rows, columns = (axis for axis in axes if axis is not None)
    kernel = phase_weights(weight, stride, (rows, columns))
    filters, (batch, channels, height, width) = out[1], data.map
    geometry = ConvGeometry(
        channels,
        len(kernel),
        height,
        width,
        (rows.taps, columns.taps),
        padding=(rows.before, columns.before, rows.after, columns.after),
        batch=batch,
    )
    order = channel_order(kernel)
    if order is None:
        if rewriter.refuses(geometry, rewriter.in_block(geometry, data)):
            return None
        made = (batch, len(kernel), geometry.out_height, geometry.out_width)
        conv = Convolution(geometry, kernel, None)
        data = of_map(made, pending=Pending([data], conv))
        order = np.arange(len(kernel))
    phases = tuple(runs_of(phase) for phase in order.reshape(-1, filters))
    workload = InterleaveWorkload(
        batch, data.channels, *data.map[2:], stride, phases, (out[2], out[3])
    )
    return of_map((batch, filters, *out[2:]), pending=Pending([data], Interleave(workload)))


@dataclass(frozen=True)
class Phases:
    """An axis of a transposed convolution as one of a convolution that makes all its phases.

    It has ``taps``, and zeros ``before`` and ``after``. Output ``stride i + phase`` reads input
    ``i + tap - before`` by the weight ``stride (before - tap) + phase + padding``, if that is one.
    """

    taps: int
    before: int
    after: int
    padding: int


def phases_of(size: int, out_size: int, taps: int, stride: int, padding: int) -> Phases | None:
    """An axis of so many inputs, outputs and taps; None where inputs would have to be cut off."""
    low = min(-((phase + padding) // stride) for phase in range(stride))
    high = max((taps - 1 - phase - padding) // stride for phase in range(stride))
    reach = high - low + 1
    after = -(-out_size // stride) - size - high + reach - 1
    return None if reach < 1 or high < 0 or after < 0 else Phases(reach, high, after, padding)


def phase_weights(
    weight: np.ndarray, stride: tuple[int, int], axes: tuple[Phases, Phases]
) -> np.ndarray:
    """The OIHW weight of the convolution, phase by phase, from an IOHW one."""
    channels, filters, *taps = weight.shape
    found = np.zeros((*stride, filters, channels, axes[0].taps, axes[1].taps), np.float32)
    for place in np.ndindex(*stride, axes[0].taps, axes[1].taps):
        phase, tap = place[:2], place[2:]
        kept = [
            step * (axis.before - t) + p + axis.padding
            for step, axis, p, t in zip(stride, axes, phase, tap, strict=True)
        ]
        if all(0 <= k < count for k, count in zip(kept, taps, strict=True)):
            found[(*phase, ..., *tap)] = weight[:, :, kept[0], kept[1]].T
    return found.reshape(-1, channels, axes[0].taps, axes[1].taps)
