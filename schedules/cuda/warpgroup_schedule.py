"""The tiles of convolutions by warpgroups, and what of a multiprocessor they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from . import wgmma
from .arch import WARP

# Values between lines of shared memory that keep the lanes of a warp off the same banks.
_SKEW = 8
# Shared memory that the driver gives a block where it is asked to, less for alignment.
_MOST_SHARED = (227 << 10) - 1024
_MOST_CHANNELS = 256
# Sums of a thread: at most so many, or so many for which registers are shared out.
MOST_SUMS, SCARCE_SUMS = 96, 128
# What a thread that copies and one of two warpgroups that multiply have of the registers where they
# share them out. Together that is what 384 threads of `GIVEN` registers, all that nvcc can give
# them, have at the start; with fewer a block would wait for ever, which the tests exclude.
GIVEN = 168
COPIES_IN, MULTIPLIES_IN = 40, 232


@dataclass(frozen=True)
class WarpgroupTiles:
    """Tiles of a convolution's product by warpgroups, whatever maps are like.

    - ``block_m``: output channels of a block, up to 256;
    - ``block_n``: pixels of a block, 64 times ``tiles`` for each of its warpgroups;
    - ``block_k``: how much of the sum is a piece in shared memory;
    - ``tiles``: products of 64 pixels that a warpgroup keeps sums of, 1 or 2;
    - ``stages``: pieces in shared memory, of which all but one may be on their way;
    - ``copying``: warps that copy, 4 or 8.
    """

    kernel: ClassVar[str]
    factor: ClassVar[wgmma.Factor]
    #: What channels of a block are multiples of.
    least_channels: ClassVar[int]

    block_m: int
    block_n: int
    block_k: int
    tiles: int
    stages: int
    copying: int = 4

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block that multiply."""
        return self.block_n // (wgmma.ROWS * self.tiles)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.warpgroups * wgmma.WARPS + self.copying) * WARP

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pieces, and two barriers of each stage."""
        raise NotImplementedError

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return self.tiles * wgmma.ROWS * self.block_m // (wgmma.WARPS * WARP)

    @property
    def shares(self) -> bool:
        """Whether threads that copy leave registers to those that multiply."""
        return self.sums == SCARCE_SUMS and self.warpgroups == 2

    def refuse(self) -> str | None:
        """Why no kernel can have such tiles, or None."""
        if min(self.block_m, self.block_n, self.block_k) < 1 or self.tiles not in (1, 2):
            return "tiles are 1 or 2, blocks positive"
        if (
            self.block_m % self.least_channels
            or self.block_m > _MOST_CHANNELS
            or (self.sums > MOST_SUMS and self.sums != SCARCE_SUMS)
        ):
            return (
                f"channels must be multiples of {self.least_channels} up to {_MOST_CHANNELS}, and "
                f"a thread's sums at most {MOST_SUMS} or {SCARCE_SUMS}"
            )
        if self.block_n % (wgmma.ROWS * self.tiles) or self.block_k % self.factor.k:
            return "blocks must be of whole warpgroups and pieces of whole instructions"
        if self.copying not in (4, 8) or (self.shares and self.copying != 4):
            return "4 or 8 warps copy, 4 where registers are scarce"
        if self.stages < 2:
            return "stages must be 2 or more: one is multiplied while another is on its way"
        if self.shared_bytes > _MOST_SHARED:
            return f"it needs {self.shared_bytes} of {_MOST_SHARED} bytes of shared memory"
        return None

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {"kernel": self.kernel, **vars(self)}

    @classmethod
    def from_json(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Rebuild a schedule from `to_json`'s dictionary."""
        return cls(**{name: value for name, value in data.items() if name != "kernel"})


Self = TypeVar("Self", bound=WarpgroupTiles)


@dataclass(frozen=True)
class WarpgroupSchedule(WarpgroupTiles):
    """`WarpgroupTiles` of a convolution between NCHW maps of float32.

    ``split_k`` are parts of the sum that different blocks take on, for a second kernel to add up.
    """

    least_channels: ClassVar[int] = 16

    split_k: int = 1

    @property
    def line(self) -> int:
        """Values of shared memory from one element of the sum to the next."""
        return self.block_n + _SKEW

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: pieces, and two barriers of each stage."""
        weights = self.factor.bytes * self.block_m
        return self.stages * (self.block_k * (4 * self.line + weights) + 16)

    @property
    def registers(self) -> int:
        """Roughly the registers of a thread: sums, rows of two instructions, addresses.

        Where these are too many for every thread of a block, those that copy give some up.
        """
        return GIVEN if self.shares else self.sums + 16 * self.tiles + 24


@dataclass(frozen=True)
class WarpgroupTF32Schedule(WarpgroupSchedule):
    """The same with TF32 factors."""

    kernel: ClassVar[str] = "cuda_warpgroup_tf32"
    factor: ClassVar[wgmma.Factor] = wgmma.TF32


@dataclass(frozen=True)
class WarpgroupHalfSchedule(WarpgroupSchedule):
    """The same with float16 factors."""

    kernel: ClassVar[str] = "cuda_warpgroup_half"
    factor: ClassVar[wgmma.Factor] = wgmma.HALF
