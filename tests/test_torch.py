"""The factored PyTorch module: its outputs, its way back into a plan, what is refused."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
from helpers import relative, run

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tvm_lowrank.passes.pipeline import normalise  # noqa: E402

from tvm_lowrank.decompose import FORMS  # noqa: E402
from tvm_lowrank.errors import LowRankError  # noqa: E402
from tvm_lowrank.frontend import load_model  # noqa: E402
from tvm_lowrank.layer import collect_layers  # noqa: E402
from tvm_lowrank.layer_plan import LayerPlan  # noqa: E402
from tvm_lowrank.plan import Plan  # noqa: E402
from tvm_lowrank.planner.candidates import forms_for  # noqa: E402
from tvm_lowrank.target import host_target  # noqa: E402
from tvm_lowrank.torch import FactoredConv2d, FactoredLinear, collect, factorize  # noqa: E402
from tvm_lowrank.torch_layers import ChannelOrder  # noqa: E402

SHAPE = (1, 3, 13, 11)


class Residual(nn.Module):
    """Two convolutions beside a strided 1x1 shortcut; the shortcut is the first operand."""

    def __init__(self, c: int, f: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(c, f, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(f)
        self.second = nn.Conv2d(f, f, 3, padding="same", dilation=2)
        self.norm2 = nn.BatchNorm2d(f)
        self.shortcut = nn.Conv2d(c, f, 1, stride, bias=False)
        self.norm3 = nn.BatchNorm2d(f)

    def forward(self, x):
        y = F.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(y))
        return F.relu(self.norm3(self.shortcut(x)) + y)


class Net(nn.Module):
    """Kernels 5x5, 3x3 and 1x1, strides, dilation, an outer pad, even kernels, depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, padding=2)
        self.block = Residual(12, 16, 2)
        self.narrow = nn.Conv2d(16, 16, 3, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.even = nn.Conv2d(16, 24, (4, 2), padding="same", bias=False)
        self.norm = nn.BatchNorm2d(24, affine=False)
        self.last = nn.Conv2d(24, 20, 1)
        self.classes = nn.Linear(20, 5)

    def forward(self, x):
        x = self.block(F.relu(self.stem(x)))
        x = F.relu(self.narrow(F.pad(x, (0, 1, 2, 1))))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.norm(self.even(x)))
        return self.classes(F.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -0.3, 0.3)
    return made.eval()


def imported(model):
    return load_model(torch.export.export(copy.deepcopy(model).eval(), (torch.zeros(SHAPE),)))


def plan_of(model, form: str) -> Plan:
    """A plan that takes a form wherever it can, with biases that are not the original ones."""
    layers, factors = [], {}
    rng = np.random.default_rng(0)
    for layer in collect_layers(normalise(imported(model))):
        ranks = []
        if forms_for(layer, [form]) and not FORMS[form].refuse(layer.geometry):
            ranks = FORMS[form].ranks(layer.geometry, 4 if form != "svd" else 1)
        if not ranks:
            layers.append(LayerPlan(layer.name, layer.geometry))
            continue
        rank = ranks[-1]
        exact = layer.weight.astype(np.float64)
        fitter = FORMS[form].fitter(exact, layer.geometry, refine=False)
        weights = tuple(np.asarray(w, np.float32) for w in fitter.fit(rank))
        bias = (layer.bias + rng.normal(0, 0.1, layer.bias.shape)).astype(np.float32)
        factors[layer.name] = (weights, bias)
        stages = tuple(FORMS[form].stages(layer.geometry, rank))
        layers.append(
            LayerPlan(layer.name, layer.geometry, form, rank, stages, ("direct",) * len(stages))
        )
    assert factors
    target = json.loads(str(host_target()))
    return Plan(target, 1, 0, 1.0, "top1", tuple(layers), factors=factors)


def outputs(model, x) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize(
    ("form", "batch_norm"),
    [
        ("separable", "keep"),
        ("tucker2", "fold"),
        ("cp", "fold"),
        ("monochromatic", "keep"),
        ("bicluster", "fold"),
        ("svd", "keep"),
    ],
)
def test_the_module_computes_what_the_plan_computes(net, x, form, batch_norm):
    plan = plan_of(net, form)
    module = factorize(net, plan, batch_norm=batch_norm)
    kinds = (FactoredConv2d, FactoredLinear)
    chains = [part for part in module.modules() if isinstance(part, kinds)]
    assert sorted(chain.layer for chain in chains) == sorted(p.name for p in plan.rewritten)
    expected = run(plan.factor(imported(net)), x)
    assert relative(outputs(module, x), expected) < 1e-4
    assert relative(expected, outputs(net, x)) > 1e-3  # the plan is another network
    network, back = collect(module, plan)
    for name, (weights, bias) in plan.factors.items():
        mine, shift = back.factors[name]
        for a, b in zip(mine, weights, strict=True):
            if batch_norm == "fold":
                assert np.array_equal(a, b)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shift, bias, rtol=1e-4, atol=1e-5)
    assert relative(run(back.factor(network), x), expected) < 1e-4


def test_a_gradient_step_reaches_the_library(net, x):
    plan = plan_of(net, "separable")
    module = factorize(net, plan).train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    batch = torch.randn(8, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(module(batch), torch.arange(8) % 5).backward()
        optimiser.step()
    moved = [n for n, p in module.named_parameters() if not torch.equal(p, before[n])]
    assert any("stem" in n for n in moved) and any("classes" in n for n in moved)
    network, tuned = collect(module, plan)
    assert tuned.layers == plan.layers
    built = run(tuned.apply(network), x, target=host_target())
    assert relative(built, outputs(module, x)) < 1e-4
    assert relative(built, run(plan.apply(imported(net)), x, target=host_target())) > 1e-3


def test_channel_orders_are_not_trained(net):
    module = factorize(net, plan_of(net, "monochromatic"))
    assert any(isinstance(part, ChannelOrder) for part in module.modules())
    chain = next(part for part in module.modules() if isinstance(part, FactoredConv2d))
    assert all(p.requires_grad for p in chain.parameters())
    orders = sum(isinstance(part, ChannelOrder) for part in chain)
    assert len(list(chain.parameters())) == len(chain.factors()) - orders + 1


def test_the_model_given_stays_as_it_is(net, x):
    before = outputs(net, x)
    module = factorize(net, plan_of(net, "tucker2"), batch_norm="fold")
    assert isinstance(net.block.norm1, nn.BatchNorm2d)
    assert isinstance(module.block.norm1, nn.Identity)
    assert np.array_equal(outputs(net, x), before)


def test_a_single_convolution_is_a_network():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 16, 3, padding=1)
    plan = plan_of(model, "separable")
    assert isinstance(factorize(model, plan), FactoredConv2d)


def test_a_form_of_several_branches_is_refused():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 16, 7, padding=3)
    with pytest.raises(LowRankError, match="conv0 takes the form multiresolution, which is no"):
        factorize(model, plan_of(model, "multiresolution"))


def test_another_model_is_refused(net):
    plan = plan_of(net, "separable")
    torch.manual_seed(7)
    with pytest.raises(LowRankError, match="nothing in common with the weight of module"):
        factorize(Net(), plan)
    with pytest.raises(LowRankError, match="the plan is for a network of"):
        factorize(nn.Sequential(nn.Conv2d(3, 8, 3)), plan)
    with pytest.raises(LowRankError, match="input_shape="):
        factorize(net, plan, input_shape=(1, 4, 13, 11))
    with pytest.raises(LowRankError, match="'keep' or 'fold'"):
        factorize(net, plan, batch_norm="drop")


def test_a_module_that_runs_twice_is_refused():
    torch.manual_seed(0)
    shared = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), shared, nn.ReLU(), shared)
    with pytest.raises(LowRankError, match=r"'[13]' runs 2 times"):
        factorize(model, plan_of(model, "linear_combination"))


def test_padding_with_other_than_zeros_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(LowRankError, match="name the shape of the input with input_shape="):
        factorize(model, plan_of(model, "separable"))
    with pytest.raises(LowRankError, match=r"conv0 .* zero padding"):
        factorize(model, plan_of(model, "separable"), input_shape=SHAPE)


def test_scales_that_no_batch_norm_makes_need_keep(x):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3)
            self.register_buffer("scale", torch.linspace(0.5, 2.0, 16).reshape(1, -1, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale

    model = Scaled()
    plan = plan_of(model, "separable")
    expected = run(plan.factor(imported(model)), x)
    assert relative(outputs(factorize(model, plan), x), expected) < 1e-4
    with pytest.raises(LowRankError, match="something else than a batch norm"):
        factorize(model, plan, batch_norm="fold")


def test_collect_wants_the_plan_of_factorize(net):
    module = factorize(net, plan_of(net, "separable"))
    with pytest.raises(LowRankError, match="collect with the plan"):
        collect(module, plan_of(net, "tucker2"))
    with pytest.raises(LowRankError, match="do not factor the same layers"):
        collect(net, plan_of(net, "separable"))


def test_without_torch_the_extra_is_named(monkeypatch):
    from tvm_lowrank.extras import require_torch

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(LowRankError, match=r"pip install tvm-lowrank\[torch\]"):
        require_torch()
