"""Grouped convolutions as fewer, larger groups that fill whole blocks of channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_lowrank.geometry import ConvGeometry


def is_depthwise(geometry: ConvGeometry) -> bool:
    """Whether every output channel reads one input channel of its own."""
    return 1 < geometry.groups == geometry.in_channels == geometry.out_channels


def merge_groups(geometry: ConvGeometry, in_block: int, lanes: int) -> ConvGeometry:
    """The same convolution with as few groups merged into one as blocks of channels allow.

    Each group of the result has whole blocks of ``in_block`` input and ``lanes`` output channels,
    or is the only one. Its weights off the diagonal are zeros, to be multiplied all the same.
    Groups may be missing in the last one: its channels are those that fill up the last block.
    """
    groups = geometry.groups
    inputs, outputs = geometry.in_channels // groups, geometry.out_channels // groups
    for merged in range(1, groups):
        read, made, left = merged * inputs, merged * outputs, -(-groups // merged)
        aligned = read % in_block == 0 and made % lanes == 0
        # No block more than there are.
        ends = (
            left * read - geometry.in_channels < in_block,
            left * made - geometry.out_channels < lanes,
        )
        if aligned and all(ends):
            return replace(geometry, in_channels=left * read, out_channels=left * made, groups=left)
    return replace(geometry, groups=1)


def merge_weight(weight: np.ndarray, geometry: ConvGeometry, merged: ConvGeometry) -> np.ndarray:
    """The OIHW weight of ``merged``, block-diagonal in its groups, from that of ``geometry``."""
    if merged.groups == geometry.groups:
        return weight
    wide = np.zeros(merged.weight_shape, np.float32)
    outputs = geometry.out_channels // geometry.groups
    inputs = geometry.in_channels // geometry.groups
    together = merged.in_channels // merged.groups // inputs
    for group in range(geometry.groups):
        at = group % together * inputs
        rows = slice(group * outputs, (group + 1) * outputs)
        wide[rows, at : at + inputs] = weight[rows]
    return wide
