"""Maps from NCHW to channels last and back: transposes through tiles of shared memory.

With channels last the values of a map are of a kind: float32 as they are, float32 rounded to what
TF32 keeps of them, or float16. What multiplies such values does not round them again. Of the last
two kinds maps have whole eights of channels, the rest of them zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import mma, model, wgmma, wgmma_shared
from .arch import WARP, CudaArch
from .epilogue import map_shape
from .gemm import round_up
from .program import WEIGHTS, Program, Shape, Stage, X, Y
from .straight import Values, emit_threads
from .threads import ThreadSchedule

Place = Callable[[ir.Expr, ir.Expr, ir.Expr], list[ir.Expr]]
PLAIN, TF32, HALF = "float32", "tf32", "float16"
FACTORS = {TF32: wgmma.TF32, HALF: wgmma.HALF}
# Channels of which maps of these have whole multiples; a map of no more is turned pixel by pixel.
EIGHT = 8
# Rows of a block's threads; each thread takes `WARP` / `_ROWS` values of a tile.
_ROWS = 8


def last_shape(shape: Shape, kind: str = PLAIN) -> Shape:
    """NHWC shape of a map whose NCHW shape is ``shape``."""
    batch, channels, height, width = shape
    return (batch, height, width, channels if kind == PLAIN else round_up(channels, EIGHT))


def indices(place: Sequence[ir.Expr], channels_last: bool) -> list[ir.Expr]:
    """Indices of a map in its layout, from those in NCHW."""
    return [place[0], *place[2:], place[1]] if channels_last else list(place)


def dtype_of(kind: str) -> str:
    """The type of the values of a kind."""
    return HALF if kind == HALF else "float32"


def rounded(value: ir.Expr, kind: str, loops: bool) -> ir.Expr:
    """A float32 value as one of a kind."""
    return mma.round_value(value, loops) if kind == TF32 else value.astype(dtype_of(kind))


def program(
    func: tirx.PrimFunc,
    shapes: Mapping[str, Shape],
    operands: tuple[str, ...],
    arch: CudaArch,
    kind: str = PLAIN,
    splits: bool = False,
) -> Program:
    """A kernel of maps with channels last, among those that turn its maps.

    Parameters
    ----------
    func : tirx.PrimFunc
        Reads x, weights and the operands, writes y; its maps are NHWC.
    shapes : mapping
        Of these values; of maps in NCHW.
    operands : tuple of str
    arch : CudaArch
    kind : str
        Of the maps' values.
    splits : bool
        Whether the kernel reads its input as `split` says, which no other kernel leaves so.
    """
    alone = (WEIGHTS, X) if splits else (WEIGHTS,)
    maps = [name for name, shape in shapes.items() if len(shape) == 4 and name not in alone]
    twins = {name: f"{name}_last" for name in maps}
    every = {**shapes, **{twin: last_shape(shapes[name], kind) for name, twin in twins.items()}}
    stages = [
        Stage(emit(name, twin, shapes[name], True, arch, kind), (name,), twin, turns=True)
        for name, twin in twins.items()
        if name != Y
    ]
    named = dict(twins)
    if splits:
        named[X] = f"{X}_split"
        every[named[X]] = last_shape(split(shapes[X]), kind)
        stages.append(Stage(emit_split(X, named[X], shapes[X], arch, kind), (X,), named[X]))
    reads = tuple(named.get(name, name) for name in (X, WEIGHTS, *operands))
    back = emit(twins[Y], Y, shapes[Y], False, arch, kind)
    stages += [Stage(func, reads, twins[Y]), Stage(back, (twins[Y],), Y, turns=True)]
    dtypes = dict.fromkeys((*twins.values(), named.get(X, X)), dtype_of(kind))
    return Program(tuple(stages), every, operands, dtypes, twins, kind)


def of_convolution(workload: ConvWorkload, arch: CudaArch, kind: str = PLAIN) -> float:
    """Predicted microseconds of the kernels that turn a convolution's maps."""
    g = workload.geometry
    maps = [(g.batch, g.in_channels, g.height, g.width), map_shape(g)]
    maps += [map_shape(g)] * workload.epilogue.count("residual")
    return sum(predict(shape, arch, kind) for shape in maps)


def predict(shape: Shape, arch: CudaArch, kind: str = PLAIN) -> float:
    """Predicted microseconds of `emit`'s kernel."""
    batch, height, width, channels = last_shape(shape, kind)
    values = batch * channels * height * width
    memory = (2.0 if kind == HALF else 4.0) * values + 4.0 * batch * shape[1] * height * width
    return model.of_streaming(values, memory, 4, arch, _ROWS * WARP, WARP // _ROWS)


def emit(
    source: str, sink: str, shape: Shape, to_last: bool, arch: CudaArch, kind: str = PLAIN
) -> tirx.PrimFunc:
    """The kernel that turns a map.

    Parameters
    ----------
    source, sink : str
        Names of the parameters.
    shape : tuple
        NCHW shape of the map, in either layout.
    to_last : bool
        Whether the source is NCHW and the sink NHWC, or the other way round.
    arch : CudaArch
    kind : str
        Of the values with channels last.
    """
    batch, channels, height, width = shape
    pixels = height * width
    if to_last and kind != PLAIN and channels <= EIGHT:
        return _few(source, sink, shape, arch, kind)
    rows, columns = (channels, pixels) if to_last else (pixels, channels)

    def first(b: ir.Expr, channel: ir.Expr, pixel: ir.Expr) -> list[ir.Expr]:
        return [b, channel, pixel // width, pixel % width]

    def last(b: ir.Expr, channel: ir.Expr, pixel: ir.Expr) -> list[ir.Expr]:
        return [b, pixel // width, pixel % width, channel]

    place_in, place_out = (first, last) if to_last else (last, first)
    shape_in, shape_out = shape, last_shape(shape, kind)
    written = (shape_out[3], pixels) if to_last else (pixels, channels)
    if not to_last:
        shape_in, shape_out = shape_out, shape_in

    def at(
        place: Callable[..., list[ir.Expr]], b: ir.Expr, r: ir.Expr, c: ir.Expr
    ) -> list[ir.Expr]:
        return place(b, r, c) if to_last else place(b, c, r)

    tiles = (batch, round_up(rows, WARP), round_up(columns, WARP))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        kinds = (PLAIN, kind) if to_last else (kind, PLAIN)
        x = T.arg(source, T.buffer(shape_in, dtype_of(kinds[0])))
        y = T.arg(sink, T.buffer(shape_out, dtype_of(kinds[1])))
        with T.sblock("root"):
            tile = T.sblock_alloc_buffer(tiles, "float32")
            with T.grid(*tiles) as (b, r, c), T.sblock("read"):
                vb, vr, vc = T.axis.remap("SSS", [b, r, c])
                value = x[tuple(at(place_in, vb, vr, vc))].astype("float32")
                if tiles != (batch, rows, columns):
                    inside = tirx.all(vr < rows, vc < columns)
                    value = tirx.if_then_else(inside, value, tirx.const(0, "float32"))
                T.buffer_store(tile, value, [vb, vr, vc])
            with T.grid(*tiles) as (b, r, c), T.sblock("write"):
                vb, vr, vc = T.axis.remap("SSS", [b, r, c])
                with T.If(tirx.all(vr < written[0], vc < written[1])), T.Then():
                    value = rounded(tile[vb, vr, vc], kinds[1], arch.loops)
                    T.buffer_store(y, value, at(place_out, vb, vr, vc))
    sch = ThreadSchedule(builder.get(), arch)
    tir = sch.tir
    read, write = tir.get_sblock("read"), tir.get_sblock("write")
    b, r, c = tir.get_loops(write)
    block_r, lane = tir.split(r, [None, WARP])
    block_c, inner, row = tir.split(c, [None, WARP // _ROWS, _ROWS])
    tir.reorder(b, block_c, block_r, inner, row, lane)
    # Pixels, of which there may be very many, along the axis without a limit.
    pixel_blocks, channel_blocks = (block_c, block_r) if to_last else (block_r, block_c)
    sch.bind(b, "blockIdx.z")
    sch.bind(channel_blocks, "blockIdx.y")
    sch.bind(pixel_blocks, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    tir.set_scope(read, 0, sch.scope("shared"))
    tir.compute_at(read, block_r, preserve_unit_loops=True)
    sch.spread(read, tir.get_loops(read)[-2:], (_ROWS, WARP), 1)
    tir.storage_align(read, 0, axis=-2, factor=WARP, offset=1)
    return sch.finish()


def split(shape: Shape) -> Shape:
    """NCHW shape of a map with the pixels of every 2 x 2 as channels, in whole eights."""
    batch, channels, height, width = shape
    return (batch, round_up(4 * channels, EIGHT), height // 2, width // 2)


def emit_split(source: str, sink: str, shape: Shape, arch: CudaArch, kind: str) -> tirx.PrimFunc:
    """The kernel that turns a map of few channels to channels last as `split` says.

    Channel ``c`` of row ``u``, column ``v`` of the four pixels becomes channel
    ``(2 * u + v) * channels + c``.
    """
    return _few(source, sink, shape, arch, kind, 2)


def _few(
    source: str, sink: str, shape: Shape, arch: CudaArch, kind: str, side: int = 1
) -> tirx.PrimFunc:
    """The kernel that turns a map of few channels: a thread to ``side * side`` pixels."""
    channels = shape[1]
    made = last_shape(split(shape) if side == 2 else shape, kind)
    batch, height, width, count = made

    def body(number: ir.Expr, values: Values) -> None:
        image, row, column = number // (height * width), number // width % height, number % width
        x, y = values[source], values[sink]
        kept = T.alloc_buffer((count,), scope="global" if arch.loops else "local")
        for channel in range(count):
            part, inner = divmod(channel, channels)
            value: ir.Expr = tirx.const(0, "float32")
            if part < side * side:
                value = x[image, inner, row * side + part // side, column * side + part % side]
            if arch.loops:
                T.buffer_store(y, rounded(value, kind, True), [image, row, column, channel])
            else:
                T.buffer_store(kept, value, [channel])
        if not arch.loops:
            factor = FACTORS[kind]
            first = tirx.address_of(y[0, 0, 0, 0])
            for channel in range(0, count, factor.per_core):
                written = kept.access_ptr("r", offset=channel, extent=1)
                offset = number * count + channel
                T.evaluate(wgmma_shared.store(factor, first, offset, written))

    shapes = {source: shape, sink: made}
    return emit_threads(batch * height * width, shapes, body, arch, {sink: dtype_of(kind)})
