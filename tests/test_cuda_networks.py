"""Networks for CUDA without a GPU: lowering, machine code, predicted times, refusals."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tvm
from cuda_support import LOOPS, SM80, SM90, needs_nvcc
from graph_support import Graph
from helpers import operators, reference, relative, run
from tvm_lowrank.passes.lower import lower, survey
from tvm_lowrank.passes.lower_for_cuda import LowerForCuda
from tvm_lowrank.passes.pipeline import factor, normalise
from tvm_lowrank.schedules.cuda.fragments import SIDE
from tvm_lowrank.schedules.kernels import (
    ALGORITHMS,
    REDUCED,
    default_schedule,
    predict,
    schedule_from_json,
    spaces,
)
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

import tvm_lowrank
from tvm_lowrank import tune
from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost.learned import train
from tvm_lowrank.cost.predicting import NO_CARD, PredictingTimer, records_for
from tvm_lowrank.cuda import architectures_in
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.plan import Plan
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import is_measurable, parse_target, target_key

needs_no_gpu = pytest.mark.skipif(tvm.cuda(0).exist, reason="this machine has a GPU")
needs_gpu = pytest.mark.skipif(not tvm.cuda(0).exist, reason="this machine has no GPU")


# The library where only TVM's runtime is installed.
BARE = """
import ctypes, os, pathlib, sys
sys.modules["tvm_lowrank"] = None
os.environ["TVM_USE_RUNTIME_LIB"] = "1"
import numpy as np
import tvm
from tvm.runtime import vm
ctypes.CDLL(str(pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
library, x, y = sys.argv[1:]
machine = vm.VirtualMachine(tvm.runtime.load_module(library), [tvm.cuda(), tvm.cpu()])
np.save(y, machine["main"](tvm.runtime.tensor(np.load(x), tvm.cuda())).numpy())
"""


def choose(workload: ConvWorkload):
    return default_schedule(workload, SM80)


def resnet20() -> Graph:
    """The residual network of 20 layers for 32 x 32 images, with projections as shortcuts."""
    g = Graph(1, 3, 32, 32)
    x, channels = g.op("Relu", g.conv("x", 3, 16)), 16
    for filters in (16, 32, 64):
        for _ in range(3):
            strides = [2, 2] if filters > channels else [1, 1]
            y = g.op("Relu", g.conv(x, channels, filters, strides=strides))
            y = g.conv(y, filters, filters)
            if filters > channels:
                x = g.conv(x, channels, filters, size=1, strides=strides)
            x, channels = g.op("Relu", g.op("Add", y, x)), filters
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    g.out = g.op("MatMul", x, g.constant(np.random.default_rng(1).standard_normal((64, 10))))
    return g


def transformed(mod: tvm.IRModule, target: str) -> Plan:
    """A plan that factors some layers of ResNet-20 whatever that costs."""
    layers, factors = [], {}
    for layer in collect_layers(normalise(mod)):
        assert layer.geometry is not None
        if layer.name not in ("conv3", "conv10", "conv17"):
            layers.append(LayerPlan(layer.name, layer.geometry))
            continue
        form, rank = (FORMS["tucker2"], (16, 16)) if layer.name == "conv17" else (FORMS["cp"], 16)
        weight = layer.weight.astype(np.float64)
        weights = form.fitter(weight, layer.geometry, None).fit(rank)
        factors[layer.name] = (tuple(w.astype(np.float32) for w in weights), layer.bias)
        stages = tuple(form.stages(layer.geometry, rank))
        layers.append(LayerPlan(layer.name, layer.geometry, form.name, rank, stages))
    json_target = json.loads(str(parse_target(target)))
    return Plan(json_target, 1, 0, 1.0, "top1", tuple(layers), factors=factors)


@pytest.mark.parametrize(
    ("spec", "arch"),
    [("cuda:sm_90", "sm_90"), ('{"kind": "cuda", "arch": "sm_86"}', "sm_86")],
)
def test_cuda_targets_name_their_architecture_and_a_host(spec, arch) -> None:
    target = parse_target(spec)
    assert machine_of(target).name == arch and target_key(target) == f"cuda-{arch}"
    assert target.host.kind.name == "llvm"
    assert str(parse_target(json.loads(str(target)))) == str(target)


@needs_no_gpu
def test_without_a_gpu_plain_cuda_means_the_default_architecture() -> None:
    target = parse_target("cuda")
    assert target_key(target) == "cuda-sm_80" and not is_measurable(target)


@pytest.mark.parametrize("spec", ["cuda:sm_20", "cuda:hopper", '{"kind": "cuda", "arch": "90"}'])
def test_unknown_architectures_are_refused(spec) -> None:
    with pytest.raises(LowRankError, match=r"sm_75 or later|cuda:sm_90"):
        parse_target(spec)


def test_an_unlisted_architecture_has_the_figures_of_the_one_before() -> None:
    later = machine_of(parse_target("cuda:sm_120"))
    assert replace(later, name="sm_90") == SM90


def test_epilogues_join_kernels_and_the_network_computes_the_same(small) -> None:
    x = np.random.default_rng(2).standard_normal((1, 3, 18, 18)).astype(np.float32)
    mod = normalise(load_model(small))
    lowered = lower(mod, LOOPS, choose)
    counts = operators(lowered)
    assert counts["lowrank_cuda_direct"] >= 5 and counts["lowrank_cuda_depthwise"] == 1
    assert counts["nn.conv2d"] == counts["nn.relu"] == 0
    steps = [workload.epilogue for workload in survey(mod, SM80, choose)]
    assert steps[0] == ("bias", "relu") and ("bias", "residual", "relu") in steps
    assert ("bias", "relu", "affine") in steps
    assert relative(run(lowered, x), reference(small, x)) < 1e-5


def test_maps_stay_channels_last_between_kernels_that_want_them_so(small) -> None:
    """One turn in, one out at the end; a reader of the other layout in between gets that too."""

    def prefer_last(workload: ConvWorkload):
        found = spaces(workload, SM80, ("tf32",)).get("cuda_tf32", [])
        return next((s for s in found if s.channels_last), choose(workload))

    g = Graph(1, 8, 12, 12)
    x = g.op("Relu", g.conv("x", 8, 16))
    y = g.op("Relu", g.conv(x, 16, 16))
    y = g.op("Relu", g.op("Add", g.conv(y, 16, 16), x))
    g.out = g.conv(y, 16, 24, size=1)
    mod = normalise(load_model(g.model(g.out)))
    lowered = lower(mod, LOOPS, prefer_last)
    # Four products, the input turned, the output turned back; the residual stays as it is.
    assert operators(lowered)["lowrank_cuda_tf"] == 4 + 2
    x = np.random.default_rng(2).standard_normal((1, 8, 12, 12)).astype(np.float32)
    assert relative(run(lowered, x), run(mod, x)) < 2e-3


def test_a_transformed_resnet_computes_the_same_as_loops() -> None:
    graph = resnet20()
    mod = load_model(graph.model(graph.out))
    plan = transformed(mod, "cuda:sm_90")
    factored = factor(normalise(mod), plan.chains())
    x = np.random.default_rng(2).standard_normal((1, 3, 32, 32)).astype(np.float32)
    workloads = survey(factored, SM90, choose)
    stages = sum(len(layer.stages) for layer in plan.rewritten)
    assert len(workloads) == 21 - 3 + stages + 1 and stages > 8
    assert choose(workloads[-1]).kernel == "cuda_dense"
    assert all(w.in_block == 1 for w in workloads)
    assert sum("residual" in w.epilogue for w in workloads) == 9
    result = run(LowerForCuda(LOOPS, choose)(factored), x)
    assert relative(result, run(factored, x)) < 1e-5


@needs_nvcc
@needs_no_gpu
def test_a_transformed_resnet_exports_machine_code_for_the_architecture(tmp_path) -> None:
    graph = resnet20()
    mod = load_model(graph.model(graph.out))
    plan = transformed(mod, "cuda:sm_90")
    executable = compile_module(plan.apply(mod), parse_target(plan.target))
    # One graph has all kernels but the first, which reads the input, and the copy of the result.
    functions = re.split(r"\n(?=@)", "\n" + executable.as_text())
    (main,) = (text for text in functions if text.strip().startswith("@main:"))
    (graph,) = (text for text in functions if "_cuda_graph_capture:" in text)
    assert main.count("run_or_capture") == 1 and main.count("call  lowrank_cuda") == 1
    assert graph.count("call  lowrank_cuda") > 20 and "run_or_capture" not in graph
    path = export(executable, tmp_path / "model.so")
    assert architectures_in(path) == Counter({"sm_90": 1})
    assert b"__global__" not in path.read_bytes(), "the library holds source"


def test_other_bytes_hold_no_machine_code(tmp_path) -> None:
    (tmp_path / "x.so").write_bytes(b"\x50\xed\x55\xba" + bytes(100))
    assert not architectures_in(tmp_path / "x.so")


@needs_no_gpu
def test_without_nvcc_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tune.main(["--target", "cuda:sm_80", "--lossless", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: kernels for sm_80 need nvcc") and "install" in error[-1]


@needs_nvcc
@needs_no_gpu
def test_metaschedule_needs_a_gpu_to_measure_on(tmp_path, capsys) -> None:
    command = ["--target", "cuda:sm_80", "--lossless", "-o", str(tmp_path / "out")]
    assert tune.main([*command, "--metaschedule-trials", "4"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: metaschedule_trials") and "sm_80" in error[-1]


@needs_nvcc
@needs_no_gpu
def test_tune_without_a_gpu_predicts_says_so_and_exports(tmp_path, capsys) -> None:
    """A plan of factors and tensor cores, chosen by predicted times, as machine code."""
    import onnx

    g = Graph(1, 16, 40, 40)
    x = g.op("Relu", g.conv("x", 16, 256, size=1))
    rng = np.random.default_rng(1)
    thin, core = rng.standard_normal((256, 16)), rng.standard_normal((16, 256, 3, 3))
    weight = g.constant(np.einsum("fk,kcxy->fcxy", thin, core) / 200)
    x = g.op("Conv", x, weight, g.constant(rng.standard_normal(256)), pads=[1] * 4)
    x = g.op("Flatten", g.op("GlobalAveragePool", g.op("Relu", x)))
    dense = g.constant(rng.standard_normal((256, 10)))
    g.out = g.op("Gemm", x, dense, g.constant(rng.standard_normal(10)))
    model = onnx.shape_inference.infer_shapes(g.model(g.out))
    onnx.save(model, tmp_path / "net.onnx")
    inputs = rng.standard_normal((20, 16, 40, 40)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs)
    out = tmp_path / "out"
    command = [str(tmp_path / "net.onnx"), "--data", str(tmp_path / "data.npz"), "-o", str(out)]
    command += ["--forms", "dense,tucker2", "--algorithms", "direct,tf32", "--max-drop", "50"]
    assert tune.main([*command, "--target", "cuda:sm_90"]) == 0
    said = capsys.readouterr()
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "cost model" in notes[0] and "not measured" in notes[0]
    assert "without the rounding of tf32 kernels" in said.err
    assert "PREDICTED" in said.out and "medians" not in said.out
    plan = Plan.load(out / "plan.json")
    assert plan.result["predicted"] and plan.result["runs"] == 0
    assert plan.result["samples"] > 0
    (rewritten,) = plan.rewritten
    assert rewritten.form == "tucker2" and "tf32" in rewritten.algorithms
    assert architectures_in(out / "model.so") == Counter({"sm_90": 1})
    assert not (out / "records.jsonl").exists(), "a prediction is no record"


WORKLOADS = [
    ConvWorkload(ConvGeometry(32 * c, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1)), 1, ("bias",))
    for c in range(1, 10)
]


@pytest.mark.parametrize("name", ["tucker2", "cp", "separable", "linear_combination"])
def test_ranks_are_whole_tiles_of_tensor_cores(name) -> None:
    geometry = ConvGeometry(72, 136, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    ranks = list(FORMS[name].ranks(geometry, SM90.lanes))
    assert len(ranks) > 1
    for rank in ranks:
        stages = FORMS[name].stages(geometry, rank)
        assert all(stage.out_channels % SIDE == 0 for stage in stages[:-1]), rank


@needs_no_gpu
def test_imported_times_win_and_scale_the_predictions(tmp_path) -> None:
    path, target = tmp_path / "records.jsonl", parse_target("cuda:sm_80")
    assert records_for(path, target, 2, False).machine == NO_CARD
    measured = TuningRecords(path, "sm_80", 1, machine="NVIDIA A100")
    *known, unknown = WORKLOADS
    for workload in known:
        schedule = choose(workload)
        measured.add(workload.key(), schedule.to_json(), 3 * predict(workload, schedule, SM80))
    before = path.read_bytes()
    records = records_for(path, target, 2, False)
    assert records.machine == "NVIDIA A100"
    timer = PredictingTimer(target, records, algorithms=("direct",))
    for workload in WORKLOADS:
        expected = 3 * predict(workload, choose(workload), SM80)
        assert math.isclose(timer.microseconds(workload), expected, rel_tol=1e-3)
        assert timer.choose(workload) == choose(workload)
    assert path.read_bytes() == before
    # Another family has its own ratio.
    for workload in known:
        schedule = spaces(workload, SM80, ("winograd",))["cuda_winograd"][0]
        us = 5 * predict(workload, schedule, SM80)
        measured.add(workload.key(), schedule.to_json(), us)
    timer = PredictingTimer(target, records_for(path, target, 2, False), algorithms=("winograd",))
    (first, *_) = spaces(unknown, SM80, ("winograd",))["cuda_winograd"]
    expected = 5 * predict(unknown, first, SM80)
    assert math.isclose(timer.time(unknown, first), expected, rel_tol=1e-3)
    fresh = TuningRecords(None, "sm_80", 1, machine=NO_CARD)
    fresh = PredictingTimer(target, fresh, algorithms=("direct",))
    assert fresh.microseconds(unknown) == predict(unknown, choose(unknown), SM80)


def test_what_one_timer_predicts_hides_nothing_from_another() -> None:
    """As a search has them: one of direct kernels alone, one of all, on the same records."""
    target = parse_target("cuda:sm_80")
    records = TuningRecords(None, "sm_80", 1, machine=NO_CARD)
    plain = PredictingTimer(target, records, algorithms=("direct",))
    timer = PredictingTimer(target, records)
    large = ConvWorkload(ConvGeometry(256, 256, 56, 56, (3, 3), padding=(1, 1, 1, 1), batch=32), 1)
    direct = plain.microseconds(large)
    assert timer.microseconds(large) < direct
    assert timer.choose(large).kernel == "cuda_winograd"
    assert plain.microseconds(large) == direct and plain.choose(large).kernel == "cuda_direct"


@needs_no_gpu
def test_shipped_times_price_the_layers_that_they_are_of(tmp_path) -> None:
    """Of the card that was measured, without any file of one's own; imported times come before."""
    target = parse_target("cuda:sm_90")
    records = records_for(None, target, 2, True)
    shipped = [(key, s, us) for key, place, s, us in records.rows() if place[2]]
    assert len(shipped) > 500 and records.machine in {place[0] for place in records.places()}
    timer = PredictingTimer(target, records)
    for key, schedule, us in shipped[::97]:
        workload = ConvWorkload.from_json(json.loads(key))
        assert timer.time(workload, schedule_from_json(schedule)) == us
    own = tmp_path / "records.jsonl"
    TuningRecords(own, "sm_90", 1, machine="another card").add("{}", {"kernel": "x"}, 1.0)
    assert records_for(own, target, 2, True).machine == "another card"


def test_trained_trees_predict_what_the_families_models_get_wrong(tmp_path) -> None:
    """On made-up times: of the card, twice what is predicted; for some TF32 tiles, four times."""
    target = parse_target("cuda:sm_80")
    path = tmp_path / "records.jsonl"
    measured = TuningRecords(path, "sm_80", 1, machine="NVIDIA A100")
    every = (*ALGORITHMS, *REDUCED)

    def truth(workload: ConvWorkload, schedule) -> float:
        slow = schedule.kernel == "cuda_tf32" and schedule.warps_n == 1
        return (4.0 if slow else 2.0) * predict(workload, schedule, SM80)

    for workload in WORKLOADS:
        for space in spaces(workload, SM80, every).values():
            for schedule in space:
                measured.add(workload.key(), schedule.to_json(), truth(workload, schedule))
    records = records_for(path, target, 2, False)
    trees = train(records, SM80)
    assert {"cuda_tf32", "cuda_tensor", "cuda_direct"} <= set(trees.families)
    timer = PredictingTimer(target, records, algorithms=("tf32",), trees=trees)
    # A shape between those that it has seen.
    unknown = ConvWorkload(ConvGeometry(64, 64, 20, 20, (3, 3), padding=(1, 1, 1, 1)), 1)
    found = timer.microseconds(unknown)
    space = spaces(unknown, SM80, ("tf32",))["cuda_tf32"]
    assert space[0].warps_n == 1 and timer.choose(unknown).warps_n > 1
    least = min(truth(unknown, schedule) for schedule in space)
    assert abs(found / least - 1) < 0.05
    assert truth(unknown, timer.choose(unknown)) < 1.05 * least


@needs_nvcc
@needs_gpu
def test_a_network_on_the_gpu_equals_onnx_runtime(small, tmp_path) -> None:
    target = parse_target("cuda")
    machine = machine_of(target)
    mod = lower(normalise(load_model(small)), machine, lambda w: default_schedule(w, machine))
    export(compile_module(mod, target), tmp_path / "model.so")
    x = np.random.default_rng(2).standard_normal((1, 3, 18, 18)).astype(np.float32)
    built = tvm_lowrank.load(tmp_path / "model.so")
    for _ in range(3):  # captured, then replayed
        assert relative(built(x), reference(small, x)) < 1e-4
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", BARE, *(str(tmp_path / n) for n in ("model.so", "x.npy", "y"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert relative(np.load(tmp_path / "y.npy"), reference(small, x)) < 1e-4
