"""Direct convolution on channel-blocked maps, with accumulators held in vector registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tvm import tirx

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, clamp_high, quotient, remainder
from .epilogue import Epilogue
from .isa import VectorISA
from .packing import pack_channels, pack_weights
from .padding import pad_geometry, pad_map, padded_copy
from .space import direct_geometry, is_legal, reduction_of, refuse, space
from .tiles import TileGroup, kernel_rows, tiling
from .workload import ConvSchedule, ConvWorkload

# Floats of a cache line.
_LINE = 16

__all__ = ["emit", "pack_channels", "pack_weights", "refuse", "space"]


@dataclass(frozen=True)
class Nest:
    """The loop nest in numbers, with the buffers it works on."""

    geometry: ConvGeometry  # of ``x``, which may be the padded copy
    schedule: ConvSchedule
    lanes: int
    blocks: int  # outer loop of the reduction over channels
    inner: int  # inner loop of it
    inner_stride: int  # between its channels, in elements of x
    pixel_stride: int
    x: tirx.Buffer
    weights: tirx.Buffer

    @property
    def group(self) -> int:
        """Output channels of a register tile."""
        return self.schedule.vectors * self.lanes

    @property
    def visits(self) -> int:
        """Register tiles that use the weights of a group in turn."""
        tiles = tiling(self.geometry, self.schedule.tile, self.schedule.rows).count
        return tiles if self.schedule.order == "channels" else min(self.schedule.chunk, tiles)

    @property
    def channels(self) -> int:
        """Input channels that an output channel reads."""
        return self.geometry.in_channels // self.geometry.groups

    def first_map(self, group: Index) -> Index:
        """The first input map, among those of an image, that a group of channels reads."""
        per_group = -(-self.geometry.out_channels // self.geometry.groups // self.group)
        return quotient(group, per_group) * -(-self.channels // self.pixel_stride)

    def pixel_offset(self, pixel: int) -> int:
        """Where the input of a pixel of a tile is, from that of its first pixel."""
        row, column = (0, pixel) if self.schedule.rows == 1 else divmod(pixel, self.schedule.tile)
        stride = self.geometry.stride
        offset = row * stride[0] * self.geometry.width + column * stride[1]
        return offset * self.pixel_stride


class Place(NamedTuple):
    """The image, group of output channels, and first pixel that a register tile is for.

    ``visit`` counts the tiles that use the weights of the group in turn.
    """

    image: Index
    group: Index
    row: Index
    column: Index
    visit: Index


def emit(workload: ConvWorkload, schedule: ConvSchedule, isa: VectorISA) -> tirx.PrimFunc:
    """Build the kernel.

    Its parameters are ``x``, the packed weights, the buffers of the epilogue's steps, and ``y``.
    ``x`` has shape ``(N, ceil(C / in_block), H, W, in_block)``, or ``(N, C, H, W)`` if ``in_block``
    is 1; ``y`` has ``(N, ceil(F / lanes), OH, OW, lanes)``. The lanes of ``x`` beyond C must be
    finite; those of ``y`` beyond F are what the epilogue makes of zeros.

    Raises ValueError if the schedule is not legal for the workload.
    """
    problem = is_legal(workload, schedule, isa)
    if problem:
        raise ValueError(f"{schedule} cannot compute {workload.geometry}: {problem}")
    given, block = workload.geometry, workload.in_block
    out_blocks = -(-given.out_channels // isa.lanes)
    in_blocks = -(-given.in_channels // block)
    geometry = direct_geometry(workload, isa)
    reduced_blocks = -(-geometry.in_channels // geometry.groups // block)
    groups = out_blocks // schedule.vectors
    em = Emitter(isa)
    x_shape = (given.batch, in_blocks, given.height, given.width)
    x = em.argument("x", x_shape if block == 1 else (*x_shape, block))
    weights = em.argument(
        "weights", (groups, reduced_blocks, *given.kernel, block, schedule.vectors * isa.lanes)
    )
    y_shape = (given.batch, out_blocks, given.out_height, given.out_width, isa.lanes)
    epilogue = Epilogue(em, workload.epilogue, out_blocks * isa.lanes, y_shape)
    y = em.argument("y", y_shape)

    sides = padded_copy(geometry, schedule, block)
    if any(sides):
        x = pad_map(em, geometry, sides, block, x)
        geometry = pad_geometry(geometry, sides)
    nest = Nest(
        geometry, schedule, isa.lanes, *reduction_of(geometry, block), block, x, weights
    )  # fmt: skip
    emit_tasks(em, nest, groups, epilogue, y)
    return em.finish()


def emit_tasks(em: Emitter, nest: Nest, groups: int, epilogue: Epilogue, y: tirx.Buffer) -> None:
    """The parallel loop over images, groups of output channels and chunks of register tiles."""
    geometry, schedule = nest.geometry, nest.schedule
    tiles = tiling(geometry, schedule.tile, schedule.rows)
    chunks = -(-tiles.count // schedule.chunk)
    with em.loop(groups * geometry.batch * chunks, "parallel", prefix="task") as task:
        if schedule.order == "channels":
            group, place = (f(task, geometry.batch * chunks) for f in (quotient, remainder))
        else:
            place, group = (f(task, groups) for f in (quotient, remainder))
        group = em.bind_index(group, "group")
        image = em.bind_index(quotient(place, chunks), "image")
        first = em.bind_index(remainder(place, chunks) * schedule.chunk, "first")
        extent: Index = schedule.chunk
        if tiles.count % schedule.chunk:
            extent = clamp_high(tiles.count - first, schedule.chunk)
        with em.loop(extent, start=first, prefix="tile") as tile:
            line = em.bind_index(quotient(tile, tiles.per_line), "line")
            index = em.bind_index(remainder(tile, tiles.per_line), "tile")
            visit = tile if schedule.order == "channels" else tile - first
            for part in tiles.groups:
                number = part.first if part.count == 1 else index
                if schedule.rows == 1:
                    place_of = Place(image, group, line, number * schedule.tile, visit)
                else:
                    place_of = Place(image, group, number * schedule.rows, 0, visit)
                if len(tiles.groups) == 1:
                    _store_tile(em, nest, part, place_of, epilogue, y)
                    continue
                with em.when(within(index, part, tiles.per_line)):
                    _store_tile(em, nest, part, place_of, epilogue, y)


def within(index: Index, part: TileGroup, per_line: int) -> tirx.Expr:
    """The condition that tile ``index`` of a line belongs to ``part``."""
    stop = part.first + part.count
    if part.count == 1:
        return tirx.EQ(index, part.first)
    if part.first == 0:
        return tirx.LT(index, stop)
    after = tirx.GE(index, part.first)
    return after if stop == per_line else tirx.And(after, tirx.LT(index, stop))


def _store_tile(
    em: Emitter,
    nest: Nest,
    part: TileGroup,
    place: Place,
    epilogue: Epilogue,
    y: tirx.Buffer,
) -> None:
    """One register tile, through the epilogue to its place in the output."""
    values = emit_tile(em, nest, part, place)
    store_values(em, values, (nest.geometry, place), epilogue, y)


def store_values(
    em: Emitter,
    values: list[list[tirx.Expr]],
    where: tuple[ConvGeometry, Place],
    epilogue: Epilogue,
    y: tirx.Buffer,
) -> None:
    """Store the sums of a register tile, by vector and pixel, at a place of a geometry's output."""
    (geometry, place), lanes, vectors = where, em.lanes, len(values)
    out_blocks = -(-geometry.out_channels // lanes)
    size = geometry.out_height * geometry.out_width * lanes
    base = em.bind_index(
        (place.image * out_blocks + place.group * vectors) * size
        + (place.row * geometry.out_width + place.column) * lanes,
        "out",
    )
    epilogue.store(y, values, base, size, place.group * (vectors * lanes), lanes)


def emit_tile(em: Emitter, nest: Nest, part: TileGroup, place: Place) -> list[list[tirx.Expr]]:
    """Clear the accumulators of a tile and run its reduction; returns them by vector and pixel."""
    schedule, pixels = nest.schedule, range(part.width)
    # accumulators[chain][pixel][vector]
    accumulators = [
        [em.accumulators(schedule.vectors) for _ in pixels] for _ in range(schedule.chains)
    ]
    for chain in accumulators:
        for of_pixel in chain:
            for accumulator in of_pixel:
                em.store(accumulator, em.constant(0))
    _emit_reduction(em, nest, part, place, accumulators)
    values = []
    for j in range(schedule.vectors):
        line = []
        for i in pixels:
            value = em.value_of(accumulators[0][i][j])
            for chain in accumulators[1:]:
                value = value + em.value_of(chain[i][j])
            line.append(value)
        values.append(line)
    return values


def _emit_reduction(
    em: Emitter,
    nest: Nest,
    part: TileGroup,
    place: Place,
    accumulators: list[list[list[tirx.Buffer]]],
) -> None:
    """Loops over input channels and kernel, accumulating into ``accumulators``."""
    geometry, pixel = nest.geometry, nest.pixel_stride
    (top, left), (rows, columns) = geometry.padding[:2], geometry.kernel
    image_size = geometry.height * geometry.width * pixel
    per_image = -(-geometry.in_channels // pixel) * image_size
    tap = nest.inner * nest.group
    low, high = kernel_rows(geometry, place.row)
    low = em.bind_index(low, "low")
    with em.loop(nest.blocks, prefix="block") as block, em.loop(high - low, start=low) as kh:
        line = place.row * geometry.stride[0] + kh * geometry.dilation[0] - top
        x_base = em.bind_index(
            place.image * per_image
            + nest.first_map(place.group) * image_size
            + block * image_size
            + (line * geometry.width + place.column * geometry.stride[1] - left) * pixel,
            "x",
        )
        w_base = em.bind_index(
            ((place.group * nest.blocks + block) * rows + kh) * (columns * tap), "w"
        )
        step = geometry.dilation[1] * pixel
        first, last = part.full
        if last > first:
            with em.loop(last - first, start=first, prefix="kw") as kw:
                origin = (x_base + kw * step, w_base + kw * tap)
                _emit_inner(em, nest, origin, block, place.visit, range(part.width), accumulators)
        for kw, pixels in part.partial:
            origin = (x_base + kw * step, w_base + kw * tap)
            _emit_inner(em, nest, origin, block, place.visit, pixels, accumulators)


def _emit_inner(
    em: Emitter,
    nest: Nest,
    origin: tuple[Index, Index],
    block: Index,
    visit: Index,
    pixels: range | tuple[int, ...],
    accumulators: list[list[list[tirx.Buffer]]],
) -> None:
    """The channels of one block at one kernel tap: the loop that all the time goes into.

    ``origin`` holds the offsets of the tap's first input and first weight.
    """
    geometry, chains = nest.geometry, len(accumulators)
    x_base, w_base = origin
    extent: Index = nest.inner // chains
    if chains == 1 and nest.inner * nest.blocks > nest.channels:
        # The last block has channels that are only padding.
        extent = clamp_high(nest.channels - block * nest.inner, nest.inner)
    # A pointwise kernel uses its input once, so it waits for every line. (More taps: no gain.)
    ahead = geometry.kernel == (1, 1) and nest.blocks > 1

    def multiply(channel: Index, chain: list[list[tirx.Buffer]]) -> None:
        w = em.bind_index(w_base + channel * nest.group, "w")
        taps = [em.load(nest.weights, w + j * nest.lanes) for j in range(nest.schedule.vectors)]
        x = em.bind_index(x_base + channel * nest.inner_stride, "x")
        for i in pixels:
            value = em.broadcast(nest.x, x + nest.pixel_offset(i))
            for accumulator, weight in zip(chain[i], taps, strict=True):
                em.multiply_add(accumulator, value, weight)

    if nest.schedule.prefetch:
        _emit_prefetch(em, nest, visit, w_base)
    with em.loop(extent, prefix="c") as c:
        if ahead:
            # The c-th channel asks for the c-th pixel of the next block.
            next_block = geometry.height * geometry.width * nest.pixel_stride
            em.prefetch(nest.x, x_base + next_block + c * nest.pixel_offset(1))
        for number, chain in enumerate(accumulators):
            multiply(c * chains + number, chain)
    whole = nest.inner - nest.inner % chains
    for number in range(nest.inner - whole):
        multiply(whole + number, accumulators[number])


def _emit_prefetch(em: Emitter, nest: Nest, visit: Index, w_base: Index) -> None:
    """Ask for the share of a tile in the weights that the next group has at this tap."""
    tap = nest.inner * nest.group
    lines = -(-tap // (nest.visits * _LINE))
    rows, columns = nest.geometry.kernel
    next_group = w_base + nest.blocks * rows * columns * tap
    start = em.bind_index(next_group + visit * (lines * _LINE), "next")
    with em.loop(lines, prefix="line") as line:
        em.prefetch(nest.weights, start + line * _LINE)
