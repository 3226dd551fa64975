"""The shape of one convolution: the plain value that forms, kernels and cost formulas share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution without its weights, in the paper's letters.

    ``in_channels`` is C, ``out_channels`` F, ``kernel`` (X, Y), ``stride`` the pair of Deltas; the
    weight it goes with has OIHW shape ``(F, C // groups, X, Y)`` and its input
    ``(batch, C, height, width)``. 1-D convolutions are 2-D ones with a kernel of ``(X, 1)``.
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the output map."""
        reach = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.height + self.padding[0] + self.padding[2] - reach) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the output map."""
        reach = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.width + self.padding[1] + self.padding[3] - reach) // self.stride[1] + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """OIHW shape of the weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def multiplications(self) -> int:
        """Multiplications of the direct algorithm for the whole batch (equation 1 of the paper).

        Taps that fall on padding are counted, as the paper's ``X Y C F / Delta^2`` does.
        """
        f, c, x, y = self.weight_shape
        return self.batch * self.out_height * self.out_width * f * c * x * y

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        f, c, x, y = self.weight_shape
        return f * c * x * y

    def with_batch(self, batch: int) -> ConvGeometry:
        """The same convolution for another batch size."""
        return replace(self, batch=batch)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values; `from_json` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConvGeometry:
        """Rebuild a geometry from `to_json`'s dictionary."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**fields)

    def __str__(self) -> str:
        text = f"{self.in_channels}->{self.out_channels} {self.kernel[0]}x{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f" /{self.stride[0]}" if len(set(self.stride)) == 1 else f" /{self.stride}"
        if self.groups > 1:
            text += f" g{self.groups}"
        return f"{text} @{self.height}x{self.width}"
