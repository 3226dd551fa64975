"""Planning a small network end to end; plans as JSON and as files; the pass and the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from helpers import factored_plan, operators, reference, relative, run
from tvm import relax

import tvm_lowrank
from tvm_lowrank.frontend import load_model
from tvm_lowrank.plan import Plan
from tvm_lowrank.target import host_target


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    return rng.standard_normal((48, 3, 18, 18)).astype(np.float32)


@pytest.fixture(scope="module")
def made(small, data, tmp_path_factory):
    """A plan of the small network with a budget that lets everything pass."""
    records = tmp_path_factory.mktemp("plan") / "records.jsonl"
    plan = tvm_lowrank.plan(small, data=data, max_drop=100.0, trials=1, records=records)
    return plan, records


def test_plan_names_every_layer_with_a_form_or_a_reason(made):
    plan, _ = made
    assert [layer.name for layer in plan.layers] == [
        *(f"conv{i}" for i in range(6)),
        "matmul0",
    ]
    for layer in plan.layers:
        assert layer.form != "dense" or layer.reason or not plan.rewritten
    assert plan.layers[4].reason == "groups = channels: depthwise"
    assert plan.metric == "disagreement"
    assert plan.result["left_to_tvm"] == {}
    assert plan.result["samples"] == 16
    assert plan.transformed or plan.reason


def test_plan_reads_its_records_instead_of_measuring_again(made, small, data):
    plan, records = made
    before = records.read_bytes()
    again = tvm_lowrank.plan(small, data=data, max_drop=100.0, trials=1, records=records)
    assert records.read_bytes() == before
    assert [(p.name, p.dense_us) for p in again.layers] == [
        (p.name, p.dense_us) for p in plan.layers
    ]


def test_lossless_keeps_the_network(small, data):
    plan = tvm_lowrank.plan(small, data=data, lossless=True, trials=1)
    assert not plan.rewritten
    x = data[:1]
    mod = plan.apply(load_model(small))
    assert relative(run(mod, x, target=host_target()), reference(small, x)) < 1e-5


def test_excluded_layers_stay(small, data):
    plan = tvm_lowrank.plan(small, data=data, max_drop=100.0, trials=1, exclude=["conv*"])
    assert not plan.rewritten and not plan.transformed
    assert plan.layers[0].reason == "excluded"


def test_without_data_a_warning_says_that_accuracy_was_not_measured(small):
    with pytest.warns(UserWarning, match="accuracy is not measured"):
        plan = tvm_lowrank.plan(small, trials=1, forms=["dense", "separable"])
    assert plan.metric == "output_error" and plan.result["synthetic_data"]


def test_apply_equals_the_factored_network_and_uses_our_kernels(small, data):
    plan, x = factored_plan(small), data[:1]
    mod = load_model(small)
    factored = plan.factor(mod)
    assert operators(factored)["nn.conv2d"] == 6 + 1 + 2
    applied = plan.apply(mod)
    # Six layers, two of them as chains, and the dense layer.
    assert operators(applied)["lowrank_conv2d"] == 6 + 1 + 2 + 1
    expected = run(factored, x)
    assert relative(run(applied, x, target=host_target()), expected) < 1e-5
    assert relative(expected, reference(small, x)) > 1e-4  # it is an approximation


def test_json_and_files_bring_the_plan_back(small, data, tmp_path):
    plan, x = factored_plan(small), data[:1]
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    mod = load_model(small)
    once, twice = (run(p.apply(mod), x, target=host_target()) for p in (plan, loaded))
    assert np.array_equal(once, twice)


def test_a_plan_without_its_factors_says_so(small):
    bare = Plan.from_json(factored_plan(small).to_json())
    with pytest.raises(tvm_lowrank.LowRankError, match=r"no factors for conv1.*Plan\.load"):
        bare.apply(load_model(small))


def test_factors_of_another_run_are_refused(small, tmp_path):
    plan = factored_plan(small)
    plan.save(tmp_path / "plan.json")
    np.savez(tmp_path / "plan.npz", wrong=np.zeros(3))
    with pytest.raises(tvm_lowrank.LowRankError, match="not the file that belongs"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_for_another_network_is_refused(small):
    from conftest import small_network

    with pytest.raises(tvm_lowrank.LowRankError, match=r"conv0 is .*in this network but"):
        factored_plan(small).apply(load_model(small_network(), batch=2))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 7}', '{"format": 1, "layers": 3}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(tvm_lowrank.LowRankError, match="damaged"):
        Plan.from_json(text)


def test_lowrank_is_a_pass_and_a_pipeline(small, data):
    plan, mod, x = factored_plan(small), load_model(small), data[:1]
    pass_ = tvm_lowrank.LowRank(plan=plan)
    assert isinstance(pass_, tvm.ir.transform.Pass)
    by_pass = tvm.ir.transform.Sequential([pass_])(mod)
    assert operators(by_pass)["lowrank_conv2d"] == 10
    pipeline = relax.get_pipeline("lowrank", plan=plan)
    executable = tvm.compile(mod, target=host_target(), relax_pipeline=pipeline)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    piped = machine["main"](tvm.runtime.tensor(x)).numpy()
    assert np.array_equal(piped, run(by_pass, x, target=host_target()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": ["sparse"]}, "choose among dense"),
        ({"algorithms": ["strassen"]}, "choose among direct"),
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"trials": 0}, "trials is 0"),
        ({"target": "sparc9"}, "unknown to TVM"),
        ({"target": "llvm:i1486"}, "does not know"),
        ({"labels": np.zeros(3, int)}, "labels"),
        ({"labels": np.zeros(48)}, "class indices"),
        ({"data": np.zeros((48, 3, 17, 18))}, r"\(3, 18, 18\)"),
        ({"data": np.full((48, 3, 18, 18), np.nan)}, "NaN"),
        ({"data": np.zeros((2, 3, 18, 18))}, "at least 4"),
    ],
)
def test_bad_options_are_named(small, data, options, message):
    with pytest.raises(tvm_lowrank.LowRankError, match=message):
        tvm_lowrank.plan(small, **{"data": data, **options})
