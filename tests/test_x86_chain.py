import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.x86 import fused, fused_space
from tvm_lowrank.schedules.x86.bfloat16_schedule import Bfloat16Schedule
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.depthwise import DepthwiseSchedule
from tvm_lowrank.schedules.x86.isa import AVX512, AVX512_BF16
from tvm_lowrank.schedules.x86.workload import ConvSchedule, ConvWorkload
from x86_support import (
    CPUS,
    apply_steps,
    bfloat16_isa,
    block,
    reference_convolution,
    relative_error,
    rounded,
    run,
    runnable_isa,
    unblock,
)

from tvm_lowrank.geometry import ConvGeometry

ISAS = list(CPUS)
SAME = (1, 1, 1, 1)


def check(workload, schedule, isa):
    """The fused kernel against the stages one after the other in float64.

    What stages of bfloat16 multiply is rounded before: what is left is the error of float32.
    """
    rng = np.random.default_rng(0)
    first, last = workload.stages[0].geometry, workload.stages[-1].geometry
    shape = (first.batch, first.in_channels, first.height, first.width)
    y = rng.standard_normal(shape).astype("float32")
    inputs = [block(y, isa.lanes)]
    for stage, tiles in zip(workload.stages, schedule.stages, strict=True):
        weight = rng.standard_normal(stage.geometry.weight_shape).astype("float32")
        weight /= np.prod(weight.shape[1:]) ** 0.5
        inputs.append(kernels.pack_weights(weight, stage, tiles, isa))
        if isinstance(tiles, Bfloat16Schedule):
            y, weight = rounded(np.float32(y)), rounded(weight)
        y = reference_convolution(y, weight, stage.geometry)
        y, operands = apply_steps(y, stage.epilogue, isa, rng)
        inputs += operands
    blocks = -(-last.out_channels // isa.lanes)
    out_shape = (last.batch, blocks, last.out_height, last.out_width, isa.lanes)
    result = run(fused.emit(workload, schedule, isa), isa, inputs, out_shape)
    assert np.isfinite(result).all()  # the next kernel reads the lanes beyond F too
    # A value that lies between two of bfloat16 may be rounded to the other one.
    allowed = 1e-3 if schedule.rounds else 1e-5
    assert relative_error(unblock(result, last.out_channels), y) < allowed, (workload, schedule)


def chain(lanes, *geometries, epilogues=()):
    names = [*epilogues, *[()] * len(geometries)]
    pairs = zip(geometries, names, strict=False)
    return ChainWorkload(tuple(ConvWorkload(geometry, lanes, steps) for geometry, steps in pairs))


def inverted_residual(lanes, stride=1, last=("bias",), batch=1):
    wide = ConvGeometry(
        40, 40, 11, 13, (3, 3), (stride, stride), padding=SAME, groups=40, batch=batch
    )
    return chain(
        lanes,
        ConvGeometry(20, 40, 11, 13, (1, 1), batch=batch),
        wide,
        ConvGeometry(40, 24, wide.out_height, wide.out_width, (1, 1), batch=batch),
        epilogues=[("bias", "clip:0.0:6.0"), ("bias", "hard_swish"), last],
    )


CASES = {
    "inverted_residual": lambda lanes: inverted_residual(lanes, last=("bias", "residual"), batch=2),
    "strided": lambda lanes: inverted_residual(lanes, stride=2),
    "depthwise_then_pointwise": lambda lanes: inverted_residual(lanes).last(2),
    "expansion_then_depthwise": lambda lanes: chain(
        lanes,
        ConvGeometry(9, 17, 9, 9, (1, 1)),
        ConvGeometry(17, 17, 9, 9, (5, 5), padding=(2, 2, 2, 2), groups=17),
        epilogues=[("affine", "relu"), ("bias", "silu")],
    ),
    "separable": lambda lanes: chain(
        lanes,
        ConvGeometry(20, 9, 10, 15, (3, 1), padding=(1, 0, 1, 0)),
        ConvGeometry(9, 40, 10, 15, (1, 3), padding=(0, 1, 0, 1)),
        epilogues=[(), ("bias", "relu")],
    ),
    "tucker": lambda lanes: chain(
        lanes,
        ConvGeometry(20, 10, 9, 9, (1, 1)),
        ConvGeometry(10, 12, 9, 9, (3, 3), padding=SAME),
        ConvGeometry(12, 33, 9, 9, (1, 1)),
    ),
    "grouped": lambda lanes: chain(
        lanes,
        ConvGeometry(32, 64, 7, 7, (3, 3), padding=SAME, groups=4),
        ConvGeometry(64, 32, 7, 7, (3, 3), padding=SAME, groups=2),
    ),
    "bands_of_padding_only": lambda lanes: chain(
        lanes,
        ConvGeometry(5, 6, 3, 4, (1, 1)),
        ConvGeometry(6, 7, 3, 4, (2, 2), padding=(5, 1, 4, 0)),
    ),
}


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_chains(case, name):
    isa = runnable_isa(name)
    workload = CASES[case](isa.lanes)
    height = workload.stages[-1].geometry.out_height
    schedule = fused_space.fused_space(workload, isa)[0]
    checked = 0
    for rows in (1, 2, 5, height):
        changed = dataclasses.replace(schedule, rows=rows)
        if fused_space.is_legal(workload, changed, isa) is None:
            check(workload, changed, isa)
            checked += 1
    assert checked


@pytest.mark.parametrize("case", CASES)
def test_chains_of_bfloat16(case):
    isa = bfloat16_isa()
    workload = CASES[case](isa.lanes)
    schedules = fused_space.fused_space(workload, isa, bfloat16=True)
    assert bool(schedules) == any(fused_space.is_flat(stage.geometry) for stage in workload.stages)
    for schedule in schedules:
        kinds = [isinstance(tiles, Bfloat16Schedule) for tiles in schedule.stages]
        assert kinds == [fused_space.is_flat(stage.geometry) for stage in workload.stages]
        check(workload, schedule, isa)


@st.composite
def chains(draw, lanes):
    """Two or three stages, any of them depthwise."""
    height, width = draw(st.integers(1, 15)), draw(st.integers(1, 17))
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 37))
    steps = st.lists(st.sampled_from(["bias", "relu", "affine"]), max_size=2).map(tuple)
    geometries, epilogues = [], []
    for _ in range(draw(st.integers(2, 3))):
        kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 1), (1, 3), (5, 5), (2, 3)]))
        stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (2, 1)]))
        dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2)]))
        padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if (
            height + padding[0] + padding[2] < reach[0]
            or width + padding[1] + padding[3] < reach[1]
        ):
            kernel = (1, 1)
        groups = channels if draw(st.booleans()) else 1
        filters = channels if groups > 1 else draw(st.integers(1, 37))
        geometries.append(
            ConvGeometry(
                channels, filters, height, width, kernel, stride, padding, dilation, groups, batch
            )
        )
        epilogues.append(draw(steps))
        channels = filters
        height, width = geometries[-1].out_height, geometries[-1].out_width
    epilogues[-1] = ("bias", "residual", draw(st.sampled_from(["relu", "gate"])))
    return chain(lanes, *geometries, epilogues=epilogues)


@pytest.mark.parametrize("name", ISAS)
def test_any_chain_and_schedule(name):
    isa = runnable_isa(name)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(chains(isa.lanes))
        schedules = fused_space.fused_space(workload, isa)
        assert bool(schedules) == (fused_space.refuse(workload, isa) is None)
        if schedules:
            check(workload, data.draw(st.sampled_from(schedules)), isa)

    check_one()


def test_any_chain_of_bfloat16():
    isa = bfloat16_isa()

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(chains(isa.lanes))
        if schedules := fused_space.fused_space(workload, isa, bfloat16=True):
            check(workload, data.draw(st.sampled_from(schedules)), isa)

    check_one()


def test_processors_without_bfloat16_have_no_such_chains():
    workload = inverted_residual(16)
    assert fused_space.fused_space(workload, AVX512, bfloat16=True) == []
    schedule = fused_space.fused_space(workload, AVX512_BF16, bfloat16=True)[0]
    assert fused_space.is_legal(workload, schedule, AVX512_BF16) is None
    assert "AVX512-BF16" in fused_space.is_legal(workload, schedule, AVX512)


def test_the_number_of_threads_decides_on_how_many_bands():
    stage = ConvGeometry(64, 384, 14, 14, (1, 1))
    wide = ConvGeometry(384, 384, 14, 14, (3, 3), padding=SAME, groups=384)
    workload = chain(16, stage, wide, ConvGeometry(384, 64, 14, 14, (1, 1)))
    first = [fused_space.fused_space(workload, AVX512, threads=n)[0].rows for n in (2, 4, 14)]
    assert first == [7, 4, 1]


def test_what_no_fused_kernel_computes():
    stem = ConvGeometry(3, 16, 9, 9, (3, 3), padding=SAME)
    rest = ConvGeometry(16, 16, 9, 9, (3, 3), padding=SAME, groups=16)
    plain = ChainWorkload((ConvWorkload(stem, 1), ConvWorkload(rest, 16)))
    assert "in_block" in fused_space.refuse(plain, AVX512)
    assert fused_space.fused_space(plain, AVX512) == []
    for step in ("residual", "gate"):
        with pytest.raises(ValueError, match="reads another map"):
            chain(16, stem, rest, epilogues=[(step,)])
    with pytest.raises(ValueError, match="does not read"):
        chain(16, stem, stem)
    with pytest.raises(ValueError, match="two stages"):
        chain(16, stem)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 12}, "rows"),
        ({"stages": (ConvSchedule(4, 1),)}, "schedules for 2 stages"),
        ({"stages": (ConvSchedule(4, 1), ConvSchedule(4, 1))}, "does not fit"),
        ({"stages": (DepthwiseSchedule(2, 5), ConvSchedule(4, 1)), "rows": 1}, "tiles of 2 rows"),
        ({"stages": (DepthwiseSchedule(1, 5), ConvSchedule(13, 1, rows=2))}, "several rows"),
        ({"stages": (DepthwiseSchedule(1, 5), ConvSchedule(40, 1))}, "registers"),
        ({"stages": (Bfloat16Schedule(4, 1), ConvSchedule(4, 1))}, "does not fit"),
        ({"stages": (DepthwiseSchedule(1, 5), Bfloat16Schedule(4, 1))}, "no instructions"),
    ],
)
def test_illegal_schedules(changes, message):
    workload = inverted_residual(16).last(2)
    legal = FusedSchedule(4, (DepthwiseSchedule(1, 5), ConvSchedule(4, 1)))
    assert fused_space.is_legal(workload, legal, AVX512) is None
    with pytest.raises(ValueError, match=message):
        fused.emit(workload, dataclasses.replace(legal, **changes), AVX512)


def test_only_pointwise_stages_are_of_bfloat16():
    workload = CASES["tucker"](16)
    schedule = fused_space.fused_space(workload, AVX512_BF16, bfloat16=True)[0]
    pairs = Bfloat16Schedule(3, 1)
    changed = dataclasses.replace(schedule, stages=(schedule.stages[0], pairs, schedule.stages[2]))
    with pytest.raises(ValueError, match="stage 1: only pointwise"):
        fused.emit(workload, changed, AVX512_BF16)


def test_chains_and_schedules_are_json():
    workload = inverted_residual(16, last=("bias", "residual"))
    assert ChainWorkload.from_json(json.loads(workload.key())) == workload
    pair = fused_space.fused_space(workload.last(2), AVX512)[0]
    first = kernels.default_schedule(workload.stages[0], AVX512)
    schedule = ChainSchedule((first, pair))
    assert ChainSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert schedule.fused == pair and ChainSchedule((pair, first)).fused is None
    parts = [part for part, _ in schedule.split(workload)]
    assert parts == [workload.stages[0], workload.last(2)]
    with pytest.raises(ValueError, match="stages"):
        ChainSchedule((pair,)).split(workload)
    with pytest.raises(ValueError, match="kernel"):
        ChainSchedule.from_json(pair.to_json())


def test_only_chains_around_a_depthwise_stage_are_promising():
    assert inverted_residual(16).is_promising()
    assert not CASES["separable"](16).is_promising() and not CASES["tucker"](16).is_promising()
