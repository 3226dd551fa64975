"""The tiles of convolutions between maps with channels last, and what they take of a card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import turn, wgmma
from .arch import REGISTERS
from .warpgroup_schedule import GIVEN, WarpgroupTiles


@dataclass(frozen=True)
class LastSchedule(WarpgroupTiles):
    """`WarpgroupTiles` of a convolution between maps with channels last.

    With ``stays`` no more blocks start than the card holds. Each takes one tile after the other and
    copies the pieces of the next while it writes the results of one.
    """

    kind: ClassVar[str]
    least_channels: ClassVar[int] = 32
    channels_last: ClassVar[bool] = True
    split_k: ClassVar[int] = 1

    stays: bool = False

    @property
    def lines(self) -> int:
        """Copies of a pixel's channels in a piece."""
        return self.block_k // self.factor.per_core

    @property
    def line(self) -> int:
        """Units of 16 bytes from a copy of a pixel to the next: all pixels', and off their bank."""
        return self.block_n + 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pieces, and two barriers of each stage."""
        units = self.lines * (self.line + self.block_m)
        return self.stages * (wgmma.CORE_BYTES * units + 16)

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: sums, a vector of channels, addresses.

        Where these are too many for every thread of a block, those that copy give some up.
        """
        return GIVEN if self.shares else self.sums + 32

    def reads_early(self, residuals: int) -> bool:
        """Whether a thread has registers for what is added at the end while it multiplies."""
        held = residuals * self.sums * self.factor.bytes // 4
        return held > 0 and self.sums + held + 40 <= min(GIVEN, REGISTERS // self.threads)


@dataclass(frozen=True)
class LastTF32Schedule(LastSchedule):
    """The same with TF32 factors in maps of float32."""

    kernel: ClassVar[str] = "cuda_last_tf32"
    factor: ClassVar[wgmma.Factor] = wgmma.TF32
    kind: ClassVar[str] = turn.TF32


@dataclass(frozen=True)
class LastHalfSchedule(LastSchedule):
    """The same with float16 maps."""

    kernel: ClassVar[str] = "cuda_last_half"
    factor: ClassVar[wgmma.Factor] = wgmma.HALF
    kind: ClassVar[str] = turn.HALF
