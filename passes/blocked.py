"""Tensors of a network that is being lowered, in the layouts that they exist in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tvm import relax
from tvm_lowrank.passes.kernel_calls import Convolution, Shape, Step
from tvm_lowrank.schedules.x86.gather import GatherWorkload
from tvm_lowrank.schedules.x86.interleave import InterleaveWorkload
from tvm_lowrank.schedules.x86.placement import Images

# How the network sees a map: as it is, with channels last (whatever the axes before them), or
# flattened to (N, C H W) in either order.
NCHW, NHWC, CHW, HWC = "nchw", "nhwc", "chw", "hwc"


@dataclass
class Elementwise:
    """Epilogue steps on a map that is there already."""

    steps: list[Step] = field(default_factory=list)


@dataclass
class Gather:
    """A copy that concatenates, slices or pads; it takes steps if the pixels stay in place.

    ``owned`` are the sources that nothing else reads, by their numbers.
    """

    workload: GatherWorkload
    owned: frozenset[int] = frozenset()
    steps: list[Step] = field(default_factory=list)


@dataclass
class Interleave:
    """A map of more pixels from one of more channels; it takes steps."""

    workload: InterleaveWorkload
    steps: list[Step] = field(default_factory=list)


Operation: TypeAlias = Convolution | Elementwise | Gather | Interleave


@dataclass
class Pending:
    """An operation whose call is not written yet, because what follows may join it.

    ``before`` is the convolution that makes its source, if that is pending too and nothing else
    reads it.
    """

    sources: list[BlockedTensor]
    operation: Operation
    before: Pending | None = None


@dataclass
class BlockedTensor:
    """A value that is there plain (as the network sees it), in blocks, both, or is pending.

    ``map`` is the (N, C, H, W) map behind it, of which the blocked form is made, and ``view`` how
    the network sees that map: ``shape`` is its shape there. Some images of a plain batch are at
    first there only as ``piece`` of it: that batch, and which images.
    """

    shape: tuple[int, ...]
    map: Shape
    view: str
    plain: relax.Expr | None = None
    blocked: relax.Expr | None = None
    pending: Pending | None = None
    piece: tuple[relax.Expr, Images] | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether it is, or will be, there in blocks without a conversion."""
        return self.blocked is not None or self.pending is not None

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return self.map[1]

    @property
    def channels_at_end(self) -> bool:
        """Whether the channels are the last axis that the network sees."""
        if self.view == NHWC:
            return self.shape[-1] == self.channels
        return self.view in (CHW, HWC) and self.map[2:] == (1, 1)


def of_map(shape: Shape, **layouts: Any) -> BlockedTensor:
    """A tensor that the network sees as its map."""
    return BlockedTensor(shape, shape, NCHW, **layouts)


def of_plain(shape: tuple[int, ...], plain: relax.Expr) -> BlockedTensor:
    """A tensor of the network's that is plain; of two axes, the second are channels."""
    if len(shape) == 2:
        return BlockedTensor(shape, (*shape, 1, 1), CHW, plain)
    n, c, h, w = (*shape, 1, 1, 1, 1)[:4]
    return BlockedTensor(shape, (n, c, h, w), NCHW, plain)


def view_of(tensor: BlockedTensor, shape: tuple[int, ...], order: list[int] | None) -> str | None:
    """How the network sees ``tensor`` after a permutation of its axes, or a reshape, to ``shape``.

    ``order`` is the permutation, None for a reshape. None if that is no view of the map.
    """
    n, c, h, w = tensor.map
    if order is not None:
        if (tensor.view, order) == (NCHW, [0, 2, 3, 1]):
            return NHWC
        if (tensor.view, order, w) == (NCHW, [0, 2, 1, 3], 1):
            return NHWC  # but for the place of an axis of one
        back = tensor.shape == (n, h, w, c) and (tensor.view, order) == (NHWC, [0, 3, 1, 2])
        return NCHW if back else None
    if shape == tensor.map and (h, w) == (1, 1):
        return NCHW
    if tensor.channels_at_end and tensor.view == NHWC and shape[-1] == c:
        return NHWC
    if shape == (n, c * h * w):
        return {NCHW: CHW, NHWC: HWC}.get(tensor.view, tensor.view)
    return tensor.view if shape == tensor.shape else None
