"""Concatenation, slicing and padding of channel-blocked maps in one copy, with an epilogue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high, moving, quotient, remainder
from .epilogue import Epilogue
from .isa import VectorISA

# Pixels of a task where the copy keeps the map as it is: at most so many, and so few that there are
# tasks enough for a few threads.
_CHUNK = 64
_TASKS = 8


@dataclass(frozen=True)
class ChannelRun:
    """``count`` consecutive channels of the output: those of source ``source`` from ``first`` on.

    A ``source`` of -1 stands for the fill value.
    """

    source: int
    first: int
    count: int


@dataclass(frozen=True)
class GatherWorkload:
    """A map put together from channels of others, and from a window of theirs.

    All sources have ``height`` x ``width`` pixels and ``channels[i]`` channels. The output takes
    the channels of ``runs`` in order; its pixel ``(i, j)`` of ``out_size`` is the sources' pixel
    ``(origin[0] + i * stride[0], origin[1] + j * stride[1])``, or ``fill`` where that is none.

    Raises ValueError if a run names channels that its source has not.
    """

    batch: int
    channels: tuple[int, ...]
    height: int
    width: int
    runs: tuple[ChannelRun, ...]
    out_size: tuple[int, int]
    origin: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    fill: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        for run in self.runs:
            if run.source >= 0 and run.first + run.count > self.channels[run.source]:
                raise ValueError(f"{run} is beyond the {self.channels[run.source]} channels")

    @classmethod
    def concatenation(
        cls, batch: int, channels: tuple[int, ...], height: int, width: int
    ) -> GatherWorkload:
        """All channels of all sources, one source after the other."""
        runs = tuple(ChannelRun(i, 0, count) for i, count in enumerate(channels))
        return cls(batch, channels, height, width, runs, (height, width))

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return sum(run.count for run in self.runs)

    @property
    def keeps_map(self) -> bool:
        """Whether every pixel stays where it is."""
        same = self.out_size == (self.height, self.width)
        return same and self.origin == (0, 0) and self.stride == (1, 1)


def runs_of(channels: Iterable[int]) -> tuple[ChannelRun, ...]:
    """Channels of a single source in any order, neighbours together."""
    return joined_runs((0, int(channel)) for channel in channels)


def joined_runs(channels: Iterable[tuple[int, int]]) -> tuple[ChannelRun, ...]:
    """Channels, each with its source, in any order, neighbours together."""
    runs: list[ChannelRun] = []
    for source, channel in channels:
        last = runs[-1] if runs else None
        if last and (last.source, last.first + last.count) == (source, channel):
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(ChannelRun(source, channel, 1))
    return tuple(runs)


# Where a lane of an output block comes from: (source, channel), None for the fill value.
_Lane: TypeAlias = "tuple[int, int] | None"


@dataclass(frozen=True)
class _Blocks:
    """``count`` output blocks from ``first`` on that are made alike.

    ``whole`` is the (source, block) that the first of them copies, the next block for the next;
    otherwise ``lanes`` says what a single block holds.
    """

    first: int
    count: int
    whole: tuple[int, int] | None
    lanes: tuple[_Lane, ...] = ()


def emit_gather(
    workload: GatherWorkload, isa: VectorISA, steps: Sequence[str] = ()
) -> tirx.PrimFunc:
    """Build ``(sources..., operands..., y)`` on blocked maps ``(N, ceil(C / lanes), H, W, lanes)``.

    Channels that start at a block of their source and of the output are copied by vectors; others
    are put together lane by lane. ``steps``, as in `ConvWorkload.epilogue`, are applied to what is
    copied; their ``operands`` are those of `Epilogue`. Lanes of ``y`` beyond its channels are
    finite if those of the sources are.

    Raises ValueError for a step unknown or malformed, and for steps where pixels move.
    """
    given = workload
    if steps and not given.keeps_map:
        raise ValueError(f"{given} moves pixels, so it takes no steps")
    rows, columns = given.out_size
    pixels = rows * columns
    if given.keeps_map:
        columns = min(_CHUNK, -(-pixels // _TASKS))
        rows = -(-pixels // columns)
    em = Emitter(isa)
    sources = [
        em.argument(
            f"x{i}", (given.batch, -(-c // isa.lanes), given.height, given.width, isa.lanes)
        )
        for i, c in enumerate(given.channels)
    ]
    out_blocks = -(-given.out_channels // isa.lanes)
    y_shape = (given.batch, out_blocks, *given.out_size, isa.lanes)
    epilogue = Epilogue(em, steps, out_blocks * isa.lanes, y_shape)
    y = em.argument("y", y_shape)
    size = 4 * given.batch * out_blocks * pixels * isa.lanes
    with em.loop(given.batch * rows, moving(size), prefix="task") as task:
        image = em.bind_index(quotient(task, rows), "image")
        row = em.bind_index(remainder(task, rows), "row")
        for blocks in plan_blocks(given, isa.lanes):
            with em.loop(blocks.count, prefix="block") as index:
                out = (image * out_blocks + blocks.first + index) * pixels
                if given.keeps_map:
                    start = row * columns
                    extent: Index = columns
                    if pixels % columns:
                        extent = clamp_high(pixels - start, columns)
                    with em.loop(extent, prefix="pixel") as pixel:
                        at = start + pixel
                        value = emit_vector(em, given, blocks, sources, (image, index, at))
                        position = (out + at) * isa.lanes
                        channel = (blocks.first + index) * isa.lanes
                        em.store(y, epilogue.apply(value, channel, position), position)
                else:
                    _emit_row(em, given, blocks, sources, y, (image, index, row, out))
    return em.finish()


def _emit_row(
    em: Emitter,
    workload: GatherWorkload,
    blocks: _Blocks,
    sources: list[tirx.Buffer],
    y: tirx.Buffer,
    place: tuple[Index, Index, Index, Index],
) -> None:
    """One output row of one block: filled, or copied between filled ends."""
    image, index, row, out = place
    line = row * workload.stride[0] + workload.origin[0]
    columns, step, left = workload.out_size[1], workload.stride[1], workload.origin[1]
    inside = [j for j in range(columns) if 0 <= left + j * step < workload.width]
    low, high = (inside[0], inside[-1] + 1) if inside else (columns, columns)
    base = em.bind_index(out + row * columns, "to")
    fill = em.constant(workload.fill)

    def clear(start: int, stop: int) -> None:
        if stop > start:
            with em.loop(stop - start, start=start, prefix="pixel") as pixel:
                em.store(y, fill, (base + pixel) * em.lanes)

    clear(0, low)
    clear(high, columns)
    if high == low:
        return
    last = (workload.out_size[0] - 1) * workload.stride[0] + workload.origin[0]
    whole = workload.origin[0] >= 0 and last < workload.height

    def copy() -> None:
        with em.loop(high - low, start=low, prefix="pixel") as pixel:
            at = line * workload.width + left + pixel * step
            value = emit_vector(em, workload, blocks, sources, (image, index, at))
            em.store(y, value, (base + pixel) * em.lanes)

    if whole:
        copy()
        return
    is_inside = tirx.And(tirx.GE(line, 0), tirx.LT(line, workload.height))
    with em.when(is_inside):
        copy()
    with em.when(tirx.Not(is_inside)):
        clear(low, high)


def emit_vector(
    em: Emitter,
    workload: GatherWorkload,
    blocks: _Blocks,
    sources: list[tirx.Buffer],
    place: tuple[Index, Index, Index],
) -> ir.Expr:
    """The output block's vector for the sources' pixel ``place[2]``."""
    image, index, pixel = place
    pixels = workload.height * workload.width

    def load(source: int, block: Index) -> ir.Expr:
        per_image = -(-workload.channels[source] // em.lanes)
        return em.load(sources[source], ((image * per_image + block) * pixels + pixel) * em.lanes)

    if blocks.whole is not None:
        source, block = blocks.whole
        return load(source, block + index)
    fill = em.constant(workload.fill)
    used = list(dict.fromkeys((s, c // em.lanes) for s, c in filter(None, blocks.lanes)))
    if not used:
        return fill
    vectors = [fill, *(load(source, block) for source, block in used)]
    numbers = [
        0
        if lane is None
        else (used.index((lane[0], lane[1] // em.lanes)) + 1) * em.lanes + lane[1] % em.lanes
        for lane in blocks.lanes
    ]
    value, taken = vectors[0], [0] * em.lanes
    # Two vectors at a time: an instruction of its own wherever the processor has one.
    for position, vector in enumerate(vectors[1:], start=1):
        mine = [number // em.lanes == position for number in numbers]
        taken = [
            em.lanes + numbers[lane] % em.lanes if mine[lane] else lane for lane in range(em.lanes)
        ]
        value = em.shuffle((value, vector), taken)
    return value


def plan_blocks(workload: GatherWorkload, lanes: int) -> list[_Blocks]:
    """The output blocks in order, neighbours that are made alike together."""
    plan: list[_Blocks] = []
    for number, content in enumerate(_contents(workload, lanes)):
        whole = _whole_block(content, lanes)
        last = plan[-1] if plan else None
        if whole and last and last.whole:
            follows = (last.whole[0], last.whole[1] + last.count)
            if follows == whole:
                plan[-1] = _Blocks(last.first, last.count + 1, last.whole)
                continue
        plan.append(_Blocks(number, 1, whole, () if whole else content))
    return plan


def _contents(workload: GatherWorkload, lanes: int) -> Iterator[tuple[_Lane, ...]]:
    channels: list[_Lane] = []
    for run in workload.runs:
        for channel in range(run.first, run.first + run.count):
            channels.append(None if run.source < 0 else (run.source, channel))
    for first in range(0, len(channels), lanes):
        block = channels[first : first + lanes]
        if len(block) < lanes and (whole := _continued(block, lanes)):
            yield whole
        else:
            yield tuple(block + [None] * (lanes - len(block)))


def _continued(block: list[_Lane], lanes: int) -> tuple[_Lane, ...] | None:
    """A last, partial block that begins a block of its source, with the rest of that block."""
    first = block[0]
    if first is None or first[1] % lanes:
        return None
    whole = tuple((first[0], first[1] + lane) for lane in range(lanes))
    return whole if tuple(block) == whole[: len(block)] else None


def _whole_block(content: tuple[_Lane, ...], lanes: int) -> tuple[int, int] | None:
    """The (source, block) that a block is a copy of, or None."""
    whole = _continued(list(content), lanes)
    if whole is None or content[0] is None:
        return None
    return content[0][0], content[0][1] // lanes
