"""Max and average pooling on channel-blocked maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import ir, tirx

from tvm_lowrank.geometry import ConvGeometry

from .emitter import Emitter, Index, quotient, remainder
from .isa import VectorISA
from .tiles import TileGroup, kernel_rows, tiling

# Pixels of a tile: enough to fill the units, few enough that a border costs little code.
_TILE = 8
_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class PoolWorkload:
    """One pooling layer on a map of ``channels`` channels.

    ``kind`` is ``"max"`` or ``"avg"``; ``padding`` is (top, left, bottom, right).
    ``count_include_pad`` makes an average divide by all taps on the padded map instead of those on
    the map. ``out_size`` is the output's (rows, columns) where it is not the usual rounding down
    (``ceil_mode``); taps beyond the padded map count as absent.

    Raises ValueError if a parameter is out of range.
    """

    kind: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    count_include_pad: bool = False
    out_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.kind not in ("max", "avg"):
            raise ValueError(f"kind must be 'max' or 'avg', not {self.kind!r}")
        if self.out_height < 1 or self.out_width < 1:
            raise ValueError(f"the output of {self} is empty")

    @classmethod
    def global_average(cls, batch: int, channels: int, height: int, width: int) -> PoolWorkload:
        """The average over the whole map."""
        return cls("avg", batch, channels, height, width, (height, width), (1, 1))

    @property
    def out_height(self) -> int:
        """Rows of the output map."""
        return self.out_size[0] if self.out_size else self._given().out_height

    @property
    def out_width(self) -> int:
        """Columns of the output map."""
        return self.out_size[1] if self.out_size else self._given().out_width

    def geometry(self) -> ConvGeometry:
        """The windows as a convolution's, padded below and to the right as far as they reach."""
        top, left = self.padding[:2]
        bottom, right = (
            (out - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1 - held
            for axis, out, held in (
                (0, self.out_height, top + self.height),
                (1, self.out_width, left + self.width),
            )
        )
        return replace(self._given(), padding=(top, left, bottom, right))

    def _given(self) -> ConvGeometry:
        return ConvGeometry(
            self.channels, self.channels, self.height, self.width, self.kernel, self.stride,
            self.padding, self.dilation, self.channels, self.batch,
        )  # fmt: skip


def emit_pool(workload: PoolWorkload, isa: VectorISA) -> tirx.PrimFunc:
    """Build ``(N, ceil(C / lanes), H, W, lanes) -> (N, ceil(C / lanes), OH, OW, lanes)``.

    An average over taps of which none is on the map is not a number.
    """
    geometry = workload.geometry()
    maps = workload.batch * -(-workload.channels // isa.lanes)
    em = Emitter(isa)
    x = em.argument("x", _blocked_shape(workload, geometry.height, geometry.width, isa))
    y = em.argument("y", _blocked_shape(workload, geometry.out_height, geometry.out_width, isa))
    rows, width = geometry.out_height, geometry.out_width
    with em.loop(maps * rows, "parallel", prefix="task") as task:
        image = em.bind_index(quotient(task, rows), "map")
        row = em.bind_index(remainder(task, rows), "oh")
        for part in tiling(geometry, min(_TILE, width)).groups:
            with em.loop(part.count, start=part.first, prefix="tile") as tile:
                column = tile * min(_TILE, width)
                values = _emit_windows(em, workload, geometry, part, (image, row, column), x)
                base = em.bind_index((task * width + column) * isa.lanes, "out")
                for i, value in enumerate(values):
                    em.store(y, value, base + i * isa.lanes)
    return em.finish()


def _blocked_shape(
    workload: PoolWorkload, height: int, width: int, isa: VectorISA
) -> tuple[int, ...]:
    return (workload.batch, -(-workload.channels // isa.lanes), height, width, isa.lanes)


def _emit_windows(
    em: Emitter,
    workload: PoolWorkload,
    geometry: ConvGeometry,
    part: TileGroup,
    place: tuple[Index, Index, Index],
    x: tirx.Buffer,
) -> list[ir.Expr]:
    """Reduce the windows of one tile; returns a vector for each pixel."""
    image, row, column = place
    top, left = geometry.padding[:2]
    is_max = workload.kind == "max"
    accumulators = em.accumulators(part.width)
    for accumulator in accumulators:
        em.store(accumulator, em.constant(_LOWEST if is_max else 0.0))
    low, high = kernel_rows(geometry, row)
    low = em.bind_index(low, "low")
    with em.loop(high - low, start=low, prefix="kh") as kh:
        line = row * geometry.stride[0] + kh * geometry.dilation[0] - top
        base = em.bind_index(
            (image * geometry.height + line) * geometry.width + column * geometry.stride[1] - left,
            "x",
        )

        def reduce(kw: Index, pixels: range | tuple[int, ...]) -> None:
            for i in pixels:
                offset = base + i * geometry.stride[1] + kw * geometry.dilation[1]
                value = em.load(x, offset * em.lanes)
                old = em.value_of(accumulators[i])
                em.store(accumulators[i], tirx.max(old, value) if is_max else old + value)

        first, last = part.full
        if last > first:
            with em.loop(last - first, start=first, prefix="kw") as kw:
                reduce(kw, range(part.width))
        for tap, pixels in part.partial:
            reduce(tap, pixels)
    values = [em.value_of(accumulator) for accumulator in accumulators]
    if is_max:
        return values
    return [
        value / _broadcast(em, _taps(workload, geometry, part, row, pixel))
        for pixel, value in enumerate(values)
    ]


def _taps(
    workload: PoolWorkload, geometry: ConvGeometry, part: TileGroup, row: Index, pixel: int
) -> Index:
    """The number of taps that an average of ``pixel`` of a tile divides by."""
    first, last = part.full
    if workload.count_include_pad:
        top, left, bottom, right = workload.padding
        padded = replace(
            geometry,
            height=top + geometry.height + bottom,
            width=left + geometry.width + right,
            padding=(0, 0, geometry.padding[2] - bottom, geometry.padding[3] - right),
        )
        low, high = kernel_rows(padded, row)
        columns = last - first
        if part.partial or last - first < geometry.kernel[1]:
            # Only a tile of its own reads padding, so its first column is a number.
            start = (part.first * min(_TILE, geometry.out_width) + pixel) * geometry.stride[1]
            reached = range(start, start + geometry.kernel[1] * geometry.dilation[1])
            columns = sum(at < padded.width for at in reached[:: geometry.dilation[1]])
    else:
        low, high = kernel_rows(geometry, row)
        columns = last - first + sum(pixel in pixels for _, pixels in part.partial)
    return (high - low) * columns


def _broadcast(em: Emitter, count: Index) -> ir.Expr:
    if isinstance(count, int):
        return em.constant(count)
    return tirx.Broadcast(count.astype("float32"), em.lanes)
