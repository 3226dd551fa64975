"""The three stages of a Fourier convolution over the tiles of a map, and their order."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .epilogue import Epilogue
from .fft_schedule import FFTGrid
from .fft_tiles import TileTransform
from .fourier import Packed
from .gemm import RegisterBlock


@dataclass(frozen=True)
class Stages:
    """What the three stages work on: the buffers are input map, packed weights and output map.

    Transformed maps are ``(register block, slot, channel block, row, lane)``, with one vector of
    space after each slot: strides of a power of two would have all slots of a tile fall into the
    same lines of the cache. Channel blocks of the input are ``(group, term, block)``.
    """

    em: Emitter
    grid: FFTGrid
    product: RegisterBlock
    tile: TileTransform
    buffers: tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer]
    epilogue: Epilogue

    @property
    def group_blocks(self) -> int:
        """Blocks of input channels of a group."""
        return -(-self.product.channels // self.em.lanes)

    @property
    def in_blocks(self) -> int:
        """Blocks of input channels, counted for each term."""
        return self.grid.geometry.groups * self.grid.terms * self.group_blocks

    @property
    def out_blocks(self) -> int:
        """Blocks of output channels."""
        return -(-self.grid.geometry.out_channels // self.em.lanes)

    @property
    def groups(self) -> int:
        """Groups of output channels, one a register block."""
        return self.out_blocks // self.product.vectors

    def slot_stride(self, channel_blocks: int) -> int:
        """Elements between two slots of a register block of a transformed map."""
        return (channel_blocks * self.grid.rows + 1) * self.em.lanes

    def block_stride(self, channel_blocks: int) -> int:
        """Elements between two register blocks of a transformed map."""
        return self.grid.slots * self.slot_stride(channel_blocks)

    def emit_fused(self, blocks: int) -> None:
        """Parallel tasks of ``blocks`` register blocks, each through all stages."""
        em, count = self.em, self.grid.blocks
        with em.loop(-(-count // blocks), "parallel", prefix="task") as task:
            # Made by every task: a thread gets the same memory again, which is still in its cache.
            data = em.workspace(blocks * self.block_stride(self.in_blocks))
            products = em.workspace(blocks * self.block_stride(self.out_blocks))
            scratch = em.workspace(self.tile.scratch)
            first = em.bind_index(task * blocks, "first")
            extent: Index = blocks
            if count % blocks:
                extent = em.bind_index(clamp_high(count - first, blocks), "count")
            with em.loop(extent, prefix="block") as block:
                self._input((first + block, block), (0, self.in_blocks), data, scratch)
            for start, end, complex_ in self._products():
                with (
                    em.loop(end - start, prefix="product") as number,
                    em.loop(self.groups, prefix="group") as group,
                    em.loop(extent, prefix="block") as block,
                ):
                    self._multiply(block, (number, start, complex_), group, data, products)
            with em.loop(extent, prefix="block") as block:
                self._output((first + block, block), (0, self.out_blocks), products, scratch)

    def emit_staged(self) -> None:
        """One parallel stage after the other over the whole map."""
        em, count = self.em, self.grid.blocks
        data = em.workspace(count * self.block_stride(self.in_blocks))
        products = em.workspace(count * self.block_stride(self.out_blocks))
        with em.loop(count * self.in_blocks, "parallel", prefix="task") as task:
            scratch = em.workspace(self.tile.scratch)
            block = em.bind_index(quotient(task, self.in_blocks), "block")
            channels = em.bind_index(remainder(task, self.in_blocks), "channels")
            self._input((block, block), (channels, 1), data, scratch)
        for start, end, complex_ in self._products():
            with em.loop((end - start) * self.groups, "parallel", prefix="task") as task:
                number = em.bind_index(quotient(task, self.groups), "product")
                group = em.bind_index(remainder(task, self.groups), "group")
                with em.loop(count, prefix="block") as block:
                    self._multiply(block, (number, start, complex_), group, data, products)
        with em.loop(count * self.out_blocks, "parallel", prefix="task") as task:
            scratch = em.workspace(self.tile.scratch)
            block = em.bind_index(quotient(task, self.out_blocks), "block")
            channels = em.bind_index(remainder(task, self.out_blocks), "channels")
            self._output((block, block), (channels, 1), products, scratch)

    def _products(self) -> list[tuple[int, int, bool]]:
        """Ranges of slots whose products are alike: first, number after the last, complex?"""
        grid = self.grid
        if grid.gauss:
            return [(0, grid.slots, False)]
        return [(0, grid.reals, False), (grid.reals, grid.reals + grid.pairs, True)]

    def _input(
        self,
        numbers: tuple[Index, Index],
        channels: tuple[Index, int],
        data: tirx.Buffer,
        scratch: tirx.Buffer,
    ) -> None:
        """Transform the tiles of a register block, by its number on the map and in ``data``.

        ``channels`` are the first block of channels and the number of these.
        """
        em, grid, geometry, lanes = self.em, self.grid, self.grid.geometry, self.em.lanes
        number, local = numbers
        size = geometry.height * geometry.width * lanes
        maps = geometry.groups * self.group_blocks
        with em.loop(grid.rows, prefix="tile") as t:
            tile = em.bind_index(number * grid.rows + t, "tile")
            if grid.tiles % grid.rows:
                tile = em.bind_index(clamp_high(tile, grid.tiles - 1), "tile")
            place = self.tile.place(tile)
            with em.loop(channels[1], prefix="block") as block:
                at = em.bind_index(channels[0] + block, "at")
                term = em.bind_index(remainder(quotient(at, self.group_blocks), grid.terms), "term")
                group = quotient(at, self.group_blocks * grid.terms)
                channel = group * self.group_blocks + remainder(at, self.group_blocks)
                source = em.bind_index((place.image * maps + channel) * size, "x")
                target = local * self.block_stride(self.in_blocks) + (at * grid.rows + t) * lanes
                sink = self._spectrum(data, target, self.in_blocks)
                self.tile.forward(place, (self.buffers[0], source), term, sink, scratch)

    def _output(
        self,
        numbers: tuple[Index, Index],
        channels: tuple[Index, int],
        products: tirx.Buffer,
        scratch: tirx.Buffer,
    ) -> None:
        """Transform a register block of products back and store what is on the map."""
        em, grid, geometry, lanes = self.em, self.grid, self.grid.geometry, self.em.lanes
        number, local = numbers
        size = geometry.out_height * geometry.out_width * lanes
        extent: Index = grid.rows
        if grid.tiles % grid.rows:
            extent = clamp_high(grid.tiles - number * grid.rows, grid.rows)
        with em.loop(extent, prefix="tile") as t:
            place = self.tile.place(em.bind_index(number * grid.rows + t, "tile"))
            with em.loop(channels[1], prefix="block") as block:
                at = em.bind_index(channels[0] + block, "at")
                target = em.bind_index((place.image * self.out_blocks + at) * size, "y")
                source = local * self.block_stride(self.out_blocks) + (at * grid.rows + t) * lanes
                values = self._spectrum(products, source, self.out_blocks)
                y = (self.buffers[2], target)
                self.tile.inverse(place, values, y, self.epilogue, at * lanes, scratch)

    def _spectrum(self, buffer: tirx.Buffer, at: Index, channel_blocks: int) -> Packed:
        """The spectrum of a tile in a transformed map, from its first slot on."""
        kind = _Threefold if self.grid.gauss else Packed
        base = self.em.bind_index(at, "v")
        return kind(self.em, buffer, base, self.slot_stride(channel_blocks), self.grid.reals)

    def _multiply(
        self,
        block: Index,
        which: tuple[Index, int, bool],
        group: Index,
        data: tirx.Buffer,
        products: tirx.Buffer,
    ) -> None:
        """The products of a register block at a frequency, for a group of output channels.

        ``which`` holds the number of the product, that of the first like it, and its kind.
        """
        em, lanes, rows = self.em, self.em.lanes, self.grid.rows
        number, start, complex_ = which
        parts = 2 if complex_ else 1
        # Real products come first, each in one slot.
        slot = em.bind_index(number * parts + start, "slot")
        vectors = self.product.vectors
        strides = [self.slot_stride(n) for n in (self.in_blocks, self.out_blocks)]
        of_group = quotient(group, self.groups // self.grid.geometry.groups)
        segment = self.grid.terms * self.group_blocks * rows * lanes
        left = em.bind_index(
            block * self.block_stride(self.in_blocks) + slot * strides[0] + of_group * segment, "v"
        )
        size = self.grid.terms * self.product.channels * vectors * lanes
        right = em.bind_index((slot * self.groups + group * parts) * size, "w")
        target = em.bind_index(
            block * self.block_stride(self.out_blocks)
            + slot * strides[1]
            + group * (vectors * rows * lanes),
            "m",
        )

        def store(row: int, vector: int, values: tuple[ir.Expr, ...]) -> None:
            for part, value in enumerate(values):
                at = target + (part * strides[1] + (vector * rows + row) * lanes)
                em.store(products, value, at)

        product = RegisterBlock(rows, vectors, self.product.channels, self.product.segments, parts)
        lefts = tuple(left + part * strides[0] for part in range(parts))
        product.emit_parts(em, (data, lefts), (self.buffers[1], right), store)


@dataclass(frozen=True)
class _Threefold(Packed):
    """A spectrum with three slots for a complex value.

    On its way in: the sum of both parts, the real, the imaginary one. On its way out: the products
    of these with the real part of the weight, its imaginary minus its real part, and their sum.
    """

    def complex(self, number: Index) -> tuple[ir.Expr, ir.Expr]:
        """Real and imaginary part of a product."""
        at = self.base + (number * 3 + self.reals) * self.step
        first, second, third = (self.em.load(self.buffer, at + i * self.step) for i in range(3))
        return self.em.bind(first - third), self.em.bind(first + second)

    def put_complex(self, number: Index, real: ir.Expr, imaginary: ir.Expr) -> None:
        """Store what three products need."""
        at = self.base + (number * 3 + self.reals) * self.step
        for i, value in enumerate((real + imaginary, real, imaginary)):
            self.em.store(self.buffer, value, at + i * self.step)


@dataclass(frozen=True)
class _Multiplied(Packed):
    """A spectrum that gets multiplied by weights on its way into memory, maybe added to it."""

    weights: tirx.Buffer
    first: Index
    adds: bool

    def put_real(self, number: Index, value: ir.Expr) -> None:
        """Store the product with the weight of a real frequency."""
        at = number * self.step
        self._store(value * self.em.load(self.weights, self.first + at), at)

    def put_complex(self, number: Index, real: ir.Expr, imaginary: ir.Expr) -> None:
        """Store the product with the weight of a complex frequency."""
        em, at = self.em, (number * 2 + self.reals) * self.step
        a, b = (em.load(self.weights, self.first + at + i * self.step) for i in range(2))
        self._store(real * a - imaginary * b, at)
        self._store(real * b + imaginary * a, at + self.step)

    def _store(self, value: ir.Expr, at: Index) -> None:
        if self.adds:
            value = value + self.em.load(self.buffer, self.base + at)
        self.em.store(self.buffer, value, self.base + at)


def emit_depthwise(
    em: Emitter,
    grid: FFTGrid,
    tile: TileTransform,
    buffers: tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer],
    epilogue: Epilogue,
) -> None:
    """One task a tile of a block of channels; spectra are multiplied value by value."""
    geometry, lanes = grid.geometry, em.lanes
    x, weights, y = buffers
    blocks, size = -(-geometry.out_channels // lanes), grid.slots * lanes
    with em.loop(blocks * grid.tiles, "parallel", prefix="task") as task:
        spectrum, scratch = em.workspace(size), em.workspace(tile.scratch)
        block = em.bind_index(quotient(task, grid.tiles), "block")
        place = tile.place(em.bind_index(remainder(task, grid.tiles), "tile"))
        plane = em.bind_index(place.image * blocks + block, "map")
        if grid.terms > 1:
            with em.loop(grid.slots, prefix="slot") as slot:
                em.store(spectrum, em.constant(0), slot * lanes)
        with em.loop(grid.terms, prefix="term") as term:
            source = em.bind_index(plane * (geometry.height * geometry.width * lanes), "x")
            first = em.bind_index((block * grid.terms + term) * size, "w")
            sink = _Multiplied(em, spectrum, 0, lanes, grid.reals, weights, first, grid.terms > 1)
            tile.forward(place, (x, source), term, sink, scratch)
        target = em.bind_index(plane * (geometry.out_height * geometry.out_width * lanes), "y")
        values = Packed(em, spectrum, 0, lanes, grid.reals)
        tile.inverse(place, values, (y, target), epilogue, block * lanes, scratch)
