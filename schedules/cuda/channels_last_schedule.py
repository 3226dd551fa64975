"""The tiles of convolutions between maps with channels last, and what they take of a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from . import turn, wgmma
from .arch import REGISTERS, WARP
from .warpgroup_schedule import GIVEN, SCARCE_SUMS

Self = TypeVar("Self", bound="LastSchedule")


@dataclass(frozen=True)
class LastSchedule:
    """Tiles of a convolution's product by warpgroups, between maps with channels last.

    - ``block_m``: output channels of a block, a multiple of 32 up to 256;
    - ``block_n``: pixels of a block, 64 times ``tiles`` for each of its warpgroups;
    - ``block_k``: how much of the sum is a piece in shared memory;
    - ``tiles``: products of 64 pixels that a warpgroup keeps sums of, 1 or 2;
    - ``stages``: pieces in shared memory, of which all but one may be on their way;
    - ``copying``: warps that copy, 4 or 8;
    - ``stays``: no more blocks start than the card holds, and each takes one tile after the other:
      it copies the pieces of the next while it writes the results of one.
    """

    kernel: ClassVar[str]
    factor: ClassVar[wgmma.Factor]
    kind: ClassVar[str]
    channels_last: ClassVar[bool] = True
    split_k: ClassVar[int] = 1

    block_m: int
    block_n: int
    block_k: int
    tiles: int
    stages: int
    copying: int = 4
    stays: bool = False

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block that multiply."""
        return self.block_n // (wgmma.ROWS * self.tiles)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.warpgroups * wgmma.WARPS + self.copying) * WARP

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
    def sums(self) -> int:
        """Sums of a thread."""
        return self.tiles * wgmma.ROWS * self.block_m // (wgmma.WARPS * WARP)

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: sums, a vector of channels, addresses.

        Where these are too many for every thread of a block, those that copy give some up.
        """
        return GIVEN if self.shares else self.sums + 32

    @property
    def shares(self) -> bool:
        """Whether threads that copy leave registers to those that multiply."""
        return self.sums == SCARCE_SUMS and self.warpgroups == 2

    def reads_early(self, residuals: int) -> bool:
        """Whether a thread has registers for what is added at the end while it multiplies."""
        held = residuals * self.sums * self.factor.bytes // 4
        return held > 0 and self.sums + held + 40 <= min(GIVEN, REGISTERS // self.threads)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **asdict(self)}

    @classmethod
    def from_json(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


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
