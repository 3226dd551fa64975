"""Convolutions of bfloat16 factors on x86: their arithmetic and their code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_x86_convolution import ACTIVATIONS, GROUPED
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86 import bfloat16, bfloat16_schedule, dense
from tvm_lowrank.schedules.x86.bfloat16_schedule import Bfloat16Schedule
from tvm_lowrank.schedules.x86.isa import AVX2, AVX512, AVX512_BF16
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import (
    BF16,
    TOLERANCE,
    Case,
    bfloat16_isa,
    reference_convolution,
    relative_error,
    rounded,
    run,
    unblock,
)

from tvm_lowrank.geometry import ConvGeometry

LAYER = ConvGeometry(64, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1))


def check(workload, isa, schedule):
    """Against float64 sums of factors that are rounded already: what is left is that of float32."""
    case = Case(workload, schedule, isa, rounded)
    y = run(kernels.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)
    result = unblock(y, workload.geometry.out_channels)
    assert relative_error(result, case.expected) < TOLERANCE, (workload, schedule)
    assert np.isfinite(y).all()  # the next kernel reads the lanes beyond F too


@st.composite
def workloads(draw):
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    geometry = ConvGeometry(
        in_channels=draw(st.integers(1, 70)),
        out_channels=draw(st.integers(1, 70)),
        height=draw(st.integers(max(1, reach[0] - padding[0] - padding[2]), 11)),
        width=draw(st.integers(max(1, reach[1] - padding[1] - padding[3]), 23)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        batch=draw(st.integers(1, 3)),
    )
    steps = ["bias", "residual", "gate", "affine", "clip:-1:6", *ACTIVATIONS]
    epilogue = tuple(draw(st.lists(st.sampled_from(steps), max_size=2)))
    workload = ConvWorkload(geometry, 16, epilogue)
    if bfloat16_schedule.refuse(workload, AVX512_BF16):
        return ConvWorkload(replace(geometry, batch=1), 16, epilogue)
    return workload


def test_any_geometry_and_schedule():
    isa = bfloat16_isa()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload = data.draw(workloads())
        check(workload, isa, data.draw(st.sampled_from(bfloat16_schedule.space(workload, isa))))

    check_one()


SHAPES = {
    "pointwise": ConvGeometry(67, 40, 13, 7, (1, 1), batch=2),
    "pointwise_strided": ConvGeometry(33, 64, 13, 7, (1, 1), (2, 2)),
    "pointwise_padded": ConvGeometry(5, 7, 6, 5, (1, 1), padding=(1, 2, 0, 1)),
    "fully_connected": ConvGeometry(100, 10, 1, 1, (1, 1)),
    "column": ConvGeometry(32, 16, 50, 1, (33, 1), (1, 1), (15, 0, 17, 0)),
    "line_of_tall_kernels": ConvGeometry(20, 24, 3, 40, (3, 5), padding=(0, 2, 0, 2)),
    "kernel_of_the_whole_map": ConvGeometry(16, 64, 4, 4, (4, 4)),
    "rows_of_padding_only": ConvGeometry(40, 20, 2, 2, (2, 2), padding=(4, 3, 3, 4)),
    "strided": ConvGeometry(48, 32, 15, 15, (3, 3), (2, 2), (1, 1, 1, 1)),
    "layer": LAYER,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_schedule(shape):
    isa, workload = bfloat16_isa(), ConvWorkload(SHAPES[shape], 16, ("bias", "relu"))
    kinds = {}
    for schedule in bfloat16_schedule.space(workload, isa):
        kind = (schedule.order, schedule.rows > 1, schedule.chunk > 1, schedule.chains > 1)
        kinds.setdefault(kind, schedule)
    assert {order for order, *_ in kinds} == {"channels", "rows"}
    for schedule in kinds.values():
        check(workload, isa, schedule)


@pytest.mark.parametrize("shape", GROUPED)
def test_groups(shape):
    isa, (inputs, outputs, groups) = bfloat16_isa(), GROUPED[shape]
    for kernel, pad in ((1, 0), (3, 1)):
        geometry = ConvGeometry(
            inputs, outputs, 7, 9, (kernel,) * 2, padding=(pad,) * 4, groups=groups, batch=2
        )
        workload = ConvWorkload(geometry, 16, ("bias",))
        check(workload, isa, bfloat16_schedule.space(workload, isa)[0])


def dense_workload(inputs, outputs, size, batch, plain, epilogue=("bias", "relu")):
    geometry = ConvGeometry(inputs, outputs, *size, size, batch=batch)
    return ConvWorkload(geometry, 1 if plain else 16, epilogue)


def test_any_dense_layer_of_several_samples():
    isa = bfloat16_isa()

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        draw, plain = data.draw, data.draw(st.booleans())
        inputs = 16 * draw(st.integers(1, 5)) if plain else draw(st.integers(1, 70))
        size = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        samples, outputs = draw(st.integers(2, 37)), draw(st.integers(1, 70))
        workload = dense_workload(inputs, outputs, size, samples, plain)
        space = dense.space(workload, isa, dense.Bfloat16DenseSchedule)
        check(workload, isa, draw(st.sampled_from(space)))

    check_one()


def test_large_dense_inputs_are_rounded_in_parallel():
    isa = bfloat16_isa()
    workload = dense_workload(144, 32, (3, 3), 11, plain=True)
    for schedule in dense.space(workload, isa, dense.Bfloat16DenseSchedule)[:2]:
        check(workload, isa, schedule)


def test_dense_layers_of_several_samples_have_a_kernel_of_their_own():
    workload = dense_workload(64, 32, (1, 1), 16, plain=False)
    assert list(spaces(workload, AVX512_BF16, ("bfloat16",))) == ["bfloat16_dense"]
    assert not spaces(workload, AVX512, ("bfloat16",))
    odd = dense_workload(20, 32, (1, 1), 16, plain=True)
    assert "multiple of 16" in dense.refuse(odd, AVX512_BF16, dense.Bfloat16DenseSchedule)
    schedule = spaces(workload, AVX512_BF16, ("bfloat16",))["bfloat16_dense"][0]
    assert kernels.schedule_from_json(schedule.to_json()) == schedule
    effort, plain = (
        dense.effort(workload, each(schedule.rows, schedule.vectors), AVX512_BF16)
        for each in (dense.Bfloat16DenseSchedule, dense.DenseSchedule)
    )
    assert effort.multiplications == plain.multiplications / 2
    assert effort.weight_bytes == plain.weight_bytes / 2


def test_factors_are_rounded_to_nearest_and_even():
    one, step = np.float32(1.0), np.float32(2.0**-7)
    values = np.array([1, 1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -3.1, 0, 1e30], "f4")
    assert rounded(values)[:4].tolist() == [1.0, 1.0, 1 + 2 * step, one + step]
    many = np.random.default_rng(0).standard_normal(10_000).astype("f4")
    error = np.abs(rounded(many) / many.astype(np.float64) - 1)
    assert 0.9 * 2**-8 < error.max() <= 2**-8
    assert (rounded(rounded(many)) == rounded(many)).all()


@pytest.mark.parametrize("shape", ["layer", "pointwise", "fully_connected"])
def test_errors_keep_the_stated_bound_and_are_no_smaller_than_rounding(shape):
    isa, workload = bfloat16_isa(), ConvWorkload(SHAPES[shape], 16)
    schedule = bfloat16_schedule.space(workload, isa)[0]
    case = Case(workload, schedule, isa)
    y = run(bfloat16.emit(workload, schedule, isa), isa, case.inputs, case.out_shape)
    error = relative_error(unblock(y, workload.geometry.out_channels), case.expected)
    assert 2e-4 < error < kernels.error_bound(workload, schedule)
    exact = reference_convolution(rounded(case.x), rounded(case.weight), workload.geometry)
    assert relative_error(unblock(y, workload.geometry.out_channels), exact) < TOLERANCE


@pytest.mark.parametrize("pipeline", ["lowrank", "default"])
@pytest.mark.parametrize("order", ["channels", "rows"])
def test_products_are_one_instruction(pipeline, order):
    workload = ConvWorkload(LAYER, 16, ("bias",))
    schedule = Bfloat16Schedule(14, 2, order, 1)
    kernel = bfloat16.emit(workload, schedule, AVX512_BF16).with_attr("global_symbol", "main")
    built = tvm.compile(
        tvm.IRModule({"main": kernel}),
        target=tvm.target.Target({"kind": "llvm", "mcpu": BF16}),
        tir_pipeline=pipeline,
    )
    lines = built.mod.inspect_source("asm").splitlines()
    assert sum("vdpbf16ps" in line for line in lines) >= 14 * 2
    assert any("vcvtne2ps2bf16" in line for line in lines)
    assert not any("lowrank_bfloat16" in line for line in lines)  # all are where they are called
    # Accumulators stay in registers: nothing is stored between two products.
    first = next(i for i, line in enumerate(lines) if "vdpbf16ps" in line)
    assert all("vdpbf16ps" in x or "vbroadcast" in x or "\tvmov" in x for x in lines[first:][:28])


def test_what_has_no_kernel_is_refused_with_its_reason():
    workload = ConvWorkload(LAYER, 16)
    assert "AVX512-BF16" in bfloat16_schedule.refuse(workload, AVX512)
    assert "AVX512-BF16" in bfloat16_schedule.refuse(replace(workload, in_block=8), AVX2)
    assert "in_block" in bfloat16_schedule.refuse(replace(workload, in_block=1), AVX512_BF16)
    depthwise = ConvWorkload(replace(LAYER, groups=64), 16)
    assert "depthwise" in bfloat16_schedule.refuse(depthwise, AVX512_BF16)
    several = ConvWorkload(ConvGeometry(64, 10, 1, 1, (1, 1), batch=8), 16)
    assert "samples" in bfloat16_schedule.refuse(several, AVX512_BF16)
    for schedule in (
        Bfloat16Schedule(30, 4),
        Bfloat16Schedule(7, 3),
        Bfloat16Schedule(7, 2, "rows", 0),
    ):
        with pytest.raises(ValueError, match="cannot compute"):
            bfloat16.emit(workload, schedule, AVX512_BF16)
    with pytest.raises(ValueError, match="expected"):
        bfloat16.pack(np.zeros((1, 2, 3, 3), "f4"), workload, Bfloat16Schedule(7, 2), AVX512_BF16)
