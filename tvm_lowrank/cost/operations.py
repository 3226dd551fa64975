"""Counts of multiplications, weights and bytes: the paper's formulas and those of real chains."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_lowrank.geometry import ConvGeometry

FLOAT32_BYTES = 4


def multiplications(chain: Sequence[ConvGeometry]) -> int:
    """Multiplications of a chain of convolutions by the direct algorithm, whole batch."""
    return sum(stage.multiplications for stage in chain)


def weight_count(chain: Sequence[ConvGeometry]) -> int:
    """Number of weights of a chain, biases not counted."""
    return sum(stage.weight_count for stage in chain)


def bytes_moved(chain: Sequence[ConvGeometry]) -> int:
    """Bytes in float32 that a chain reads and writes if each stage runs alone.

    Each stage reads its input and weights once and writes its output once: a lower bound of the
    traffic without fusion, for the whole batch.
    """
    return FLOAT32_BYTES * sum(_values_moved(stage) for stage in chain)


def full_ops_per_pixel(
    channels: int, filters: int, kernel: tuple[int, int], stride: float = 1
) -> float:
    """Multiplications an input pixel of a dense layer: ``X Y C F / Delta^2`` (Table 1)."""
    x, y = kernel
    return x * y * channels * filters / stride**2


def separable_ops_per_pixel(
    channels: int, filters: int, kernel: tuple[int, int], rank: int, stride: float = 1
) -> float:
    """Multiplications an input pixel of the paper's rank-K chain (Table 1).

    ``K (C + X / Delta + Y / Delta^2 + F / Delta^2)``: four thin stages, one for each of alpha,
    beta, gamma and delta of equation 2. It is not the count of the form "separable", whose two
    dense 1-D stages cost ``K (C X / Delta + F Y / Delta^2)``.
    """
    x, y = kernel
    return rank * (channels + x / stride + y / stride**2 + filters / stride**2)


def biclustered_ops_per_pixel(
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    rank: int,
    groups: tuple[int, int],
    stride: float = 1,
) -> float:
    """Multiplications an input pixel with N x M biclusters of rank K each (section 3.3).

    ``K N M (C / N + X / Delta + Y / Delta^2 + F / (M Delta^2))``, ``groups`` = (N, M).
    """
    x, y = kernel
    n, m = groups
    inside = channels / n + x / stride + y / stride**2 + filters / m / stride**2
    return rank * n * m * inside


def _values_moved(stage: ConvGeometry) -> int:
    read = stage.batch * stage.in_channels * stage.height * stage.width
    written = stage.batch * stage.out_channels * stage.out_height * stage.out_width
    return read + written + stage.weight_count
