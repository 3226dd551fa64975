"""The largest value of a window on maps with channels last: a thread takes 16 bytes of channels.

Only for maps that are in that layout already; others have TVM's own kernels.
"""

from __future__ import annotations

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.x86.pooling import PoolWorkload

from . import turn, wgmma_shared
from .arch import CudaArch
from .program import Program, Shape, Stage, X, Y
from .straight import Values, emit_threads

_LOWEST = -3.4028234663852886e38


def refuse(workload: PoolWorkload) -> str | None:
    """Why the kernel cannot compute ``workload``, or None if it can."""
    if workload.kind != "max":
        return "averages have no kernel of their own"
    if workload.channels % turn.EIGHT:
        return f"channels last are read by {turn.EIGHT}"
    return None


def emit(workload: PoolWorkload, kind: str, arch: CudaArch) -> Program:
    """The kernel on maps of a kind of `turn`, among those that turn them; ValueError if refused."""
    problem = refuse(workload)
    if problem:
        raise ValueError(f"{workload}: {problem}")
    w = workload
    shapes = {
        X: (w.batch, w.channels, w.height, w.width),
        Y: (w.batch, w.channels, w.out_height, w.out_width),
    }
    each = 8 if kind == turn.HALF else 4
    groups = w.channels // each
    pixels = w.batch * w.out_height * w.out_width
    last = {name: turn.last_shape(shape, kind) for name, shape in shapes.items()}
    scope = "global" if arch.loops else "local"

    def body(number: ir.Expr, values: Values) -> None:
        pixel, channel = number // groups, number % groups * each
        image, row = pixel // w.out_width // w.out_height, pixel // w.out_width % w.out_height
        column = pixel % w.out_width
        best, read = T.alloc_buffer((each,), scope=scope), T.alloc_buffer((each,), scope=scope)
        with T.unroll(each) as i:
            T.buffer_store(best, tirx.const(_LOWEST, "float32"), [i])
        with T.unroll(w.kernel[0]) as u, T.unroll(w.kernel[1]) as v:
            at_row = row * w.stride[0] + u * w.dilation[0] - w.padding[0]
            at_column = column * w.stride[1] + v * w.dilation[1] - w.padding[1]
            inside = [at_row >= 0, at_row < w.height, at_column >= 0, at_column < w.width]
            with T.If(tirx.all(*inside)), T.Then():
                place = [image, at_row, at_column, channel]
                _load(read, values[X], place, last[X], kind, arch)
                with T.unroll(each) as i:
                    T.buffer_store(best, tirx.max(best[i], read[i]), [i])
        _store(values[Y], best, number * each, [image, row, column, channel], kind, arch)

    dtypes = dict.fromkeys(shapes, turn.dtype_of(kind))
    func = emit_threads(pixels * groups, last, body, arch, dtypes)
    twins = {name: f"{name}_last" for name in shapes}
    stages = (
        Stage(turn.emit(X, twins[X], shapes[X], True, arch, kind), (X,), twins[X], turns=True),
        Stage(func, (twins[X],), twins[Y]),
        Stage(turn.emit(twins[Y], Y, shapes[Y], False, arch, kind), (twins[Y],), Y, turns=True),
    )
    every: dict[str, Shape] = {**shapes, **{twins[name]: last[name] for name in shapes}}
    typed = dict.fromkeys(twins.values(), turn.dtype_of(kind))
    return Program(stages, every, (), typed, twins, kind)


def _load(
    into: tirx.Buffer,
    source: tirx.Buffer,
    place: list[ir.Expr],
    shape: Shape,
    kind: str,
    arch: CudaArch,
) -> None:
    """Read a thread's channels of a pixel as float32."""
    image, row, column, channel = place
    if kind == turn.HALF and not arch.loops:
        offset = ((image * shape[1] + row) * shape[2] + column) * shape[3] + channel
        first = tirx.address_of(source[0, 0, 0, 0])
        held = T.alloc_buffer((4,), "uint32", scope="local")
        T.evaluate(wgmma_shared.fetch(turn.FACTORS[kind], _address(held), first, offset))
        T.evaluate(wgmma_shared.unpack(turn.FACTORS[kind], _address(into), _address(held)))
        return
    with T.vectorized(int(into.shape[0])) as i:
        value = source[image, row, column, channel + i].astype("float32")
        T.buffer_store(into, value, [i])


def _store(
    sink: tirx.Buffer,
    values: tirx.Buffer,
    offset: ir.Expr,
    place: list[ir.Expr],
    kind: str,
    arch: CudaArch,
) -> None:
    """Write a thread's channels of a pixel; the largest of rounded values is one of them."""
    image, row, column, channel = place
    if kind == turn.HALF and not arch.loops:
        first = tirx.address_of(sink[0, 0, 0, 0])
        T.evaluate(wgmma_shared.store(turn.FACTORS[kind], first, offset, _address(values)))
        return
    with T.vectorized(int(values.shape[0])) as i:
        value = values[i].astype(turn.dtype_of(kind))
        T.buffer_store(sink, value, [image, row, column, channel + i])


def _address(buffer: tirx.Buffer) -> ir.Expr:
    return buffer.access_ptr("r", offset=0, extent=1)
