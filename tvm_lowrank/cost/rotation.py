"""What timed kernels are called with: weights as cold as in a network, which reads others between.

Calls take turns among copies of the weights. Those of a small network go round in what leaves the
caches near a core; all of a large one's come from where so many bytes have their place.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.place import LARGE, SMALL

# Copies at most: in a small network small weights are near a core, as there are few of them.
_MOST_COPIES = {SMALL: 32, LARGE: 1 << 13}
# Where copies begin.
_ALIGNMENT = 64
# Of every parameter of a kernel: its name and shape.
Parameters = Sequence[tuple[str, tuple[int, ...]]]
# Tensors by their kernel's number and their name and shape.
Maps = dict[tuple[int, str, tuple[int, ...]], Any]


def rotation(
    kernels: Sequence[Parameters], network: int, start: float = 0.0, maps: Maps | None = None
) -> Iterator[list[list[Any]]]:
    """Tensors for every parameter of every kernel, again and again, each time with other weights.

    The last parameter of a kernel is the first of the next. Weights are the parameters whose names
    begin with "weights".

    Parameters
    ----------
    kernels : sequence
        The parameters of each kernel.
    network : int
        MiB of weights between two runs; see `place`.
    start : float
        The share of the copies to begin after: of what takes turns each must find others.
    maps : dict, optional
        Filled with what is no weights, and taken from it where it has that: what takes turns finds
        the same maps, as layers do.
    """
    maps = {} if maps is None else maps
    first = [
        [None if _is_weights(name) else _kept(maps, i, name, shape) for name, shape in parameters]
        for i, parameters in enumerate(kernels)
    ]
    for before, after in itertools.pairwise(first):
        after[0] = before[-1]
    weights = [
        (i, j, shape)
        for i, parameters in enumerate(kernels)
        for j, (name, shape) in enumerate(parameters)
        if _is_weights(name)
    ]
    if not weights:
        return itertools.repeat(first)
    sizes = [-(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for *_, shape in weights]
    copies = min(math.ceil((network << 20) / sum(sizes)), _MOST_COPIES[network])
    pool, begin, found = _pool(_rounded(max(copies * sum(sizes), network << 20))), 0, []
    for _ in range(copies):
        copy = [[*arguments] for arguments in first]
        for (i, j, shape), size in zip(weights, sizes, strict=True):
            floats = pool[begin // 4 : begin // 4 + math.prod(shape)]
            copy[i][j] = tvm.runtime.from_dlpack(floats.reshape(shape))
            begin += size
        found.append(copy)
    return itertools.islice(itertools.cycle(found), round(start * copies), None)


def _is_weights(name: str) -> bool:
    return name.startswith("weights")


def _kept(maps: Maps, kernel: int, name: str, shape: tuple[int, ...]) -> Any:
    if (kernel, name, shape) not in maps:
        maps[kernel, name, shape] = _tensor(shape)
    return maps[kernel, name, shape]


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.lru_cache(maxsize=2)
def _pool(size: int) -> np.ndarray:
    """Memory that copies of weights are cut from; kept, as filling it takes longer than kernels.

    It is TVM's, in pages as those of a network's weights are.
    """
    return np.from_dlpack(_tensor((size // 4,)))


def _tensor(shape: Sequence[int]) -> Any:
    noise = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32) * 0.1
    return tvm.runtime.tensor(np.resize(noise, shape))
