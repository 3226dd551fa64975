"""Products on tensor cores: what a lane holds, rounding, and kernels of Hopper's warpgroups."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from cuda_support import (
    HOPPER,
    LAST,
    SM80,
    SM90,
    Case,
    launch_of,
    needs_nvcc,
    resources_of,
    run_on_host,
    source_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda import mma, wgmma
from tvm_lowrank.schedules.cuda.arch import ARCHITECTURES
from tvm_lowrank.schedules.cuda.channels_last import LastHalfSchedule
from tvm_lowrank.schedules.cuda.gemm import round_up
from tvm_lowrank.schedules.cuda.warpgroup import WarpgroupHalfSchedule, WarpgroupTF32Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import relative_error

from tvm_lowrank.geometry import ConvGeometry

SAME3 = ConvGeometry(16, 32, 12, 12, (3, 3), padding=(1, 1, 1, 1))
SHAPES = [
    ConvGeometry(64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1)),
    ConvGeometry(256, 64, 56, 56, (1, 1), batch=128),
    ConvGeometry(3, 64, 224, 224, (7, 7), (2, 2), (3, 3, 3, 3), batch=128),
    ConvGeometry(128, 256, 28, 28, (3, 3), padding=(1, 1, 1, 1), batch=128),
    ConvGeometry(3, 21, 13, 11, (5, 3), stride=(2, 1), padding=(2, 0, 1, 1), batch=2),
    ConvGeometry(100, 33, 1, 1, (1, 1), batch=3),
]


@needs_nvcc
def test_warpgroups_compile_within_the_limits(tmp_path) -> None:
    """Products run on by themselves (ptxas says where it makes them wait), and nothing spills."""
    programs, threads, shared_out, algorithms = [], [], set(), ("tf32", "half")
    for geometry in SHAPES:
        workload = ConvWorkload(geometry, 1, ("bias", "residual", "relu"))
        found = kernels.spaces(workload, SM90, algorithms)
        names = sorted(HOPPER if geometry.out_channels % 8 == 0 else HOPPER - LAST)
        assert set(found) & HOPPER == set(names)
        most = [max(found[name], key=lambda s: (s.sums, s.threads)) for name in names]
        for schedule in [*(found[name][0] for name in names), *most]:
            assert schedule.shared_bytes <= SM90.shared_bytes - 1024
            programs.append(kernels.emit(workload, schedule, SM90))
            stages = programs[-1].stages
            first = next(index for index, stage in enumerate(stages) if not stage.turns)
            shared_out |= {len(threads) + first} if schedule.shares else set()
            threads += [math.prod(launch_of(stage.func)[0]) for stage in stages]
    source = source_of(programs, SM90.name)
    found = resources_of(source, ("sm_90a",), tmp_path)["sm_90a"]
    assert len(found) == len(threads)
    for index, count in enumerate(threads):
        used = found[f"kernel{index}_kernel"]
        assert used.spills == used.stack == 0, used
        assert used.registers * count <= SM90.registers
        if index in shared_out:
            # A block is given them by eights: no fewer than its threads take when they share.
            assert round_up(used.registers, 8) * count >= 128 * (2 * 232 + 40)
    assert shared_out
    assert not kernels.spaces(ConvWorkload(SAME3, 1), SM80, algorithms).keys() & HOPPER


@pytest.mark.parametrize(
    ("algorithm", "name", "instruction"),
    [
        ("half", "cuda_tensor", "wmma::mma_sync"),
        ("tf32", "cuda_tf32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_rounded_products_are_computed_only_where_they_are_asked_for(
    algorithm, name, instruction
) -> None:
    workload = ConvWorkload(SAME3, 1)
    assert name not in kernels.spaces(workload, SM80)
    asked = kernels.spaces(workload, SM80, (algorithm,))
    assert set(asked) == {name}
    assert kernels.spaces(workload, SM80, (algorithm,), exact=True) == {}
    assert instruction in source_of([kernels.emit(workload, asked[name][0], SM80)], "sm_80")


def test_tf32_begins_with_sm_80_and_rounds_to_ten_bits() -> None:
    old = ARCHITECTURES["sm_75"]
    assert kernels.spaces(ConvWorkload(SAME3, 1), old, ("tf32",)) == {}
    values = np.random.default_rng(0).standard_normal(1000).astype("float32")
    rounded = mma.round_array(values)
    assert 0 < np.abs(rounded / values - 1).max() <= 2.0**-11
    assert not (rounded.view("uint32") & 0x1FFF).any()
    special = np.array([np.inf, -np.inf, np.nan, 0], "float32")
    np.testing.assert_array_equal(mma.round_array(special), special)


def test_a_lane_holds_each_element_of_a_fragment_once() -> None:
    """PTX's layout of the accumulators, and a bijection to (lane, register) for all three."""
    for place, rows, columns in (
        (mma.left_place, mma.M, mma.K),
        (mma.right_place, mma.K, mma.N),
        (mma.sums_place, mma.M, mma.N),
    ):
        held = {place(row, column) for row in range(rows) for column in range(columns)}
        registers = rows * columns // 32
        assert held == {(lane, r) for lane in range(32) for r in range(registers)}
    for lane, register in ((0, 0), (5, 1), (31, 3)):
        row, column = lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2
        assert mma.sums_place(row, column) == (lane, register)


def test_warpgroup_kernels_that_cannot_be_are_refused() -> None:
    workload = ConvWorkload(SAME3, 1)
    with pytest.raises(ValueError, match="registers for each of 512 threads"):
        kernels.emit(workload, WarpgroupTF32Schedule(128, 384, 16, 2, 2), SM90)
    with pytest.raises(ValueError, match="sm_90 alone has"):
        kernels.emit(workload, WarpgroupTF32Schedule(32, 128, 16, 2, 3), SM80)
    with pytest.raises(ValueError, match="stages must be 2 or more"):
        kernels.emit(workload, WarpgroupTF32Schedule(32, 128, 16, 2, 1), SM90)
    with pytest.raises(ValueError, match="an even number of instructions"):
        kernels.emit(workload, WarpgroupHalfSchedule(32, 128, 16, 2, 3), SM90)


@pytest.mark.parametrize("factor", [wgmma.TF32, wgmma.HALF])
def test_columns_and_sums_of_a_warpgroup_have_a_place_each(factor) -> None:
    """PTX multiplies elements ``t``, ``t + 4``, ... of the sum, which a lane holds, by these."""
    slots = [factor.slot_of(element) for element in range(factor.k)]
    assert sorted(slots) == list(range(factor.k))
    pair = factor.per_core // 4
    for t in range(4):
        held = [factor.slot_of(t + 4 * index) for index in range(factor.k // 4)]
        first = [pair * t + index for index in range(pair)]
        assert held == first + [factor.per_core + slot for slot in first]
    for tiles, columns in ((1, 32), (2, 16)):
        places = [
            wgmma.place_of_sum(register, tile, tiles)
            for tile in range(tiles)
            for register in range(columns // 2)
        ]
        assert sorted(places) == list(range(tiles * columns // 2))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_schedule_with_channels_last_computes_the_convolution(data) -> None:
    """Few channels and many, with strides that split pixels and paddings that do not let them."""
    groups = data.draw(st.sampled_from([1, 1, 2]))
    kernel = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)))
    geometry = ConvGeometry(
        8 * groups if groups > 1 else data.draw(st.integers(1, 40)),
        8 * groups * data.draw(st.integers(1, 5)),
        kernel[0] + data.draw(st.integers(1, 10)),
        kernel[1] + data.draw(st.integers(1, 10)),
        kernel,
        stride=data.draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])),
        padding=tuple(data.draw(st.integers(0, 3)) for _ in range(4)),
        groups=groups,
        batch=data.draw(st.integers(1, 3)),
    )
    workload = ConvWorkload(geometry, 1, data.draw(st.sampled_from([("bias",), ("residual",)])))
    name = data.draw(st.sampled_from(sorted(LAST)))
    schedule = data.draw(st.sampled_from(kernels.FAMILIES[name].space(workload, SM90)))
    case = Case(workload, schedule)
    error = relative_error(run_on_host(case.program, case.inputs), case.expected)
    assert error < kernels.error_bound(workload, schedule)


def test_what_channels_last_cannot_be_is_refused() -> None:
    def reason(**changed) -> str | None:
        workload = ConvWorkload(replace(SAME3, **changed), 1)
        return kernels.FAMILIES["cuda_last_half"].refuse(workload, SM90)

    assert reason() is None
    assert "written by 8" in str(reason(out_channels=30))
    assert "written by 8" in str(reason(groups=4))
    assert "32 bits" in str(reason(height=4096, width=4096, batch=8))
    assert "15 taps" in str(reason(kernel=(1, 17), width=40))
    workload = ConvWorkload(SAME3, 1)
    with pytest.raises(ValueError, match="more than 8 pixels"):
        kernels.emit(workload, LastHalfSchedule(128, 256, 64, 2, 2), SM90)
    with pytest.raises(ValueError, match="sm_90 alone has"):
        kernels.emit(workload, LastHalfSchedule(32, 64, 64, 1, 3), SM80)
