import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.x86 import depthwise
from tvm_lowrank.schedules.x86.depthwise import DepthwiseSchedule
from tvm_lowrank.schedules.x86.fft_schedule import FFTSchedule
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import (
    CPUS,
    TOLERANCE,
    Case,
    build,
    relative_error,
    run,
    runnable_isa,
    target,
    unblock,
)

from tvm_lowrank.geometry import ConvGeometry


def geometry_of(channels, height, width, kernel, **others):
    return ConvGeometry(channels, channels, height, width, kernel, groups=channels, **others)


def check(workload, isa, schedule):
    case = Case(workload, schedule, isa)
    y = run(kernels.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)
    result = unblock(y, workload.geometry.out_channels)
    assert relative_error(result, case.expected) < TOLERANCE, (workload, schedule)
    assert np.isfinite(y).all()


@st.composite
def workloads(draw, lanes):
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    geometry = geometry_of(
        draw(st.integers(2, 37)),
        draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 19)),
        draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 23)),
        kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        batch=draw(st.integers(1, 3)),
    )
    steps = st.sampled_from(["bias", "residual", "gate", "prelu", "hard_swish", "silu"])
    return ConvWorkload(geometry, lanes, tuple(draw(st.lists(steps, max_size=3))))


@pytest.mark.parametrize("name", CPUS)
def test_any_geometry_and_schedule(name):
    isa = runnable_isa(name)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(workloads(isa.lanes))
        check(workload, isa, data.draw(st.sampled_from(depthwise.space(workload, isa))))

    check_one()


SHAPES = {
    "mobilenet": geometry_of(40, 14, 14, (3, 3), padding=(1, 1, 1, 1)),
    "strided": geometry_of(24, 15, 15, (3, 3), stride=(2, 2), padding=(0, 0, 1, 1)),
    "convnext": geometry_of(16, 14, 14, (7, 7), padding=(3, 3, 3, 3), batch=2),
    "large_kernel_small_map": geometry_of(16, 9, 9, (31, 31), padding=(15, 15, 15, 15)),
    "one_dimensional": geometry_of(20, 50, 1, (9, 1), padding=(4, 0, 4, 0)),
    "rows_of_padding_only": geometry_of(4, 2, 2, (2, 2), padding=(4, 3, 3, 4)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CPUS)
def test_special_shapes(name, shape):
    isa = runnable_isa(name)
    workload = ConvWorkload(SHAPES[shape], isa.lanes, ("bias", "relu"))
    spaces = kernels.spaces(workload, isa)
    assert set(spaces) <= {DepthwiseSchedule.kernel, FFTSchedule.kernel}  # no direct one
    check(workload, isa, spaces[DepthwiseSchedule.kernel][0])
    assert kernels.default_schedule(workload, isa) == spaces[DepthwiseSchedule.kernel][0]


def test_what_does_not_fit_is_refused():
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(geometry_of(16, 8, 8, (3, 3)), 16)
    assert "in_block" in depthwise.refuse(ConvWorkload(workload.geometry, 1), isa)
    dense = ConvWorkload(ConvGeometry(16, 16, 8, 8, (3, 3)), 16)
    assert "not depthwise" in depthwise.refuse(dense, isa)
    for schedule, message in (
        (DepthwiseSchedule(7, 1), "within"),
        (DepthwiseSchedule(1, 0), "within"),
        (DepthwiseSchedule(6, 6), "vector registers"),
    ):
        with pytest.raises(ValueError, match=message):
            depthwise.emit(workload, schedule, isa)
    with pytest.raises(ValueError, match="shape"):
        depthwise.pack(np.zeros((16, 16, 3, 3)), workload, DepthwiseSchedule(2, 3), isa)


def test_json_round_trip():
    schedule = DepthwiseSchedule(2, 7)
    assert kernels.schedule_from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_accumulators_of_the_default_schedule_stay_in_registers():
    isa = isa_of(target("avx512"))  # compiled, not run
    workload = ConvWorkload(geometry_of(64, 28, 28, (7, 7), padding=(3, 3, 3, 3)), isa.lanes)
    schedule = depthwise.space(workload, isa)[0]
    assert schedule.rows > 1
    assembly = build(depthwise.emit(workload, schedule, isa), isa).inspect_source("asm")
    lines = [line for line in assembly.splitlines() if "zmm" in line]
    assert len([line for line in lines if "(%rsp" in line]) < len(lines) / 50
