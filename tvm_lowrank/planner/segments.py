"""A network compiled in pieces, to run a few layers at a time with other weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
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
from tvm_lowrank.passes.blocked_rewriter import waits_in_blocks
from tvm_lowrank.passes.cut_at_convolutions import Piece, cut_at_convolutions
from tvm_lowrank.passes.graph import static_shape
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
    """The dense network cut before each layer, its packed weights and biases being inputs.

    A factored layer computes what the dense layer with the reconstructed weight computes (up to
    rounding), so every plan can be tried without compiling anything. To refit layer after layer, or
    to ask what one layer's error does to the output, only what follows a layer has to run again.
    Between pieces, maps wait in the blocks that kernels read.

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
        first = piece.source is None
        if first and piece.takes == piece.gives and not _has_maps(piece):
            return _Compiled(piece, None, [], [])
        lower = LowerConvolutions(
            timer.isa,
            functools.partial(timer.choose, raced=False),
            weights_as_parameters=True,
            blocked_inputs=not first,
            blocked_outputs=bool(piece.gives),
        )
        lowered = lower(piece.mod)
        alike = self._networks.setdefault(structural_hash(lowered), [])
        network = next((n for mod, n in alike if structural_equal(mod, lowered)), None)
        if network is None:
            network = network_of(compile_module(lowered, timer.target, checks=False))
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
        return self._advance(self._compiled[index + 1], state, self._pack(index, weight))

    def finish(self, index: int, state: State, weight: Weight | None = None) -> np.ndarray:
        """The network's outputs (samples, ...), from the state before convolution ``index`` on."""
        state = self.step(index, state, weight)
        for later in range(index + 1, len(self.layers)):
            state = self.step(later, state)
        return np.concatenate([values["output"] for values in state])

    def run(self, inputs: np.ndarray, weights: Mapping[str, Weight] | None = None) -> np.ndarray:
        """Outputs (samples, ...) for inputs (samples, ...), with some layers' weights replaced.

        Several outputs are put in a row (see `tvm_lowrank.metrics.joined`).
        """
        packed, found = self._packed(self.layers, weights), []
        for rows, state in self._batches(inputs):
            for compiled, arrays in zip(self._compiled[1:], packed, strict=True):
                state = self._advance(compiled, state, arrays)
            found.append(state[0]["output"][:rows])
        return np.concatenate(found)

    def inputs_of(
        self,
        names: Sequence[str],
        inputs: np.ndarray,
        weights: Mapping[str, Weight] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """What the named layers read, a batch of n samples each, plain or in blocks (see `read`).

        Rows that only fill up the last batch are left out. See `run` for ``weights``.
        """
        last = max(index for index, layer in enumerate(self.layers) if layer.name in names)
        packed = self._packed(self.layers[:last], weights)
        for rows, state in self._batches(inputs):
            found = {}
            for index, layer in enumerate(self.layers[: last + 1]):
                if layer.name in names:
                    found[layer.name] = self.read(index, state[0])[:rows]
                if index < last:
                    state = self._advance(self._compiled[index + 1], state, packed[index])
            yield found

    def read(self, index: int, values: Mapping[str, Any]) -> np.ndarray:
        """What convolution ``index`` reads in one call's state.

        A map (n, C, H, W), or its blocks (n, C / lanes, H, W, lanes), as `PatchSampler` takes both.
        """
        source, g = self.piece(index).source, self.layers[index].geometry
        assert source is not None and g is not None
        return _map(values[source], g.in_channels, g.height, g.width)

    def shortcut(self, index: int, values: Mapping[str, Any]) -> np.ndarray | None:
        """What is added to what convolution ``index`` gives, as `read`; None if nothing is."""
        shortcut, g = self.piece(index).shortcut, self.layers[index].geometry
        if shortcut is None or g is None:
            return None
        return _map(values[shortcut], g.out_channels, g.out_height, g.out_width)

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

    def _batches(self, inputs: np.ndarray) -> Iterator[tuple[int, State]]:
        """The state before the first convolution of each batch, and how many samples it holds."""
        for begin in range(0, len(inputs), self.batch):
            part = inputs[begin : begin + self.batch]
            yield len(part), self.start(part)

    def _packed(
        self, layers: Sequence[ConvLayer], weights: Mapping[str, Weight] | None
    ) -> list[list[Any]]:
        """`_pack` of the first layers, some with other weights than their own."""
        given = weights or {}
        return [self._pack(i, given.get(layer.name)) for i, layer in enumerate(layers)]

    def _pack(self, index: int, weight: Weight | None) -> list[Any]:
        """Packed weight and bias of convolution ``index``; the original ones are kept."""
        compiled, layer = self._compiled[index + 1], self.layers[index]
        if weight is None and compiled.original:
            return compiled.original
        arrays = (layer.weight, layer.bias) if weight is None else weight
        packed = [
            tvm.runtime.tensor(
                parameter.pack(np.asarray(arrays[parameter.kind != "weight"], np.float32))
            )
            for parameter in compiled.parameters
        ]
        if weight is None:
            compiled.original.extend(packed)
        return packed

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


def _map(value: Any, channels: int, height: int, width: int) -> np.ndarray:
    """A tensor as blocks, if it is in blocks, else as a map (n, C, H, W)."""
    found = np.from_dlpack(value)
    return found if found.ndim == 5 else found.reshape(-1, channels, height, width)


def _has_maps(piece: Piece) -> bool:
    """Whether any of what a piece takes waits in blocks for the next."""
    return any(waits_in_blocks(static_shape(var)) for var in piece.mod["main"].params)
