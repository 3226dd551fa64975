"""Which ``nn.Conv2d`` or ``nn.Linear`` of a user's module each layer of a network is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.extras import require_torch
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.torch_layers import to_array

torch: Any = require_torch()

# Axes of the weight of each operator.
_OPERATORS = {
    "aten.conv2d.default": 4,
    "aten.conv2d.padding": 4,
    "aten.convolution.default": 4,
    "aten.linear.default": 2,
}
# Rounding of batch norm's factors in float32, and room for other formulas of them.
_SAME = 1e-4


@dataclass(frozen=True, eq=False)
class Matched:
    """A layer and its module.

    ``folded = scale * own``, channel by channel, holds between the layer's weight and the module's;
    ``shift`` is the layer's bias less ``scale`` times the module's. ``name`` is the module's path,
    None where no module of these kinds makes the layer; ``norm`` is that of the batch norm that
    alone reads the layer, if there is one.
    """

    layer: ConvLayer
    name: str | None
    scale: np.ndarray
    shift: np.ndarray
    norm: str | None = None


@dataclass
class _Node:
    """A convolution or product in the exported graph."""

    name: str | None
    weight: np.ndarray
    bias: np.ndarray
    norm: str | None


def export(model: Any, shape: Sequence[int]) -> Any:
    """``torch.export`` of a copy of the model for inference, with an input of zeros.

    Raises
    ------
    LowRankError
        The model cannot be exported, or does not take an input of this shape.
    """
    twin = copy.deepcopy(model).cpu().float().eval()
    try:
        return torch.export.export(twin, (torch.zeros(tuple(shape)),))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise LowRankError(
            f"torch.export cannot trace the model with an input of shape {tuple(shape)} "
            f"({reason}); name the right shape with input_shape=, or make the model exportable"
        ) from error


def match(model: Any, program: Any) -> list[Matched]:
    """The layers of an exported program, in the order of plans, each with its module.

    Passes may write convolutions in another order than the model runs them, so they are told
    by their values; among equal ones the order decides.

    Raises
    ------
    LowRankError
        As `tvm_lowrank.frontend.load_model`.
    """
    layers = collect_layers(normalise(load_model(program)))
    nodes = _convolutions(model, program)
    found = []
    for layer in layers:
        pair = next(((n, s) for n in nodes if (s := _proportions(layer, n)) is not None), None)
        if pair is None:
            zeros = np.zeros(len(layer.bias))
            found.append(Matched(layer, None, zeros, zeros))
            continue
        node, scale = pair
        nodes.remove(node)
        shift = layer.bias.astype(np.float64) - scale * node.bias
        found.append(Matched(layer, node.name, scale, shift, node.norm))
    return found


def _proportions(layer: ConvLayer, node: _Node) -> np.ndarray | None:
    own, folded = node.weight, layer.weight
    if layer.fully_connected != (own.ndim == 2) or own.size != folded.size:
        return None
    return proportions(folded, own.reshape(folded.shape) if own.ndim == 2 else own)


def proportions(folded: np.ndarray, own: np.ndarray) -> np.ndarray | None:
    """Factors (F,) that make ``folded`` of ``own``, filter by filter; None if there are none."""
    if folded.shape != own.shape:
        return None
    a, b = (w.reshape(len(w), -1).astype(np.float64) for w in (folded, own))
    squares = (b * b).sum(1)
    scale = np.where(squares > 0, (a * b).sum(1) / np.maximum(squares, 1e-300), 0.0)
    apart = np.linalg.norm(a - scale[:, None] * b, axis=1)
    return scale if (apart <= _SAME * np.linalg.norm(a, axis=1)).all() else None


def _convolutions(model: Any, program: Any) -> list[_Node]:
    signature, values = program.graph_signature, program.state_dict
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or str(node.target) not in _OPERATORS:
            continue
        path = parameters.get(getattr(node.args[1], "name", None))
        if path is None or path not in values or values[path].ndim != _OPERATORS[str(node.target)]:
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        shift = parameters.get(getattr(bias, "name", None))
        weight = to_array(values[path])
        found.append(
            _Node(
                _module_of(model, path),
                weight,
                to_array(values[shift]) if shift in values else np.zeros(len(weight), np.float32),
                _norm_after(node, parameters),
            )
        )
    return found


def _module_of(model: Any, path: str) -> str | None:
    """The module that owns a weight, if it is a plain ``nn.Conv2d`` or ``nn.Linear``."""
    name, _, attribute = path.rpartition(".")
    module, plain = model.get_submodule(name), torch.nn.Conv2d
    if attribute == "weight" and isinstance(module, torch.nn.Linear):
        return name if type(module).forward is torch.nn.Linear.forward else None
    if attribute != "weight" or not isinstance(module, plain):
        return None
    same = type(module).forward is plain.forward
    same = same and type(module)._conv_forward is plain._conv_forward
    return name if same and module.padding_mode == "zeros" else None


def _norm_after(node: Any, parameters: dict[str, str]) -> str | None:
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    if "batch_norm" not in str(reader.target) or len(reader.args) < 5:
        return None
    mean = parameters.get(getattr(reader.args[3], "name", None))  # type: ignore[arg-type]
    return mean.rpartition(".")[0] if mean else None
