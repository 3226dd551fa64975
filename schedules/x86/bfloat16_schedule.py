"""The tunable choices of the direct convolution of bfloat16 pairs, and which of them are legal."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

from tvm_lowrank.schedules.effort import Effort, imbalance

from tvm_lowrank.geometry import ConvGeometry

from . import space as direct
from .dense import is_dense
from .groups import is_depthwise, merge_groups
from .isa import VectorISA
from .pairs import NO_BFLOAT16
from .workload import ConvSchedule, ConvWorkload, TiledSchedule

# Bytes of the rounded input that a task keeps to itself, and tasks that there should be at least.
_SLAB_BYTES = 1 << 18
_LEAST_TASKS = 2
_SLABS = (1, 2, 4, 7, 8, 14, 16, 28, 32)
# Bytes that a core reads in a cycle from its second-level cache and from behind it, and how much
# the former keeps.
_NEAR, _FAR = 64.0, 16.0
_CACHE_BYTES = 1 << 19
# Cycles to round a pair of vectors: two loads, one conversion, one store.
_ROUND_CYCLES = 2.0
_MOST_SCHEDULES = 32


@dataclass(frozen=True)
class Bfloat16Schedule(TiledSchedule):
    """The tunable choices; register tiles are those of `ConvSchedule`.

    - ``order``: with ``"channels"``, the whole input is rounded first, and tasks finish the whole
      map for one group of output channels before the next. With ``"rows"`` each task rounds what
      it reads, in memory of its own, and finishes all channels of its part of the map;
    - ``chunk``: of order ``"rows"`` the part of a task: lines of the map, or register tiles where
      the map is one line, or tiles are several. Of order ``"channels"`` register tiles.
    """

    kernel: ClassVar[str] = "bfloat16"

    @property
    def direct(self) -> ConvSchedule:
        """The direct kernel's schedule that has its tiles and tasks."""
        return ConvSchedule(**vars(self))


@functools.lru_cache(maxsize=4096)
def paired(workload: ConvWorkload, isa: VectorISA) -> ConvWorkload:
    """The convolution between the rounded copy of the input and the output.

    Its input channels are pairs, its map holds the padding, and of a strided pointwise kernel only
    the pixels that it reads.
    """
    given = workload.geometry
    merged = merge_groups(given, 2 * isa.lanes, isa.lanes)
    stride = (1, 1) if given.kernel == (1, 1) else given.stride
    height, width = (
        (outputs - 1) * step + (taps - 1) * apart + 1
        for outputs, step, taps, apart in zip(
            (given.out_height, given.out_width), stride, given.kernel, given.dilation, strict=True
        )
    )
    pairs = -(-merged.in_channels // merged.groups // 2) * merged.groups
    geometry = replace(
        merged,
        in_channels=pairs,
        height=height,
        width=width,
        stride=stride,
        padding=(0, 0, 0, 0),
    )
    return ConvWorkload(geometry, isa.lanes, workload.epilogue)


def computed(workload: ConvWorkload, isa: VectorISA) -> ConvGeometry:
    """The geometry of `paired`, its long axis as its width."""
    return direct.canonical_geometry(paired(workload, isa).geometry)


def refuse(workload: ConvWorkload, isa: VectorISA) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if not isa.bfloat16:
        return NO_BFLOAT16
    if workload.in_block != isa.lanes:
        return f"bfloat16: in_block is {workload.in_block}, expected {isa.lanes}"
    if is_depthwise(workload.geometry):
        return f"bfloat16: {workload.geometry} is depthwise"
    if is_dense(workload.geometry):
        return f"bfloat16: {workload.geometry} is dense, of several samples"
    return None


def is_legal(workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, isa)
    if problem:
        return problem
    if schedule.chunk < 1:
        return "chunk must be positive"
    return direct.illegal_tiles(computed(workload, isa), schedule.direct, isa)


def space(workload: ConvWorkload, isa: VectorISA) -> list[Bfloat16Schedule]:
    """Legal schedules, most promising first by a count of cycles; never empty unless refused."""
    pairs, geometry = paired(workload, isa), computed(workload, isa)
    found: dict[Bfloat16Schedule, float] = {}
    for tiles in direct.register_tiles(pairs, geometry, isa):
        for order, chunk in _orders(geometry, tiles):
            schedule = Bfloat16Schedule(
                tiles.tile, tiles.vectors, order, chunk, tiles.chains, tiles.rows
            )
            tasks = tasks_of(geometry, schedule, isa)
            found[schedule] = _cycles(workload, schedule, isa) * imbalance(tasks)
    return sorted(found, key=lambda schedule: found[schedule])[:_MOST_SCHEDULES]


def parts_of(geometry: ConvGeometry, schedule: Bfloat16Schedule) -> int:
    """Lines of the map that tasks of order rows share, or tiles where there is one line."""
    tiles = direct.tiling_of(geometry, schedule)
    return tiles.lines if tiles.lines > 1 else tiles.per_line


def slab_of(geometry: ConvGeometry, schedule: Bfloat16Schedule) -> tuple[int, int]:
    """Rows and columns of the input that a task of order rows reads, at most."""
    chunk = min(schedule.chunk, parts_of(geometry, schedule))
    if direct.tiling_of(geometry, schedule).lines > 1 or schedule.rows > 1:
        lines = min(chunk * schedule.rows, geometry.out_height)
        return _reach(geometry, 0, lines), geometry.width
    columns = min(chunk * schedule.tile, geometry.out_width)
    return geometry.height, _reach(geometry, 1, columns)


def tasks_of(geometry: ConvGeometry, schedule: Bfloat16Schedule, isa: VectorISA) -> int:
    """Parallel tasks of the products."""
    if schedule.order == "rows":
        return geometry.batch * -(-parts_of(geometry, schedule) // schedule.chunk)
    chunks = -(-direct.tiling_of(geometry, schedule).count // schedule.chunk)
    return geometry.batch * groups_of(geometry, schedule, isa) * chunks


def effort(workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA) -> Effort:
    """What a schedule asks for; see `Effort`. A multiply-add is one of pairs."""
    geometry = computed(workload, isa)
    width, steps = isa.lanes * schedule.vectors, geometry.weight_count // geometry.out_channels
    groups, tasks = groups_of(geometry, schedule, isa), tasks_of(geometry, schedule, isa)
    by_rows = schedule.order == "rows"
    copied = _copied(geometry, schedule)
    pixels = geometry.batch * geometry.out_height * geometry.out_width
    return Effort(
        multiplications=float(pixels * steps * groups * width),
        operations=0.0,
        products=geometry.batch
        * direct.tile_cycles(paired(workload, isa), geometry, schedule.direct, isa),
        transforms=_ROUND_CYCLES * copied / isa.lanes,
        weight_bytes=4.0 * groups * width * steps,
        weight_reads=float(tasks if by_rows else 1),
        input_reads=1.0 if by_rows else float(groups),
        exchange_bytes=0.0 if by_rows else 4.0 * copied,
        task_bytes=4.0 * copied / tasks if by_rows else 4.0 * width * steps,
        tasks=tasks,
        stages=1 if by_rows else 2,
    )


def _orders(geometry: ConvGeometry, tiles: ConvSchedule) -> list[tuple[str, int]]:
    """Orders of the tasks with their chunks."""
    shape = Bfloat16Schedule(tiles.tile, tiles.vectors, rows=tiles.rows)
    parts = parts_of(geometry, shape)
    found = [("channels", 1)]
    for chunk in _SLABS:
        slab = replace(shape, order="rows", chunk=chunk)
        rows, columns = slab_of(geometry, slab)
        small = 4 * geometry.in_channels * rows * columns <= _SLAB_BYTES
        if chunk == 1 or (small and geometry.batch * -(-parts // chunk) >= _LEAST_TASKS):
            found.append(("rows", chunk))
    return found


def _cycles(workload: ConvWorkload, schedule: Bfloat16Schedule, isa: VectorISA) -> float:
    """Cycles of all tasks on a core with two multiply-add units."""
    asked = effort(workload, schedule, isa)
    inputs = 4.0 * _copied(computed(workload, isa), schedule)
    reads = asked.weight_bytes * asked.weight_reads / _rate(asked.weight_bytes)
    reads += inputs * (asked.input_reads - 1) / _rate(inputs)
    return asked.products + asked.transforms + reads


def _rate(size: float) -> float:
    return _NEAR if size <= _CACHE_BYTES else _FAR


def _copied(geometry: ConvGeometry, schedule: Bfloat16Schedule) -> float:
    """Pairs that all tasks together round."""
    rows, columns = geometry.height, geometry.width
    count = geometry.batch
    if schedule.order == "rows":
        rows, columns = slab_of(geometry, schedule)
        count *= -(-parts_of(geometry, schedule) // schedule.chunk)
    return float(count * geometry.in_channels * rows * columns)


def groups_of(geometry: ConvGeometry, schedule: Bfloat16Schedule, isa: VectorISA) -> int:
    """Groups of output channels that have a register tile."""
    width = isa.lanes * schedule.vectors
    return geometry.groups * -(-geometry.out_channels // geometry.groups // width)


def _reach(geometry: ConvGeometry, axis: int, outputs: int) -> int:
    """Inputs along an axis that so many outputs read."""
    taps = (geometry.kernel[axis] - 1) * geometry.dilation[axis]
    return (outputs - 1) * geometry.stride[axis] + taps + 1
