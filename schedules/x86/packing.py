"""Weights and channel vectors laid out as the blocked kernels read them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .groups import merge_groups, merge_weight
from .isa import VectorISA
from .workload import ConvWorkload


class Tiles(Protocol):
    """A schedule in register tiles of ``vectors`` vectors of output channels."""

    @property
    def vectors(self) -> int:
        """Their number."""
        ...


def pack_weights(
    weight: np.ndarray,
    workload: ConvWorkload,
    schedule: Tiles,
    isa: VectorISA,
) -> np.ndarray:
    """Lay out an OIHW weight for the direct convolution, dense layers of several samples included.

    Returns float32 of shape ``(tiles, blocks, X, Y, in_block, vectors * lanes)``: a tile is
    ``schedule.vectors`` vectors of output channels, and ``blocks`` are those of the input channels
    of its group (`merge_groups`). Channels beyond C and F are zero.

    Raises ValueError if the weight does not have the shape the workload's geometry gives.
    """
    geometry = workload.geometry
    if weight.shape != geometry.weight_shape:
        raise ValueError(f"weight has shape {weight.shape}, expected {geometry.weight_shape}")
    merged = merge_groups(geometry, workload.in_block, isa.lanes)
    out_channels, in_channels, rows, columns = merged.weight_shape
    width = schedule.vectors * isa.lanes
    tiles = -(-out_channels // width)
    blocks = -(-in_channels // workload.in_block)
    padded = np.zeros((tiles * width, blocks * workload.in_block, rows, columns), np.float32)
    padded[:out_channels, :in_channels] = merge_weight(weight, geometry, merged)
    split = padded.reshape(tiles, width, blocks, workload.in_block, rows, columns)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def pack_channels(values: np.ndarray, isa: VectorISA) -> np.ndarray:
    """Pad a vector with one value per channel by zeros to whole vectors of lanes, as float32."""
    padded = np.zeros(-(-values.size // isa.lanes) * isa.lanes, np.float32)
    padded[: values.size] = values.reshape(-1)
    return padded
