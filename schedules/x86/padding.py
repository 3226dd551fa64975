"""When a convolution reads a padded copy of its input, and the stage that makes the copy."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from tvm import tirx

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, moving, quotient, remainder
from .tiles import tiling
from .workload import ConvSchedule

Sides: TypeAlias = tuple[int, int, int, int]  # top, left, bottom, right

# Multiply-adds of straight-line code that border tiles may take before a copy is better: with
# blocked channels for the time it takes to compile, with plain NCHW, where neighbouring taps share
# their inputs and LLVM keeps these at the price of spilled accumulators, for speed too.
_BORDER_CODE_BLOCKED = 300
_BORDER_CODE_PLAIN = 60


def padded_copy(geometry: ConvGeometry, schedule: ConvSchedule, in_block: int) -> Sides:
    """The padding that a copy of the input should hold; all zero if none should be made."""
    if schedule.rows > 1:
        return geometry.padding
    border = schedule.vectors * sum(
        len(pixels)
        for group in tiling(geometry, schedule.tile).groups
        for _, pixels in group.partial
    )
    if border > (_BORDER_CODE_PLAIN if in_block == 1 else _BORDER_CODE_BLOCKED):
        return (0, geometry.padding[1], 0, geometry.padding[3])
    return (0, 0, 0, 0)


def pad_geometry(geometry: ConvGeometry, sides: Sides) -> ConvGeometry:
    """The geometry of the same convolution on the copy."""
    top, left, bottom, right = sides
    old = geometry.padding
    return replace(
        geometry,
        height=top + geometry.height + bottom,
        width=left + geometry.width + right,
        padding=(old[0] - top, old[1] - left, old[2] - bottom, old[3] - right),
    )


def pad_map(
    em: Emitter, geometry: ConvGeometry, sides: Sides, in_block: int, x: tirx.Buffer
) -> tirx.Buffer:
    """Emit a stage that copies ``x`` between zeros; returns the copy, in a workspace.

    ``x`` is a batch of maps of ``geometry`` in blocks of ``in_block`` channels.
    """
    top, left, _, right = sides
    padded = pad_geometry(geometry, sides)
    maps = geometry.batch * -(-geometry.in_channels // in_block)
    old, new = geometry.width * in_block, padded.width * in_block
    size = maps * padded.height * new
    copy = em.workspace(size)
    zero = tirx.FloatImm("float32", 0.0)

    def clear(start: Index, count: int) -> None:
        if count:
            # Scalar loops here and below: LLVM makes vector code of them.
            with em.loop(count) as i:
                em.store_scalar(copy, zero, start + i)

    with em.loop(maps * padded.height, moving(4 * size), prefix="row") as row:
        target = em.bind_index(row * new, "to")
        line = em.bind_index(remainder(row, padded.height) - top, "line")
        is_copied = tirx.And(tirx.GE(line, 0), tirx.LT(line, geometry.height))
        with em.when(is_copied):
            source = em.bind_index(
                (quotient(row, padded.height) * geometry.height + line) * old, "from"
            )
            clear(target, left * in_block)
            with em.loop(old) as i:
                em.store_scalar(copy, em.scalar(x, source + i), target + left * in_block + i)
            clear(target + (left * in_block + old), right * in_block)
        if padded.height > geometry.height:
            with em.when(tirx.Not(is_copied)):
                clear(target, new)
    return copy
