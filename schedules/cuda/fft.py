"""Convolution by tiled Fourier transforms: overlap-save, one complex product for each frequency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import ir, tirx
from tvm_lowrank.schedules.transforms.fft_codelets import (
    complex_dft,
    real_dft,
    shortened,
    transposed,
)
from tvm_lowrank.schedules.x86.accuracy import stated_error
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

from . import model
from .arch import CudaArch
from .epilogue import map_shape, operand_shapes
from .gemm import Gemm, GemmSchedule, Index, is_legal, tiles
from .gemm import emit as emit_gemm
from .program import WEIGHTS, Program, Stage, X, Y, moved_bytes
from .straight import THREADS, Values, emit_threads
from .winograd import INPUTS, OUTPUTS, Products, TileGrid, store_inside

# Rows and columns of the input that one transform takes.
TILES = (8, 16)
_SHORTEST_KERNEL = 3
_PRODUCTS = 8
_MOST_SCHEDULES = 16
ROWS, BACK = "row_spectra", "row_products"


@dataclass(frozen=True)
class FFTSchedule(GemmSchedule):
    """The tiles of the products, and the side of the input tile of a transform."""

    kernel: ClassVar[str] = "cuda_fft"

    tile: int = 16

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FFTSchedule:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


@dataclass(frozen=True)
class _Spectra:
    """Tiles of the map and their spectra, of which half of the columns determine the rest."""

    geometry: ConvGeometry
    tile: int

    @property
    def grid(self) -> TileGrid:
        """The tiles of the output."""
        x, y = self.geometry.kernel
        return TileGrid(self.geometry, (self.tile - x + 1, self.tile - y + 1))

    @property
    def columns(self) -> int:
        """Columns of a spectrum that are kept."""
        return self.tile // 2 + 1

    @property
    def gemm(self) -> Gemm:
        """Complex products as real ones: real and imaginary parts are channels of their own."""
        g = self.geometry
        points = self.tile * self.columns
        return Gemm(points, 2 * g.out_channels, self.grid.tiles, 2 * g.in_channels)


def refuse(workload: ConvWorkload, arch: CudaArch) -> str | None:
    """Why no Fourier kernel can compute ``workload``, or None if one can."""
    g = workload.geometry
    if workload.in_block != arch.block:
        return f"fft: in_block is {workload.in_block}, expected {arch.block}"
    if g.groups != 1 or g.stride != (1, 1) or g.dilation != (1, 1):
        return f"fft: {g} has groups, a stride or a dilation"
    if min(g.kernel) < _SHORTEST_KERNEL or max(g.kernel) > TILES[-1] - 1:
        return f"fft: kernel is {g.kernel}, expected {_SHORTEST_KERNEL} to {TILES[-1] - 1}"
    return None


def is_schedule_legal(workload: ConvWorkload, schedule: FFTSchedule, arch: CudaArch) -> str | None:
    """Why ``schedule`` cannot be used for ``workload``, or None if it can."""
    problem = refuse(workload, arch)
    if problem:
        return problem
    if schedule.tile not in TILES or schedule.tile <= max(workload.geometry.kernel):
        return f"tile is {schedule.tile}, expected one of {TILES} and larger than the kernel"
    if schedule.split_k != 1:
        return "the products of a transform are not split"
    return is_legal(_Spectra(workload.geometry, schedule.tile).gemm, schedule, arch)


def space(workload: ConvWorkload, arch: CudaArch) -> list[FFTSchedule]:
    """Legal schedules, the one predicted fastest first."""
    found = []
    for side in TILES:
        if side <= max(workload.geometry.kernel):
            continue
        gemm = _Spectra(workload.geometry, side).gemm
        products = [tile for tile in tiles(gemm, arch) if tile.split_k == 1]
        products.sort(key=lambda tile: (model.of_gemm(gemm, tile, 0, arch, 0.3), str(tile)))
        found += [FFTSchedule(**vars(tile), tile=side) for tile in products[:_PRODUCTS]]
    legal = [s for s in found if is_schedule_legal(workload, s, arch) is None]
    legal.sort(key=lambda schedule: (predict(workload, schedule, arch), str(schedule)))
    return legal[:_MOST_SCHEDULES]


def predict(workload: ConvWorkload, schedule: FFTSchedule, arch: CudaArch) -> float:
    """Predicted microseconds of the five kernels."""
    spectra = _Spectra(workload.geometry, schedule.tile)
    gemm, whole = spectra.gemm, spectra.gemm.padded(schedule)
    g, outside = workload.geometry, moved_bytes(workload, 0) / 2
    there, back = 4.0 * gemm.batch * gemm.k * gemm.n, 4.0 * gemm.batch * gemm.m * gemm.n
    weights = 4.0 * gemm.batch * whole.k * whole.m
    steps = 5.0 * schedule.tile * np.log2(schedule.tile)
    middle = model.of_gemm(gemm, schedule, there + weights + back, arch, 0.3)
    passes = [
        (g.in_channels * schedule.tile, outside + there),
        (g.in_channels * spectra.columns, 2 * there),
        (g.out_channels * spectra.columns, 2 * back),
        (g.out_channels * spectra.grid.tile[0], outside + back),
    ]
    return middle + sum(
        model.of_streaming(count * gemm.n, memory, steps, arch, THREADS) for count, memory in passes
    )


def error_bound(workload: ConvWorkload, schedule: FFTSchedule) -> float:
    """The stated max|error| / max|result|; transforms but round once more at each stage."""
    terms = workload.geometry.in_channels * 4 + 4 * int(np.log2(schedule.tile))
    return stated_error(terms)


def pack(
    weight: np.ndarray, workload: ConvWorkload, schedule: FFTSchedule, arch: CudaArch
) -> np.ndarray:
    """OIHW to [frequencies][2 x input channels][2 x output channels], the spectra's conjugates.

    The factors of the inverse transforms are in them: 1 / tile^2, and 2 for the columns that stand
    for two.
    """
    spectra = _Spectra(workload.geometry, schedule.tile)
    side, gemm = schedule.tile, spectra.gemm
    values = np.fft.rfft2(weight.astype(np.float64), (side, side)).conj() / side**2
    values[..., 1:-1] *= 2
    f, c = weight.shape[:2]
    points = values.reshape(f, c, -1).transpose(2, 1, 0)
    whole = gemm.padded(schedule)
    packed = np.zeros((gemm.batch, whole.k, whole.m), np.float32)
    packed[:, :c, :f], packed[:, c : 2 * c, :f] = points.real, -points.imag
    packed[:, :c, f : 2 * f], packed[:, c : 2 * c, f : 2 * f] = points.imag, points.real
    return packed


def emit(workload: ConvWorkload, schedule: FFTSchedule, arch: CudaArch) -> Program:
    """The five kernels; ValueError if the schedule is not legal for the workload."""
    problem = is_schedule_legal(workload, schedule, arch)
    if problem:
        raise ValueError(f"{schedule} for {workload.geometry}: {problem}")
    g = workload.geometry
    spectra = _Spectra(g, schedule.tile)
    grid, gemm, side = spectra.grid, spectra.gemm, schedule.tile
    whole = gemm.padded(schedule)
    operands = operand_shapes(g, workload.epilogue)
    shapes = {
        X: (g.batch, g.in_channels, g.height, g.width),
        WEIGHTS: (gemm.batch, whole.k, whole.m),
        **operands,
        ROWS: (2, spectra.columns, side, g.in_channels, grid.tiles),
        INPUTS: (gemm.batch, gemm.k, gemm.n),
        OUTPUTS: (gemm.batch, gemm.m, gemm.n),
        BACK: (2, spectra.columns, grid.tile[0], g.out_channels, grid.tiles),
        Y: map_shape(g),
    }

    def stage(lines: int, channels: int, reads: tuple[str, ...], writes: str, body: Any) -> Stage:
        def code(number: Index, values: Values) -> None:
            tile = values.hold(number % grid.tiles)
            rest = values.hold(number // grid.tiles)
            channel, line = values.hold(rest % channels), values.hold(rest // channels)
            body(spectra, line, channel, tile, values)

        parameters = {name: shapes[name] for name in (*reads, writes)}
        func = emit_threads(lines * channels * grid.tiles, parameters, code, arch)
        return Stage(func, reads, writes)

    def last(spectra: _Spectra, *place: Any) -> None:
        _outputs(workload, spectra, *place)

    product = emit_gemm(gemm, schedule, Products(gemm, whole), arch)
    stages = (
        stage(side, g.in_channels, (X,), ROWS, _rows),
        stage(spectra.columns, g.in_channels, (ROWS,), INPUTS, _columns),
        Stage(product, (INPUTS, WEIGHTS), OUTPUTS),
        stage(spectra.columns, g.out_channels, (OUTPUTS,), BACK, _columns_back),
        stage(grid.tile[0], g.out_channels, (BACK, *operands), Y, last),
    )
    return Program(stages, shapes, tuple(operands))


def _rows(spectra: _Spectra, line: Index, channel: Index, tile: Index, values: Values) -> None:
    """The spectrum of one row of a tile of the input."""
    g, side = spectra.geometry, spectra.tile
    image, row, column = map(values.hold, spectra.grid.place(tile))
    at = values.hold(row + line - g.padding[0])
    zero = tirx.const(0, "float32")
    inputs = []
    for j in range(side):
        across = column + (j - g.padding[1])
        inside = tirx.all(at >= 0, at < g.height, across >= 0, across < g.width)
        value = values[X][image, channel, at, across]
        inputs.append(values.hold(tirx.if_then_else(inside, value, zero)))
    found = values.apply(real_dft(side), inputs)
    for j, (real, imaginary) in enumerate(_complex(found, zero)):
        values.store(ROWS, real, [0, j, line, channel, tile])
        values.store(ROWS, imaginary, [1, j, line, channel, tile])


def _columns(spectra: _Spectra, line: Index, channel: Index, tile: Index, values: Values) -> None:
    """The spectrum of one column of the rows' spectra."""
    inputs = [
        values.hold(values[ROWS][part, line, i, channel, tile])
        for i in range(spectra.tile)
        for part in range(2)
    ]
    found = values.apply(complex_dft(spectra.tile), inputs)
    channels = spectra.geometry.in_channels
    for i in range(spectra.tile):
        for part in range(2):
            place = [i * spectra.columns + line, part * channels + channel, tile]
            values.store(INPUTS, found[2 * i + part], place)


def _columns_back(
    spectra: _Spectra, line: Index, channel: Index, tile: Index, values: Values
) -> None:
    """One column of a product back from frequencies, as far as the rows are outputs."""
    channels = spectra.geometry.out_channels
    inputs = [
        values.hold(values[OUTPUTS][i * spectra.columns + line, part * channels + channel, tile])
        for i in range(spectra.tile)
        for part in range(2)
    ]
    rows = spectra.grid.tile[0]
    found = values.apply(shortened(transposed(complex_dft(spectra.tile)), range(2 * rows)), inputs)
    for i in range(rows):
        for part in range(2):
            values.store(BACK, found[2 * i + part], [part, line, i, channel, tile])


def _outputs(
    workload: ConvWorkload,
    spectra: _Spectra,
    line: Index,
    channel: Index,
    tile: Index,
    values: Values,
) -> None:
    """One row of a tile of the output back from frequencies, with the epilogue."""
    g, grid = spectra.geometry, spectra.grid
    spectrum = [
        [values.hold(values[BACK][part, j, line, channel, tile]) for part in range(2)]
        for j in range(spectra.columns)
    ]
    inputs = [spectrum[0][0], spectrum[-1][0]]
    inputs += [part for pair in spectrum[1:-1] for part in pair]
    code = shortened(transposed(real_dft(spectra.tile)), range(grid.tile[1]))
    image, row, column = map(values.hold, grid.place(tile))
    at = values.hold(row + line)
    for j, value in enumerate(values.apply(code, inputs)):
        place = [image, channel, at, column + j]
        inside = []
        if g.out_height % grid.tile[0]:
            inside.append(at < g.out_height)
        if g.out_width % grid.tile[1]:
            inside.append(place[3] < g.out_width)
        store_inside(values, workload.epilogue, value, place, inside)


def _complex(packed: list[ir.Expr], zero: ir.Expr) -> list[tuple[ir.Expr, ir.Expr]]:
    """The frequencies of `real_dft`, in order."""
    inner = [(packed[i], packed[i + 1]) for i in range(2, len(packed), 2)]
    return [(packed[0], zero), *inner, (packed[1], zero)]
