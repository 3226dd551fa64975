"""Dense layers of several samples: the kernel against float64, its schedules, who takes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.x86 import convolution, dense
from tvm_lowrank.schedules.x86.dense import DenseSchedule
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvSchedule, ConvWorkload
from x86_support import CPUS, TOLERANCE, Case, relative_error, run, runnable_isa, target, unblock

from tvm_lowrank.geometry import ConvGeometry


def geometry_of(inputs, outputs, size=(1, 1), batch=16, **others):
    return ConvGeometry(inputs, outputs, *size, size, batch=batch, **others)


def check(workload, isa, schedule):
    case = Case(workload, schedule, isa)
    y = run(kernels.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)
    result = unblock(y, workload.geometry.out_channels)
    assert relative_error(result, case.expected) < TOLERANCE, (workload, schedule)
    assert np.isfinite(y).all()


@st.composite
def workloads(draw, lanes):
    geometry = geometry_of(
        draw(st.integers(1, 70)),
        draw(st.integers(1, 90)),
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        draw(st.integers(2, 37)),
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    )
    steps = st.sampled_from(["bias", "residual", "gate", "prelu", "hard_swish", "silu"])
    epilogue = tuple(draw(st.lists(steps, max_size=3)))
    return ConvWorkload(geometry, draw(st.sampled_from([1, lanes])), epilogue)


@pytest.mark.parametrize("name", CPUS)
def test_any_shape_and_schedule(name):
    isa = runnable_isa(name)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(workloads(isa.lanes))
        check(workload, isa, data.draw(st.sampled_from(dense.space(workload, isa))))

    check_one()


@pytest.mark.parametrize("in_block", ["plain", "blocked"])
def test_large_inputs_are_laid_out_in_parallel(in_block):
    isa = runnable_isa("generic")
    workload = ConvWorkload(
        geometry_of(130, 24, (5, 3), batch=11), 1 if in_block == "plain" else isa.lanes, ("bias",)
    )
    for schedule in dense.space(workload, isa)[:2]:
        check(workload, isa, schedule)


def test_the_direct_kernel_leaves_these_layers_to_it_and_takes_the_others():
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(geometry_of(64, 32, (3, 3)), isa.lanes)
    assert "kernel of its own" in convolution.refuse(workload, isa)
    assert set(kernels.spaces(workload, isa, ("direct",))) == {"dense"}
    for other in (
        geometry_of(64, 32, (3, 3), batch=1),
        geometry_of(64, 32, (3, 3), groups=2),
        geometry_of(64, 32, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(64, 32, 3, 3, (2, 3), batch=16),
    ):
        assert "dense layer" in dense.refuse(ConvWorkload(other, isa.lanes), isa)
        assert "direct" in kernels.spaces(ConvWorkload(other, isa.lanes), isa, ("direct",))


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("batch", [2, 16, 128])
def test_space_is_legal_ordered_and_counted(name, batch):
    isa = isa_of(target(name))
    workload = ConvWorkload(geometry_of(512, 1024, batch=batch), isa.lanes)
    space = dense.space(workload, isa)
    assert len(set(space)) == len(space) > 0
    for schedule in space:
        assert dense.is_legal(workload, schedule, isa) is None
        assert DenseSchedule.from_json(schedule.to_json()) == schedule
        effort = dense.effort(workload, schedule, isa)
        assert effort.multiplications >= workload.geometry.multiplications
        assert effort.weight_reads == 1
    # The best keeps both multiply-add units busy: four cycles' latency of two.
    assert space[0].rows * space[0].vectors >= 8


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (DenseSchedule(17, 1), "samples"),
        (DenseSchedule(0, 1), "samples"),
        (DenseSchedule(4, 3), "divide"),
        (DenseSchedule(16, 2), "registers"),
    ],
)
def test_illegal_schedules_are_refused(schedule, reason):
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(geometry_of(64, 32), isa.lanes)
    assert reason in dense.is_legal(workload, schedule, isa)
    with pytest.raises(ValueError, match=reason):
        dense.emit(workload, schedule, isa)


def test_schedules_of_single_samples_are_not_borrowed():
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(geometry_of(64, 32), isa.lanes)
    with pytest.raises(ValueError, match="kernel of its own"):
        kernels.emit(workload, ConvSchedule(1, 2), isa)
