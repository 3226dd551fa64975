"""Row bands of a fused chain, and its legal schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm_lowrank.schedules.effort import imbalance

from tvm_lowrank.geometry import ConvGeometry

from . import bfloat16_schedule, convolution, depthwise, space
from .bfloat16_schedule import Bfloat16Schedule, paired
from .chain import ChainWorkload, FusedSchedule, StageSchedule
from .depthwise import DepthwiseSchedule
from .groups import is_depthwise, merge_groups
from .isa import VectorISA
from .padding import padded_copy
from .workload import ConvSchedule, ConvWorkload

# Bytes of maps between the stages that a task may hold: they should stay in its core's cache.
_SCRATCH_BYTES = 1 << 20
# Into how many bands a map may be cut.
_BANDS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Band:
    """The rows of a stage's output that a task makes.

    If the first row of the last map is ``r``, these are ``rows`` rows from ``r * factor + offset``
    on. Those that lie outside of the map are padding.
    """

    factor: int
    offset: int
    rows: int

    def is_inside(self, geometry: ConvGeometry, last_row: int) -> bool:
        """Whether all rows lie within the map while ``r`` goes from 0 to ``last_row``."""
        return self.offset >= 0 and self._end(last_row) <= geometry.out_height

    def least_rows(self, geometry: ConvGeometry, first_rows: list[int]) -> int:
        """The fewest rows within the map that any of the tasks starting at these rows has."""
        counts = []
        for row in first_rows:
            low = max(row * self.factor + self.offset, 0)
            counts.append(min(self._end(row), geometry.out_height) - low)
        return min(counts)

    def _end(self, row: int) -> int:
        return row * self.factor + self.offset + self.rows


def bands(workload: ChainWorkload, rows: int) -> list[Band]:
    """The band of each stage for ``rows`` rows of the last map."""
    found = [Band(1, 0, rows)]
    for stage in reversed(workload.stages[1:]):
        after, geometry = found[0], stage.geometry
        stride, reach = geometry.stride[0], geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
        offset = after.offset * stride - geometry.padding[0]
        found.insert(0, Band(after.factor * stride, offset, (after.rows - 1) * stride + reach))
    return found


def first_rows(height: int, rows: int) -> list[int]:
    """Where bands start; the last starts early enough to be whole."""
    return [min(first, height - rows) for first in range(0, height, rows)]


def band_geometry(workload: ChainWorkload, number: int, rows: int) -> ConvGeometry:
    """Stage ``number`` as a convolution of the band before it, which holds its padding."""
    geometry = workload.stages[number].geometry
    left, right = geometry.padding[1], geometry.padding[3]
    return replace(
        geometry,
        batch=1,
        height=bands(workload, rows)[number - 1].rows,
        width=left + geometry.width + right,
        padding=(0, 0, 0, 0),
    )


def is_flat(geometry: ConvGeometry) -> bool:
    """Whether a stage may run through the pixels of several rows as if they were one."""
    plain = geometry.kernel == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding)
    return plain and not is_depthwise(geometry)


def refuse(workload: ChainWorkload, isa: VectorISA) -> str | None:
    """Why no fused kernel can compute the chain, or None if one can."""
    found = fused_space(workload, isa)
    return None if found else _unfit(workload, isa) or "no register tile fits the bands"


def _unfit(workload: ChainWorkload, isa: VectorISA) -> str | None:
    """Why a stage has no kernel on blocks of channels, or None if all have."""
    for stage in workload.stages:
        family = depthwise if is_depthwise(stage.geometry) else convolution
        reason = family.refuse(stage, isa)
        if reason is None and stage.in_block != isa.lanes:
            reason = f"in_block is {stage.in_block}, expected {isa.lanes}"
        if reason is not None:
            return reason
    return None


def is_legal(workload: ChainWorkload, schedule: FusedSchedule, isa: VectorISA) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    if len(schedule.stages) != len(workload.stages):
        return f"{len(schedule.stages)} schedules for {len(workload.stages)} stages"
    height = workload.stages[-1].geometry.out_height
    if not 1 <= schedule.rows <= height:
        return f"rows={schedule.rows} does not lie between 1 and {height}"
    starts = first_rows(height, schedule.rows)
    of_stages = zip(workload.stages, schedule.stages, bands(workload, schedule.rows), strict=True)
    for number, (stage, tiles, band) in enumerate(of_stages):
        problem = _illegal_stage(stage, tiles, isa, is_first=number == 0)
        if problem:
            return f"stage {number}: {problem}"
        least = band.least_rows(stage.geometry, starts)
        needed = tiles.rows if isinstance(tiles, DepthwiseSchedule) else 0
        if least < needed:
            return f"stage {number}: tiles of {needed} rows in bands of {least}"
    return None


def _illegal_stage(
    stage: ConvWorkload, tiles: StageSchedule, isa: VectorISA, is_first: bool
) -> str | None:
    if is_depthwise(stage.geometry) != isinstance(tiles, DepthwiseSchedule):
        return f"a {tiles.kernel} schedule does not fit {stage.geometry}"
    if stage.in_block != isa.lanes:
        return f"in_block is {stage.in_block}, expected {isa.lanes}"
    if isinstance(tiles, DepthwiseSchedule):
        problem = depthwise.is_legal(stage, tiles, isa)
        copied = any(depthwise.copied_sides(stage.geometry, tiles))
    elif tiles.rows > 1:
        return "tiles of several rows"
    elif isinstance(tiles, Bfloat16Schedule):
        if not is_flat(stage.geometry):
            return f"only pointwise stages are of bfloat16, not {stage.geometry}"
        problem, copied = bfloat16_schedule.is_legal(stage, tiles, isa), False
    else:
        problem = space.is_legal(stage, tiles, isa)
        merged = merge_groups(stage.geometry, isa.lanes, isa.lanes)
        copied = any(padded_copy(merged, tiles, isa.lanes))
    if problem is None and is_first and copied:
        return "its input would have to be copied between zeros"
    return problem


def fused_space(
    workload: ChainWorkload,
    isa: VectorISA,
    bfloat16: bool = False,
    threads: int | None = None,
) -> list[FusedSchedule]:
    """Legal schedules, most promising first, one for each height of the bands; may be empty.

    With ``bfloat16`` all pointwise stages multiply such pairs, and there is at least one. What is
    promising depends on how many ``threads`` share the tasks.
    """
    flat = any(is_flat(stage.geometry) for stage in workload.stages)
    if _unfit(workload, isa) is not None or (bfloat16 and not (isa.bfloat16 and flat)):
        return []
    last = workload.stages[-1].geometry
    found: dict[FusedSchedule, float] = {}
    for rows in sorted({-(-last.out_height // count) for count in _BANDS}, reverse=True):
        if last.batch == 1 and rows == last.out_height > 1:
            continue  # one task would leave all other threads idle
        stages = []
        for number, stage in enumerate(workload.stages):
            pick = _pair_tiles if bfloat16 and is_flat(stage.geometry) else _tiles
            stages.append(pick(workload, number, rows, isa))
        if None in stages:
            continue
        schedule = FusedSchedule(rows, tuple(stage for stage in stages if stage is not None))
        if _scratch_bytes(workload, schedule, isa) > _SCRATCH_BYTES:
            continue
        if is_legal(workload, schedule, isa) is None:
            found[schedule] = _work(workload, rows, threads)
    return sorted(found, key=lambda schedule: found[schedule])


def _scratch_bytes(workload: ChainWorkload, schedule: FusedSchedule, isa: VectorISA) -> int:
    total, rows = 0, schedule.rows
    for number, band in enumerate(bands(workload, rows)[:-1]):
        geometry = band_geometry(workload, number + 1, rows)
        blocks = -(-geometry.in_channels // isa.lanes)
        total += blocks * band.rows * geometry.width * isa.vector_bytes
    for stage, tiles, band in zip(
        workload.stages, schedule.stages, bands(workload, rows), strict=True
    ):
        if isinstance(tiles, Bfloat16Schedule):
            blocks = -(-paired(stage, isa).geometry.in_channels // isa.lanes)
            total += blocks * band.rows * stage.geometry.width * isa.vector_bytes
    return total


def _tiles(workload: ChainWorkload, number: int, rows: int, isa: VectorISA) -> StageSchedule | None:
    """The register tile that the stage's own kernel would take for a map like the band."""
    stage, band = workload.stages[number], bands(workload, rows)[number]
    geometry = _alone(workload, number, rows)
    if is_depthwise(geometry):
        last = workload.stages[-1].geometry.out_height
        least = band.least_rows(stage.geometry, first_rows(last, rows))
        tiles = depthwise.space(ConvWorkload(geometry, isa.lanes), isa)
        return next((t for t in tiles if t.rows <= least), None)
    for found in space.space(ConvWorkload(geometry, isa.lanes), isa):
        if found.rows == 1:
            return ConvSchedule(found.tile, found.vectors, chains=found.chains)
    return None


def _pair_tiles(
    workload: ChainWorkload, number: int, rows: int, isa: VectorISA
) -> StageSchedule | None:
    """The register tile of pairs that takes a pointwise stage the fewest cycles."""
    pairs = paired(ConvWorkload(_alone(workload, number, rows), isa.lanes), isa)
    found = [
        tiles
        for tiles in space.register_tiles(pairs, pairs.geometry, isa)
        if tiles.rows == 1
    ]  # fmt: skip
    if not found:
        return None
    best = min(found, key=lambda tiles: space.tile_cycles(pairs, pairs.geometry, tiles, isa))
    return Bfloat16Schedule(best.tile, best.vectors, chains=best.chains)


def _alone(workload: ChainWorkload, number: int, rows: int) -> ConvGeometry:
    """Stage ``number`` as a convolution of its own that makes the stage's band."""
    stage, band = workload.stages[number], bands(workload, rows)[number]
    geometry = stage.geometry
    if number:
        geometry = band_geometry(workload, number, rows)
    else:
        reach = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
        height = (band.rows - 1) * geometry.stride[0] + reach
        _, left, _, right = geometry.padding
        geometry = replace(geometry, batch=1, height=height, padding=(0, left, 0, right))
    if is_flat(geometry) and number == len(workload.stages) - 1:
        geometry = replace(geometry, height=1, width=geometry.height * geometry.width)
    return geometry


def _work(workload: ChainWorkload, rows: int, threads: int | None) -> float:
    """Multiplications with those that bands share, times the imbalance of the tasks."""
    last = workload.stages[-1].geometry
    tasks = last.batch * -(-last.out_height // rows)
    work = 0.0
    for stage, band in zip(workload.stages, bands(workload, rows), strict=True):
        geometry = stage.geometry
        work += band.rows * geometry.out_width * geometry.weight_count
    return tasks * work * imbalance(tasks, threads)
