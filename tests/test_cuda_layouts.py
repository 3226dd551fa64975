"""Networks whose kernels work with channels last: which layout wins, and what becomes of maps."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tvm
from cuda_emulator import COMPILER, EmulatedPrograms
from cuda_support import LOOPS, SM90, run_on_host, run_program
from tvm import relax
from tvm_lowrank.passes.lower import survey
from tvm_lowrank.passes.lower_for_cuda import LowerForCuda, calls_of
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda import pooling, turn
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.pooling import PoolWorkload
from x86_support import relative_error

from tvm_lowrank.build import compile_module
from tvm_lowrank.cost import layouts
from tvm_lowrank.cost.predicting import PredictingTimer
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

# Of the reference kernels, whose sums are float32 in another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def network() -> tvm.IRModule:
    """Two convolutions, pooling, a block with a residual, and a mean: of 3, 16 and 24 channels."""
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 16, 16), "float32"))

    def conv(value, inputs, outputs, size, stride=1):
        weight = rng.standard_normal((outputs, inputs, size, size)).astype("float32")
        weight /= math.sqrt(inputs * size * size)
        padding = [size // 2] * 4
        made = builder.emit(
            relax.op.nn.conv2d(value, relax.const(weight), [stride, stride], padding)
        )
        bias = relax.const(rng.standard_normal((1, outputs, 1, 1)).astype("float32"))
        return builder.emit(relax.op.add(made, bias))

    def relu(value):
        return builder.emit(relax.op.nn.relu(value))

    with builder.function("main", [x]):
        with builder.dataflow():
            first = relu(conv(x, 3, 16, 3))
            pooled = builder.emit(relax.op.nn.max_pool2d(first, [3, 3], [2, 2], padding=[1, 1]))
            inner = relu(conv(pooled, 16, 24, 1))
            outer = conv(inner, 24, 16, 3)
            added = relu(builder.emit(relax.op.add(outer, pooled)))
            result = builder.emit_output(relax.op.mean(added, [2, 3]))
        builder.emit_func_output(result)
    return builder.get()


def _last(workload) -> object:
    """The first schedule of the kernel with float16 maps."""
    return kernels.spaces(workload, SM90, ("half",))["cuda_last_half"][0]


def _run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    """The output of a network on this machine's processor."""
    library = compile_module(mod, tvm.target.Target("llvm"))
    machine = relax.VirtualMachine(library.jit(), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def _functions(mod: tvm.IRModule) -> list[str]:
    """The names of the kernels that ``main`` calls, in order."""
    names = []
    for binding in mod["main"].body.blocks[0].bindings:
        if getattr(binding.value, "op", None) == tvm.ir.Op.get("relax.call_tir"):
            names.append(binding.value.args[0].name_hint)
    return names


def test_between_kernels_with_channels_last_no_map_is_turned(network) -> None:
    """Three convolutions and the pooling: only the input is turned, and the last result back."""
    lowered = LowerForCuda(LOOPS, _last)(network)
    kinds = []
    for name in _functions(lowered):
        shapes = [tuple(int(e) for e in p.shape) for p in lowered[name].params]
        dtypes = [str(p.dtype) for p in lowered[name].params]
        kinds.append((shapes[-1], dtypes[-1]))
    half = [(shape, dtype) for shape, dtype in kinds if dtype == "float16"]
    assert half == [
        ((2, 16, 16, 8), "float16"),  # the input, with whole eights of channels
        ((2, 16, 16, 16), "float16"),
        ((2, 8, 8, 16), "float16"),  # pooled
        ((2, 8, 8, 24), "float16"),
        ((2, 8, 8, 16), "float16"),
    ]
    assert next(shape for shape, dtype in kinds if dtype == "float32") == (2, 16, 8, 8)


def test_a_network_with_channels_last_computes_the_same(network) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype("float32")
    error = relative_error(_run(LowerForCuda(LOOPS, _last)(network), x), _run(network, x))
    assert TOLERANCE < error < 2e-3


@pytest.mark.skipif(not tvm.cuda(0).exist, reason="this machine has no GPU")
def test_a_network_with_channels_last_on_the_gpu_computes_the_same(network) -> None:
    target = parse_target("cuda")
    machine = machine_of(target)
    if "cuda_last_half" not in kernels.families_of(machine) or machine.name != SM90.name:
        pytest.skip(f"{machine.name} has no warpgroups")
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype("float32")
    expected = _run(network, x)
    library = compile_module(LowerForCuda(machine, _last)(network), target)
    executed = relax.VirtualMachine(library.jit(), tvm.cuda())
    result = executed["main"](tvm.runtime.tensor(x, tvm.cuda())).numpy()
    assert relative_error(result, expected) < 2e-3


@pytest.mark.skipif(not tvm.cuda(0).exist, reason="this machine has no GPU")
def test_pooling_on_the_gpu_is_exact() -> None:
    target = parse_target("cuda")
    for workload in POOLS:
        for kind in KINDS:
            x, expected = _pool_case(workload, kind)
            program = pooling.emit(workload, kind, machine_of(target))
            result = run_program(program, {"x": x}, target, tvm.cuda())
            np.testing.assert_array_equal(result, expected)


def test_calls_tell_who_reads_a_map(network) -> None:
    def direct(workload):
        return kernels.default_schedule(workload, SM90)

    calls = calls_of(network, SM90, direct)
    assert [call.workload is None for call in calls] == [False, True, False, False]
    first, pooled, inner, outer = calls
    assert pooled.reads == (first.writes,) and inner.reads == (pooled.writes,)
    assert outer.reads == (inner.writes, pooled.writes)
    assert [call.read_elsewhere for call in calls] == [False, False, False, True]
    assert first.writes.shape == (2, 16, 16, 16) and pooled.writes.shape == (2, 16, 8, 8)
    workloads = [call.workload for call in calls if call.workload is not None]
    assert workloads == survey(network, SM90, direct)


def _timer(network, turning: float, alone: float) -> PredictingTimer:
    """A timer with records of 10 us for NCHW kernels, and of others with and without turning."""
    records = TuningRecords(None, SM90.name, 1, machine="a card")
    target = parse_target("cuda:sm_90")

    def direct(workload):
        return kernels.default_schedule(workload, SM90)

    for workload in survey(network, SM90, direct):
        spaces = kernels.spaces(workload, SM90, ("direct", "half"))
        records.add(workload.key(), spaces["cuda_direct"][0].to_json(), 10.0)
        data = spaces["cuda_last_half"][0].to_json()
        records.add(workload.key(), data, alone + turning, alone=alone)
    return PredictingTimer(target, records, algorithms=("direct", "half"))


@pytest.mark.parametrize(
    ("turning", "alone", "last"), [(6.0, 5.0, True), (6.0, 9.5, False), (40.0, 1.0, False)]
)
def test_the_layout_is_the_one_that_the_network_takes_least_time_with(
    network, turning, alone, last
) -> None:
    """Each kernel on its own is faster in NCHW; what is turned in the network decides."""
    timer = _timer(network, turning, alone)
    workloads = survey(network, SM90, timer.choose)
    chosen = {workload: timer.choose(workload) for workload in workloads}
    assert {schedule.kernel for schedule in chosen.values()} == {"cuda_direct"}
    settled = layouts.settle(network, timer, chosen)
    names = {schedule.kernel for schedule in settled.values()}
    assert names == ({"cuda_last_half"} if last else {"cuda_direct"})
    before = layouts.total(network, timer, chosen.__getitem__)
    after = layouts.total(network, timer, settled.__getitem__)
    assert before == pytest.approx(30.0)
    if last:
        # What is turned: the network's input, and the result that the mean reads.
        assert 3 * alone < after < before
    else:
        assert after == before


def test_times_without_turning_are_kept_with_records(tmp_path) -> None:
    path = tmp_path / "records.jsonl"
    records = TuningRecords(path, SM90.name, 1, machine="a card")
    records.add("w", {"kernel": "k"}, 12.0, alone=7.0004)
    records.add("w", {"kernel": "j"}, 12.0)
    assert json.loads(path.read_text().splitlines()[0])["alone"] == 7.0
    again = TuningRecords(path, SM90.name, 1, machine="a card")
    assert again.alone("w", {"kernel": "k"}) == 7.0
    assert again.alone("w", {"kernel": "j"}) is None


POOLS = [
    PoolWorkload("max", 2, 16, 9, 11, (3, 3), (2, 2), (1, 1, 1, 1)),
    PoolWorkload("max", 1, 24, 8, 8, (2, 3), (1, 2), (0, 1, 0, 1), (2, 1)),
]


def _pool_case(workload: PoolWorkload, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A map whose values are of the kind, and the float64 result."""
    w = workload
    rng = np.random.default_rng(0)
    x = rng.standard_normal((w.batch, w.channels, w.height, w.width)).astype("float16")
    padded = np.full((*x.shape[:2], w.height + 20, w.width + 20), -np.inf)
    padded[:, :, 10 : 10 + w.height, 10 : 10 + w.width] = x
    rows = np.arange(w.out_height) * w.stride[0] - w.padding[0] + 10
    columns = np.arange(w.out_width) * w.stride[1] - w.padding[1] + 10
    taps = [
        padded[:, :, rows + u * w.dilation[0]][:, :, :, columns + v * w.dilation[1]]
        for u in range(w.kernel[0])
        for v in range(w.kernel[1])
    ]
    return x.astype("float32"), np.max(taps, axis=0)


KINDS = (turn.PLAIN, turn.TF32, turn.HALF)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", POOLS)
def test_pooling_with_channels_last_is_exact(workload, kind) -> None:
    x, expected = _pool_case(workload, kind)
    program = pooling.emit(workload, kind, LOOPS)
    np.testing.assert_array_equal(run_on_host(program, {"x": x}), expected)


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not on the PATH")
def test_pooling_as_threads_is_exact(tmp_path) -> None:
    cases = [(workload, kind) for workload in POOLS for kind in KINDS]
    programs = [pooling.emit(workload, kind, SM90) for workload, kind in cases]
    emulated = EmulatedPrograms(programs, SM90.name, tmp_path)
    for (workload, kind), program in zip(cases, programs, strict=True):
        x, expected = _pool_case(workload, kind)
        np.testing.assert_array_equal(emulated.run(program, {"x": x}), expected)


def test_pooling_that_has_no_kernel_is_refused() -> None:
    assert pooling.refuse(replace(POOLS[0], kind="avg")) is not None
    with pytest.raises(ValueError, match="read by 8"):
        pooling.emit(replace(POOLS[0], channels=12), turn.HALF, SM90)
