"""Operators without a kernel of the project's, tuned by MetaSchedule."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from helpers import reference, relative
from tvm import relax

import tvm_lowrank
from tvm_lowrank.cost import metaschedule
from tvm_lowrank.frontend import load_model
from tvm_lowrank.planner import Options, search
from tvm_lowrank.target import host_target


def small_functions():
    """Exponentials of sums: a reduction and an elementwise function, both quick to tune."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((16, 64), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            total = builder.emit(relax.op.sum(x, axis=1))
            out = builder.emit_output(relax.op.exp(total))
        builder.emit_func_output(out)
    return builder.get()


def test_metaschedule_tunes_other_functions_and_goes_on_from_its_database(tmp_path, monkeypatch):
    target = host_target()
    prepared = metaschedule.prepare(small_functions(), target)
    outcome = metaschedule.tune(prepared, target, tmp_path, trials=4)
    assert outcome.functions == 2
    assert outcome.measured > 0 and outcome.failed == 0 and outcome.complaint() == ""
    best = metaschedule.apply(prepared, target, tmp_path)
    assert best.script() != prepared.script()
    x = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    results = []
    for mod in (small_functions(), best):
        machine = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
        results.append(machine["main"](tvm.runtime.tensor(x)).numpy())
    assert relative(results[1], results[0]) < 1e-5
    monkeypatch.setattr("tvm.s_tir.meta_schedule.tune.tune_tasks", lambda **_: None)
    again = metaschedule.tune(prepared, target, tmp_path, trials=4)
    assert again.functions < outcome.functions


def test_metaschedule_that_measured_nothing_says_so():
    assert "measured no candidate for 3 functions" in metaschedule.Outcome(3, 0, 8).complaint()
    assert "2 of 10 MetaSchedule candidates" in metaschedule.Outcome(3, 8, 2).complaint()
    assert metaschedule.Outcome(0, 0, 0).complaint() == ""


def test_a_network_is_built_through_metaschedule_and_says_when_that_failed(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(metaschedule, "tune", lambda *_: metaschedule.Outcome(2, 0, 5))
    options = Options(forms=("dense",), trials=1, metaschedule_trials=4)
    mod = load_model(small)
    with pytest.warns(UserWarning, match="MetaSchedule measured no candidate for 2 functions"):
        search(mod, options=options, records=tmp_path / "records.jsonl", directory=tmp_path)
    x = np.random.default_rng(0).standard_normal((1, 3, 18, 18)).astype(np.float32)
    assert relative(tvm_lowrank.load(tmp_path / "model.so")(x), reference(small, x)) < 1e-5
