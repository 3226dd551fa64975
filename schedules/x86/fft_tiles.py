"""The tiles of a Fourier convolution: from the input map to spectra, and back to the output map."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high, clamp_low, quotient, remainder
from .epilogue import Epilogue
from .fft_schedule import Axis, FFTGrid
from .fourier import ComplexTransform, Packed, RealTransform, Sink, Source


@dataclass(frozen=True)
class Place:
    """A tile: its image, and its class and number along both axes."""

    image: Index
    classes: tuple[Index, Index]
    tiles: tuple[Index, Index]

    def output(self, axis: Axis, index: int) -> Index:
        """The first output of the tile along an axis, counted within its class."""
        return self.tiles[index] * axis.tile_outputs

    def origin(self, axis: Axis, index: int) -> Index:
        """The position in the input of the tile's first value, for the first term."""
        start = self.output(axis, index) * axis.step - axis.padding
        return start + self.classes[index] * axis.stride


class TileTransform:
    """Both transforms of a tile, as code.

    Creating one may emit tables: do so outside of parallel loops. The *line* axis is transformed
    first, of real values; it is the width, unless tiles have one column. Along the other, the
    *cross* axis, two of the spectra of lines are real and the others complex.
    """

    def __init__(self, em: Emitter, grid: FFTGrid) -> None:
        self.em, self.grid, self.lanes = em, grid, em.lanes
        self.line = 1 if grid.axes[1].points > 1 else 0
        self.cross = 1 - self.line
        self._along = RealTransform(em, self._points(self.line))
        if grid.is_planar:
            points = self._points(self.cross)
            same = points == self._points(self.line)
            self._real = self._along if same else RealTransform(em, points)
            self._complex = ComplexTransform(em, points)

    def _points(self, index: int) -> int:
        return self.grid.axes[index].points

    @property
    def _pitch(self) -> int:
        """Elements from one transformed line to the next; not a power of two, see `Stages`."""
        return (self._points(self.line) + 1) * self.lanes

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Elements of scratch memory for the lines, for one of them, for a transform."""
        needed = [self._along.scratch]
        if self.grid.is_planar:
            needed += [self._real.scratch, self._complex.scratch]
        lines = self._points(self.cross) * self._pitch if self.grid.is_planar else 0
        return lines, self._points(self.line) * self.lanes, max(needed) * self.lanes

    @property
    def scratch(self) -> int:
        """Elements of scratch memory that both transforms need."""
        return sum(self._parts)

    def place(self, tile: Index) -> Place:
        """Where a tile of the batch lies."""
        em, numbers, rest = self.em, [], tile
        for axis in reversed(self.grid.axes):
            for count in (axis.tiles, axis.classes):
                numbers.append(em.bind_index(remainder(rest, count), "at"))
                rest = em.bind_index(quotient(rest, count), "rest")
        return Place(rest, (numbers[3], numbers[1]), (numbers[2], numbers[0]))

    def _unit(self, index: int, width: int) -> int:
        """Elements of a map from one position along an axis to the next."""
        return self.lanes if index else width * self.lanes

    # -- input -----------------------------------------------------------------------------

    def forward(
        self,
        place: Place,
        source: tuple[tirx.Buffer, Index],
        term: Index,
        sink: Sink,
        scratch: tirx.Buffer,
    ) -> None:
        """Transform a tile of the map that starts at (buffer, offset), as a term reads it."""
        em, grid, lanes = self.em, self.grid, self.lanes
        axes, terms = (
            grid.axes,
            (quotient(term, grid.axes[1].terms), remainder(term, grid.axes[1].terms)),
        )
        origins = []
        for index, axis in enumerate(axes):
            phase, part = quotient(terms[index], axis.parts), remainder(terms[index], axis.parts)
            shift = phase * axis.dilation + part * (axis.reach * axis.step)
            origins.append(em.bind_index(place.origin(axis, index) + shift, "origin"))
        line, cross = axes[self.line], axes[self.cross]
        along = self._unit(self.line, grid.geometry.width)
        across = self._unit(self.cross, grid.geometry.width)
        start = em.bind_index(source[1] + origins[self.line] * along, "x")
        inside = _inside(line, origins[self.line])
        size, buffered, _ = self._parts

        def transform(row: Index, sink: Sink) -> None:
            at = em.bind_index(start + (origins[self.cross] + row * cross.step) * across, "x")
            temporary = (scratch, size + buffered)
            with nullcontext() if inside is None else em.when(inside):
                step = line.step * along
                self._along.forward(lambda i: em.load(source[0], at + i * step), sink, temporary)
            if inside is not None:
                with em.when(tirx.Not(inside)):
                    on_map = _on_map(cross, origins[self.cross] + row * cross.step)
                    self._fill(source[0], at, origins[self.line], on_map, scratch, size)
                    self._along.forward(
                        lambda i: em.load(scratch, i * lanes + size), sink, temporary
                    )

        if not grid.is_planar:
            transform(0, sink)
            return
        with em.loop(cross.points, prefix="row") as row:
            base = em.bind_index(row * self._pitch, "r")
            on_map = _on_map(cross, origins[self.cross] + row * cross.step)
            with nullcontext() if on_map is None else em.when(on_map):
                transform(row, Packed(em, scratch, base, lanes, 2))
            if on_map is not None:
                with em.when(tirx.Not(on_map)), em.loop(line.points, prefix="i") as i:
                    em.store(scratch, em.constant(0), base + i * lanes)
        self._forward_across(sink, scratch, (scratch, size + buffered))

    def _fill(
        self,
        x: tirx.Buffer,
        at: Index,
        origin: Index,
        on_map: ir.Expr | None,
        scratch: tirx.Buffer,
        target: int,
    ) -> None:
        """Copy those values of a line to ``scratch`` that lie on the map, zeros for the others."""
        em, line = self.em, self.grid.axes[self.line]
        with em.loop(line.points, prefix="i") as i:
            em.store(scratch, em.constant(0), i * em.lanes + target)
        low = clamp_low(quotient(line.step - 1 - origin, line.step), 0)
        high = quotient(clamp_low(line.extent + line.step - 1 - origin, 0), line.step)
        low = em.bind_index(low, "low")
        count = em.bind_index(clamp_high(high, line.points) - low, "count")
        step = line.step * self._unit(self.line, self.grid.geometry.width)
        whole = nullcontext() if on_map is None else em.when(on_map)
        with whole, em.loop(count, start=low, prefix="i") as i:
            em.store(scratch, em.load(x, at + i * step), i * em.lanes + target)

    def _forward_across(
        self, sink: Sink, scratch: tirx.Buffer, temporary: tuple[tirx.Buffer, int]
    ) -> None:
        """Transform the lines in ``scratch`` along the cross axis."""
        em, lanes, points = self.em, self.lanes, self._points(self.cross)
        with em.loop(2, prefix="column") as column:
            self._real.forward(
                lambda i: em.load(scratch, column * lanes + i * self._pitch),
                _Shifted(sink, column * 2, column * (points // 2 - 1)),
                temporary,
            )
        with em.loop(self._points(self.line) // 2 - 1, prefix="column") as column:
            base = em.bind_index((column * 2 + 2) * lanes, "r")
            first = em.bind_index(column * points + (points - 2), "k")

            def load(i: Index) -> tuple[ir.Expr, ir.Expr]:
                at = base + i * self._pitch
                return em.load(scratch, at), em.load(scratch, at + lanes)

            self._complex.forward(
                load, lambda k, re, im: sink.put_complex(first + k, re, im), temporary
            )

    # -- output ----------------------------------------------------------------------------

    def inverse(
        self,
        place: Place,
        source: Source,
        target: tuple[tirx.Buffer, Index],
        epilogue: Epilogue,
        channel: Index,
        scratch: tirx.Buffer,
    ) -> None:
        """Transform a spectrum back and store its outputs on the map at (buffer, offset)."""
        em, grid, lanes, geometry = self.em, self.grid, self.lanes, self.grid.geometry
        line, cross = grid.axes[self.line], grid.axes[self.cross]
        size, buffered, _ = self._parts
        temporary = (scratch, size + buffered)
        if grid.is_planar:
            self._inverse_across(source, scratch, temporary)
        counts, offset = [], target[1]
        for index, axis in enumerate(grid.axes):
            first = em.bind_index(place.output(axis, index), "first")
            unit = self._unit(index, geometry.out_width)
            offset = offset + (first * axis.classes + place.classes[index]) * unit
            counts.append(em.bind_index(_count(axis, first, place.classes[index]), "count"))
        offset = em.bind_index(offset, "y")
        along = self._unit(self.line, geometry.out_width) * line.classes
        across = self._unit(self.cross, geometry.out_width) * cross.classes
        with em.loop(counts[self.cross], prefix="row") as row:
            values = source
            if grid.is_planar:
                values = Packed(em, scratch, em.bind_index(row * self._pitch, "r"), lanes, 2)
            self._along.inverse(
                values,
                lambda i, value: em.store(scratch, value, i * lanes + size),
                temporary,
                line.tile_outputs,
            )
            start = em.bind_index(offset + row * across, "y")
            with em.loop(counts[self.line], prefix="i") as i:
                position = em.bind_index(start + i * along, "y")
                value = em.load(scratch, i * lanes + size)
                em.store(target[0], epilogue.apply(value, channel, position), position)

    def _inverse_across(
        self, source: Source, scratch: tirx.Buffer, temporary: tuple[tirx.Buffer, int]
    ) -> None:
        """Transform a spectrum back along the cross axis, to lines in ``scratch``."""
        em, lanes, points = self.em, self.lanes, self._points(self.cross)
        outputs = self.grid.axes[self.cross].tile_outputs
        with em.loop(2, prefix="column") as column:
            self._real.inverse(
                _Shifted(source, column * 2, column * (points // 2 - 1)),
                lambda i, value: em.store(scratch, value, column * lanes + i * self._pitch),
                temporary,
                outputs,
            )
        with em.loop(self._points(self.line) // 2 - 1, prefix="column") as column:
            base = em.bind_index((column * 2 + 2) * lanes, "r")
            first = em.bind_index(column * points + (points - 2), "k")

            def store(i: Index, re: ir.Expr, im: ir.Expr) -> None:
                at = base + i * self._pitch
                em.store(scratch, re, at)
                em.store(scratch, im, at + lanes)

            self._complex.inverse(lambda k: source.complex(first + k), store, temporary, outputs)


class _Shifted:
    """A part of a spectrum, from given numbers of its real and complex values on."""

    def __init__(self, whole: Any, reals: Index, pairs: Index) -> None:
        self._whole, self._reals, self._pairs = whole, reals, pairs

    def real(self, number: Index) -> ir.Expr:
        return self._whole.real(self._reals + number)

    def complex(self, number: Index) -> tuple[ir.Expr, ir.Expr]:
        return self._whole.complex(self._pairs + number)

    def put_real(self, number: Index, value: ir.Expr) -> None:
        self._whole.put_real(self._reals + number, value)

    def put_complex(self, number: Index, real: ir.Expr, imaginary: ir.Expr) -> None:
        self._whole.put_complex(self._pairs + number, real, imaginary)


def _inside(axis: Axis, origin: Index) -> ir.Expr | None:
    """The condition that a tile lies within the map along an axis; None if all do."""
    if not axis.is_padded:
        return None
    reach = (axis.points - 1) * axis.step + 1
    return tirx.And(tirx.GE(origin, 0), tirx.LE(origin, axis.extent - reach))


def _on_map(axis: Axis, position: Index) -> ir.Expr | None:
    """The condition that a position lies on the map along an axis; None if all do."""
    if not axis.is_padded:
        return None
    return tirx.And(tirx.GE(position, 0), tirx.LT(position, axis.extent))


def _count(axis: Axis, first: Index, number: Index) -> Index:
    """Outputs of a tile that lie on the map along an axis."""
    if axis.classes == 1 and axis.outputs % axis.tile_outputs == 0:
        return axis.tile_outputs
    # Class b has ceil((outputs - b) / classes) of them.
    rest = quotient(axis.outputs + axis.classes - 1 - number, axis.classes) - first
    return clamp_low(clamp_high(rest, axis.tile_outputs), 0)
