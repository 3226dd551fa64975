"""Fourier convolution on channel-blocked maps: overlap-save around batched complex products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from tvm import tirx

from .emitter import Emitter
from .epilogue import Epilogue
from .fft_schedule import FFTGrid, FFTSchedule, fft_geometry, grid_of, is_legal, register_block
from .fft_stages import Stages, emit_depthwise
from .fft_tiles import TileTransform
from .fourier import real_frequencies
from .groups import is_depthwise, merge_groups, merge_weight
from .isa import VectorISA
from .layout import move_map
from .workload import ConvWorkload


def emit(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Parameters and maps are those of the direct convolution; the weights are `pack`'s. Lanes of
    ``x`` beyond C must be finite.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    given, lanes = workload.geometry, isa.lanes
    in_blocks, out_blocks = -(-given.in_channels // lanes), -(-given.out_channels // lanes)
    em = Emitter(isa)
    plain = workload.in_block == 1
    x_shape: tuple[int, ...] = (given.batch, in_blocks, given.height, given.width, lanes)
    if plain:
        x_shape = (given.batch, given.in_channels, given.height, given.width)
    x = em.argument("x", x_shape)
    weights = em.argument("weights", (math.prod(_packed_shape(workload, schedule, isa)),))
    y_shape = (given.batch, out_blocks, given.out_height, given.out_width, lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * lanes, y_shape)
    y = em.argument("y", y_shape)
    grid = grid_of(workload, schedule, isa)
    if plain:
        pixels = given.height * given.width
        blocked = em.workspace(given.batch * pixels * lanes)
        move_map(em, x, blocked, given.batch, given.in_channels, pixels, True)
        x = blocked
    tile = TileTransform(em, grid)
    if is_depthwise(given):
        emit_depthwise(em, grid, tile, (x, weights, y), epilogue)
        return em.finish()
    product = register_block(workload, schedule, isa)
    stages = Stages(em, grid, product, tile, (x, weights, y), epilogue)
    if schedule.blocks:
        stages.emit_fused(min(schedule.blocks, grid.blocks))
    else:
        stages.emit_staged()
    return em.finish()


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA
) -> np.ndarray:
    """Transform an OIHW weight, in float64, and lay it out for the products, flat.

    First the spectra at real frequencies, ``(reals, groups, terms, channels, vectors * lanes)``,
    where a group is ``schedule.vectors`` vectors of output channels, then those at complex ones:
    ``(pairs, groups, terms, channels, 2, vectors * lanes)``, or with Gauss's products
    ``(pairs, 3, groups, terms, channels, vectors * lanes)``. Those of depthwise convolutions are
    ``(blocks, terms, slots, lanes)``. Outputs beyond F are zero.

    Raises ValueError if the weight does not have the shape the workload's geometry gives.
    """
    if weight.shape != workload.geometry.weight_shape:
        raise ValueError(
            f"weight has shape {weight.shape}, expected {workload.geometry.weight_shape}"
        )
    geometry, grid = fft_geometry(workload, isa), grid_of(workload, schedule, isa)
    packed = np.zeros(_packed_shape(workload, schedule, isa), np.float32)
    if is_depthwise(geometry):
        taps = weight.reshape(geometry.weight_shape)[:, 0]
        for term, (reals, pairs) in enumerate(_spectra(taps, grid)):
            parts = np.stack([pairs.real, pairs.imag], axis=1).reshape(-1, pairs.shape[1])
            padded = np.zeros((grid.slots, packed.shape[0] * isa.lanes), np.float32)
            padded[:, : geometry.out_channels] = np.concatenate([reals, parts])
            packed[:, term] = padded.reshape(grid.slots, -1, isa.lanes).transpose(1, 0, 2)
        return packed.reshape(-1)
    merged = merge_groups(workload.geometry, workload.in_block, isa.lanes)
    taps = merge_weight(weight, workload.geometry, merged).reshape(geometry.weight_shape)
    _, groups, terms, channels, width = packed.shape
    outputs = geometry.out_channels // geometry.groups
    per_group = -(-outputs // width)
    of_reals, of_pairs = packed[: grid.reals], packed[grid.reals :]
    if schedule.gauss:
        of_pairs = of_pairs.reshape(grid.pairs, 3, groups, terms, channels, width)
    else:
        of_pairs = of_pairs.reshape(grid.pairs, groups, terms, channels, 2, width)
    for group in range(groups):
        first = group // per_group * outputs + group % per_group * width
        count = min(width, (group // per_group + 1) * outputs - first)
        for term, spectra in enumerate(_spectra(taps[first : first + count], grid)):
            reals, pairs = (values.transpose(0, 2, 1) for values in spectra)
            of_reals[:, group, term, :, :count] = reals
            if schedule.gauss:
                products = (pairs.real, pairs.imag - pairs.real, pairs.real + pairs.imag)
                for part, values in enumerate(products):
                    of_pairs[:, part, group, term, :, :count] = values
            else:
                of_pairs[:, group, term, :, 0, :count] = pairs.real
                of_pairs[:, group, term, :, 1, :count] = pairs.imag
    return packed.reshape(-1)


def _packed_shape(workload: ConvWorkload, schedule: FFTSchedule, isa: VectorISA) -> tuple[int, ...]:
    geometry, grid = fft_geometry(workload, isa), grid_of(workload, schedule, isa)
    if is_depthwise(geometry):
        return -(-geometry.out_channels // isa.lanes), grid.terms, grid.slots, isa.lanes
    width = schedule.vectors * isa.lanes
    groups = geometry.groups * -(-geometry.out_channels // geometry.groups // width)
    return grid.slots, groups, grid.terms, geometry.in_channels // geometry.groups, width


def _spectra(taps: np.ndarray, grid: FFTGrid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What multiplies the spectra of tiles, for each term: (reals, ...) and (pairs, ...).

    ``taps`` are (..., X, Y). Correlation takes conjugates; the scale is that of the inverse, which
    needs complex values doubled, as each stands for its conjugate too.
    """
    rows, columns = grid.axes
    ends = [sorted({0, axis.points // 2}) for axis in grid.axes]
    real = [(f, g) for g in ends[1] for f in ends[0]]
    if grid.is_planar:
        pairs = [(f, g) for g in ends[1] for f in real_frequencies(rows.points)]
        pairs += [(f, g) for g in real_frequencies(columns.points) for f in range(rows.points)]
    elif columns.points > 1:
        pairs = [(0, g) for g in real_frequencies(columns.points)]
    else:
        pairs = [(f, 0) for f in real_frequencies(rows.points)]
    size = rows.points * columns.points
    for row in range(rows.terms):
        for column in range(columns.terms):
            part = taps[..., rows.taps_of(row), :][..., columns.taps_of(column)]
            padded = np.zeros((*taps.shape[:-2], rows.points, columns.points))
            padded[..., : part.shape[-2], : part.shape[-1]] = part
            spectrum = np.conj(np.fft.fft2(padded)) / size
            found = [
                np.moveaxis(spectrum[..., [f for f, _ in at], [g for _, g in at]], -1, 0)
                for at in (real, pairs)
            ]
            yield found[0].real, 2 * found[1]
