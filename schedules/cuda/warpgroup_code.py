"""The code of convolutions by warpgroups: warps that copy, and warps that multiply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

from . import mma, wgmma
from .arch import WARP
from .direct import Convolution
from .gemm import Index
from .warpgroup_schedule import COPIES_IN, MULTIPLIES_IN, WarpgroupSchedule

_VECTOR = 4


def pixels_a_copy(geometry: ConvGeometry) -> int:
    """How many neighbouring pixels are one copy."""
    pointwise = geometry.kernel == (1, 1) and geometry.stride == (1, 1)
    pixels = geometry.out_height * geometry.out_width
    return _VECTOR if pointwise and not any(geometry.padding) and pixels % _VECTOR == 0 else 1


class WarpgroupProduct(Convolution):
    """A convolution's operands; taps follow each other within a piece's channels.

    Blocks read the same pixels for one tap after the other, which the first-level cache keeps.
    """

    def __init__(self, workload: ConvWorkload, schedule: WarpgroupSchedule) -> None:
        super().__init__(workload, schedule)
        self.schedule = schedule
        self.weight_dtype = "float32" if schedule.factor.bytes == 4 else "float16"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        s, whole = self.schedule, self.whole
        pieces = whole.k * self.split // s.block_k
        return (self.geometry.groups, whole.m // s.block_m, pieces, s.block_k * s.block_m)

    @property
    def stride_of_channels(self) -> int:
        """Values of the input from an element of a piece to the next, 0 if that varies."""
        whole = self.channels % self.schedule.block_k == 0
        return self.geometry.height * self.geometry.width if whole else 0

    def place_in_sum(self, at: Index) -> tuple[Index, Index]:
        """The tap and the channel of its group that an element of the sum belongs to."""
        piece = self.schedule.block_k
        if self.channels % piece:
            return super().place_in_sum(at)
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        number = at // piece
        return number % taps, number // taps * piece + at % piece

    def weight(self, batch: Index, k: Index, i: Index) -> ir.Expr:
        """A packed weight."""
        part, group = self.part(batch)
        s, factor = self.schedule, self.schedule.factor
        at = part * self.whole.k + k
        slot = factor.slot_of(at % factor.k)
        core = at % s.block_k // factor.k * 2 + slot // factor.per_core
        place = (core * s.block_m + i % s.block_m) * factor.per_core + slot % factor.per_core
        return self.w[group, i // s.block_m, at // s.block_k, place].astype("float32")

    def prepare(self, value: ir.Expr) -> ir.Expr | None:
        """Round a value of a column, where products are loops."""
        if self.schedule.factor is wgmma.TF32:
            return mma.round_value(value, loops=True)
        return value.astype("float16").astype("float32")


def kernel(product: WarpgroupProduct) -> tirx.PrimFunc:
    """The kernel as threads."""
    return build(product, _Block)


def build(product: Any, block: type[Block], most_blocks: int = 0) -> tirx.PrimFunc:
    """The kernel whose blocks compute so.

    With ``most_blocks`` no more are started, and each takes one tile of the result after the other.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        product.declare()
        with T.sblock("root"), ExitStack() as stack:
            block(product, stack, most_blocks).compute()
    return builder.get()


class Block:
    """What a block of threads does: warps that copy pieces, and warps that multiply them.

    What pieces of pixels look like in shared memory is told by those who inherit.
    """

    def __init__(self, product: Any, stack: ExitStack, most_blocks: int = 0) -> None:
        """Bind blocks and threads, and allocate memory."""
        s, whole = product.schedule, product.whole
        self.product, self.schedule = product, s
        self.row_blocks, self.pieces = whole.m // s.block_m, whole.k // s.block_k
        # Loops are unrolled by nvcc, as `ThreadSchedule.finish` says.
        text = {"pragma_unroll_explicit": 0}

        def bound(extent: int, axis: str) -> Index:
            return stack.enter_context(T.thread_binding(extent, axis, annotations=text))

        self.tiles = self.row_blocks * (whole.n // s.block_n)
        self.started = min(self.tiles, most_blocks or self.tiles)
        self.batch = bound(whole.batch, "blockIdx.z")
        self.first = bound(self.started, "blockIdx.x")
        self.warp = bound(s.threads // WARP, "threadIdx.y")
        self.lane = bound(WARP, "threadIdx.x")
        self.take(self.first)
        self.piece_of_weights = s.block_k * s.block_m
        shared = {"scope": "shared.dyn"}
        self.weights = T.alloc_buffer(
            (s.stages * self.piece_of_weights,), product.weight_dtype, **shared
        )
        # Of each stage: that it is full, and that it is free again.
        self.barriers = T.alloc_buffer((2 * s.stages,), "uint64", **shared)
        self.sums = T.alloc_buffer((s.sums,), scope="local")

    def take(self, tile: Index) -> None:
        """Turn to a tile of the result; those of the same pixels follow each other."""
        self.block = tile
        self.first_column = tile // self.row_blocks * self.schedule.block_n

    def for_tiles(self, do: Callable[[Index], None]) -> None:
        """Do something for each tile of the block, given how many pieces were before."""
        rounds = -(-self.tiles // self.started)
        if rounds == 1:
            do(tirx.const(0, "int32"))
            return
        with T.serial(rounds, unroll=False) as number, ExitStack() as stack:
            self.take(number * self.started + self.first)
            if self.tiles % self.started:
                stack.enter_context(T.If(self.block < self.tiles))
                stack.enter_context(T.Then())
            do(number * self.pieces)

    def compute(self) -> None:
        """Warps that copy pieces, and warps that multiply them."""
        s = self.schedule
        multiplying = s.warpgroups * wgmma.WARPS
        copying = s.copying * WARP
        T.evaluate(
            wgmma.prepare(at(self.barriers, 0), s.stages, full=copying + 1, free=multiplying)
        )
        with T.If(self.warp >= multiplying):
            with T.Then():
                if s.shares:
                    T.evaluate(wgmma.share_registers("dec", COPIES_IN))
                thread = (self.warp - multiplying) * WARP + self.lane
                self.for_tiles(lambda before: self.copy(thread, before))
            with T.Else():
                if s.shares:
                    T.evaluate(wgmma.share_registers("inc", MULTIPLIES_IN))
                self.for_tiles(self.multiply)

    def multiply(self, before: Index) -> None:
        """Multiply piece by piece as they come, and write the sums."""
        s = self.schedule
        self.begin()
        with T.unroll(s.sums) as i:
            T.buffer_store(self.sums, tirx.const(0, "float32"), [i])
        with T.serial(self.pieces, unroll=False) as piece:
            number = before + piece
            stage = number % s.stages
            T.evaluate(wgmma.wait(at(self.barriers, stage), number // s.stages % 2))
            self.multiply_piece(piece, stage)
        T.evaluate(wgmma.finish(s.sums, at(self.sums, 0)))
        if self.started < self.tiles:
            # The next tile's pieces come while these sums are written.
            last = (before + self.pieces - 1) % s.stages
            T.evaluate(wgmma.arrive(at(self.barriers, s.stages + last), self.lane < 1))
        self.write()

    def leave_piece_before(self, piece: Index, stage: Index) -> None:
        """Tell that the products of the tile's piece before are done."""
        s = self.schedule
        before = s.stages + (stage + s.stages - 1) % s.stages
        mine = tirx.all(piece > 0, self.lane < 1)
        T.evaluate(wgmma.arrive(at(self.barriers, before), mine))

    def copy(self, thread: Index, before: Index) -> None:
        """Start the copies of a piece as soon as there is a free stage."""
        s = self.schedule
        self.start_copying(thread)
        with T.serial(self.pieces, unroll=False) as piece:
            number = before + piece
            stage = number % s.stages
            full = at(self.barriers, stage)
            free = at(self.barriers, s.stages + stage)
            T.evaluate(wgmma.wait(free, (number // s.stages + 1) % 2))
            self.send_weights(piece, stage, full, thread)
            self.gather(piece, stage, thread)
            T.evaluate(wgmma.arrive_copied(full))

    def send_weights(self, piece: Index, stage: Index, full: ir.Expr, thread: Index) -> None:
        """Start the copy of a piece's weights."""
        product = self.product
        part, group = product.part(self.batch)
        source = product.w[group, self.block % self.row_blocks, part * self.pieces + piece, 0]
        T.evaluate(
            wgmma.send(
                at(self.weights, stage * self.piece_of_weights),
                tirx.address_of(source),
                self.piece_of_weights * self.schedule.factor.bytes,
                full,
                thread < 1,
            )
        )

    def begin(self) -> None:
        """What a thread that multiplies does before the first piece."""

    def start_copying(self, thread: Index) -> None:
        """What a thread that copies does before the first piece."""

    def gather(self, piece: Index, stage: Index, thread: Index) -> None:
        """Start a thread's copies of a piece's columns."""
        raise NotImplementedError

    def multiply_piece(self, piece: Index, stage: Index) -> None:
        """Add a piece's products, and leave the piece before as soon as its own are done."""
        raise NotImplementedError

    def write(self) -> None:
        """Apply the epilogue to the sums and store them."""
        raise NotImplementedError


class _Block(Block):
    """Pieces are lines of pixels, in float32; a lane takes its rows of them to registers."""

    def __init__(self, product: WarpgroupProduct, stack: ExitStack, most_blocks: int = 0) -> None:
        super().__init__(product, stack, most_blocks)
        s = product.schedule
        # A lane's pixels in the block are neighbours.
        self.own = self.warp * (16 * s.tiles) + self.lane // 4 * (2 * s.tiles)
        # Pixels of one copy, and those that a lane writes as one vector.
        self.copied = product.vector
        rows = 2 * s.tiles
        self.written = rows if not (product.gemm.n % rows or product.pixels % rows) else 1
        self.columns = T.alloc_buffer((s.stages * s.block_k * s.line,), scope="shared.dyn")
        self.rows = T.alloc_buffer((2 * 4 * s.tiles,), "uint32", scope="local")

    def multiply_piece(self, piece: Index, stage: Index) -> None:
        """Start the products step by step, while the rows of the next are read."""
        s, factor = self.schedule, self.schedule.factor
        steps = s.block_k // factor.k
        self.read(stage, 0)
        for step in range(steps):
            place = (stage * s.block_k + step * factor.k) * s.block_m
            T.evaluate(
                wgmma.multiply(
                    factor,
                    s.tiles,
                    s.block_m,
                    at(self.sums, 0),
                    at(self.rows, step % 2 * 4 * s.tiles),
                    at(self.weights, place),
                )
            )
            if step + 1 < steps:
                self.read(stage, step + 1)
            if step == 0:
                self.leave_piece_before(piece, stage)

    def gather(self, piece: Index, stage: Index, thread: Index) -> None:
        """Start a thread's copies of a piece's columns."""
        product, s = self.product, self.schedule
        lanes = self.copied
        across = s.block_n // lanes
        threads = s.copying * WARP
        step = product.stride_of_channels

        def source(line: Index, j: Index) -> tuple[list[ir.Expr], list[ir.Expr]]:
            return product.source(self.batch, piece * s.block_k + line, self.first_column + j)

        def start(line: Index, j: Index, known: Index) -> None:
            place, inside = source(line, j)
            offset: Index = tirx.const(0, "int32")
            if step:
                # The address of another line plus a distance that is known here.
                place, _ = source(line - known, j)
                offset = known * step
            T.evaluate(
                wgmma.copy(
                    at(self.columns, (stage * s.block_k + line) * s.line + j),
                    tirx.address_of(product.x[tuple(place)]),
                    offset,
                    4 * lanes,
                    tirx.all(*inside) if inside else tirx.const(True, "bool"),
                )
            )

        lines = max(threads // across, 1)
        with T.unroll(max(across // threads, 1)) as i, T.unroll(s.block_k // lines) as k:
            j = (i * threads + thread) % across * lanes
            start(k * lines + thread // across, j, k * lines)

    def read(self, stage: Index, step: int) -> None:
        """Take a lane's rows of a step to registers; those of two steps alternate."""
        s = self.schedule
        line = stage * s.block_k + step * s.factor.k + self.lane % 4
        T.evaluate(
            wgmma.read(
                s.factor,
                s.tiles,
                s.line,
                at(self.rows, step % 2 * 4 * s.tiles),
                at(self.columns, line * s.line + self.own),
            )
        )

    def write(self) -> None:
        """Apply the epilogue to the sums and store them."""
        product, s = self.product, self.schedule
        rows, vector = 2 * s.tiles, self.written
        product.vector = vector
        first_row = self.block % self.row_blocks * s.block_m
        with T.unroll(s.block_m // 4) as column, T.unroll(rows // vector) as r:
            row = first_row + column // 2 * 8 + self.lane % 4 * 2 + column % 2
            with T.vectorized(vector) as v:
                j = r * vector + v
                column_of = self.first_column + self.own + j
                product.write(self.batch, row, column_of, self.sums[column * rows + j])


def at(buffer: tirx.Buffer, offset: Index | int) -> ir.Expr:
    """An address, told as read, for barriers are set here."""
    return buffer.access_ptr("r", offset=offset, extent=1)
