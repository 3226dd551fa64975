"""One map of the pixels of several: what ends a transposed convolution, and depth to space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from .emitter import Emitter, moving, quotient, remainder
from .epilogue import Epilogue
from .gather import ChannelRun, GatherWorkload, emit_vector, plan_blocks
from .isa import VectorISA


@dataclass(frozen=True)
class InterleaveWorkload:
    """A map whose pixels come in turns from groups of channels of another.

    Pixel ``(s_0 i + a, s_1 j + b)`` of the output, ``s`` its ``stride``, has the channels of
    ``phases[a s_1 + b]`` of the input's pixel ``(i, j)``. The last rows and columns may be missing.

    Raises ValueError for phases of which there are not as many as the stride asks for, of different
    numbers of channels, and for an output that is larger than all of them.
    """

    batch: int
    channels: int
    height: int
    width: int
    stride: tuple[int, int]
    phases: tuple[tuple[ChannelRun, ...], ...]
    out_size: tuple[int, int]

    def __post_init__(self) -> None:
        """Check the values."""
        counts = {sum(run.count for run in runs) for runs in self.phases}
        if len(self.phases) != self.stride[0] * self.stride[1] or len(counts) != 1:
            raise ValueError(f"{len(self.phases)} phases of {counts} channels for {self.stride}")
        whole = (self.height * self.stride[0], self.width * self.stride[1])
        if self.out_size[0] > whole[0] or self.out_size[1] > whole[1]:
            raise ValueError(f"{self.out_size} pixels of {whole}")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return sum(run.count for run in self.phases[0])


def emit_interleave(
    workload: InterleaveWorkload, isa: VectorISA, steps: Sequence[str] = ()
) -> tirx.PrimFunc:
    """Build ``(x, operands..., y)`` on blocked maps ``(N, ceil(C / lanes), H, W, lanes)``.

    ``steps``, as in `ConvWorkload.epilogue`, are applied to what is moved; their ``operands`` are
    those of `Epilogue`.

    Raises ValueError for a step unknown or malformed.
    """
    given, (down, along) = workload, workload.stride
    rows, columns = given.out_size
    em = Emitter(isa)
    blocks = -(-given.channels // isa.lanes)
    x = em.argument("x", (given.batch, blocks, given.height, given.width, isa.lanes))
    out_blocks = -(-given.out_channels // isa.lanes)
    y_shape = (given.batch, out_blocks, rows, columns, isa.lanes)
    epilogue = Epilogue(em, steps, out_blocks * isa.lanes, y_shape)
    y = em.argument("y", y_shape)
    size = 4 * given.batch * out_blocks * rows * columns * isa.lanes
    with em.loop(given.batch * rows, moving(size), prefix="line") as line:
        image = em.bind_index(quotient(line, rows), "image")
        row = em.bind_index(remainder(line, rows), "row")
        start = em.bind_index(quotient(row, down) * given.width, "from")
        for phase, runs in enumerate(given.phases):
            a, b = divmod(phase, along)
            extent = -(-(columns - b) // along)
            if extent < 1:
                continue
            source = GatherWorkload(
                given.batch, (given.channels,), given.height, given.width, runs,
                (given.height, given.width),
            )  # fmt: skip
            with em.when(tirx.EQ(remainder(row, down), a)):
                for part in plan_blocks(source, isa.lanes):
                    with em.loop(part.count, prefix="block") as index:
                        block = em.bind_index(part.first + index, "block")
                        first = (image * out_blocks + block) * rows + row
                        to = em.bind_index(first * columns + b, "to")
                        with em.loop(extent, prefix="pixel") as pixel:
                            place = (image, index, start + pixel)
                            value = emit_vector(em, source, part, [x], place)
                            position = em.bind_index((to + pixel * along) * isa.lanes, "at")
                            value = epilogue.apply(value, block * isa.lanes, position)
                            em.store(y, value, position)
    return em.finish()
