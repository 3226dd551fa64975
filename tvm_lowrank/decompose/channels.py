"""Groups of a layer's channels (section 3.3): its inputs, and its outputs, clustered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tvm_lowrank.decompose.clustering import k_subspaces
from tvm_lowrank.decompose.form import usable
from tvm_lowrank.decompose.moments import Array, InputMoments

# Of the subspaces that the channels are clustered around.
DIMENSION = 4


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of a layer's channels: the group of each input (C,) and of each output (F,)."""

    inputs: np.ndarray
    outputs: np.ndarray


def bicluster(
    weight: Array,
    groups: tuple[int, int],
    dimension: int = DIMENSION,
    moments: InputMoments | None = None,
    seed: int = 0,
) -> Clusters:
    """Inputs in N and outputs in M groups of equal size, ``groups`` = (N, M), by k-subspaces.

    Each output's filter and each input's slice of all filters is a point; with moments, in
    whitened channels. ValueError where N does not divide C or M does not divide F.
    """
    points = ChannelPoints(weight, moments, dimension, seed)
    return Clusters(points.of_inputs(groups[0]), points.of_outputs(groups[1]))


class ChannelPoints:
    """A layer's channels as the points that `bicluster` clusters, each number of groups once."""

    def __init__(
        self,
        weight: Array,
        moments: InputMoments | None,
        dimension: int = DIMENSION,
        seed: int = 0,
    ):
        """As `bicluster`."""
        f, c, x, y = weight.shape
        tensor = np.asarray(weight, np.float64).reshape(f, c, x * y)
        given = usable(moments, c * x * y)
        outputs, inputs = tensor, tensor
        if given is not None:
            channels = given.channel_covariance(c, x * y) + given.damping * np.eye(c)
            outputs = np.einsum("fct,cd->fdt", tensor, np.linalg.cholesky(channels))
            # Whitening mixes the inputs; each is only scaled by its deviation here.
            inputs = tensor * np.sqrt(channels.diagonal())[None, :, None]
        self._inputs = inputs.transpose(1, 0, 2).reshape(c, f * x * y)
        self._outputs = outputs.reshape(f, -1)
        self._dimension, self._seed = dimension, seed
        self._found: dict[tuple[str, int], np.ndarray] = {}

    def of_inputs(self, groups: int) -> np.ndarray:
        """The group of each input; ValueError where ``groups`` does not divide them."""
        return self._labels("inputs", self._inputs, groups)

    def of_outputs(self, groups: int) -> np.ndarray:
        """The group of each output; ValueError where ``groups`` does not divide them."""
        return self._labels("outputs", self._outputs, groups)

    def _labels(self, side: str, points: Array, groups: int) -> np.ndarray:
        if (side, groups) not in self._found:
            dimension = min(self._dimension, len(points) // groups)
            self._found[side, groups] = k_subspaces(points, groups, dimension, self._seed)
        return self._found[side, groups]
