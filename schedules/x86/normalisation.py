"""Layer normalisation over the channels of each pixel of a blocked map."""

from __future__ import annotations

from tvm import ir, tirx

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .isa import VectorISA

# Pixels that one pass over the channels takes along, and pixels of a task.
_TILE = 8
_CHUNK = 32


def emit_layer_norm(
    batch: int, channels: int, height: int, width: int, epsilon: float, isa: VectorISA
) -> tirx.PrimFunc:
    """Build ``(x, scale, shift, y)``: zero mean and unit variance over the channels of each pixel.

    ``x`` and ``y`` have shape ``(N, C / lanes, H, W, lanes)``, scale and shift ``(C,)``. The
    variance is taken around the mean, in a second pass.

    Raises ValueError if C is not a multiple of the lanes.
    """
    if channels % isa.lanes:
        raise ValueError(f"{channels} channels are not whole vectors of {isa.lanes}")
    blocks, pixels = channels // isa.lanes, height * width
    shape = (batch, blocks, height, width, isa.lanes)
    em = Emitter(isa)
    x = em.argument("x", shape)
    scale, shift = em.argument("scale", (channels,)), em.argument("shift", (channels,))
    y = em.argument("y", shape)
    tile = min(_TILE, pixels)
    chunks = -(-pixels // _CHUNK)
    with em.loop(batch * chunks, "parallel", prefix="task") as task:
        image = em.bind_index(quotient(task, chunks), "image")
        start = em.bind_index(remainder(task, chunks) * _CHUNK, "start")
        stop = clamp_high(start + _CHUNK, pixels)
        with em.loop(quotient(stop - start + tile - 1, tile), prefix="tile") as number:
            # The last tile overlaps the one before it.
            first = em.bind_index(clamp_high(start + number * tile, pixels - tile), "first")
            base = em.bind_index((image * blocks * pixels + first) * isa.lanes, "base")

            def at(block: Index, pixel: int, base: Index = base) -> Index:
                return base + (block * pixels + pixel) * isa.lanes

            sums = em.accumulators(tile)
            _clear(em, sums)
            with em.loop(blocks, prefix="block") as block:
                for i in range(tile):
                    em.store(sums[i], em.value_of(sums[i]) + em.load(x, at(block, i)))
            means = [_total(em, em.bind(em.value_of(acc)), channels) for acc in sums]
            squares = em.accumulators(tile)
            _clear(em, squares)
            with em.loop(blocks, prefix="block") as block:
                for i in range(tile):
                    apart = em.bind(em.load(x, at(block, i)) - means[i])
                    em.multiply_add(squares[i], apart, apart)
            factors = [
                em.bind(
                    em.constant(1)
                    / tirx.sqrt(
                        _total(em, em.bind(em.value_of(acc)), channels) + em.constant(epsilon)
                    )
                )
                for acc in squares
            ]
            with em.loop(blocks, prefix="block") as block:
                gain = em.load(scale, block * isa.lanes)
                offset = em.load(shift, block * isa.lanes)
                for i in range(tile):
                    value = (em.load(x, at(block, i)) - means[i]) * factors[i]
                    em.store(y, value * gain + offset, at(block, i))
    return em.finish()


def _clear(em: Emitter, accumulators: list[tirx.Buffer]) -> None:
    for accumulator in accumulators:
        em.store(accumulator, em.constant(0))


def _total(em: Emitter, vector: ir.Expr, count: int) -> ir.Expr:
    """The sum of all lanes over ``count``, in every lane."""
    distance = em.lanes // 2
    while distance:
        lanes = [lane ^ distance for lane in range(em.lanes)]
        vector = em.bind(vector + em.shuffle((vector, vector), lanes))
        distance //= 2
    return em.bind(vector * em.constant(1 / count))
