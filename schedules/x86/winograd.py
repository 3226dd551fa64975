"""Winograd convolution on channel-blocked maps: transforms around batched matrix products."""

from __future__ import annotations

import numpy as np
from tvm import ir, tirx
from tvm_lowrank.schedules.transforms.cook_toom import cook_toom

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .epilogue import Epilogue
from .isa import VectorISA
from .space import canonical_geometry
from .winograd_schedule import WinogradSchedule, grid_of, is_legal, register_block
from .winograd_stages import Stages, transform_input, transform_output
from .workload import ConvWorkload


def emit(workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Parameters and maps are those of the direct convolution; the weights are `pack`'s. Lanes of
    ``x`` beyond C are not read.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    given, lanes = workload.geometry, isa.lanes
    grid = grid_of(workload, schedule)
    in_blocks, out_blocks = -(-given.in_channels // lanes), -(-given.out_channels // lanes)
    em = Emitter(isa)
    x = em.argument("x", (given.batch, in_blocks, given.height, given.width, lanes))
    weights = em.argument("weights", _packed_shape(workload, schedule, isa))
    y_shape = (given.batch, out_blocks, given.out_height, given.out_width, lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * lanes, y_shape)
    y = em.argument("y", y_shape)
    stages = Stages(grid, register_block(workload, schedule), lanes, x, weights, y, epilogue)
    if schedule.blocks:
        _emit_fused(em, stages, min(schedule.blocks, grid.blocks))
    else:
        _emit_staged(em, stages)
    return em.finish()


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA
) -> np.ndarray:
    """Transform an OIHW weight, in float64, and lay it out for the products.

    Returns float32 of shape ``(points, groups, channels, vectors * lanes)``, where a group is
    ``schedule.vectors`` vectors of output channels and channels are filled up to whole vectors by
    zeros.

    Raises ValueError if the weight does not have the shape the workload's geometry gives.
    """
    geometry = canonical_geometry(workload.geometry)
    if weight.shape != workload.geometry.weight_shape:
        raise ValueError(
            f"weight has shape {weight.shape}, expected {workload.geometry.weight_shape}"
        )
    rows, columns = (
        np.array(cook_toom(outputs, taps).filter, dtype=np.float64)
        for outputs, taps in zip(schedule.tile, geometry.kernel, strict=True)
    )
    taps = weight.reshape(geometry.weight_shape).astype(np.float64)
    transformed = np.einsum("ix,fcxy,jy->ijcf", rows, taps, columns, optimize=True)
    points, groups, channels, width = _packed_shape(workload, schedule, isa)
    padded = np.zeros((points, channels, groups * width), np.float32)
    padded[:, : geometry.in_channels, : geometry.out_channels] = transformed.reshape(
        points, geometry.in_channels, geometry.out_channels
    )
    split = padded.reshape(points, channels, groups, width)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3))


def _packed_shape(
    workload: ConvWorkload, schedule: WinogradSchedule, isa: VectorISA
) -> tuple[int, int, int, int]:
    geometry, width = workload.geometry, schedule.vectors * isa.lanes
    groups = -(-geometry.out_channels // width)
    channels = -(-geometry.in_channels // isa.lanes) * isa.lanes
    return grid_of(workload, schedule).points, groups, channels, width


def _emit_fused(em: Emitter, stages: Stages, blocks: int) -> None:
    """Parallel tasks of ``blocks`` register blocks, each through all stages."""
    count, in_blocks, out_blocks = stages.grid.blocks, stages.in_blocks, stages.out_blocks
    with em.loop(-(-count // blocks), "parallel", prefix="task") as task:
        # Made by every task: a thread gets the same memory again, which is still in its cache.
        data = em.workspace(blocks * stages.block_stride(in_blocks))
        products = em.workspace(blocks * stages.block_stride(out_blocks))
        scratch = em.workspace(stages.grid.points * stages.lanes)
        first = em.bind_index(task * blocks, "first")
        extent: Index = blocks
        if count % blocks:
            extent = em.bind_index(clamp_high(count - first, blocks), "count")
        with em.loop(extent, prefix="block") as block:
            source = (first + block, 0, in_blocks)
            transform_input(em, stages, source, data, block, scratch)
        with (
            em.loop(stages.grid.points, prefix="point") as point,
            em.loop(stages.groups, prefix="group") as group,
            em.loop(extent, prefix="block") as block,
        ):
            _emit_product(em, stages, (block, point, group), data, products)
        with em.loop(extent, prefix="block") as block:
            target = (first + block, 0, out_blocks)
            transform_output(em, stages, target, products, block, scratch)


def _emit_staged(em: Emitter, stages: Stages) -> None:
    """One parallel stage after the other over the whole map."""
    count, in_blocks, out_blocks = stages.grid.blocks, stages.in_blocks, stages.out_blocks
    data = em.workspace(count * stages.block_stride(in_blocks))
    products = em.workspace(count * stages.block_stride(out_blocks))
    with em.loop(count * in_blocks, "parallel", prefix="task") as task:
        scratch = em.workspace(stages.grid.points * stages.lanes)
        block = em.bind_index(quotient(task, in_blocks), "block")
        channels = em.bind_index(remainder(task, in_blocks), "channels")
        transform_input(em, stages, (block, channels, 1), data, block, scratch)
    with em.loop(stages.grid.points * stages.groups, "parallel", prefix="task") as task:
        point = em.bind_index(quotient(task, stages.groups), "point")
        group = em.bind_index(remainder(task, stages.groups), "group")
        with em.loop(count, prefix="block") as block:
            _emit_product(em, stages, (block, point, group), data, products)
    with em.loop(count * out_blocks, "parallel", prefix="task") as task:
        scratch = em.workspace(stages.grid.points * stages.lanes)
        block = em.bind_index(quotient(task, out_blocks), "block")
        channels = em.bind_index(remainder(task, out_blocks), "channels")
        transform_output(em, stages, (block, channels, 1), products, block, scratch)


def _emit_product(
    em: Emitter,
    stages: Stages,
    place: tuple[Index, Index, Index],
    data: tirx.Buffer,
    products: tirx.Buffer,
) -> None:
    """The products of a register block at a point, for a group of output channels."""
    block, point, group = place
    lanes, rows, vectors = stages.lanes, stages.grid.rows, stages.product.vectors

    def offset(channel_blocks: int) -> Index:
        strides = stages.block_stride(channel_blocks), stages.point_stride(channel_blocks)
        return block * strides[0] + point * strides[1]

    left = em.bind_index(offset(stages.in_blocks), "v")
    size = stages.in_blocks * lanes * vectors * lanes
    right = em.bind_index((point * stages.groups + group) * size, "w")
    target = em.bind_index(offset(stages.out_blocks) + group * (vectors * rows * lanes), "m")

    def store(row: int, vector: int, value: ir.Expr) -> None:
        em.store(products, value, target + (vector * rows + row) * lanes)

    stages.product.emit(em, (data, left), (stages.weights, right), store)
