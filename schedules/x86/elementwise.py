"""Epilogue steps alone, on a map that no convolution has just computed."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from .emitter import Emitter, clamp_high, moving, quotient, remainder
from .epilogue import Epilogue
from .isa import VectorISA

# Vectors of a task: short maps still give every thread some, long ones keep each task in cache.
_CHUNK = 256
# Vectors of one pass of the innermost loop.
_UNROLL = 4


def emit_elementwise(
    batch: int, channels: int, height: int, width: int, steps: Sequence[str], isa: VectorISA
) -> tirx.PrimFunc:
    """Build a kernel that applies ``steps``, as in `ConvWorkload.epilogue`, to a blocked map.

    Its parameters are ``x``, the buffers of the steps (see `Epilogue`), and ``y``; ``x``,
    residuals and ``y`` have shape ``(N, ceil(C / lanes), H, W, lanes)``. Adding two maps is the
    step ``residual``, multiplying a map by one of a single pixel is ``gate``.

    Raises ValueError for a step unknown or malformed.
    """
    blocks, pixels = -(-channels // isa.lanes), height * width
    shape = (batch, blocks, height, width, isa.lanes)
    em = Emitter(isa)
    x = em.argument("x", shape)
    epilogue = Epilogue(em, steps, blocks * isa.lanes, shape)
    y = em.argument("y", shape)
    chunk = min(_CHUNK, pixels)
    chunks = -(-pixels // chunk)
    with em.loop(batch * blocks * chunks, "parallel", prefix="task") as task:
        plane = em.bind_index(quotient(task, chunks), "map")
        first = em.bind_index(remainder(task, chunks) * chunk, "first")
        extent = chunk if pixels % chunk == 0 else tirx.min(pixels - first, chunk)
        channel = em.bind_index(remainder(plane, blocks) * isa.lanes, "channel")
        base = em.bind_index((plane * pixels + first) * isa.lanes, "base")

        def step(pixel: tirx.Var | int) -> None:
            position = em.bind_index(base + pixel * isa.lanes, "at")
            em.store(y, epilogue.apply(em.load(x, position), channel, position), position)

        whole = quotient(extent, _UNROLL)
        with em.loop(whole, prefix="pixel") as group:
            for i in range(_UNROLL):
                step(group * _UNROLL + i)
        with em.loop(extent - whole * _UNROLL, start=whole * _UNROLL, prefix="pixel") as pixel:
            step(pixel)
    return em.finish()


def emit_activation(count: int, step: str, isa: VectorISA) -> tirx.PrimFunc:
    """Build ``(x, y)``, both of shape (count,): an activation of each value, whatever they are of.

    Raises ValueError for a step unknown, malformed, or with operands, and for fewer values than a
    vector has.
    """
    if count < isa.lanes:
        raise ValueError(f"{count} values, fewer than {isa.lanes}")
    em = Emitter(isa)
    x = em.argument("x", (count,))
    activation = Epilogue(em, (step,), isa.lanes, (1, isa.lanes))
    if activation.has_operands:
        raise ValueError(f"{step} is no activation")
    y = em.argument("y", (count,))
    vectors = -(-count // isa.lanes)
    tasks = -(-vectors // _CHUNK)
    with em.loop(tasks, moving(4 * count), prefix="task") as task:
        first = em.bind_index(task * _CHUNK, "first")
        extent = clamp_high(vectors - first, _CHUNK) if vectors % _CHUNK else _CHUNK
        with em.loop(extent, prefix="vector") as vector:
            # The last vector begins early enough to be whole.
            at = clamp_high((first + vector) * isa.lanes, count - isa.lanes)
            at = em.bind_index(at, "at")
            em.store(y, activation.apply(em.load(x, at), 0, at), at)
    return em.finish()
