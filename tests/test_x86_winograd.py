import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_x86_convolution import innermost_loops
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.transforms.cook_toom import cook_toom
from tvm_lowrank.schedules.x86 import winograd, winograd_space
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.winograd_schedule import (
    WinogradSchedule,
    error_bound,
    refuse,
)
from tvm_lowrank.schedules.x86.workload import ConvSchedule, ConvWorkload
from x86_support import CPUS, Case, build, relative_error, run, runnable_isa, target, unblock

from tvm_lowrank.geometry import ConvGeometry

ISAS = list(CPUS)
SAME = (1, 1, 1, 1)


def result_of(workload, schedule, isa):
    """The case and its whole output, with the lanes beyond F."""
    case = Case(workload, schedule, isa)
    return case, run(winograd.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)


def check(workload, schedule, isa):
    case, y = result_of(workload, schedule, isa)
    assert np.isfinite(y).all()  # the next kernel reads the lanes beyond F too
    error = relative_error(unblock(y, workload.geometry.out_channels), case.expected)
    assert error < error_bound(workload, schedule), (workload, schedule)


@st.composite
def workloads(draw, lanes):
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3), (3, 1), (5, 1), (1, 7), (2, 3)]))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    height = draw(st.integers(max(1, kernel[0] - padding[0] - padding[2]), 15))
    width = draw(st.integers(max(1, kernel[1] - padding[1] - padding[3]), 23))
    geometry = ConvGeometry(
        in_channels=draw(st.integers(1, 37)),
        out_channels=draw(st.integers(20, 50)),
        height=height,
        width=width,
        kernel=kernel,
        padding=padding,
        batch=draw(st.integers(1, 3)),
    )
    epilogue = tuple(
        draw(st.lists(st.sampled_from(["bias", "residual", "gate", "relu"]), max_size=2))
    )
    return ConvWorkload(geometry, lanes, epilogue)


@pytest.mark.parametrize("name", ISAS)
def test_any_geometry_and_schedule(name):
    isa = runnable_isa(name)

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(workloads(isa.lanes))
        schedules = winograd_space.space(workload, isa)
        check(workload, data.draw(st.sampled_from(schedules)), isa)

    check_one()


CASES = {
    "border_tiles_on_every_side": (
        ConvGeometry(20, 40, 11, 13, (3, 3), padding=(0, 2, 3, 1), batch=2),
        WinogradSchedule((4, 4), 5, 1, 2),
    ),
    "inner_tiles_only": (ConvGeometry(16, 16, 10, 10, (3, 3)), WinogradSchedule((4, 4), 4, 1, 1)),
    "stages": (
        ConvGeometry(20, 40, 11, 13, (3, 3), padding=SAME, batch=2),
        WinogradSchedule((2, 2), 7, 1, 0),
    ),
    "large_tiles": (
        ConvGeometry(16, 32, 13, 13, (3, 3), padding=SAME),
        WinogradSchedule((6, 6), 5, 1, 3),
    ),
    "oblong_tiles": (
        ConvGeometry(16, 32, 9, 9, (3, 3), padding=SAME),
        WinogradSchedule((2, 4), 5, 1, 0),
    ),
    "more_blocks_than_tiles": (
        ConvGeometry(8, 8, 3, 3, (3, 3), padding=SAME),
        WinogradSchedule((2, 2), 6, 1, 9),
    ),
    "five_by_five": (
        ConvGeometry(20, 32, 9, 10, (5, 5), padding=(2, 2, 2, 2)),
        WinogradSchedule((4, 4), 5, 1, 3),
    ),
    "row_kernel": (
        ConvGeometry(20, 32, 9, 10, (1, 3), padding=(0, 1, 0, 1), batch=2),
        WinogradSchedule((1, 4), 7, 1, 0),
    ),
    "column_kernel": (
        ConvGeometry(20, 32, 9, 10, (3, 1), padding=(3, 1, 0, 1), batch=2),
        WinogradSchedule((6, 1), 7, 1, 3),
    ),
    "one_dimensional": (
        ConvGeometry(20, 32, 50, 1, (5, 1), padding=(2, 0, 2, 0), batch=2),
        WinogradSchedule((1, 4), 7, 1, 1),
    ),
    "seven_taps": (
        ConvGeometry(16, 32, 40, 1, (7, 1), padding=(3, 0, 3, 0)),
        WinogradSchedule((1, 4), 7, 1, 1),
    ),
    "padding_wider_than_a_tile": (
        ConvGeometry(4, 8, 2, 3, (3, 3), padding=(7, 6, 6, 7)),
        WinogradSchedule((2, 2), 5, 1, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ISAS)
def test_special_shapes(name, case):
    geometry, schedule = CASES[case]
    isa = runnable_isa(name)
    check(ConvWorkload(geometry, isa.lanes, ("bias", "residual", "relu")), schedule, isa)


@pytest.mark.parametrize(("kernel", "tile"), [(3, 2), (3, 3), (3, 4), (3, 6), (5, 2), (5, 4)])
def test_errors_stay_within_a_tenth_to_one_of_their_bound(kernel, tile):
    isa = runnable_isa("avx2")
    half = kernel // 2
    geometry = ConvGeometry(64, 16, 24, 24, (kernel, kernel), padding=(half,) * 4)
    workload = ConvWorkload(geometry, isa.lanes)
    schedule = WinogradSchedule((tile, tile), 6, 2, 1)
    case, y = result_of(workload, schedule, isa)
    bound = error_bound(workload, schedule)
    assert bound / 10 < relative_error(unblock(y, 16), case.expected) < bound


def test_weights_are_transformed_in_float64_and_padded_by_zeros():
    isa = isa_of(target("avx512"))
    geometry = ConvGeometry(20, 40, 8, 8, (3, 3), padding=SAME)
    workload, schedule = ConvWorkload(geometry, 16), WinogradSchedule((4, 4), 4, 3)
    weight = np.random.default_rng(0).standard_normal(geometry.weight_shape).astype("float32")
    packed = winograd.pack(weight, workload, schedule, isa)
    assert packed.shape == (36, 1, 32, 48) and packed.dtype == np.float32
    matrix = np.array(cook_toom(4, 3).filter, dtype=np.float64)
    expected = np.einsum("ix,fcxy,jy->ijcf", matrix, weight.astype("float64"), matrix)
    np.testing.assert_array_equal(
        packed[:, 0, :20, :40], expected.reshape(36, 20, 40).astype("float32")
    )
    assert not packed[:, :, 20:].any() and not packed[..., 40:].any()
    with pytest.raises(ValueError, match="shape"):
        winograd.pack(weight[:, :, :1], workload, schedule, isa)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(128, 128, 28, 28, (3, 3), padding=SAME),
        ConvGeometry(64, 192, 27, 27, (5, 5), padding=(2, 2, 2, 2)),
        ConvGeometry(96, 256, 128, 1, (7, 1), padding=(3, 0, 3, 0)),
        ConvGeometry(512, 512, 7, 7, (3, 3), padding=SAME),
    ],
    ids=str,
)
def test_space_is_legal_and_varied(name, geometry):
    isa = isa_of(target(name))
    workload = ConvWorkload(geometry, isa.lanes)
    schedules = winograd_space.space(workload, isa)
    assert len(schedules) == len(set(schedules)) > 4
    for schedule in schedules:
        winograd.emit(workload, schedule, isa)
        assert error_bound(workload, schedule) < 1e-4
    assert len({schedule.tile for schedule in schedules}) > 1
    assert {schedule.blocks > 0 for schedule in schedules} == {True, False}


def test_what_it_cannot_compute_is_refused():
    isa = isa_of(target("avx512"))
    base = ConvGeometry(16, 48, 9, 9, (3, 3))
    for change, message in (
        ({"stride": (2, 1)}, "stride"),
        ({"dilation": (1, 2)}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"kernel": (1, 1)}, "kernel"),
        ({"kernel": (9, 3)}, "kernel"),
    ):
        workload = ConvWorkload(dataclasses.replace(base, **change), 16)
        assert message in refuse(workload, isa)
        assert winograd_space.space(workload, isa) == []
        with pytest.raises(ValueError, match=message):
            winograd.emit(workload, WinogradSchedule((2, 2), 6, 1), isa)
    assert "in_block" in refuse(ConvWorkload(base, 1), isa)
    workload = ConvWorkload(base, 16)
    for schedule, message in (
        (WinogradSchedule((2, 2), 6, 2), "does not divide"),
        (WinogradSchedule((2, 2), 10, 3), "vector registers"),
        (WinogradSchedule((2, 0), 6, 1), "positive"),
        (WinogradSchedule((2, 2), 6, 1, -1), "negative"),
        (WinogradSchedule((2, 9), 6, 1), "at most 10"),
    ):
        with pytest.raises(ValueError, match=message):
            winograd.emit(workload, schedule, isa)
    row = ConvWorkload(dataclasses.replace(base, kernel=(1, 3)), 16)
    with pytest.raises(ValueError, match="expected 1"):
        winograd.emit(row, WinogradSchedule((2, 2), 6, 1), isa)


def test_json_round_trip():
    schedule = WinogradSchedule((2, 4), 7, 2, 3)
    data = json.loads(json.dumps(schedule.to_json()))
    assert data["kernel"] == "winograd"
    assert kernels.schedule_from_json(data) == schedule
    assert kernels.algorithm_of(schedule) == "winograd"


def test_every_family_states_its_error():
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(ConvGeometry(64, 64, 28, 28, (3, 3), padding=SAME), 16)
    bounds = {
        name: kernels.FAMILIES[name].error_bound(workload, schedules[0])
        for name, schedules in kernels.spaces(workload, isa, ("direct", "winograd")).items()
    }
    assert 1e-7 < bounds[ConvSchedule.kernel] < bounds[WinogradSchedule.kernel] < 1e-4


@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_sums_of_the_default_schedule_stay_in_registers(name):
    isa = isa_of(target(name))  # compiled, not run
    workload = ConvWorkload(ConvGeometry(64, 64, 28, 28, (3, 3), padding=SAME), isa.lanes)
    schedule = winograd_space.space(workload, isa)[0]
    assembly = build(winograd.emit(workload, schedule, isa), isa).inspect_source("asm")
    register = "zmm" if name == "avx512" else "ymm"
    products = []
    for body in innermost_loops(assembly):
        # Transforms broadcast constants only, which stand beside the code.
        values = [line for line in body if "vbroadcastss" in line and "(%rip)" not in line]
        if len(values) >= schedule.rows:
            products.append(body)
    assert products
    for body in products:
        assert "".join(body).count("vfmadd") % (schedule.rows * schedule.vectors) == 0
        assert not [line for line in body if register in line and "(%rsp" in line]
