"""Operators that only move values: other views of a map's blocks, or one copy of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tvm import relax
from tvm_lowrank.passes.blocked import (
    NCHW,
    NHWC,
    BlockedTensor,
    Gather,
    Pending,
    of_map,
    view_of,
)
from tvm_lowrank.passes.blocked_rewriter import BlockedRewriter
from tvm_lowrank.passes.graph import constant_array, is_constant
from tvm_lowrank.schedules.x86.emitter import ALIGNMENT
from tvm_lowrank.schedules.x86.gather import ChannelRun, GatherWorkload, joined_runs
from tvm_lowrank.schedules.x86.placement import Images


def lower_view(
    rewriter: BlockedRewriter, name: str, value: relax.Call, shape: tuple[int, ...] | None
) -> BlockedTensor | None:
    """A reshape or transposition that leaves the blocks as they are; None for others."""
    source = rewriter.values.get(value.args[0])
    if not isinstance(source, BlockedTensor) or not source.is_blocked or shape is None:
        return None
    order = None
    if name == "permute_dims":
        rank = len(source.shape)
        order = [int(axis) % rank for axis in value.attrs.axes or range(rank)[::-1]]
    view = view_of(source, shape, order)
    if view is None:
        return None
    if rewriter.pending(value.args[0]) is None:
        return BlockedTensor(shape, source.map, view, blocked=rewriter.blocked(source))
    return BlockedTensor(shape, source.map, view, pending=source.pending)


def lower_concat(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """A concatenation along the channels as a pending copy; None along other axes."""
    fields = value.args[0]
    if not isinstance(fields, relax.Tuple) or any(is_constant(field) for field in fields.fields):
        return None
    sources = [rewriter.tensor(field) for field in fields.fields]
    views = {source.view for source in sources}
    axis = value.attrs.axis
    if len(views) != 1 or axis is None or not any(source.is_blocked for source in sources):
        return None
    rank = len(sources[0].shape)
    (view,) = views
    if int(axis) == 0 and view == NCHW and all(source.is_blocked for source in sources):
        counts = Counter(fields.fields)
        alone = [rewriter.users.get(field) == counts[field] == 1 for field in fields.fields]
        n, (_, c, h, w) = sum(source.map[0] for source in sources), sources[0].map
        return of_map((n, c, h, w), blocked=rewriter.stack(sources, alone))
    channel_axis = {NCHW: 1, NHWC: 3}.get(view)
    if int(axis) % rank != channel_axis:
        return None
    if view == NHWC and not all(source.channels_at_end for source in sources):
        return None
    readers = Counter(fields.fields)
    single = [
        id(part)
        for part, field in zip(sources, fields.fields, strict=True)
        if rewriter.users.get(field) == readers[field] == 1
    ]
    workload, sources = _join(rewriter, sources)
    owned = frozenset(i for i, source in enumerate(sources) if id(source) in single)
    pending = Pending(sources, Gather(workload, owned))
    n, _, h, w = sources[0].map
    shape = (n, workload.out_channels, h, w)
    if view == NHWC:
        return BlockedTensor((n, h, w, shape[1]), shape, view, pending=pending)
    return of_map(shape, pending=pending)


def lower_window(
    rewriter: BlockedRewriter, name: str, value: relax.Call, shape: tuple[int, ...] | None
) -> BlockedTensor | None:
    """A slice or pad as a pending copy, merged with the one before it; None for others.

    Images of a plain batch are not copied: the kernel that reads them gets the batch.
    """
    source = rewriter.blocked_map(value.args[0])
    if source is None or shape is None:
        return _images(rewriter, value, shape) if name == "strided_slice" else None
    n = source.map[0]
    sources, workload = rewriter.copied(source)
    cut = _pad(value, workload) if name == "nn.pad" else _slice(value, workload)
    if cut is None or (n, cut.out_channels, *cut.out_size) != shape:
        return None
    return of_map((n, cut.out_channels, *cut.out_size), pending=Pending(sources, Gather(cut)))


def lower_take(rewriter: BlockedRewriter, value: relax.Call) -> BlockedTensor | None:
    """Channels in another order as a pending copy, merged with the one before it; else None."""
    source = rewriter.blocked_map(value.args[0])
    axis, indices = value.attrs.axis, value.args[1]
    if source is None or axis is None or int(axis) != 1 or not is_constant(indices):
        return None
    order = constant_array(indices)
    if order.ndim != 1 or not order.size or order.min() < 0 or order.max() >= source.channels:
        return None
    sources, workload = rewriter.copied(source)
    channels = [
        (run.source, run.first + number) for run in workload.runs for number in range(run.count)
    ]
    taken = replace(workload, runs=joined_runs(channels[channel] for channel in order))
    shape = (source.map[0], taken.out_channels, *taken.out_size)
    return of_map(shape, pending=Pending(sources, Gather(taken)))


def _join(
    rewriter: BlockedRewriter, parts: Sequence[BlockedTensor]
) -> tuple[GatherWorkload, list[BlockedTensor]]:
    """The concatenation of ``parts``; those that are pending concatenations are read past."""
    sources: list[BlockedTensor] = []
    runs: list[ChannelRun] = []
    for part in parts:
        within, copy = rewriter.copied(part)
        if not copy.keeps_map or any(run.source < 0 for run in copy.runs):
            within, copy = (
                [part],
                GatherWorkload.concatenation(part.map[0], (part.channels,), *part.map[2:]),
            )
        runs += [replace(run, source=run.source + len(sources)) for run in copy.runs]
        sources += within
    n, _, h, w = sources[0].map
    channels = tuple(source.channels for source in sources)
    return GatherWorkload(n, channels, h, w, tuple(runs), (h, w)), sources


def _images(
    rewriter: BlockedRewriter, value: relax.Call, shape: tuple[int, ...] | None
) -> BlockedTensor | None:
    """Neighbouring images of a plain batch of maps, as a piece of it; None for other slices.

    Kernels count on maps that start on a line of the cache.
    """
    source = rewriter.tensor(value.args[0])
    ranges = _ranges(value, source.shape)
    if source.plain is None or source.view != NCHW or shape is None or ranges is None:
        return None
    n, c, h, w = source.map
    first, last, step = ranges[0]
    if step != 1 or ranges[1:] != [(0, c, 1), (0, h, 1), (0, w, 1)]:
        return None
    if 4 * first * c * h * w % ALIGNMENT:
        return None
    return of_map((last - first, c, h, w), piece=(source.plain, Images(first, n)))


def _slice(value: relax.Call, workload: GatherWorkload) -> GatherWorkload | None:
    """``workload`` with a strided slice after it, or None."""
    size = (workload.batch, workload.out_channels, *workload.out_size)
    ranges = _ranges(value, size)
    if ranges is None:
        return None
    begin, end, stride = zip(*ranges, strict=True)
    count = [-(-(e - b) // s) for b, e, s in zip(begin, end, stride, strict=True)]
    if min(count) < 1 or count[0] != size[0] or stride[1] != 1:
        return None
    old = workload.stride
    return replace(
        workload,
        runs=_cut(workload.runs, begin[1], end[1]),
        out_size=(count[2], count[3]),
        origin=(
            workload.origin[0] + begin[2] * old[0],
            workload.origin[1] + begin[3] * old[1],
        ),
        stride=(old[0] * stride[2], old[1] * stride[3]),
    )


def _ranges(value: relax.Call, size: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """Begin, end and step along each axis of a strided slice; None where they are not forward."""
    if any(not isinstance(arg, relax.Tuple) for arg in value.args[1:]):
        return None
    try:
        axes, begins, ends, *more = (
            [int(field.value) for field in arg.fields] for arg in value.args[1:]
        )
    except AttributeError:
        return None
    rank, ranges = len(size), [(0, extent, 1) for extent in size]
    for axis, first, last, step in zip(
        axes, begins, ends, more[0] if more else [1] * len(axes), strict=True
    ):
        if step < 1:
            return None
        extent = size[axis % rank]
        begin = min(max(first + extent if first < 0 else first, 0), extent)
        end = min(max(last + extent if last < 0 else last, 0), extent)
        ranges[axis % rank] = (begin, end, step)
    return ranges


def _cut(runs: Sequence[ChannelRun], begin: int, end: int) -> tuple[ChannelRun, ...]:
    """The channels from ``begin`` to before ``end``."""
    kept, at = [], 0
    for run in runs:
        low, high = max(begin - at, 0), min(end - at, run.count)
        if low < high:
            kept.append(ChannelRun(run.source, run.first + low, high - low))
        at += run.count
    return tuple(kept)


def _pad(value: relax.Call, workload: GatherWorkload) -> GatherWorkload | None:
    """``workload`` with a constant pad after it, or None."""
    widths, fill = [int(w) for w in value.attrs.pad_width], float(value.attrs.pad_value)
    if str(value.attrs.pad_mode) != "constant" or len(widths) != 8 or any(widths[:2]):
        return None
    front, back, top, bottom, left, right = widths[2:]
    given = GatherWorkload.concatenation(
        workload.batch, workload.channels, workload.height, workload.width
    )
    cut = (workload.out_size, workload.origin, workload.stride)
    moved = cut != (given.out_size, given.origin, given.stride)
    filled = moved or any(run.source < 0 for run in workload.runs)
    if min(widths) < 0 or (filled and workload.fill != fill) or (moved and any(widths[4:])):
        return None
    runs = list(workload.runs)
    if front:
        runs.insert(0, ChannelRun(-1, 0, front))
    if back:
        runs.append(ChannelRun(-1, 0, back))
    rows, columns = workload.out_size
    return replace(
        workload,
        runs=tuple(runs),
        out_size=(rows + top + bottom, columns + left + right),
        origin=(workload.origin[0] - top, workload.origin[1] - left),
        fill=fill,
    )
