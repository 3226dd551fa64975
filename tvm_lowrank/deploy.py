"""Running a built ``.so``; needs nothing of this package but NumPy and TVM's runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.threads import set_threads

# Bytes at whose multiples tensors begin.
_ALIGNMENT = 64


class Network:
    """A compiled network as a function of NumPy arrays.

    ``network(x)`` takes a float32 array of the shape the network was built for and returns its
    output, or a tuple of outputs.
    """

    def __init__(self, machine: Any, device: Any) -> None:
        self._machine = machine
        self._device = device
        self._far = device.type != "cpu"
        self._main = machine["main"]

    def __call__(self, *inputs: np.ndarray) -> Any:
        """Run once; inputs and outputs are NumPy arrays."""
        outputs = self._main(*(self.tensor(x) for x in inputs))
        if hasattr(outputs, "numpy"):
            return self._array(outputs)
        return tuple(map(self._array, outputs))

    def tensor(self, array: np.ndarray) -> Any:
        """A device tensor with a copy of ``array`` as float32."""
        import tvm

        if self._far:
            return tvm.runtime.tensor(np.ascontiguousarray(array, np.float32), self._device)
        return tvm.runtime.from_dlpack(_aligned(array))

    def _array(self, tensor: Any) -> np.ndarray:
        """An array with a copy of an output.

        TVM's own way to NumPy takes as long as the kernels of a small network.
        """
        return tensor.numpy() if self._far else np.from_dlpack(tensor).copy()

    def call(self, tensors: list[Any]) -> Any:
        """Run once on device tensors and return the device tensors as they are.

        A GPU may still be at it; `wait` tells when it is done.
        """
        return self._main(*tensors)

    def wait(self) -> None:
        """Return once everything that was called has run."""
        self._device.sync()


def load(path: str | Path, threads: int | None = None) -> Network:
    """Load a ``model.so`` made by ``tune`` or by ``export_library``.

    A library with CUDA kernels runs on the first GPU.

    Parameters
    ----------
    path : str or Path
        The library.
    threads : int, optional
        Threads of TVM's pool; all physical cores by default (see `tvm_lowrank.threads`).

    Raises
    ------
    LowRankError
        The file is missing or is not a library with a Relax network inside.
    """
    path = Path(path)
    if not path.is_file():
        raise LowRankError(f"library {path} does not exist; give the model.so of a tune run")
    set_threads(threads)
    import tvm
    from tvm import relax

    try:
        module = tvm.runtime.load_module(str(path))
        device = tvm.cuda() if "cuda" in _kinds(module) else tvm.cpu()
        devices = [device] if device == tvm.cpu() else [device, tvm.cpu()]
        return Network(relax.VirtualMachine(module, devices), device)
    except Exception as error:
        raise LowRankError(
            f"{path} is not a library that holds a compiled Relax network ({error})"
        ) from error


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy of ``array`` as float32 in row-major order, that begins where a tensor may."""
    array = np.asarray(array)
    room = np.empty(array.size + _ALIGNMENT // 4, np.float32)
    start = -room.ctypes.data % _ALIGNMENT // 4
    copy = room[start : start + array.size].reshape(array.shape)
    copy[...] = array
    return copy


def _kinds(module: Any) -> set[str]:
    """The kinds of a module and of those it imports: ``cuda`` for one with GPU kernels."""
    return {str(module.kind)}.union(*map(_kinds, module.imports))
