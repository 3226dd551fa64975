"""Winograd convolution: transformed tiles of the input, one product for each point, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.transforms import tile_grid
from tvm_lowrank.schedules.transforms.cook_toom import MOST_POINTS, cook_toom, transform_code
from tvm_lowrank.schedules.transforms.linear_code import LinearCode
from tvm_lowrank.schedules.x86.accuracy import stated_error
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import model
from .arch import CudaArch
from .epilogue import apply_steps as apply_epilogue
from .epilogue import map_shape, operand_shapes
from .gemm import Gemm, GemmSchedule, Index, Operands, is_legal, tiles
from .gemm import emit as emit_gemm
from .program import WEIGHTS, Program, Stage, X, Y, moved_bytes
from .straight import THREADS, Values, emit_threads

_LONGEST_KERNEL = 7
_MOST_SCHEDULES = 32
# Tiles of the product that are considered for each size of the transform.
_PRODUCTS = 8
INPUTS, OUTPUTS = "transformed", "products"


@dataclass(frozen=True)
class WinogradSchedule(GemmSchedule):
    """The tiles of the products, and (m, m') of F(m x m', r x r'): outputs of a transform.

    ``outputs`` is 1 along an axis where the kernel is 1.
    """

    kernel: ClassVar[str] = "cuda_winograd"

    outputs: tuple[int, int] = (2, 2)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self), "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WinogradSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        fields = {name: value for name, value in data.items() if name != "kernel"}
        return cls(**{**fields, "outputs": tuple(data["outputs"])})


class TileGrid(tile_grid.TileGrid):
    """The tiles of a batch, and the products of their points."""

    @property
    def gemm(self) -> Gemm:
        """The products: one for each point."""
        g = self.geometry
        return Gemm(self.points, g.out_channels, self.tiles, g.in_channels)

    def place(self, tile: Index) -> tuple[Index, Index, Index]:
        """Image, first row and first column of a tile in the output map."""
        line = tile // self.per_line
        row, column = line % self.lines * self.tile[0], tile % self.per_line * self.tile[1]
        return line // self.lines, row, column


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why no Winograd kernel can compute ``workload``, or None if one can."""
    g = workload.geometry
    if workload.in_block != arch.block:
        return f"winograd: in_block is {workload.in_block}, expected {arch.block}"
    if g.groups != 1:
        return f"winograd: groups is {g.groups}, expected 1"
    if g.stride != (1, 1) or g.dilation != (1, 1):
        return f"winograd: stride {g.stride} and dilation {g.dilation}, expected (1, 1)"
    if g.kernel == (1, 1) or max(g.kernel) > _LONGEST_KERNEL:
        return f"winograd: kernel is {g.kernel}, expected 2 to {_LONGEST_KERNEL} along one axis"
    return None


def is_schedule_legal(
    workload: ConvWorkload, schedule: WinogradSchedule, arch: CudaArch
) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    if schedule.split_k != 1:
        return "the products of a transform are not split"
    for taps, outputs in zip(workload.geometry.kernel, schedule.outputs, strict=True):
        if outputs < 1 or (taps == 1 and outputs > 1):
            return f"outputs is {schedule.outputs}, expected 1 where the kernel is 1"
    grid = TileGrid(workload.geometry, schedule.outputs)
    if max(grid.inputs) > MOST_POINTS:
        return f"tiles read {grid.inputs} inputs, expected at most {MOST_POINTS} along an axis"
    return is_legal(grid.gemm, schedule, arch)


def space(workload: ConvWorkload, arch: CudaArch) -> list[WinogradSchedule]:
    """Legal schedules, the one predicted fastest first."""
    kernel = workload.geometry.kernel
    choices = [(1,) if taps == 1 else (2, 3, 4, 6) for taps in kernel]
    found = []
    for outputs in itertools.product(*choices):
        if len({m for m, taps in zip(outputs, kernel, strict=True) if taps > 1}) > 1:
            continue
        grid = TileGrid(workload.geometry, (outputs[0], outputs[1]))
        if max(grid.inputs) > min(MOST_POINTS, 8):
            continue
        products = [tile for tile in tiles(grid.gemm, arch) if tile.split_k == 1]
        products.sort(key=lambda tile: (model.of_gemm(grid.gemm, tile, 0, arch, 0.3), str(tile)))
        for tile in products[:_PRODUCTS]:
            found.append(WinogradSchedule(**vars(tile), outputs=grid.tile))
    legal = [s for s in found if is_schedule_legal(workload, s, arch) is None]
    legal.sort(key=lambda schedule: (predict(workload, schedule, arch), str(schedule)))
    return legal[:_MOST_SCHEDULES]


def predict(workload: ConvWorkload, schedule: WinogradSchedule, arch: CudaArch) -> float:
    """Predicted microseconds of the three kernels."""
    grid = TileGrid(workload.geometry, schedule.outputs)
    gemm, whole = grid.gemm, grid.gemm.padded(schedule)
    inputs = 4.0 * gemm.batch * gemm.k * gemm.n
    products = 4.0 * gemm.batch * gemm.m * gemm.n
    weights = 4.0 * gemm.batch * whole.k * whole.m
    outside = moved_bytes(workload, 0)
    steps = 4 * grid.points
    there = model.of_streaming(gemm.k * gemm.n, outside / 2 + inputs, steps, arch, THREADS)
    back = model.of_streaming(gemm.m * gemm.n, outside / 2 + products, steps, arch, THREADS)
    middle = model.of_gemm(gemm, schedule, inputs + weights + products, arch, 0.3)
    return there + middle + back


def error_bound(workload: ConvWorkload, schedule: WinogradSchedule) -> float:
    """The stated max|error| / max|result|, as `accuracy.stated_error` defines it."""
    amplification = 1.0
    for outputs, taps in zip(schedule.outputs, workload.geometry.kernel, strict=True):
        amplification *= cook_toom(outputs, taps).amplification
    return stated_error(workload.geometry.in_channels, amplification)


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: WinogradSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [points][input channels][output channels], transformed and padded with zeros."""
    grid = TileGrid(workload.geometry, schedule.outputs)
    rows, columns = (
        np.array(cook_toom(m, r).filter, np.float64)
        for m, r in zip(schedule.outputs, workload.geometry.kernel, strict=True)
    )
    points = np.einsum("px,fcxy,qy->pqcf", rows, weight.astype(np.float64), columns, optimize=True)
    whole = grid.gemm.padded(schedule)
    packed = np.zeros((grid.points, whole.k, whole.m), np.float32)
    packed[:, : grid.gemm.k, : grid.gemm.m] = points.reshape(-1, *points.shape[2:])
    return packed


def emit(workload: ConvWorkload, schedule: WinogradSchedule, arch: CudaArch) -> Program:
    """The three kernels; ValueError if the schedule is not legal for the workload."""
    problem = is_schedule_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    g = workload.geometry
    grid = TileGrid(g, schedule.outputs)
    gemm, whole = grid.gemm, grid.gemm.padded(schedule)
    operands = operand_shapes(g, workload.epilogue)
    shapes = {
        X: (g.batch, g.in_channels, g.height, g.width),
        WEIGHTS: (grid.points, whole.k, whole.m),
        **operands,
        INPUTS: (grid.points, gemm.k, gemm.n),
        OUTPUTS: (grid.points, gemm.m, gemm.n),
        Y: map_shape(g),
    }
    there = emit_threads(
        gemm.k * gemm.n,
        {name: shapes[name] for name in (X, INPUTS)},
        lambda number, values: _transform_input(grid, number, values),
        arch,
    )
    back = emit_threads(
        gemm.m * gemm.n,
        {name: shapes[name] for name in (OUTPUTS, *operands, Y)},
        lambda number, values: _transform_output(workload, grid, number, values),
        arch,
    )
    stages = (
        Stage(there, (X,), INPUTS),
        Stage(emit_gemm(gemm, schedule, Products(gemm, whole), arch), (INPUTS, WEIGHTS), OUTPUTS),
        Stage(back, (OUTPUTS, *operands), Y),
    )
    return Program(stages, shapes, tuple(operands))


def _codes(grid: TileGrid, which: str) -> tuple[LinearCode, LinearCode]:
    """The code of a transform along columns and along rows of a tile."""
    rows, columns = (
        transform_code(m, r, which) for m, r in zip(grid.tile, grid.geometry.kernel, strict=True)
    )
    return rows, columns


def _transform_input(grid: TileGrid, number: Index, values: Values) -> None:
    """One tile of one channel: read, transform along both axes, write a value for each point."""
    g, tile = grid.geometry, values.hold(number % grid.tiles)
    channel = values.hold(number // grid.tiles)
    image, row, column = map(values.hold, grid.place(tile))
    rows, columns = grid.inputs
    patch: list[list[ir.Expr]] = []
    for i in range(rows):
        patch.append([])
        for j in range(columns):
            at = row + (i - g.padding[0]), column + (j - g.padding[1])
            inside = tirx.all(at[0] >= 0, at[0] < g.height, at[1] >= 0, at[1] < g.width)
            value = values[X][image, channel, at[0], at[1]]
            patch[-1].append(
                values.hold(tirx.if_then_else(inside, value, tirx.const(0, "float32")))
            )
    points = values.apply_to_grid(_codes(grid, "input"), patch)
    for point, value in enumerate(itertools.chain.from_iterable(points)):
        values.store(INPUTS, value, [point, channel, tile])


def _transform_output(
    workload: ConvWorkload, grid: TileGrid, number: Index, values: Values
) -> None:
    """One tile of one output channel: read its points, transform back, epilogue, write."""
    g, tile = grid.geometry, values.hold(number % grid.tiles)
    channel = values.hold(number // grid.tiles)
    image, row, column = map(values.hold, grid.place(tile))
    rows, columns = grid.inputs
    points = [
        [values.hold(values[OUTPUTS][i * columns + j, channel, tile]) for j in range(columns)]
        for i in range(rows)
    ]
    outputs = values.apply_to_grid(_codes(grid, "output"), points)
    for i, line in enumerate(outputs):
        for j, value in enumerate(line):
            place = [image, channel, row + i, column + j]
            inside = []
            if g.out_height % grid.tile[0]:
                inside.append(place[2] < g.out_height)
            if g.out_width % grid.tile[1]:
                inside.append(place[3] < g.out_width)
            store_inside(values, workload.epilogue, value, place, inside)


def store_inside(
    values: Values,
    steps: Sequence[str],
    value: ir.Expr,
    place: Sequence[Index],
    inside: Sequence[ir.Expr],
) -> None:
    """Apply the epilogue to an output and write it, where the conditions hold."""
    if not inside:
        values.store(Y, apply_epilogue(steps, values.buffers, value, place), place)
        return
    with T.If(tirx.all(*inside)), T.Then():
        values.store(Y, apply_epilogue(steps, values.buffers, value, place), place)


class Products(Operands):
    """The operands of products whose columns are in memory as they are."""

    def __init__(self, gemm: Gemm, whole: Gemm) -> None:
        self.gemm = gemm
        self.whole = whole
        self.vector = 4 if gemm.n % 4 == 0 else 1

    def declare(self) -> None:
        """Columns, rows and results."""
        gemm, whole = self.gemm, self.whole
        self.columns = T.arg(INPUTS, T.buffer((gemm.batch, gemm.k, gemm.n), "float32"))
        self.rows = T.arg(WEIGHTS, T.buffer((gemm.batch, whole.k, whole.m), "float32"))
        self.results = T.arg(OUTPUTS, T.buffer((gemm.batch, gemm.m, gemm.n), "float32"))

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A packed weight."""
        return self.rows[batch, k, i]

    def read(self, batch: Index, k: Index, j: Index) -> ir.Expr:
        """A column, zero beyond the last and below the last channel."""
        inside = []
        if self.whole.k > self.gemm.k:
            inside.append(k < self.gemm.k)
        if self.whole.n > self.gemm.n:
            inside.append(j // self.vector * self.vector < self.gemm.n)
        value = self.columns[batch, k, j]
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, "float32"))

    def write(self, batch: Index, i: Index, j: Index, value: ir.Expr) -> None:
        """A result."""
        inside = []
        if self.whole.m > self.gemm.m:
            inside.append(i < self.gemm.m)
        if self.whole.n > self.gemm.n:
            inside.append(j // self.vector * self.vector < self.gemm.n)
        if not inside:
            T.buffer_store(self.results, value, [batch, i, j])
            return
        with T.If(tirx.all(*inside)), T.Then():
            T.buffer_store(self.results, value, [batch, i, j])
