"""Elementwise operators as steps of the kernel before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm_lowrank.passes.activations import Activation
from tvm_lowrank.passes.blocked import NCHW, NHWC, BlockedTensor
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter, steps_of
from tvm_lowrank.passes.graph import constant_array, is_constant, static_shape
from tvm_lowrank.passes.kernel_calls import Step

# Activations that kernels apply to their result, with the step that each is.
ACTIVATIONS: dict[str, Callable[[relax.Call], str]] = {
    "nn.relu": lambda call: "relu",
    "nn.relu6": lambda call: "clip:0.0:6.0",
    "clip": lambda call: ":".join(["clip", *(str(float(x.value)) for x in call.args[1:])]),
    "nn.leakyrelu": lambda call: f"leaky_relu:{float(call.attrs.alpha)}",
    "sigmoid": lambda call: "sigmoid",
    "tanh": lambda call: "tanh",
    "nn.silu": lambda call: "silu",
    "nn.gelu": lambda call: "gelu",
}


def lower_binary(rewriter: BlockedRewriter, name: str, value: relax.Call) -> BlockedTensor | None:
    """An addition or multiplication: by a constant, a residual, a gate; None if neither."""
    left, right = value.args
    if is_constant(left) or is_constant(right):
        tensor, const = (right, left) if is_constant(left) else (left, right)
        return _lower_channelwise(rewriter, name, tensor, const)
    if name == "multiply":
        return _lower_gate(rewriter, left, right) or _lower_gate(rewriter, right, left)
    if name != "add" or left.same_as(right) or static_shape(left) is None:
        return None
    first, second = rewriter.values.get(left), rewriter.values.get(right)
    if not isinstance(first, BlockedTensor) or not isinstance(second, BlockedTensor):
        return None
    if (first.shape, first.view, first.map) != (second.shape, second.view, second.map):
        return None
    # A kernel that is still open takes the addition along, best one with enough arithmetic to hide
    # the reading; one of its own is the last resort.
    pairs = [(right, left), (left, right)]
    pairs.sort(
        key=lambda pair: (not rewriter.takes_steps(pair[0]), not rewriter.is_product(pair[0]))
    )
    for here, there in pairs:
        if rewriter.values[here].is_blocked:
            other = rewriter.blocked(rewriter.values[there])
            return append_step(rewriter, here, "residual", [other])
    return None


def _lower_gate(
    rewriter: BlockedRewriter, var: relax.Expr, gate: relax.Expr
) -> BlockedTensor | None:
    """A map times a value for each image and channel (squeeze and excitation)."""
    source, by = rewriter.values.get(var), rewriter.values.get(gate)
    if not isinstance(source, BlockedTensor) or not isinstance(by, BlockedTensor):
        return None
    batch, channels, *_ = source.map
    shapes = {NCHW: (batch, channels, 1, 1), NHWC: (batch, 1, 1, channels)}
    if len(source.shape) != 4 or by.shape != shapes.get(source.view) or not source.is_blocked:
        return None
    if source.view == NHWC and not source.channels_at_end:
        return None
    if by.map != (batch, channels, 1, 1):
        return None
    return append_step(rewriter, var, "gate", [rewriter.blocked(by)])


def _lower_channelwise(
    rewriter: BlockedRewriter, name: str, tensor: relax.Expr, const: relax.Expr
) -> BlockedTensor | None:
    source = rewriter.values.get(tensor) if isinstance(tensor, relax.Var) else None
    if not isinstance(source, BlockedTensor) or not source.is_blocked:
        return None
    vector = _channel_vector(const, source)
    if vector is None:
        return None
    opened = rewriter.opened(tensor)
    append_channelwise(steps_of(opened), name, vector)
    return opened


def lower_activation(rewriter: BlockedRewriter, found: Activation) -> BlockedTensor | None:
    """An activation found in its parts, as one step; None if its input is not in blocks."""
    result = append_step(rewriter, found.source, found.step, [])
    if result is not None and found.scale != 1:
        vector = np.full(result.channels, found.scale, np.float32)
        append_channelwise(steps_of(result), "multiply", vector)
    return result


def lower_prelu(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """ReLU with a trained slope, one or one a channel; None for other slopes."""
    var, slopes = value.args
    source = rewriter.values.get(var) if isinstance(var, relax.Var) else None
    if not isinstance(source, BlockedTensor) or not is_constant(slopes):
        return None
    array = constant_array(slopes).reshape(-1)
    if array.size and (array == array[0]).all():
        return append_step(rewriter, var, f"leaky_relu:{float(array[0])}", [])
    if array.size != source.channels or (source.view, int(value.attrs.axis)) != (NCHW, 1):
        return None
    return append_step(rewriter, var, "prelu", [array])


def lower_plain(rewriter: BlockedRewriter, step: str, var: relax.Expr) -> relax.Expr | None:
    """An activation of a tensor that is in no blocks; None for tensors shorter than a vector."""
    shape = static_shape(var)
    count = math.prod(shape or ())
    if shape is None or count < rewriter.calls.isa.lanes:
        return None
    row = rewriter.emit(relax.op.reshape(rewriter.substitute(var), (count,)))
    return rewriter.emit(relax.op.reshape(rewriter.calls.activation(row, count, step), shape))


def append_step(
    rewriter: BlockedRewriter, var: relax.Expr, step: str, operands: list[Any]
) -> BlockedTensor | None:
    """The value of ``var`` with an epilogue step more, if it is in blocks."""
    source = rewriter.values.get(var) if isinstance(var, relax.Var) else None
    if not isinstance(source, BlockedTensor) or not source.is_blocked:
        return None
    opened = rewriter.opened(var)
    steps_of(opened).append((step, operands))
    return opened


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


def append_channelwise(steps: list[Step], name: str, vector: np.ndarray) -> None:
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
