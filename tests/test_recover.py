"""Any network as a PyTorch module, and training of its factors without labels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import small_network
from graph_support import Graph
from helpers import reference, relative, shared

torch = pytest.importorskip("torch")

from tvm_lowrank.passes.pipeline import normalise  # noqa: E402

from tvm_lowrank import tune  # noqa: E402
from tvm_lowrank.cost.analytic import Roofline  # noqa: E402
from tvm_lowrank.cost.measure import KernelTimer  # noqa: E402
from tvm_lowrank.cost.operations import multiplications  # noqa: E402
from tvm_lowrank.data import Samples  # noqa: E402
from tvm_lowrank.decompose import FORMS  # noqa: E402
from tvm_lowrank.errors import LowRankError  # noqa: E402
from tvm_lowrank.frontend import load_model  # noqa: E402
from tvm_lowrank.layer import collect_layers  # noqa: E402
from tvm_lowrank.planner import Options, search  # noqa: E402
from tvm_lowrank.planner.candidates import Candidate  # noqa: E402
from tvm_lowrank.planner.recover import recover  # noqa: E402
from tvm_lowrank.torch_module import RelaxModule  # noqa: E402


def outputs(module, x):
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


@pytest.fixture(scope="module")
def net():
    """3x3, 1x1, strided, dilated and depthwise layers, a residual, pooling; and smooth inputs."""
    model = small_network()
    mod = normalise(load_model(model))
    noise = np.random.default_rng(0).standard_normal((96, 3, 20, 20)).astype(np.float32)
    smooth = (noise + np.roll(noise, 1, 2) + np.roll(noise, 1, 3))[:, :, 1:19, 1:19]
    return model, mod, collect_layers(mod), np.ascontiguousarray(smooth)


def test_the_module_equals_onnx_runtime_for_any_number_of_samples(net):
    model, mod, layers, x = net
    module = RelaxModule(mod, layers)
    assert relative(outputs(module, x[:7]), reference(model, x[:7])) < 1e-5
    # One value is alive before each layer, the dense one too, but before conv2, around which the
    # shortcut leads.
    assert module.borders == (1, 3, 4, 5, 6)


def test_the_module_can_begin_at_a_border(net):
    _, mod, layers, x = net
    module = RelaxModule(mod, layers)
    with torch.no_grad():
        whole, ends = module.run(torch.from_numpy(x[:7]))
        for border in module.borders:
            given, seen = module.run(ends[border], begin=border)
            assert torch.equal(given, whole)
            assert [*seen] == [other for other in module.borders if other > border]
            assert all(torch.equal(value, ends[other]) for other, value in seen.items())


def test_a_decoder_with_gates_and_shuffles_is_a_module_too():
    g, rng = Graph(1, 3, 12, 10), np.random.default_rng(0)
    x = g.op("PRelu", g.conv("x", 3, 24), g.constant(rng.uniform(0, 0.5, (24, 1, 1))))
    gate = g.op("Sigmoid", g.conv(g.op("GlobalAveragePool", x), 24, 24, 1))
    x = g.op("Mul", x, gate)
    for shape, order in (([1, 4, 6, 12, 10], [0, 2, 1, 3, 4]), ([1, 24, 12, 10], None)):
        x = g.op("Reshape", x, g.constant(shape, np.int64))
        x = g.op("Transpose", x, perm=order) if order else x
    weight = g.constant(rng.standard_normal((24, 16, 3, 4)) / 9)
    x = g.op("ConvTranspose", x, weight, strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0])
    erf = g.op("Add", g.op("Erf", g.op("Div", x, g.constant(2**0.5))), g.constant(1.0))
    x = g.conv(g.op("Mul", x, erf), 16, 16)
    x = g.op("Resize", x, "", g.constant([1, 1, 2, 3]), mode="linear")
    x = g.op("Resize", x, "", "", g.constant([1, 16, 30, 77], np.int64), mode="nearest")
    x = g.op("Gather", x, g.constant([3, 1, 14, 0], np.int64), axis=1)
    model = g.model(g.conv(x, 4, 5))
    mod = normalise(load_model(model))
    x = rng.standard_normal((3, 3, 12, 10)).astype(np.float32)
    expected = np.concatenate([reference(model, part[None]) for part in x])
    assert relative(outputs(RelaxModule(mod, collect_layers(mod)), x), expected) < 1e-5


@pytest.mark.parametrize("name", ["vgg6-cifar10", "resnet20-cifar10", "crepe-tiny"])
def test_trained_networks_run_as_modules(name):
    path = shared("models", f"{name}.onnx")
    mod = normalise(load_model(path))
    shape = [int(x) for x in mod["main"].params[0].ty.shape]
    x = np.random.default_rng(0).standard_normal((2, *shape[1:])).astype(np.float32)
    module = RelaxModule(mod, collect_layers(mod))
    expected = np.concatenate([reference(path, part[None]) for part in x])
    assert relative(outputs(module, x), expected) < 1e-4


def made(layer, form_name, rank):
    form = FORMS[form_name]
    factors = form.fitter(layer.weight.astype(np.float64), layer.geometry, None).fit(rank)
    stages = tuple(form.stages(layer.geometry, rank))
    factors = tuple(f.astype(np.float32) for f in factors)
    return Candidate(form_name, rank, stages, factors, layer.bias, 0.1, 1.0, 1.0)


def test_training_brings_the_outputs_nearer(net, monkeypatch):
    # A clock that ticks with every look at it: as many steps on any machine.
    clock = itertools.count(0.0, 0.07)
    monkeypatch.setattr("tvm_lowrank.planner.recover.time.monotonic", lambda: next(clock))
    model, mod, layers, x = net
    by_name = {layer.name: layer for layer in layers}
    choice = {
        "conv1": made(by_name["conv1"], "separable", 16),
        "conv2": made(by_name["conv2"], "monochromatic", (4, 12)),
        "conv3": made(by_name["conv3"], "tucker2", (16, 16)),
        "conv5": made(by_name["conv5"], "linear_combination", 16),
    }
    depthwise = by_name["conv4"]
    choice["conv4"] = Candidate(
        "dense", 0, (depthwise.geometry,), (depthwise.weight,), depthwise.bias, 0.0, 1.0, 1.0
    )
    expected = reference(model, x[64:])

    def off(given):
        chains = {name: _module(name, found, by_name) for name, found in given.items()}
        return np.linalg.norm(outputs(RelaxModule(mod, layers, chains), x[64:]) - expected)

    told = []
    found = recover(mod, layers, choice, x[:64], 0.065, True, 0, lambda *step: told.append(step))
    assert off(found) < 0.8 * off(choice)
    for name, candidate in found.items():
        shapes = [factor.shape for factor in candidate.factors]
        assert shapes == [factor.shape for factor in choice[name].factors]
        assert not np.array_equal(candidate.bias, choice[name].bias)
    # Orders of channels are no weights: they stay.
    gathers = FORMS["monochromatic"].gathers(by_name["conv2"].geometry, choice["conv2"].rank)
    assert gathers
    for index in gathers:
        assert np.array_equal(found["conv2"].factors[index], choice["conv2"].factors[index])
    assert not np.array_equal(found["conv4"].factors[0], depthwise.weight)
    assert told[-1] == (4, 4)


def test_what_the_original_gives_is_used_several_times_if_it_can_be_kept(monkeypatch):
    recovery = __import__("tvm_lowrank.planner.recover", fromlist=["recover"])
    runs = itertools.count()

    class Original:
        def run(self, x):
            return torch.full((len(x), 2), float(next(runs))), {1: x + 1}

    def taken(count):
        inputs = np.random.default_rng(0).standard_normal((9, 3, 4, 4)).astype(np.float32)
        lessons = recovery._lessons(Original(), inputs, "cpu", np.random.default_rng(0))
        found = list(itertools.islice(lessons, count))
        assert all(torch.equal(ends[1], x + 1) for x, _, ends in found)
        return [int(wanted[0, 0]) for _, wanted, _ in found]

    monkeypatch.setattr(recovery, "_KEPT", 5)
    rounds = np.array(taken(16)).reshape(-1)
    assert all(sorted(rounds[first : first + 5]) == [0, 1, 2, 3, 4] for first in (0, 5, 10))
    assert rounds[15] == 5
    # A batch alone, or few, would be learnt by heart.
    monkeypatch.setattr(recovery, "_KEPT_BYTES", 1)
    assert taken(4) == [6, 7, 8, 9]


def test_training_that_does_not_help_changes_nothing(net, monkeypatch):
    clock = itertools.count(0.0, 0.07)
    monkeypatch.setattr("tvm_lowrank.planner.recover.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("tvm_lowrank.planner.recover._STEP", 10.0)
    _, mod, layers, x = net
    layer = next(layer for layer in layers if layer.name == "conv3")
    choice = {"conv3": made(layer, "tucker2", (24, 24))}
    found = recover(mod, layers, choice, x[:64], 0.03, True)["conv3"]
    before, after = choice["conv3"].weight, found.weight
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_divergence_of_softened_probabilities(temperature):
    from tvm_lowrank.planner.recover import _output_loss

    rng = np.random.default_rng(0)
    wanted, given = 5 * rng.standard_normal((2, 6, 10))

    def softened(scores):
        raised = np.exp(scores / temperature)
        return raised / raised.sum(axis=1, keepdims=True)

    p, q = softened(wanted), softened(given)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    for change in (lambda scores: scores, lambda scores: np.log(softened(scores)) * temperature):
        pair = (torch.from_numpy(change(x)) for x in (given, wanted))
        assert float(_output_loss(*pair, True, temperature)) == pytest.approx(expected)
    # A network may end in a softmax.
    pair = (torch.from_numpy(np.exp(x) / np.exp(x).sum(1, keepdims=True)) for x in (given, wanted))
    assert float(_output_loss(*pair, True, temperature)) == pytest.approx(expected, rel=1e-6)


def test_the_temperature_leaves_some_doubt():
    from tvm_lowrank.planner.recover import _SURE, _temperature

    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 10)))
    assert _temperature(scores) == 1.0
    for outputs in (8 * scores, (8 * scores).softmax(1)):
        found = _temperature(outputs)
        sure = float((8 * scores / found).softmax(1).amax(1).mean())
        assert found > 1 and sure == pytest.approx(_SURE, abs=0.01)
    assert _temperature(1e6 * scores) == pytest.approx(8.0)


def test_what_is_before_the_first_factored_layer_stays(net, monkeypatch):
    clock = itertools.count(0.0, 0.07)
    monkeypatch.setattr("tvm_lowrank.planner.recover.time.monotonic", lambda: next(clock))
    _, mod, layers, x = net
    by_name = {layer.name: layer for layer in layers}
    choice = {"conv3": made(by_name["conv3"], "tucker2", (16, 16))}
    for name in ("conv1", "conv4"):
        layer = by_name[name]
        choice[name] = Candidate(
            "dense", 0, (layer.geometry,), (layer.weight,), layer.bias, 0.0, 1.0, 1.0
        )
    found = recover(mod, layers, choice, x[:64], 0.05, True)
    assert found["conv1"] is choice["conv1"]
    for name in ("conv3", "conv4"):
        assert not np.array_equal(found[name].factors[0], choice[name].factors[0])


def _module(name, candidate, by_name):
    from tvm_lowrank.planner.recover import _chain

    return _chain(candidate, name, by_name[name].geometry)


def test_what_cannot_be_trained_is_refused_before_anything_is_measured(net, monkeypatch, capsys):
    _, mod, layers, _ = net
    monkeypatch.delitem(
        __import__("tvm_lowrank.torch_module", fromlist=["_OPERATORS"])._OPERATORS, "nn.max_pool2d"
    )
    with pytest.raises(LowRankError, match=r"does not know the operator nn\.max_pool2d"):
        RelaxModule(mod, layers)


def test_without_pytorch_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert tune.main(["--recover", "1", "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "needs PyTorch" in error and "tvm-lowrank[torch]" in error
    with pytest.raises(LowRankError, match="recover is -1"):
        Options(recover=-1)


def test_a_search_tries_trained_choices(net, monkeypatch, tmp_path):
    model, _, _, x = net
    labels = reference(model, x).argmax(1)
    ticks = itertools.count(0.0, 0.2)
    monkeypatch.setattr("tvm_lowrank.planner.recover.time.monotonic", lambda: next(ticks))
    # Kernels take what they multiply, whatever the machine does meanwhile: every form is faster.
    monkeypatch.setattr(KernelTimer, "roofline", lambda _: Roofline(200.0, 20.0))
    monkeypatch.setattr(KernelTimer, "chain", lambda _, stages: 1e-3 * multiplications(stages))
    monkeypatch.setattr(KernelTimer, "expected", KernelTimer.chain)
    monkeypatch.setattr(KernelTimer, "within", lambda self, stages, _: self.chain(stages))
    # A budget that nothing keeps that approximates.
    options = Options(
        metric="output_error",
        max_drop=1e-4,
        forms=("dense", "separable"),
        algorithms=("direct",),
        exclude=("conv0", "conv3"),
        trials=1,
        recover=0.05,
    )
    plan = search(load_model(model), None, Samples(x, labels), None, options, directory=tmp_path)
    trained = [point["recovered"] for point in plan.curve]
    assert not any(point["keeps"] for point in plan.curve)
    # With no hope for any, the choice nearest to the budget alone is trained.
    assert trained == [False, True, *[False] * (len(trained) - 2)]
    assert plan.curve[1]["microseconds"] == plan.curve[0]["microseconds"]
    # 96 samples: 32 fit, 32 choose, 16 of the rest are trained on and 16 judge.
    assert plan.result["samples"] == 16
    assert (tmp_path / "model.so").exists()
