"""Weights and channel vectors laid out as the blocked kernels read them."""

from __future__ import annotations

import numpy as np

from .isa import VectorISA
from .workload import ConvSchedule, ConvWorkload


def pack_weights(
    weight: np.ndarray, workload: ConvWorkload, schedule: ConvSchedule, isa: VectorISA
) -> np.ndarray:
    """Lay out an OIHW weight for the direct convolution.

    Returns float32 of shape ``(groups, blocks, X, Y, in_block, vectors * lanes)``, where a group is
    ``schedule.vectors`` vectors of output channels; channels beyond C and F are zero.

    Raises ValueError if the weight does not have the shape the workload's geometry gives.
    """
    geometry = workload.geometry
    if weight.shape != geometry.weight_shape:
        raise ValueError(f"weight has shape {weight.shape}, expected {geometry.weight_shape}")
    out_channels, in_channels, rows, columns = geometry.weight_shape
    group = schedule.vectors * isa.lanes
    groups = -(-out_channels // group)
    blocks = -(-in_channels // workload.in_block)
    padded = np.zeros((groups * group, blocks * workload.in_block, rows, columns), np.float32)
    padded[:out_channels, :in_channels] = weight
    split = padded.reshape(groups, group, blocks, workload.in_block, rows, columns)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def pack_channels(values: np.ndarray, isa: VectorISA) -> np.ndarray:
    """Pad a vector with one value per channel by zeros to whole vectors of lanes, as float32."""
    padded = np.zeros(-(-values.size // isa.lanes) * isa.lanes, np.float32)
    padded[: values.size] = values.reshape(-1)
    return padded
