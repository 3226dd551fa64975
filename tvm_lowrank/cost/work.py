"""What a kernel has to do, counted: multiply-adds, transforms, bytes, tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tvm_lowrank.cost.operations import FLOAT32_BYTES
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# What transforms reach of the peak: counted as products with dense matrices, about half of which
# are zeros, and as the fewest operations there are, most of them additions.
_DENSE_SHARE, _FOURIER_SHARE = 0.7, 0.3


@dataclass(frozen=True)
class Work:
    """Counts of one kernel for the whole batch, channels in whole vectors.

    Attributes
    ----------
    products : float
        Multiply-adds: of the direct sum, or of the products between transforms.
    transforms : float
        Operations of the transforms of data; those of weights are done beforehand.
    weight_bytes : float
        Weights as the kernel reads them: transformed, padded.
    map_bytes : float
        Input and output maps.
    scratch_bytes : float
        Transformed data and products, once.
    task_bytes : float
        The same of one parallel task, if it keeps them to itself.
    tasks : float
        Parallel tasks of the longest stage.
    stages : int
        Parallel loops, one after the other.
    sums, inputs : float
        Accumulators of a register block, and vectors or scalars that it loads for each step.
    share : float
        Of the peak, that the transforms reach as they are counted.
    """

    products: float
    transforms: float
    weight_bytes: float
    map_bytes: float
    scratch_bytes: float = 0.0
    task_bytes: float = 0.0
    tasks: float = 1.0
    stages: int = 1
    sums: float = 8.0
    inputs: float = 8.0
    share: float = 1.0


def work_of(workload: ConvWorkload, schedule: Mapping[str, Any], lanes: int) -> Work:
    """Count what a schedule, given as JSON values, makes of a workload.

    A family that transforms tiles is known by a ``tile`` of two numbers: the outputs of a tile for
    ``winograd`` (Lavin and Gray, 2016), its inputs for ``fft`` (the paper's section on FFT: tiles
    of M + N - 1). Whatever else there is counts as direct.
    """
    if schedule["kernel"] == "winograd":
        return _winograd(workload, schedule, lanes)
    if schedule["kernel"] == "fft":
        return _fft(workload, schedule, lanes)
    return _direct(workload, schedule, lanes)


def _padded(workload: ConvWorkload, lanes: int) -> tuple[int, int]:
    """Input channels of a group, output channels of all, as they are computed."""
    g = workload.geometry
    inside = g.in_channels // g.groups
    return inside, max(1, -(-g.out_channels // lanes)) * lanes


def _map_bytes(workload: ConvWorkload, lanes: int) -> float:
    g = workload.geometry
    block = workload.in_block
    inputs = -(-g.in_channels // block) * block * g.height * g.width
    outputs = _padded(workload, lanes)[1] * g.out_height * g.out_width
    residual = outputs * ("residual" in workload.epilogue)
    return float(FLOAT32_BYTES * g.batch * (inputs + outputs + residual))


def _count(value: Any) -> int:
    """A field of a schedule as a count; 1 for what a family lacks or means otherwise."""
    return value if isinstance(value, int) and value > 0 else 1


def _direct(workload: ConvWorkload, schedule: Mapping[str, Any], lanes: int) -> Work:
    g, (inside, outside) = workload.geometry, _padded(workload, lanes)
    rows, tile, vectors = (_count(schedule.get(name)) for name in ("rows", "tile", "vectors"))
    pixels = rows * tile
    tiles = g.batch * -(-g.out_width // tile) * -(-g.out_height // rows)
    taps = g.kernel[0] * g.kernel[1]
    groups = max(1, outside // (lanes * vectors))
    return Work(
        products=float(tiles * pixels * outside * inside * taps),
        transforms=0.0,
        weight_bytes=float(FLOAT32_BYTES * outside * inside * taps),
        map_bytes=_map_bytes(workload, lanes),
        tasks=groups * math.ceil(tiles / _count(schedule.get("chunk"))),
        sums=float(pixels * vectors * _count(schedule.get("chains"))),
        inputs=float(pixels + vectors),
    )


def _winograd(workload: ConvWorkload, schedule: Mapping[str, Any], lanes: int) -> Work:
    g, kernel = workload.geometry, workload.geometry.kernel
    outputs = schedule["tile"]
    points = [m + taps - 1 for m, taps in zip(outputs, kernel, strict=True)]
    tiles = g.batch * math.ceil(g.out_height / outputs[0]) * math.ceil(g.out_width / outputs[1])
    size = points[0] * points[1]
    # Each one-dimensional transform is a small dense matrix, of which about half are zeros.
    forward = sum(p * size for p in points if p > 1)
    back = outputs[0] * points[1] * points[0] + outputs[0] * outputs[1] * points[1]
    work = _transformed(workload, schedule, lanes, tiles, size, 1.0, 1, forward, back)
    return replace(work, share=_DENSE_SHARE)


def _fft(workload: ConvWorkload, schedule: Mapping[str, Any], lanes: int) -> Work:
    g = workload.geometry
    points, tiles, terms = schedule["tile"], g.batch, 1
    for size, taps, stride, extent in zip(
        points, g.kernel, g.stride, (g.out_height, g.out_width), strict=True
    ):
        phases = min(taps, stride)
        reach = -(-taps // phases)
        # A phase of more taps than three quarters of a tile is cut into parts.
        parts = max(1, math.ceil(reach / max(1, 3 * size // 4)))
        terms *= phases * parts
        tiles *= math.ceil(extent / (size - math.ceil(reach / parts) + 1))
    size = points[0] * points[1]
    # Real transforms, 2.5 n log2 n; complex products of half as many frequencies.
    transform = 2.5 * size * math.log2(size)
    products = 1.5 if schedule.get("gauss") else 2.0
    work = _transformed(
        workload, schedule, lanes, tiles, size, products, terms, transform, transform
    )
    return replace(work, share=_FOURIER_SHARE)


def _transformed(
    workload: ConvWorkload,
    schedule: Mapping[str, Any],
    lanes: int,
    tiles: int,
    size: int,
    products: float,
    terms: int,
    forward: float,
    back: float,
) -> Work:
    """Transform, multiply, transform back: what is common to Winograd's and Fourier's."""
    g, (inside, outside) = workload.geometry, _padded(workload, lanes)
    rows, vectors = schedule.get("rows", 1), schedule.get("vectors", 1)
    blocks = math.ceil(tiles / rows)
    own = schedule.get("blocks", 1)
    everything = terms * g.in_channels + outside
    slots = size * (1.5 if schedule.get("gauss") else 1.0)
    scratch = FLOAT32_BYTES * slots * everything
    return Work(
        products=products * blocks * rows * size * inside * terms * outside,
        transforms=tiles * (forward * terms * g.in_channels + back * outside),
        weight_bytes=FLOAT32_BYTES * slots * inside * terms * outside,
        map_bytes=_map_bytes(workload, lanes),
        scratch_bytes=scratch * tiles,
        task_bytes=scratch * rows * own,
        tasks=math.ceil(blocks / own) if own else size * max(1, outside // (lanes * vectors)),
        stages=1 if own else 3,
        sums=float(rows * vectors),
        inputs=float(rows + vectors),
    )
