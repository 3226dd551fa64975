"""What a convolution of few channels becomes where channels are copied by eights.

Channels are filled up with zeros. Where a stride of 2 leaves out pixels, every 2 x 2 of them become
the channels of one: kernel and sum are then a quarter as large for four times the channels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

from . import turn
from .gemm import round_up

# Of a map whose pixels are split.
_FEW = 4


def splits(workload: ConvWorkload) -> bool:
    """Whether the kernel reads its input as `turn.split` says: of few channels, by twos.

    Four pixels then are the channels of one, and the kernel is half as large with a stride of 1.
    """
    g = workload.geometry
    return (
        g.groups == 1
        and g.in_channels <= _FEW
        and max(g.kernel) > 1
        and (g.stride, g.dilation) == ((2, 2), (1, 1))
        and g.height % 2 == g.width % 2 == 0
        and min(_split_padding(g)) >= 0
    )


def _split_kernel(geometry: ConvGeometry) -> tuple[int, int]:
    """Taps along both axes over split pixels."""
    top, left, *_ = geometry.padding
    rows, columns = geometry.kernel
    return (rows + top % 2 + 1) // 2, (columns + left % 2 + 1) // 2


def _split_padding(geometry: ConvGeometry) -> tuple[int, int, int, int]:
    """Padding of the map of split pixels."""
    g = geometry
    top, left = (g.padding[0] + 1) // 2, (g.padding[1] + 1) // 2
    rows, columns = _split_kernel(g)
    bottom = g.out_height + rows - 1 - g.height // 2 - top
    return top, left, bottom, g.out_width + columns - 1 - g.width // 2 - left


def inner(workload: ConvWorkload) -> ConvWorkload:
    """The convolution that is computed: of whole eights of channels, or of split pixels."""
    g = workload.geometry
    if splits(workload):
        _, channels, height, width = turn.split((1, g.in_channels, g.height, g.width))
        whole = ConvGeometry(
            channels,
            g.out_channels,
            height,
            width,
            _split_kernel(g),
            padding=_split_padding(g),
            batch=g.batch,
        )
    elif g.groups > 1 or g.in_channels % turn.EIGHT == 0:
        return workload
    else:
        whole = replace(g, in_channels=round_up(g.in_channels, turn.EIGHT))
    return replace(workload, geometry=whole)


def inner_weight(weight: np.ndarray, workload: ConvWorkload) -> np.ndarray:
    """The OIHW weight of `inner`'s convolution."""
    g, made = workload.geometry, inner(workload).geometry
    if made is g:
        return weight
    found = np.zeros(made.weight_shape, weight.dtype)
    if not splits(workload):
        found[:, : g.in_channels] = weight
        return found
    for u, v in np.ndindex(g.kernel):
        row, column = u + g.padding[0] % 2, v + g.padding[1] % 2
        first = (row % 2 * 2 + column % 2) * g.in_channels
        found[:, first : first + g.in_channels, row // 2, column // 2] = weight[:, :, u, v]
    return found
