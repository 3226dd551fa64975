"""A network compiled once, whose convolution weights are inputs: to try weights out fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.build import compile_module, network_of
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.metrics import joined
from tvm_lowrank.passes.expose_inputs import ExposeInputs
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions

# Weights (OIHW) and biases (F,) that replace those of the named layers.
Weights = Mapping[str, tuple[np.ndarray, np.ndarray]]


class TrialNetwork:
    """The dense network with packed weights and biases as parameters of its function.

    A factored layer computes what the dense layer with the reconstructed weight computes (up to
    rounding), so every plan can be tried on this one network without compiling anything.

    Parameters
    ----------
    mod : tvm.IRModule
        Normalised.
    layers : list of ConvLayer
        Of the same module.
    timer : KernelTimer
        Names the target and the schedules.
    expose : bool
        Also return the input of every convolution.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        layers: list[ConvLayer],
        timer: KernelTimer,
        expose: bool = False,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        lower = LowerConvolutions(timer.isa, timer.choose, weights_as_parameters=True)
        lowered = lower(ExposeInputs()(mod) if expose else mod)
        self.parameters = lower.parameters_
        self.network = network_of(compile_module(lowered, timer.target))
        self.batch = int(mod["main"].params[0].ty.shape[0])
        self._original = self._pack({})

    def run(self, inputs: np.ndarray, weights: Weights | None = None) -> np.ndarray:
        """Outputs (samples, ...) for inputs (samples, ...), with some layers' weights replaced.

        Several outputs are put in a row (see `tvm_lowrank.metrics.joined`).
        """
        return np.concatenate([joined(outputs) for outputs in self.stream(inputs, weights)])

    def stream(
        self,
        inputs: np.ndarray,
        weights: Weights | None = None,
        keep: Sequence[str] | None = None,
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Output, and the exposed inputs of the layers in ``keep`` (all by default), a batch each.

        The inputs come in the order of ``keep``. Rows that only fill up the last batch are left
        out.
        """
        names = list(self.layers)
        wanted = [0, *(names.index(name) + 1 for name in keep)] if keep else None
        parameters = self._pack(weights) if weights else self._original
        for start in range(0, len(inputs), self.batch):
            chunk = inputs[start : start + self.batch]
            if len(chunk) < self.batch:
                fill = np.repeat(chunk[-1:], self.batch - len(chunk), axis=0)
                chunk = np.concatenate([chunk, fill])
            outputs = self.network.call([self.network.tensor(chunk), *parameters])
            values = [outputs] if hasattr(outputs, "numpy") else list(outputs)
            valid = min(self.batch, len(inputs) - start)
            taken = values if wanted is None else [values[index] for index in wanted]
            yield tuple(value.numpy()[:valid] for value in taken)

    def _pack(self, weights: Weights) -> list[Any]:
        packed = []
        for index, parameter in enumerate(self.parameters):
            if parameter.layer in weights or not weights:
                layer = self.layers[parameter.layer]
                weight, bias = weights.get(parameter.layer, (layer.weight, layer.bias))
                array = weight if parameter.kind == "weight" else bias
                packed.append(self.network.tensor(parameter.pack(np.asarray(array, np.float32))))
            else:
                packed.append(self._original[index])
        return packed
