"""Kernels of bfloat16 in searches: where they are asked for, priced, judged, and left out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tvm
from cost_support import LAYERS, ROOFLINE, invented
from helpers import RACE, factored_plan, reference, relative, win
from helpers import run as run_network
from test_x86_chain import inverted_residual
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86 import bfloat16_schedule, fused_space
from tvm_lowrank.schedules.x86.bfloat16_schedule import Bfloat16Schedule
from tvm_lowrank.schedules.x86.isa import AVX2, AVX512, AVX512_BF16
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import (
    BF16,
    bfloat16_isa,
)

from tvm_lowrank import LowRankError, Plan, load
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.learned import LearnedModel, renew
from tvm_lowrank.cost.model import AnalyticModel
from tvm_lowrank.cost.trees import find, signature
from tvm_lowrank.cost.usable import Usable
from tvm_lowrank.data import Samples
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.planner.options import Options
from tvm_lowrank.planner.search import search
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target, require_kernels

LAYER = ConvGeometry(64, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1))


def test_it_is_among_the_kernels_only_where_it_is_asked_for():
    workload = ConvWorkload(LAYER, 16)
    assert "bfloat16" not in spaces(workload, AVX512_BF16)
    assert list(spaces(workload, AVX512_BF16, ("bfloat16",))) == ["bfloat16"]
    assert "bfloat16" not in spaces(workload, AVX512_BF16, ("bfloat16", "direct"), exact=True)
    assert not spaces(workload, AVX512, ("bfloat16",))


def test_targets_without_it_say_so():
    require_kernels(parse_target(f"llvm:{BF16}"), ("direct", "bfloat16"))
    require_kernels(parse_target("llvm:haswell"), ("direct", "winograd", "fft"))
    for name in ("haswell", "skylake-avx512"):
        with pytest.raises(LowRankError, match=f"bfloat16 has no kernel for llvm-{name}.*512-BF16"):
            require_kernels(parse_target(f"llvm:{name}"), ("direct", "bfloat16"))
    with pytest.raises(LowRankError, match="no kernel for"):
        require_kernels(parse_target("llvm:haswell"), ("tf32",))


def test_one_cost_model_serves_both_kinds_of_avx512():
    assert signature(AVX512) == signature(AVX512_BF16)
    assert "chunk" in signature(AVX512)["bfloat16"]
    assert "bfloat16" not in signature(AVX2)


def test_a_model_without_kernels_that_round_fits_and_counts_those(tmp_path):
    records = TuningRecords(None, "avx512", 2)
    for layer in LAYERS:
        for space in spaces(layer, AVX512_BF16).values():
            for schedule in space:
                data = schedule.to_json()
                records.add(layer.key(), data, invented(layer.key(), data))
    trees = renew(records, AVX512_BF16, tmp_path, 0, None)
    assert not {"bfloat16", "bfloat16_dense"} & {*trees.families}
    found, complaint = find(tmp_path, AVX512_BF16)
    assert complaint == "" and found.families == trees.families
    analytic = AnalyticModel(ROOFLINE, AVX512_BF16, 2)
    pairs = [Bfloat16Schedule(7, 2).to_json()]
    times = LearnedModel(found, analytic).predict(LAYERS[4], pairs)
    assert times == pytest.approx(analytic.predict(LAYERS[4], pairs) * np.exp(found.offsets[""]))


def test_effort_counts_pairs_and_the_copy():
    workload = ConvWorkload(LAYER, 16)
    whole = bfloat16_schedule.effort(workload, Bfloat16Schedule(7, 4), AVX512_BF16)
    parts = bfloat16_schedule.effort(workload, Bfloat16Schedule(7, 4, "rows", 2), AVX512_BF16)
    assert whole.multiplications == LAYER.multiplications / 2 == parts.multiplications
    assert whole.weight_bytes == 2 * LAYER.weight_count
    assert whole.exchange_bytes == 4 * 32 * 16 * 16 and parts.exchange_bytes == 0
    assert parts.tasks == 7 and parts.transforms / whole.transforms == pytest.approx(7 * 4 / 16)


def test_a_roofline_counts_two_products_in_the_place_of_one():
    machine, plain = Roofline(1.0, 1e6), {"direct": 1.0}
    direct = machine.microseconds([LAYER], 16, plain)
    both = machine.microseconds([LAYER], 16, {**plain, "bfloat16": 1.0})
    assert direct / both == pytest.approx(2.0, rel=0.01)
    depthwise = replace(LAYER, groups=64)
    assert machine.microseconds([depthwise], 16, {**plain, "bfloat16": 1.0}) == (
        machine.microseconds([depthwise], 16, plain)
    )


def test_records_that_never_tried_it_do_not_cover_a_convolution(tmp_path):
    workload = ConvWorkload(LAYER, 16, ("bias", "relu"))
    direct = spaces(workload, AVX512_BF16, ("direct",))["direct"][0].to_json()
    pairs = bfloat16_schedule.space(workload, AVX512_BF16)[0].to_json()

    def usable(algorithms):
        mine = TuningRecords(tmp_path / "records.jsonl", "avx512", 2, machine="mine")
        return Usable(AVX512_BF16, mine, algorithms, exact=False)

    theirs = TuningRecords(tmp_path / "records.jsonl", "avx512", 2, machine="theirs")
    theirs.add(workload.key(), direct, 10.0)
    plain, both = ("direct",), ("direct", "bfloat16")
    assert usable(plain).elsewhere(workload).kernel == "direct" and usable(plain).is_complete(
        workload
    )
    assert usable(both).elsewhere(workload) is None and not usable(both).is_complete(workload)
    theirs.add(workload.key(), pairs, 6.0)
    assert usable(both).elsewhere(workload).kernel == "bfloat16" and usable(both).is_complete(
        workload
    )
    assert usable(plain).elsewhere(workload).kernel == "direct"


@pytest.fixture(scope="module")
def planned(small, tmp_path_factory):
    """A network whose convolutions on blocks of channels all are of bfloat16, and its folder."""
    bfloat16_isa()
    folder = tmp_path_factory.mktemp("bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RACE, win())
        return folder, lossless(small, folder, "top1", 100.0)


def lossless(model, folder, metric, max_drop, **options):
    rng = np.random.default_rng(0)
    data = Samples(rng.standard_normal((96, 3, 18, 18)).astype("f4"), rng.integers(0, 10, 96))
    options = Options(
        max_drop, ("dense",), ("bfloat16",), threads=1, trials=1, metric=metric, **options
    )  # fmt: skip
    records = folder / "records.jsonl"
    return search(load_model(model), None, data, None, options, records, folder)


def test_a_network_of_it_is_planned_built_and_judged(planned, small):
    folder, plan = planned
    used = {layer.name: layer.algorithms for layer in plan.layers if layer.geometry is not None}
    assert used["conv0"] == ("direct",) == used["conv4"]  # NCHW; depthwise
    assert all(used[name] == ("bfloat16",) for name in ("conv1", "conv2", "conv3", "conv5"))
    x = np.random.default_rng(1).standard_normal((1, 3, 18, 18)).astype("f4")
    outputs = load(folder / "model.so")(x)
    assert 1e-5 < relative(outputs, reference(small, x)) < 1e-2
    assert 1e-5 < plan.result["output_error"] < 1e-2


def test_tvm_builds_the_plan_to_the_same_library(planned, small, tmp_path):
    folder, plan = planned
    plan.save(tmp_path / "plan.json")
    mod = Plan.load(tmp_path / "plan.json").apply(load_model(small))
    x = np.random.default_rng(1).standard_normal((1, 3, 18, 18)).astype("f4")
    assert np.array_equal(
        run_network(mod, x, target=tvm.target.Target(plan.target)), load(folder / "model.so")(x)
    )


def test_the_library_runs_without_the_package(planned, tmp_path):
    folder, _ = planned
    x = np.random.default_rng(1).standard_normal((1, 3, 18, 18)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    program = (
        "import sys, numpy as np, tvm; from tvm import relax\n"
        f"library = tvm.runtime.load_module({str(folder / 'model.so')!r})\n"
        "vm = relax.VirtualMachine(library, tvm.cpu())\n"
        "y = vm['main'](tvm.runtime.tensor(np.load('x.npy')))\n"
        "assert not any(n.split('.')[0] == 'tvm_lowrank' for n in sys.modules)\n"
        "np.save('y.npy', (y if hasattr(y, 'numpy') else y[0]).numpy())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), load(folder / "model.so")(x))


def test_another_avx512_keeps_the_schedules_that_it_can_run(planned):
    _, plan = planned
    there = plan.for_target("llvm:skylake-avx512")
    families = {schedule["kernel"] for _, schedule in plan.schedules}
    assert families == {"bfloat16", "direct", "depthwise"}
    assert {schedule["kernel"] for _, schedule in there.schedules} == families - {"bfloat16"}
    assert plan.for_target(f"llvm:{BF16}").schedules == plan.schedules


def test_plans_know_of_stages_that_round_in_kernels_of_several(small):
    workload = inverted_residual(16)
    rounds = fused_space.fused_space(workload.last(2), AVX512_BF16, bfloat16=True)[0]
    plain = fused_space.fused_space(workload.last(2), AVX512_BF16)[0]
    made = replace(factored_plan(small), schedules=()).for_target(f"llvm:{BF16}")
    for schedule, algorithms in ((rounds, ["direct", "bfloat16"]), (plain, ["direct", "direct"])):
        plan = replace(made, fused=((workload.to_json(), schedule.to_json()),))
        geometries = [stage.geometry for stage in workload.stages[1:]]
        assert plan.fused_algorithms() == dict(zip(geometries, algorithms, strict=True))
        assert plan.rounding() == [name for name in algorithms if name == "bfloat16"]
        assert plan.for_target(f"llvm:{BF16}").fused == plan.fused
        there = plan.for_target("llvm:skylake-avx512").fused
        assert there == (() if schedule is rounds else plan.fused)


def test_rounding_that_costs_more_than_the_budget_is_left_out_with_its_reason(small, tmp_path):
    bfloat16_isa()
    with pytest.warns(UserWarning, match="rounding of bfloat16 kernels alone; leave them out"):
        plan = lossless(small, tmp_path, "output_error", 1e-4)
    assert "by the rounding of bfloat16" in plan.reason and not plan.transformed
    assert "bfloat16" not in {name for layer in plan.layers for name in layer.algorithms}
    assert plan.result["drop"] <= 1e-4
