"""Maps from NCHW to channels last and back: transposes through tiles of shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import model
from .arch import WARP, CudaArch
from .epilogue import map_shape
from .gemm import round_up
from .program import WEIGHTS, Program, Shape, Stage, X, Y
from .threads import ThreadSchedule

Place = Callable[[ir.Expr, ir.Expr, ir.Expr], list[ir.Expr]]
# Rows of a block's threads; each thread takes `WARP` / `_ROWS` values of a tile.
_ROWS = 8


def last_shape(shape: Shape) -> Shape:
    """NHWC shape of a map whose NCHW shape is ``shape``."""
    batch, channels, height, width = shape
    return (batch, height, width, channels)


def indices(place: Sequence[ir.Expr], channels_last: bool) -> list[ir.Expr]:
    """Indices of a map in its layout, from those in NCHW."""
    return [place[0], *place[2:], place[1]] if channels_last else list(place)


def program(
    func: tirx.PrimFunc, shapes: Mapping[str, Shape], operands: tuple[str, ...], arch: CudaArch
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
    """
    twins = {name: f"{name}_last" for name, shape in shapes.items() if len(shape) == 4}
    every = {**shapes, **{twin: last_shape(shapes[name]) for name, twin in twins.items()}}
    stages = [
        Stage(emit(name, twin, shapes[name], True, arch), (name,), twin)
        for name, twin in twins.items()
        if name != Y
    ]
    reads = tuple(twins.get(name, name) for name in (X, WEIGHTS, *operands))
    back = emit(twins[Y], Y, shapes[Y], False, arch)
    stages += [Stage(func, reads, twins[Y]), Stage(back, (twins[Y],), Y)]
    return Program(tuple(stages), every, operands, twins=twins)


def of_convolution(workload: ConvWorkload, arch: CudaArch) -> float:
    """Predicted microseconds of the kernels that turn a convolution's maps."""
    g = workload.geometry
    maps = [(g.batch, g.in_channels, g.height, g.width), map_shape(g)]
    maps += [map_shape(g)] * workload.epilogue.count("residual")
    return sum(predict(shape, arch) for shape in maps)


def predict(shape: Shape, arch: CudaArch) -> float:
    """Predicted microseconds of `emit`'s kernel."""
    batch, channels, height, width = shape
    values = batch * channels * height * width
    return model.of_streaming(values, 8.0 * values, 4, arch, _ROWS * WARP, WARP // _ROWS)


def emit(source: str, sink: str, shape: Shape, to_last: bool, arch: CudaArch) -> tirx.PrimFunc:
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
    """
    batch, channels, height, width = shape
    pixels = height * width
    rows, columns = (channels, pixels) if to_last else (pixels, channels)

    def first(b: ir.Expr, channel: ir.Expr, pixel: ir.Expr) -> list[ir.Expr]:
        return [b, channel, pixel // width, pixel % width]

    def last(b: ir.Expr, channel: ir.Expr, pixel: ir.Expr) -> list[ir.Expr]:
        return [b, pixel // width, pixel % width, channel]

    place_in, place_out = (first, last) if to_last else (last, first)
    shape_in, shape_out = shape, last_shape(shape)
    if not to_last:
        shape_in, shape_out = shape_out, shape_in

    def at(
        place: Callable[..., list[ir.Expr]], b: ir.Expr, r: ir.Expr, c: ir.Expr
    ) -> list[ir.Expr]:
        return place(b, r, c) if to_last else place(b, c, r)

    tiles = (batch, round_up(rows, WARP), round_up(columns, WARP))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        x = T.arg(source, T.buffer(shape_in, "float32"))
        y = T.arg(sink, T.buffer(shape_out, "float32"))
        with T.sblock("root"):
            tile = T.sblock_alloc_buffer(tiles, "float32")
            with T.grid(*tiles) as (b, r, c), T.sblock("read"):
                vb, vr, vc = T.axis.remap("SSS", [b, r, c])
                value = x[tuple(at(place_in, vb, vr, vc))]
                if tiles != (batch, rows, columns):
                    inside = tirx.all(vr < rows, vc < columns)
                    value = tirx.if_then_else(inside, value, tirx.const(0, "float32"))
                T.buffer_store(tile, value, [vb, vr, vc])
            with T.grid(*tiles) as (b, r, c), T.sblock("write"):
                vb, vr, vc = T.axis.remap("SSS", [b, r, c])
                with T.If(tirx.all(vr < rows, vc < columns)), T.Then():
                    T.buffer_store(y, tile[vb, vr, vc], at(place_out, vb, vr, vc))
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
