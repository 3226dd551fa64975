import dataclasses
import json

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.x86 import convolution
from tvm_lowrank.schedules.x86.groups import merge_groups
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvSchedule, ConvWorkload
from x86_support import CPUS, TOLERANCE, Case, build, relative_error, run, runnable_isa, target

from tvm_lowrank.geometry import ConvGeometry

ISAS = list(CPUS)
ACTIVATIONS = ("sigmoid", "silu", "hard_sigmoid", "hard_swish", "tanh", "gelu")


def check(workload, isa, schedule=None):
    schedule = schedule or convolution.space(workload, isa)[0]
    case = Case(workload, schedule, isa)
    y = run(convolution.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)
    n, blocks, h, w, lanes = y.shape
    result = y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * lanes, h, w)
    result = result[:, : workload.geometry.out_channels]
    assert relative_error(result, case.expected) < TOLERANCE, (workload, schedule)
    assert np.isfinite(y).all()  # the next kernel reads the lanes beyond F too


@st.composite
def workloads(draw, lanes):
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height = draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 11))
    width = draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 23))
    geometry = ConvGeometry(
        in_channels=draw(st.integers(1, 37)),
        out_channels=draw(st.integers(1, 70)),
        height=height,
        width=width,
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        batch=draw(st.integers(1, 3)),
    )
    steps = st.sampled_from(
        ["bias", "residual", "relu", "affine", "clip:-1:6", "leaky_relu:0.1", *ACTIVATIONS]
    )
    epilogue = tuple(draw(st.lists(steps, max_size=3)))
    return ConvWorkload(geometry, draw(st.sampled_from([1, lanes])), epilogue)


@pytest.mark.parametrize("name", ISAS)
def test_any_geometry_and_schedule(name):
    isa = runnable_isa(name)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(workloads(isa.lanes))
        check(workload, isa, data.draw(st.sampled_from(convolution.space(workload, isa))))

    check_one()


SHAPES = {
    "one_dimensional_long_kernel": (
        ConvGeometry(1, 40, 256, 1, (96, 1), (4, 1), (46, 0, 47, 0)),
        1,
    ),
    "long_kernel_blocked": (ConvGeometry(32, 16, 50, 1, (33, 1), (1, 1), (15, 0, 17, 0)), 0),
    "wide_kernel": (
        ConvGeometry(3, 32, 9, 40, (5, 21), (1, 1), (2, 10, 2, 10), batch=2),
        1,
    ),
    "first_layer": (ConvGeometry(3, 32, 30, 30, (7, 7), (2, 2), (3, 3, 3, 3)), 1),
    "dense": (ConvGeometry(67, 40, 1, 1, (1, 1)), 1),
    "dense_blocked": (ConvGeometry(64, 10, 1, 1, (1, 1)), 0),
    "pointwise": (ConvGeometry(33, 64, 13, 7, (1, 1), batch=2), 0),
    "pointwise_strided": (ConvGeometry(33, 64, 13, 7, (1, 1), (2, 2)), 0),
    "pointwise_padded": (ConvGeometry(5, 7, 6, 5, (1, 1), padding=(1, 2, 0, 1)), 1),
    "kernel_of_the_whole_map": (ConvGeometry(16, 64, 4, 4, (4, 4)), 0),
    "row_factor": (ConvGeometry(32, 24, 14, 14, (1, 3), padding=(0, 1, 0, 1)), 0),
    "column_factor": (ConvGeometry(24, 32, 14, 14, (3, 1), padding=(1, 0, 1, 0)), 0),
    "rows_of_padding_only": (ConvGeometry(4, 4, 2, 2, (2, 2), padding=(4, 3, 3, 4)), 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ISAS)
def test_special_shapes(name, shape):
    isa = runnable_isa(name)
    geometry, block = SHAPES[shape]
    check(ConvWorkload(geometry, block or isa.lanes, ("bias", "relu")), isa)


GROUPED = {
    # in, out, groups: whole blocks; one block a group; merged into pairs or fours; all merged;
    # merged, with groups missing in the last
    "aligned": (32, 64, 2),
    "resnext": (64, 64, 16),
    "shufflenet": (24, 48, 3),
    "odd": (15, 21, 3),
    "multiplier": (18, 36, 18),
    "regnet": (40, 40, 5),
    "narrow": (28, 28, 7),
}


@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize("name", ISAS)
def test_groups(name, shape):
    isa = runnable_isa(name)
    inputs, outputs, groups = GROUPED[shape]
    for block in (1, isa.lanes):
        for kernel, pad in ((1, 0), (3, 1)):
            geometry = ConvGeometry(
                inputs, outputs, 7, 9, (kernel,) * 2, padding=(pad,) * 4, groups=groups, batch=2
            )
            check(ConvWorkload(geometry, block, ("bias", "relu")), isa)


def test_groups_merge_no_further_than_blocks_need():
    geometry = ConvGeometry(64, 64, 7, 7, (3, 3), groups=16)
    assert [merge_groups(geometry, lanes, lanes).groups for lanes in (4, 8, 16)] == [16, 8, 4]
    assert merge_groups(geometry, 1, 4).groups == 16
    assert merge_groups(ConvGeometry(15, 21, 7, 7, (3, 3), groups=3), 16, 16).groups == 1


def test_the_last_of_merged_groups_ends_with_the_last_block():
    geometry = ConvGeometry(440, 440, 7, 7, (3, 3), groups=55)
    merged = merge_groups(geometry, 16, 16)
    assert (merged.groups, merged.in_channels, merged.out_channels) == (28, 448, 448)
    assert merge_groups(geometry, 1, 16).groups == 1  # its channels are in no blocks
    three = ConvGeometry(72, 72, 7, 7, (3, 3), groups=3)  # two in three blocks, and one in two
    assert merge_groups(three, 16, 16).groups == 1


def test_depthwise_is_refused_in_favour_of_its_own_kernel():
    isa = isa_of(target("avx512"))
    geometry = ConvGeometry(32, 32, 8, 8, (3, 3), groups=32)
    assert "own" in convolution.refuse(ConvWorkload(geometry, 16), isa)
    assert convolution.refuse(ConvWorkload(geometry, 1), isa) is None


@pytest.mark.parametrize("name", ISAS)
def test_every_kind_of_schedule(name):
    isa = runnable_isa(name)
    geometry = ConvGeometry(20, 4 * isa.lanes, 4, 4, (3, 3), padding=(1, 1, 1, 1), batch=2)
    workload = ConvWorkload(geometry, isa.lanes)
    base = ConvSchedule(4, 1)
    for change in (
        {"tile": 3, "vectors": 2},
        {"order": "rows", "chunk": 3},
        {"tile": 2, "chains": 4},
        {"rows": 3},
        {"rows": 2, "order": "rows", "chunk": 2},
        {"chunk": 5},
        {"prefetch": True},
        {"prefetch": True, "order": "rows", "chunk": 3},
    ):
        check(workload, isa, dataclasses.replace(base, **change))


@pytest.mark.parametrize("name", ISAS)
def test_space_is_legal_and_starts_with_a_full_register_tile(name):
    isa = isa_of(target(name))
    geometry = ConvGeometry(128, 128, 28, 28, (3, 3), padding=(1, 1, 1, 1))
    schedules = convolution.space(ConvWorkload(geometry, isa.lanes), isa)
    assert len(schedules) == len(set(schedules)) > 4
    for schedule in schedules:
        accumulators = schedule.rows * schedule.tile * schedule.vectors * schedule.chains
        assert accumulators + schedule.vectors + 1 <= isa.registers - 1
    assert schedules[0].tile * schedules[0].vectors >= 8


def test_weights_that_caches_do_not_hold_are_prefetched():
    isa = isa_of(target("avx512"))
    cold, warm, once = (
        ConvGeometry(512, 512, 7, 7, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(64, 64, 56, 56, (1, 1)),
        ConvGeometry(2048, 1000, 1, 1, (1, 1)),
    )
    for geometry, expected in ((cold, True), (warm, False), (once, False)):
        schedules = convolution.space(ConvWorkload(geometry, 16), isa)
        assert {schedule.prefetch for schedule in schedules} == {expected}


def test_schedules_that_do_not_fit_are_refused():
    isa = isa_of(target("avx512"))
    workload = ConvWorkload(ConvGeometry(16, 48, 8, 8, (3, 3)), 16)
    for schedule, message in (
        (ConvSchedule(6, 2), "does not divide"),
        (ConvSchedule(16, 3), "vector registers"),
        (ConvSchedule(5, 1, rows=2), "must be 6 wide"),
        (ConvSchedule(0, 1), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            convolution.emit(workload, schedule, isa)
    with pytest.raises(ValueError, match="in_block"):
        convolution.emit(dataclasses.replace(workload, in_block=8), ConvSchedule(6, 1), isa)
    with pytest.raises(ValueError, match="order"):
        ConvSchedule(6, 1, order="columns")
    with pytest.raises(ValueError, match="groups"):
        ConvWorkload(ConvGeometry(16, 16, 8, 8, (3, 3), groups=3), 16)
    with pytest.raises(ValueError, match="empty"):
        ConvWorkload(ConvGeometry(16, 16, 2, 8, (3, 3)), 16)
    with pytest.raises(ValueError, match="softplus"):
        ConvWorkload(ConvGeometry(16, 16, 8, 8, (3, 3)), 16, ("softplus",))
    with pytest.raises(ValueError, match="shape"):
        convolution.pack_weights(np.zeros((48, 16, 3, 1)), workload, ConvSchedule(6, 3), isa)


def test_json_round_trip():
    workload = ConvWorkload(ConvGeometry(16, 48, 8, 8, (3, 3)), 16, ("bias", "relu"))
    assert ConvWorkload.from_json(json.loads(json.dumps(workload.to_json()))) == workload
    assert ConvWorkload.from_json(json.loads(workload.key())) == workload
    schedule = ConvSchedule(6, 3, "rows", 4, 1, 1)
    assert ConvSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_isa_comes_from_the_target():
    assert [isa_of(target(name)).name for name in ISAS] == ISAS
    features = tvm.target.Target({"kind": "llvm", "mattr": ["+avx2", "+fma"]})
    assert isa_of(features).lanes == 8
    assert isa_of(tvm.target.Target("c")).lanes == 4


def innermost_loops(assembly):
    """The bodies of loops (backward jumps) that hold no other loop, as lists of lines."""
    lines = [line.strip() for line in assembly.splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    spans = [
        (labels[line.split()[-1]], number)
        for number, line in enumerate(lines)
        if line.startswith("j") and labels.get(line.split()[-1], number) < number
    ]
    return [
        lines[start:stop]
        for start, stop in spans
        if not any((s, e) != (start, stop) and s >= start and e <= stop for s, e in spans)
    ]


@pytest.mark.parametrize(
    ("name", "kernel", "padding"),
    # (On AVX2, LLVM unrolls the loops of border tiles, a small part of the work, and spills.)
    [("avx512", 1, 0), ("avx512", 3, 1), ("avx2", 1, 0), ("avx2", 3, 0)],
)
def test_accumulators_of_the_default_schedule_stay_in_registers(name, kernel, padding):
    isa = isa_of(target(name))  # compiled, not run
    size = 28 + 2 * (kernel // 2 - padding)
    geometry = ConvGeometry(64, 64, size, size, (kernel, kernel), padding=(padding,) * 4)
    workload = ConvWorkload(geometry, isa.lanes)
    schedule = convolution.space(workload, isa)[0]
    assembly = build(convolution.emit(workload, schedule, isa), isa).inspect_source("asm")
    loops = [body for body in innermost_loops(assembly) if "vfmadd" in "".join(body)]
    assert loops
    register = "zmm" if name == "avx512" else "ymm"
    for body in loops:
        assert not [line for line in body if register in line and "(%rsp" in line]
    most = max("".join(body).count("vfmadd") for body in loops)
    assert most % (schedule.tile * schedule.vectors) == 0
