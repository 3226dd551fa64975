"""The output map of a convolution as a grid of tiles, each transformed alone."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_lowrank.geometry import ConvGeometry


@dataclass(frozen=True)
class TileGrid:
    """Tiles of ``tile`` outputs (rows, columns); those at the lower and right border may overhang.

    Tiles are numbered over images, rows of tiles and columns.
    """

    geometry: ConvGeometry
    tile: tuple[int, int]

    @property
    def inputs(self) -> tuple[int, int]:
        """Rows and columns of the input that a tile reads; as many points it has."""
        (m, n), (x, y) = self.tile, self.geometry.kernel
        return m + x - 1, n + y - 1

    @property
    def points(self) -> int:
        """Values of a transformed tile."""
        return self.inputs[0] * self.inputs[1]

    @property
    def lines(self) -> int:
        """Rows of tiles of an image."""
        return -(-self.geometry.out_height // self.tile[0])

    @property
    def per_line(self) -> int:
        """Tiles in a row of tiles."""
        return -(-self.geometry.out_width // self.tile[1])

    @property
    def tiles(self) -> int:
        """Tiles of the batch."""
        return self.geometry.batch * self.lines * self.per_line
