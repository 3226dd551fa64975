"""Where, and among what, a kernel was timed: only times of one place can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tvm_lowrank.geometry import ConvGeometry

# MiB of weights that a network reads between two runs of one layer: what leaves the caches near a
# core, and what leaves most caches that cores share. Times know these two.
SMALL, LARGE = 16, 128


class Place(NamedTuple):
    """A processor with a number of threads, and the size of the networks that it runs.

    In a network the weights of all other layers come in between two runs of one, so in a large one
    it finds its own in memory, in a small one in some cache: a layer of many weights takes up to
    several times longer for that.

    Attributes
    ----------
    machine : str
        Name of the processor.
    threads : int
        Of the runtime.
    shipped : bool
        Whether the times came with the package: machines of one name can differ in all else.
    network : int
        MiB of weights, `SMALL` or `LARGE`.
    """

    machine: str
    threads: int
    shipped: bool = False
    network: int = SMALL

    def __str__(self) -> str:
        size = "" if self.network == SMALL else ", in large networks"
        return f"{self.machine}, {self.threads} threads{size}" + ", shipped" * self.shipped


def network_size(layers: Iterable[ConvGeometry | None]) -> int:
    """`LARGE` for a network with more than `SMALL` MiB of weights in these layers, if dense."""
    count = sum(layer.weight_count for layer in layers if layer is not None)
    return SMALL if 4 * count <= SMALL << 20 else LARGE
