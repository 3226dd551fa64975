"""The factored network as a PyTorch module, to fine-tune in a loop of one's own, and back.

Low-rank training (section 6.2 of the paper): the factors are what is trained, so the structure that
makes the network fast stays. Needs the ``torch`` extra.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.extras import require_torch
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.plan import Plan
from tvm_lowrank.torch_layers import (
    FactoredConv2d,
    FactoredLinear,
    convolution,
    linear,
    scale_outputs,
)
from tvm_lowrank.torch_match import Matched, export, match, proportions

torch: Any = require_torch()
nn: Any = torch.nn

__all__ = ["FactoredConv2d", "FactoredLinear", "collect", "factorize"]

# A channel that batch norm scales by less than this share of the largest scale is constant.
_NOTHING = 1e-7
# Factors less alike the weight they stand for than chance would have it, at this many standard
# deviations, are those of another network.
_CHANCE = 4.0


def factorize(
    model: Any,
    plan: Plan,
    *,
    input_shape: Sequence[int] | None = None,
    batch_norm: str = "keep",
) -> Any:
    """A copy of ``model`` whose layers that the plan factored are chains to be trained.

    Parameters
    ----------
    model : torch.nn.Module
        The network that the plan was made for, with one input; it is not changed. Its
        ``nn.Conv2d`` and ``nn.Linear`` are found by ``torch.export``: by the values of their
        weights, up to the scales that normalisation folds into them.
    plan : Plan
        With its factors.
    input_shape : sequence of int, optional
        Of the network's input, batch first; by default that of the plan's first convolution.
    batch_norm : {"keep", "fold"}
        A plan's factors have the batch norm after the convolution folded in. ``"keep"`` divides it
        out of the last factor again and leaves the module as it is, so that it goes on
        normalising in training; ``"fold"`` leaves the factors as they are and puts
        ``nn.Identity`` in place of the batch norm.

    Returns
    -------
    torch.nn.Module
        With a `FactoredConv2d`, a ``Sequential`` of the stages, for each factored convolution, and
        a `FactoredLinear` for each fully connected layer. In evaluation mode its outputs are those
        of the plan's network up to rounding.

    Raises
    ------
    LowRankError
        The model cannot be exported, is not the plan's network, or a factored layer is not the
        work of one plain ``nn.Conv2d`` (and, with ``"fold"``, of a batch norm after it) or
        ``nn.Linear``, or its form is no chain.
    """
    if batch_norm not in ("keep", "fold"):
        raise LowRankError(f"batch_norm is {batch_norm!r}; give 'keep' or 'fold'")
    shape = _shape(plan) if input_shape is None else tuple(input_shape)
    chains = plan.chains()
    found = match(model, export(model, shape))
    try:
        plan.check([item.layer for item in found])
    except LowRankError as error:
        if input_shape is not None:
            raise
        raise LowRankError(
            f"{error}; or name the shape of the input with input_shape=, if that of the first "
            "convolution is another"
        ) from error
    uses = Counter(item.name for item in found)
    made = copy.deepcopy(model)
    for item, layer in zip(found, plan.layers, strict=True):
        if layer.name not in chains:
            continue
        if item.name is None:
            raise LowRankError(
                f"{layer.name} ({layer.geometry}) is not computed by an nn.Conv2d of its own with "
                "zero padding or an nn.Linear of its own; make the plan again with this layer "
                "excluded"
            )
        if uses[item.name] > 1:
            raise LowRankError(
                f"module {item.name!r} runs {uses[item.name]} times, so {layer.name} cannot have "
                "factors of its own; make the plan again with this layer excluded"
            )
        _check_alike(item, layer, plan)
        original = made.get_submodule(item.name)
        padding = (0, 0, 0, 0) if item.layer.fully_connected else _padding(original)
        chain = _chain(item, layer, plan, padding, batch_norm == "keep")
        chain.to(original.weight.device, original.weight.dtype).train(original.training)
        made = _put(made, item.name, chain)
        if batch_norm == "fold" and item.norm is not None:
            made = _put(made, item.norm, nn.Identity())
        elif batch_norm == "fold" and not np.array_equal(item.scale, np.ones_like(item.scale)):
            raise LowRankError(
                f"something else than a batch norm scales the output of {item.name!r}; "
                "use batch_norm='keep'"
            )
    return made


def collect(
    module: Any, plan: Plan, *, input_shape: Sequence[int] | None = None
) -> tuple[tvm.IRModule, Plan]:
    """Take a fine-tuned module back: the network and the plan to build a library from.

    Parameters
    ----------
    module : torch.nn.Module
        Made by `factorize` with this plan; all its weights may have changed, its structure not.
    plan : Plan
    input_shape : sequence of int, optional
        As for `factorize`.

    Returns
    -------
    network : tvm.IRModule
        With the module's present weights (where factored: their product).
    plan : Plan
        The same forms, ranks and schedules with the module's present factors; without ``result``,
        which held for others. ``plan.apply(network)`` is what ``tvm.compile`` builds.

    Raises
    ------
    LowRankError
        The module's structure is not what `factorize` made of this plan.
    """
    twin, chains = copy.deepcopy(module), {}
    for name, part in list(twin.named_modules()):
        if isinstance(part, (FactoredConv2d, FactoredLinear)):
            chains[part.layer] = part
            twin = _put(twin, name, _dense(part, plan))
    missing = {layer.name for layer in plan.rewritten} ^ set(chains)
    if missing:
        raise LowRankError(
            "the module and the plan do not factor the same layers "
            f"({', '.join(sorted(missing))}); collect with the plan that factorize was given"
        )
    shape = _shape(plan) if input_shape is None else tuple(input_shape)
    network = load_model(export(twin, shape))
    layers = collect_layers(normalise(network))
    plan.check(layers)
    factors = {}
    for layer, described in zip(layers, plan.layers, strict=True):
        if layer.name not in chains:
            continue
        chain = chains[layer.name]
        own = chain.factors()
        scale = proportions(layer.weight, _product(described, own))
        if scale is None:
            raise LowRankError(
                f"the factors of {layer.name} are not found in the exported module; its structure "
                "was changed after factorize"
            )
        scaled = scale_outputs(own, scale, _gathers(described))
        factors[layer.name] = (scaled, layer.bias.astype(np.float32))
    return network, replace(plan, factors=factors, result={})


def _shape(plan: Plan) -> tuple[int, ...]:
    first = plan.layers[0].geometry if plan.layers else None
    if first is None:
        raise LowRankError(
            "the plan does not tell the shape of the network's input; give input_shape="
        )
    return (first.batch, first.in_channels, first.height, first.width)


def _put(model: Any, name: str, module: Any) -> Any:
    """The model with the module at a path replaced; the module itself where the path is empty."""
    if not name:
        return module
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
    return model


def _gathers(layer: LayerPlan) -> frozenset[int]:
    assert layer.geometry is not None
    if layer.form == "dense":
        return frozenset()
    return FORMS[layer.form].gathers(layer.geometry, layer.rank)


def _product(layer: LayerPlan, factors: Sequence[np.ndarray]) -> np.ndarray:
    if layer.form == "dense":
        return factors[0]
    doubled = [factor.astype(np.float64) for factor in factors]
    whole = FORMS[layer.form].reconstruct(doubled, layer.geometry)
    return np.asarray(whole, np.float32)


def _check_alike(item: Matched, layer: LayerPlan, plan: Plan) -> None:
    """Refuse factors that have nothing to do with the layer's weight."""
    stands, own = _product(layer, plan.factors[layer.name][0]), item.layer.weight
    norms = float(np.linalg.norm(stands) * np.linalg.norm(own))
    if norms and float((stands * own).sum()) < norms * min(_CHANCE / np.sqrt(own.size), 0.5):
        raise LowRankError(
            f"the plan's factors of {layer.name} have nothing in common with the weight of module "
            f"{item.name!r}; give the model whose weights the plan was made from"
        )


def _padding(conv: Any) -> tuple[int, int, int, int]:
    """Zeros that an nn.Conv2d adds by itself: top, left, bottom, right."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left), whole = [side // 2 for side in total], total
        return (top, left, whole[0] - top, whole[1] - left)
    return (*conv.padding, *conv.padding)


def _chain(
    item: Matched, layer: LayerPlan, plan: Plan, padding: tuple[int, ...], keep: bool
) -> FactoredConv2d | FactoredLinear:
    weights, bias = plan.factors[layer.name]
    if len(plan.chains()[layer.name].branches) > 1:
        raise LowRankError(
            f"{layer.name} takes the form {layer.form}, which is no chain of layers; make the plan "
            "again without this form"
        )
    gathers = _gathers(layer)
    if keep:
        constant = np.abs(item.scale) <= _NOTHING * np.abs(item.scale).max(initial=0.0)
        inverse = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, item.scale))
        weights = scale_outputs(weights, inverse, gathers)
        bias = (bias - item.shift) * inverse
    if item.layer.fully_connected:
        return FactoredLinear(weights, bias, layer.name)
    return FactoredConv2d(_stages(layer, padding), weights, bias, gathers, layer.name)


def _stages(layer: LayerPlan, own: tuple[int, ...]) -> list[ConvGeometry]:
    """The stages without the padding that other modules of the model do (which a plan folds in).

    A row of zeros stays one through stages that have no bias, so it may come in earlier.
    """
    assert layer.geometry is not None
    elsewhere = [whole - part for whole, part in zip(layer.geometry.padding, own, strict=True)]
    stages = []
    for stage in layer.stages:
        top, left, bottom, right = (
            side - extra if side else 0
            for side, extra in zip(stage.padding, elsewhere, strict=True)
        )
        stages.append(replace(stage, padding=(top, left, bottom, right)))
    kept = np.sum([stage.padding for stage in stages], axis=0)
    if tuple(kept) != tuple(own) or any(min(stage.padding) < 0 for stage in stages):
        raise LowRankError(
            f"{layer.name} pads by {layer.geometry.padding}, its module by {own}: pads around it "
            "cannot be told apart; make the plan again with this layer excluded"
        )
    return stages


def _dense(chain: FactoredConv2d | FactoredLinear, plan: Plan) -> Any:
    """The layer that a chain stands for at present."""
    layer = next((layer for layer in plan.rewritten if layer.name == chain.layer), None)
    if layer is None or layer.geometry is None:
        raise LowRankError(
            f"the plan does not factor {chain.layer}; collect with the plan that factorize got"
        )
    factors = chain.factors()
    if [f.shape for f in factors] != [stage.weight_shape for stage in layer.stages]:
        raise LowRankError(
            f"the factors of {chain.layer} do not have the plan's shapes; collect with the plan "
            "that factorize was given"
        )
    if isinstance(chain, FactoredLinear):
        return linear(_product(layer, factors), chain.output_bias())
    geometry = replace(layer.geometry, padding=chain.padding())
    return nn.Sequential(*convolution(geometry, _product(layer, factors), chain.output_bias()))
