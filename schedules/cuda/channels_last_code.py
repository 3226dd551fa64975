"""The code of `channels_last`: warps that copy channels of pixels, and warps that multiply."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import wgmma, wgmma_shared
from .arch import WARP
from .channels_last_schedule import LastSchedule
from .direct import Convolution
from .epilogue import apply_steps
from .few_channels import inner, splits
from .gemm import Index
from .warpgroup_code import Block, at, build

# Where in what is known of a pixel the columns of taps begin; rows come first.
_COLUMN_BITS = 16
# Registers that hold 16 bytes.
_HELD = 4


class LastProduct(Convolution):
    """A convolution's operands; maps have channels last, the sum runs over taps, then channels."""

    def __init__(self, workload: ConvWorkload, schedule: LastSchedule) -> None:
        super().__init__(inner(workload), schedule)
        self.given = workload.geometry
        self.splits = splits(workload)
        self.schedule = schedule
        self.kind = schedule.kind
        self.vector_rows = schedule.factor.per_core
        self.weight_dtype = "float32" if schedule.factor.bytes == 4 else "float16"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        s, whole = self.schedule, self.whole
        pieces = whole.k // s.block_k
        return (self.geometry.groups, whole.m // s.block_m, pieces, s.block_k * s.block_m)

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A packed weight."""
        s, per_core = self.schedule, self.schedule.factor.per_core
        column = wgmma_shared.column_of(s.factor, i % s.block_m)
        place = (k % s.block_k // per_core * s.block_m + column) * per_core + k % per_core
        return self.w[batch, i // s.block_m, k // s.block_k, place].astype("float32")


def kernel(product: LastProduct, most_blocks: int) -> tirx.PrimFunc:
    """The kernel as threads; ``most_blocks`` is how many stay, if blocks do."""
    return build(product, _Block, most_blocks if product.schedule.stays else 0)


class _Block(Block):
    """What a block of threads does."""

    def __init__(self, product: LastProduct, stack: ExitStack, most_blocks: int = 0) -> None:
        super().__init__(product, stack, most_blocks)
        s, g = product.schedule, product.geometry
        self.columns = T.alloc_buffer(
            (s.stages * s.lines * s.line * s.factor.per_core,),
            product.weight_dtype,
            scope="shared.dyn",
        )
        # Copies of a thread are of the same channels, of so many pixels.
        self.abreast = s.copying * WARP // s.lines
        count = s.block_n // self.abreast
        # Of each pixel: its place in the input, and which rows and columns of taps are in the map.
        self.places = T.alloc_buffer((count,), "int32", scope="local")
        self.inside = T.alloc_buffer((count,), "int32", scope="local")
        self.neighbours = s.factor.per_core
        self.values = T.alloc_buffer((self.neighbours,), scope="local")
        residuals = [f"residual{i}" for i, step in enumerate(product.steps) if step == "residual"]
        # What is added to each of a lane's rows and groups of columns, as it is in memory.
        self.groups = s.block_m // wgmma_shared.group_of(s.factor)
        held = (self.groups if s.reads_early(len(residuals)) else 1) * 2 * s.tiles * _HELD
        self.held = {name: T.alloc_buffer((held,), "uint32", scope="local") for name in residuals}
        self.added = {name: T.alloc_buffer((self.neighbours,), scope="local") for name in residuals}
        self.per_group = g.in_channels // g.groups

    def start_copying(self, thread: Index) -> None:
        """Find the places of a thread's pixels."""
        product, s, g = self.product, self.schedule, self.product.geometry
        _, group = product.part(self.batch)
        channel = group * self.per_group
        with T.unroll(s.block_n // self.abreast) as i:
            j = self.first_column + i * self.abreast + thread // s.lines
            pixel = j % product.pixels
            row = pixel // g.out_width * g.stride[0] - g.padding[0]
            column = pixel % g.out_width * g.stride[1] - g.padding[1]
            place = (j // product.pixels * g.height + row) * g.width + column
            T.buffer_store(self.places, place * g.in_channels + channel, [i])
            bits: Index = tirx.const(0, "int32")
            for first, extent, size, dilation, shift in (
                (row, g.kernel[0], g.height, g.dilation[0], 0),
                (column, g.kernel[1], g.width, g.dilation[1], _COLUMN_BITS),
            ):
                for tap in range(extent):
                    at_tap = first + tap * dilation
                    is_in = tirx.all(at_tap >= 0, at_tap < size, j < product.gemm.n)
                    bits = bits + is_in.astype("int32") * (1 << (tap + shift))
            T.buffer_store(self.inside, bits, [i])

    def gather(self, piece: Index, stage: Index, thread: Index) -> None:
        """Start a thread's copies of a piece: of one tap some channels of each pixel."""
        product, s, g = self.product, self.schedule, self.product.geometry
        per_core, line = s.factor.per_core, thread % s.lines
        k = piece * s.block_k + line * per_core
        tap, channel = k // product.channels, k % product.channels
        row, column = tap // g.kernel[1], tap % g.kernel[1]
        offset = (row * g.dilation[0] * g.width + column * g.dilation[1]) * g.in_channels + channel
        known = []
        if product.channels > self.per_group:
            known.append(channel < self.per_group)
        if product.whole.k > product.gemm.k:
            known.append(k < product.gemm.k)
        with T.unroll(s.block_n // self.abreast) as i:
            j = i * self.abreast + thread // s.lines
            bits = self.inside[i]
            in_map = (bits >> row) & (bits >> (column + _COLUMN_BITS)) & 1
            T.evaluate(
                wgmma_shared.copy(
                    s.factor,
                    at(self.columns, ((stage * s.lines + line) * s.line + j) * per_core),
                    tirx.address_of(product.x[0, 0, 0, 0]),
                    self.places[i] + offset,
                    tirx.all(in_map == 1, *known),
                )
            )

    def multiply_piece(self, piece: Index, stage: Index) -> None:
        """Start the products of a piece."""
        s = self.schedule
        own = self.warp // wgmma.WARPS * (s.tiles * wgmma.ROWS)
        T.evaluate(
            wgmma_shared.multiply(
                s.factor,
                s.tiles,
                s.block_m,
                s.block_k // s.factor.k,
                s.line,
                at(self.sums, 0),
                at(self.columns, (stage * s.lines * s.line + own) * s.factor.per_core),
                at(self.weights, stage * self.piece_of_weights),
            )
        )
        self.leave_piece_before(piece, stage)

    def place(self, b: Index, tile: Index, half: Index) -> tuple[Index, Index, ir.Expr]:
        """A lane's channels of a row: the first, their place in a map, whether they are there."""
        product, s, g = self.product, self.schedule, self.product.geometry
        _, group = product.part(self.batch)
        row = self.block % self.row_blocks * s.block_m + self.lane % 4 * self.neighbours
        row = row + b * wgmma_shared.group_of(s.factor)
        j = self.first_column + self.warp // wgmma.WARPS * (s.tiles * wgmma.ROWS)
        j = j + self.warp % wgmma.WARPS * 16 + self.lane // 4 + tile * wgmma.ROWS + half * 8
        channel = group * product.gemm.m + row
        within = tirx.all(row < product.gemm.m, j < product.gemm.n)
        return channel, j * g.out_channels + channel, within

    def begin(self) -> None:
        """Read what will be added while the products are under way, where registers allow."""
        if self.schedule.reads_early(len(self.held)):
            with T.unroll(self.groups) as b:
                self.fetch(b, b)

    def fetch(self, b: Index, slot: Index) -> None:
        """Read what is added to a lane's rows."""
        s = self.schedule
        with T.unroll(s.tiles) as tile, T.unroll(2) as half:
            _, offset, within = self.place(b, tile, half)
            with T.If(within), T.Then():
                for name, held in self.held.items():
                    source = tirx.address_of(self.product.epilogue.buffers[name][0, 0, 0, 0])
                    to = at(held, self.slot(slot, tile, half))
                    T.evaluate(wgmma_shared.fetch(s.factor, to, source, offset))

    def slot(self, b: Index, tile: Index, half: Index) -> Index:
        """Where a row's channels are held."""
        return ((b * self.schedule.tiles + tile) * 2 + half) * _HELD

    def write(self) -> None:
        """Apply the epilogue to 16 bytes of a lane's channels at a time, and store them."""
        product, s = self.product, self.schedule
        early = s.reads_early(len(self.held))
        with T.unroll(self.groups) as b:
            slot = b if early else tirx.const(0, "int32")
            if self.held and not early:
                self.fetch(b, slot)
            with T.unroll(s.tiles) as tile, T.unroll(2) as half:
                channel, offset, within = self.place(b, tile, half)
                with T.If(within), T.Then():
                    for name, added in self.added.items():
                        held = at(self.held[name], self.slot(slot, tile, half))
                        T.evaluate(wgmma_shared.unpack(s.factor, at(added, 0), held))
                    with T.unroll(self.neighbours) as v:
                        register = wgmma_shared.register_of(s.factor, half, b, v)
                        value = self.sums[tile * (s.block_m // 2) + register]
                        T.buffer_store(self.values, self._finished(value, channel + v, v), [v])
                    sink = tirx.address_of(product.y[0, 0, 0, 0])
                    T.evaluate(wgmma_shared.store(s.factor, sink, offset, at(self.values, 0)))

    def _finished(self, value: ir.Expr, channel: Index, v: Index) -> ir.Expr:
        """A value of a channel after the epilogue."""
        buffers: dict[str, Any] = dict(self.product.epilogue.buffers)
        buffers |= {name: _Lane(added[v]) for name, added in self.added.items()}
        zero = tirx.const(0, "int32")
        return apply_steps(self.product.steps, buffers, value, (zero, channel, zero, zero), True)


class _Lane:
    """A map of which a lane has the value at hand."""

    def __init__(self, value: ir.Expr) -> None:
        self._value = value

    def __getitem__(self, place: Any) -> ir.Expr:
        return self._value
