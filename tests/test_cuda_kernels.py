"""CUDA kernels: their numbers as loops on a processor, and what nvcc makes of them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import tvm
from cuda_emulator import COMPILER, EmulatedPrograms
from cuda_support import (
    HOPPER,
    LOOPS,
    SM80,
    SM90,
    Case,
    launch_of,
    needs_nvcc,
    resources_of,
    run_on_host,
    run_program,
    source_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda import model
from tvm_lowrank.schedules.cuda.arch import (
    MOST_BLOCKS_X,
    MOST_BLOCKS_YZ,
    MOST_THREADS,
    REGISTERS_A_THREAD,
    STATIC_SHARED_BYTES,
)
from tvm_lowrank.schedules.cuda.channels_last import LastHalfSchedule, LastTF32Schedule
from tvm_lowrank.schedules.cuda.dense import DenseSchedule
from tvm_lowrank.schedules.cuda.depthwise import DepthwiseSchedule
from tvm_lowrank.schedules.cuda.direct import DirectSchedule
from tvm_lowrank.schedules.cuda.fft import FFTSchedule
from tvm_lowrank.schedules.cuda.kernels import FAMILIES as CUDA_FAMILIES
from tvm_lowrank.schedules.cuda.straight import copy_program
from tvm_lowrank.schedules.cuda.tensor import TensorSchedule
from tvm_lowrank.schedules.cuda.tf32 import TF32Schedule
from tvm_lowrank.schedules.cuda.warpgroup import WarpgroupHalfSchedule, WarpgroupTF32Schedule
from tvm_lowrank.schedules.cuda.winograd import WinogradSchedule
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import relative_error

from tvm_lowrank.cost import device
from tvm_lowrank.cost.timing import time_program
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.target import parse_target

TOLERANCE = 2e-5

SAME3 = ConvGeometry(16, 32, 12, 12, (3, 3), padding=(1, 1, 1, 1))
ODD = ConvGeometry(3, 21, 13, 11, (5, 3), stride=(2, 1), padding=(2, 0, 1, 1), batch=2)
POINTWISE = ConvGeometry(32, 48, 14, 14, (1, 1), batch=2)
GROUPED = ConvGeometry(24, 36, 9, 10, (3, 3), padding=(1, 1, 1, 1), dilation=(2, 1), groups=4)
DEPTHWISE = ConvGeometry(20, 40, 15, 13, (5, 3), (2, 1), (1, 0, 1, 2), (1, 2), groups=20, batch=2)
WIDE = ConvGeometry(12, 130, 7, 6, (3, 3), padding=(1, 1, 1, 1))
UNEVEN = ConvGeometry(20, 24, 13, 11, (3, 3), padding=(1, 0, 1, 2), batch=2)
LARGE = ConvGeometry(6, 12, 20, 17, (5, 7), padding=(2, 3, 2, 3))
ROW = ConvGeometry(20, 24, 13, 11, (1, 5), padding=(0, 2, 0, 2), batch=2)
BY_EIGHTS = ConvGeometry(64, 248, 9, 10, (3, 3), padding=(1, 1, 1, 1))
STRIDED = ConvGeometry(24, 40, 13, 11, (3, 5), (2, 1), (1, 0, 1, 2), batch=2)
GROUPS_OF_EIGHT = ConvGeometry(32, 64, 9, 10, (3, 3), (1, 1), (1, 1, 1, 1), (2, 1), groups=4)
# Of more tiles than blocks that stay, not of as many in each.
LARGER = ConvGeometry(64, 96, 88, 96, (1, 1), batch=2)
SPLIT = ConvGeometry(3, 32, 14, 18, (7, 5), (2, 2), (3, 2, 3, 2), batch=2)
FEW = ConvGeometry(11, 32, 9, 8, (3, 2), (2, 2), (1, 0, 1, 1), batch=2)
DENSE = ConvGeometry(100, 33, 1, 1, (1, 1), batch=3)
FLATTENED = ConvGeometry(6, 20, 5, 7, (5, 7), batch=2)
LARGE_DEPTHWISE = ConvGeometry(8, 8, 12, 12, (9, 9), padding=(4, 4, 4, 4), groups=8)
ACTIVATIONS = ("leaky_relu:0.1", "sigmoid", "tanh", "silu", "hard_sigmoid", "hard_swish", "gelu")

CASES = [
    (SAME3, DirectSchedule(32, 64, 8, 4, 4), ("bias", "relu")),
    (SAME3, DirectSchedule(64, 64, 8, 8, 8, pipeline=False), ()),
    (ODD, DirectSchedule(32, 32, 8, 4, 4), ("bias", "residual", "clip:0:6")),
    (ODD, DirectSchedule(16, 64, 16, 2, 4, split_k=2), ("bias", "residual", "relu")),
    (POINTWISE, DirectSchedule(16, 32, 8, 4, 4), ("bias", "affine", "residual")),
    (POINTWISE, DirectSchedule(64, 128, 8, 8, 8, split_k=2), ("affine",)),
    (GROUPED, DirectSchedule(16, 64, 8, 2, 4, pipeline=False), ("bias", *ACTIVATIONS)),
    (SAME3, WinogradSchedule(32, 64, 8, 4, 4, outputs=(2, 2)), ("bias", "relu")),
    (UNEVEN, WinogradSchedule(32, 32, 8, 4, 4, outputs=(4, 4)), ("bias", "residual", "relu")),
    (UNEVEN, WinogradSchedule(16, 32, 8, 2, 4, outputs=(6, 6)), ("affine", "silu")),
    (ROW, WinogradSchedule(32, 32, 8, 4, 4, outputs=(1, 4)), ("bias",)),
    (LARGE, FFTSchedule(32, 32, 8, 4, 4, tile=8), ("bias",)),
    (UNEVEN, FFTSchedule(32, 32, 8, 4, 4, tile=16), ("bias", "residual", "relu")),
    (SAME3, TensorSchedule(32, 32, 16, 1, 2), ("bias", "relu")),
    (UNEVEN, TensorSchedule(32, 64, 32, 2, 2), ("bias", "residual", "relu")),
    (POINTWISE, TensorSchedule(64, 32, 32, 2, 1), ("affine",)),
    (GROUPED, TensorSchedule(32, 32, 16, 1, 1), ()),
    (SAME3, TF32Schedule(32, 32, 16, 2, 1), ("bias", "relu")),
    (UNEVEN, TF32Schedule(32, 64, 8, 2, 2, pipeline=False), ("bias", "residual", "relu")),
    (UNEVEN, TF32Schedule(32, 32, 16, 1, 2, split_k=4), ("bias", "residual")),
    (POINTWISE, TF32Schedule(64, 32, 32, 2, 2), ("affine",)),
    (GROUPED, TF32Schedule(32, 32, 16, 1, 1), ()),
    (WIDE, TF32Schedule(128, 128, 16, 2, 2, pipeline=False), ("bias", "residual")),
    (SAME3, TF32Schedule(32, 32, 16, 2, 1, channels_last=True), ("bias", "relu")),
    (UNEVEN, TF32Schedule(32, 64, 8, 2, 2, True, False), ("bias", "residual")),
    (POINTWISE, TF32Schedule(64, 32, 32, 2, 2, channels_last=True), ("affine",)),
    (SAME3, TensorSchedule(32, 32, 32, 1, 2, True), ("bias", "relu")),
    (UNEVEN, TensorSchedule(32, 64, 32, 2, 2, True), ("bias", "residual", "relu")),
    (POINTWISE, TensorSchedule(64, 32, 32, 2, 1, True), ("affine", "residual")),
    (SAME3, DirectSchedule(32, 64, 8, 4, 4, channels_last=True), ("bias", "relu")),
    (UNEVEN, DirectSchedule(64, 32, 16, 8, 4, False, channels_last=True), ("bias", "residual")),
    (POINTWISE, DirectSchedule(16, 64, 8, 2, 4, channels_last=True), ("affine", "residual")),
    (SAME3, WarpgroupTF32Schedule(32, 128, 16, 2, 3), ("bias", "relu")),
    (WIDE, WarpgroupTF32Schedule(144, 64, 16, 1, 4), ("bias", "residual")),
    (UNEVEN, WarpgroupTF32Schedule(16, 128, 32, 1, 5, split_k=2), ("bias", "residual", "relu")),
    (POINTWISE, WarpgroupTF32Schedule(48, 256, 16, 2, 2, copying=8), ("affine", "residual")),
    (GROUPED, WarpgroupTF32Schedule(16, 64, 16, 1, 3), ()),
    (WIDE, WarpgroupTF32Schedule(128, 256, 16, 2, 3), ("bias",)),
    (SAME3, WarpgroupHalfSchedule(32, 128, 32, 2, 3, copying=8), ("bias", "relu")),
    (WIDE, WarpgroupHalfSchedule(256, 64, 32, 1, 3), ("bias", "residual")),
    (UNEVEN, WarpgroupHalfSchedule(16, 128, 64, 1, 2, split_k=2), ("bias", "residual", "relu")),
    (POINTWISE, WarpgroupHalfSchedule(48, 256, 32, 2, 4), ("affine", "residual")),
    (BY_EIGHTS, LastHalfSchedule(32, 64, 64, 1, 3), ("bias", "relu")),
    (STRIDED, LastHalfSchedule(64, 128, 32, 2, 3), ("bias", "residual", "relu")),
    (POINTWISE, LastHalfSchedule(64, 128, 32, 1, 2, copying=8), ("affine", "residual")),
    (GROUPS_OF_EIGHT, LastHalfSchedule(32, 64, 16, 1, 3), ("residual", "silu")),
    (BY_EIGHTS, LastTF32Schedule(256, 128, 32, 1, 3), ("bias", "relu")),
    (STRIDED, LastTF32Schedule(64, 128, 16, 2, 3), ("bias", "residual", "relu")),
    (POINTWISE, LastTF32Schedule(64, 128, 16, 1, 2, copying=8), ("affine",)),
    (GROUPS_OF_EIGHT, LastTF32Schedule(32, 64, 8, 1, 4), ()),
    (LARGER, LastHalfSchedule(32, 64, 64, 1, 2, stays=True), ("bias", "residual")),
    (LARGER, LastTF32Schedule(32, 64, 32, 1, 3, stays=True), ("bias", "relu")),
    (SPLIT, LastHalfSchedule(32, 128, 64, 1, 3), ("bias", "relu")),
    (replace(SPLIT, padding=(2, 1, 1, 3)), LastTF32Schedule(32, 128, 16, 1, 3), ("bias",)),
    (FEW, LastHalfSchedule(32, 128, 32, 1, 3), ("residual",)),
    (FEW, LastTF32Schedule(64, 64, 16, 1, 2), ("bias", "relu")),
    (DENSE, DenseSchedule(4, 2), ("bias", "affine", "relu")),
    (FLATTENED, DenseSchedule(2, 1), ("bias", "residual")),
    (DEPTHWISE, DepthwiseSchedule(64, 2), ("bias", "affine", "relu")),
    (DEPTHWISE, DepthwiseSchedule(32, 4), ()),
    (LARGE_DEPTHWISE, DepthwiseSchedule(128, 4), ("bias", "residual")),
    (DEPTHWISE, DepthwiseSchedule(64, 4, True), ("bias", "affine", "relu")),
    (LARGE_DEPTHWISE, DepthwiseSchedule(128, 2, True), ("bias", "residual")),
]


@pytest.mark.parametrize(("geometry", "schedule", "steps"), CASES)
def test_kernels_as_loops_compute_the_convolution(geometry, schedule, steps) -> None:
    case = Case(ConvWorkload(geometry, 1, steps), schedule)
    error = relative_error(run_on_host(case.program, case.inputs), case.expected)
    assert error < max(TOLERANCE, kernels.error_bound(case.workload, schedule))


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not on the PATH")
def test_kernels_as_threads_compute_the_convolution(tmp_path) -> None:
    """The very CUDA source, its barriers, shared memory and tensor cores included, emulated."""
    cases = [Case(ConvWorkload(geometry, 1, steps), s) for geometry, s, steps in CASES]
    programs = [kernels.emit(case.workload, case.schedule, SM90) for case in cases]
    emulated = EmulatedPrograms(programs, SM90.name, tmp_path)
    for case, program in zip(cases, programs, strict=True):
        error = relative_error(emulated.run(program, case.inputs), case.expected)
        bound = max(TOLERANCE, kernels.error_bound(case.workload, case.schedule))
        assert error < bound, (case.workload, case.schedule)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_schedule_of_any_shape_computes_the_convolution(data) -> None:
    size = st.integers(1, 12)
    kernel = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    geometry = ConvGeometry(
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 40)),
        kernel[0] + data.draw(size),
        kernel[1] + data.draw(size),
        kernel,
        stride=(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))),
        padding=tuple(data.draw(st.integers(0, 2)) for _ in range(4)),
        batch=data.draw(st.integers(1, 3)),
    )
    workload = ConvWorkload(geometry, 1, ("bias",))
    schedule = data.draw(st.sampled_from(kernels.FAMILIES["cuda_direct"].space(workload, SM80)))
    case = Case(workload, schedule)
    assert relative_error(run_on_host(case.program, case.inputs), case.expected) < TOLERANCE


RESNET = [
    ConvGeometry(64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1)),
    ConvGeometry(256, 64, 56, 56, (1, 1), batch=128),
    ConvGeometry(3, 64, 224, 224, (7, 7), (2, 2), (3, 3, 3, 3), batch=128),
    ConvGeometry(256, 256, 28, 28, (3, 3), padding=(1, 1, 1, 1), groups=256, batch=128),
    ConvGeometry(2048, 1000, 1, 1, (1, 1), batch=4),
]
# Other shapes for the families that few of the layers above are of.
OTHERS = [
    (DEPTHWISE, "cuda_depthwise"),
    (DENSE, "cuda_dense"),
    (ROW, "cuda_winograd"),
    (ConvGeometry(16, 24, 30, 30, (5, 5), padding=(2, 2, 2, 2)), "cuda_fft"),
    (ODD, "cuda_tensor"),
    (ODD, "cuda_tf32"),
]


@needs_nvcc
def test_every_family_compiles_within_the_limits(tmp_path) -> None:
    """On both architectures: neither spills nor memory of a thread's own, and blocks that fit."""
    programs, shapes, layouts = [], Counter(), set()
    every = (*kernels.ALGORITHMS, *kernels.REDUCED)
    for geometry, only in [*((geometry, None) for geometry in RESNET), *OTHERS]:
        workload = ConvWorkload(geometry, 1, ("bias", "residual", "relu"))
        for name, space in kernels.spaces(workload, SM80, every).items():
            if only not in (None, name):
                continue
            shapes[name] += 1
            first = {getattr(s, "channels_last", False): s for s in reversed(space)}
            for last, schedule in first.items():
                if not last or (name, last) not in layouts:
                    programs.append(kernels.emit(workload, schedule, SM80))
                layouts.add((name, last))
    assert set(shapes) == set(CUDA_FAMILIES) - HOPPER and min(shapes.values()) >= 2, shapes
    turned = {name for name, last in layouts if last}
    assert turned == {"cuda_direct", "cuda_tensor", "cuda_tf32", "cuda_depthwise"}
    found = resources_of(source_of(programs, SM80.name), (SM80.name, SM90.name), tmp_path)
    stages = [stage for program in programs for stage in program.stages]
    for arch in (SM80, SM90):
        assert len(found[arch.name]) == len(stages)
        for index, stage in enumerate(stages):
            used = found[arch.name][f"kernel{index}_kernel"]
            block, grid = launch_of(stage.func)
            threads = math.prod(block)
            assert used.spills == used.stack == 0, used
            assert used.registers <= REGISTERS_A_THREAD
            assert used.registers * threads <= arch.registers
            assert used.shared <= STATIC_SHARED_BYTES
            assert threads <= MOST_THREADS
            assert max(grid[1:]) <= MOST_BLOCKS_YZ


def test_grids_stay_within_bounds_and_tiles_cover_the_map() -> None:
    for geometry in RESNET:
        workload = ConvWorkload(geometry, 1, ("bias",))
        every = (*kernels.ALGORITHMS, *kernels.REDUCED)
        for space in kernels.spaces(workload, SM80, every).values():
            for schedule in space[:4]:
                program = kernels.emit(workload, schedule, SM80)
                for stage in program.stages:
                    block, grid = launch_of(stage.func)
                    threads = math.prod(block)
                    assert threads % 32 == 0 and threads <= MOST_THREADS
                    assert max(grid[1:]) <= MOST_BLOCKS_YZ and grid[0] <= MOST_BLOCKS_X
                    values = math.prod(program.shapes[stage.writes])
                    assert threads * math.prod(grid) * 64 >= values


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 60),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([1, 16, 128]),
)
def test_spaces_are_never_empty_and_sorted_by_the_model(c, f, side, kernel, batch) -> None:
    padding = (kernel // 2,) * 4
    geometry = ConvGeometry(c, f, side, side, (kernel, kernel), padding=padding, batch=batch)
    workload = ConvWorkload(geometry, 1)
    space = kernels.spaces(workload, SM90)["cuda_direct"]
    times = [kernels.predict(workload, schedule, SM90) for schedule in space]
    assert space and times == sorted(times)
    bytes_moved = 4 * (geometry.weight_count + geometry.multiplications / c / f / kernel**2)
    assert times[0] > bytes_moved / (1e3 * SM90.gigabytes)
    assert times[0] > 2 * geometry.multiplications / (1e3 * SM90.gflops)


def test_the_model_knows_when_a_block_does_not_fit() -> None:
    load = model.Load(1, 1024, 128, 0, 1.0, 1, True, 0.0, 0.0)
    assert math.isinf(model.microseconds(load, SM80))
    assert math.isfinite(model.microseconds(replace(load, registers=64), SM80))


def test_schedules_are_json_and_illegal_ones_are_refused() -> None:
    workload = ConvWorkload(SAME3, 1)
    for schedule in dict.fromkeys(schedule for _, schedule, _ in CASES):
        assert kernels.schedule_from_json(schedule.to_json()) == schedule
    with pytest.raises(ValueError, match="must divide"):
        kernels.emit(workload, DirectSchedule(32, 64, 8, 5, 4), SM80)
    with pytest.raises(ValueError, match="too short"):
        kernels.emit(workload, DirectSchedule(32, 64, 16, 4, 4, split_k=16), SM80)
    with pytest.raises(ValueError, match="expected 1 where the kernel is 1"):
        kernels.emit(ConvWorkload(ROW, 1), WinogradSchedule(32, 32, 8, 4, 4), SM80)
    with pytest.raises(ValueError, match="larger than the kernel"):
        large = ConvGeometry(8, 8, 20, 20, (9, 9))
        kernels.emit(ConvWorkload(large, 1), FFTSchedule(32, 32, 8, 4, 4, tile=8), SM80)
    with pytest.raises(ValueError, match="not depthwise"):
        kernels.emit(workload, DepthwiseSchedule(64, 2), SM80)
    with pytest.raises(ValueError, match="not fully connected"):
        kernels.emit(workload, DenseSchedule(4, 1), SM80)
    with pytest.raises(ValueError, match="whole products of 16 x 8 x 8"):
        kernels.emit(workload, TF32Schedule(32, 32, 4, 1, 1), SM80)
    depthwise = ConvWorkload(DEPTHWISE, 1)
    assert set(kernels.spaces(depthwise, SM80)) == {"cuda_depthwise"}


def test_packed_weights_are_what_the_program_reads() -> None:
    for geometry, schedule, steps in CASES:
        case = Case(ConvWorkload(geometry, 1, steps), schedule)
        assert case.inputs["weights"].shape == case.program.shapes["weights"]
        assert case.inputs["weights"].dtype == case.program.dtype("weights")
        bytes_kept = kernels.weight_bytes(case.workload, schedule, SM90)
        assert bytes_kept == case.inputs["weights"].nbytes


def test_programs_are_timed_stage_by_stage() -> None:
    case = Case(ConvWorkload(SAME3, 1), WinogradSchedule(32, 64, 8, 4, 4, outputs=(2, 2)))
    answer = time_program(case.program, tvm.target.Target("llvm"), tvm.cpu())
    assert answer["us"] > 0 and answer["spread"] >= 0


@pytest.mark.skipif(not tvm.cuda(0).exist, reason="this machine has no GPU")
@pytest.mark.parametrize(("geometry", "schedule", "steps"), CASES)
def test_kernels_on_the_gpu_compute_the_convolution(geometry, schedule, steps) -> None:
    target = parse_target("cuda")
    workload = ConvWorkload(geometry, 1, steps)
    refused = kernels.FAMILIES[schedule.kernel].refuse(workload, machine_of(target))
    if refused:
        pytest.skip(refused)
    case = Case(workload, schedule)
    program = kernels.emit(workload, schedule, machine_of(target))
    result = run_program(program, case.inputs, target, tvm.cuda())
    bound = max(TOLERANCE, kernels.error_bound(workload, schedule))
    assert relative_error(result, case.expected) < bound


def test_a_server_times_the_kernels_of_a_program(monkeypatch) -> None:
    """What a server with a GPU is asked to do, done by one that has only a processor."""
    monkeypatch.setattr(device._Device, "session", tvm.rpc.LocalSession())
    host = tvm.target.Target("llvm")
    case = Case(ConvWorkload(SAME3, 1), DirectSchedule(32, 32, 8, 4, 4, split_k=2))
    assert len(case.program.stages) == 2
    for program in (case.program, copy_program(LOOPS, 1 << 16)):
        answer = device.time_program(program, host, device._Device.session.cpu())
        assert answer["us"] > 0 and answer["spread"] >= 0
    if not tvm.cuda(0).exist:
        with pytest.raises(RuntimeError, match=r"no GPU|not enabled"):
            device._gpu()
