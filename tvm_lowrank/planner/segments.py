"""A network compiled in pieces, to run a few layers at a time with other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm_ffi import structural_equal, structural_hash

from tvm_lowrank.build import compile_module, network_of
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.deploy import Network
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.metrics import joined
from tvm_lowrank.passes.cut_at_convolutions import Piece, cut_at_convolutions
from tvm_lowrank.passes.kernel_calls import WeightParameter
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions

# What is alive between two pieces, by name, for each call of ``batch`` samples.
State = list[dict[str, Any]]
# A weight (OIHW) and a bias (F,).
Weight = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Compiled:
    piece: Piece
    network: Network | None
    parameters: list[WeightParameter]
    # Packed, of the original weights.
    original: list[Any]


class Segments:
    """The dense network cut before each layer; weights are inputs, as in `TrialNetwork`.

    To refit layer after layer, or to ask what one layer's error does to the output, only what
    follows a layer has to run again.

    Parameters
    ----------
    mod : tvm.IRModule
        Normalised.
    layers : list of ConvLayer
        Of the same module, all that `collect_layers` gives.
    timer : KernelTimer
        Names the target and the schedules.
    """

    def __init__(self, mod: tvm.IRModule, layers: list[ConvLayer], timer: KernelTimer) -> None:
        self.layers = layers
        self.batch = int(mod["main"].params[0].ty.shape[0])
        # By structure: layers that differ in their weights alone run in one library.
        self._networks: dict[int, list[tuple[tvm.IRModule, Network]]] = {}
        self._compiled = [self._compile(piece, timer) for piece in cut_at_convolutions(mod)]

    def _compile(self, piece: Piece, timer: KernelTimer) -> _Compiled:
        if piece.source is None and piece.takes == piece.gives:
            return _Compiled(piece, None, [], [])
        lower = LowerConvolutions(timer.isa, timer.choose, weights_as_parameters=True)
        lowered = lower(piece.mod)
        alike = self._networks.setdefault(structural_hash(lowered), [])
        network = next((n for mod, n in alike if structural_equal(mod, lowered)), None)
        if network is None:
            network = network_of(compile_module(lowered, timer.target))
            alike.append((lowered, network))
        return _Compiled(piece, network, lower.parameters_, [])

    def piece(self, index: int) -> Piece:
        """The piece that begins with convolution ``index``."""
        return self._compiled[index + 1].piece

    def start(self, inputs: np.ndarray) -> State:
        """The state before the first convolution; samples that do not fill a batch are left out.

        Where there are fewer samples than in one batch, it is filled by repeating them.
        """
        if 0 < len(inputs) < self.batch:
            inputs = np.resize(inputs, (self.batch, *inputs.shape[1:]))
        first = self._compiled[0]
        state: State = []
        for begin in range(0, len(inputs) - self.batch + 1, self.batch):
            tensor = tvm.runtime.tensor(
                np.ascontiguousarray(inputs[begin : begin + self.batch], np.float32)
            )
            state.append(dict.fromkeys(first.piece.takes, tensor))
        return state if first.network is None else self._advance(first, state, [])

    def step(self, index: int, state: State, weight: Weight | None = None) -> State:
        """Run convolution ``index`` and what follows it up to the next; the old state stays."""
        compiled, layer = self._compiled[index + 1], self.layers[index]
        arrays = (layer.weight, layer.bias) if weight is None else weight
        packed = compiled.original
        if weight is not None or not packed:
            packed = [
                tvm.runtime.tensor(
                    parameter.pack(np.asarray(arrays[parameter.kind != "weight"], np.float32))
                )
                for parameter in compiled.parameters
            ]
            if weight is None:
                compiled.original.extend(packed)
        return self._advance(compiled, state, packed)

    def finish(self, index: int, state: State, weight: Weight | None = None) -> np.ndarray:
        """The network's outputs (samples, ...), from the state before convolution ``index`` on."""
        state = self.step(index, state, weight)
        for later in range(index + 1, len(self.layers)):
            state = self.step(later, state)
        return np.concatenate([values["output"] for values in state])

    def values(self, state: State, name: str) -> np.ndarray:
        """One of the values that are alive, of all samples."""
        return np.concatenate([np.from_dlpack(values[name]) for values in state])

    def bytes_alive(self, samples: int) -> int:
        """The most memory that a state of so many samples takes."""
        most = 0
        for compiled in self._compiled:
            params = compiled.piece.mod["main"].params
            sizes = [
                np.prod([int(x) for x in p.ty.shape]) for p in params if hasattr(p.ty, "shape")
            ]
            most = max(most, int(sum(sizes)))
        return 4 * most * samples // self.batch

    def _advance(self, compiled: _Compiled, state: State, packed: Sequence[Any]) -> State:
        piece, network = compiled.piece, compiled.network
        assert network is not None
        found: State = []
        for values in state:
            outputs = network.call([*(values[name] for name in piece.takes), *packed])
            if piece.gives:
                found.append(dict(zip(piece.gives, outputs, strict=True)))
            else:
                several = [outputs] if hasattr(outputs, "numpy") else list(outputs)
                found.append({"output": joined([y.numpy() for y in several])})
        return found
