"""Bounds on what kernels may do: the memory of their weights, the errors they state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm_lowrank.schedules.kernels import (
    EXACT,
    algorithm_of,
    emit,
    error_bound,
    pack_weights,
    schedule_from_json,
    spaces,
    weight_bytes,
)
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

import tvm_lowrank
from tvm_lowrank import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.planner.memory import Option, within_bytes

WORKLOADS = [
    ConvWorkload(ConvGeometry(24, 40, 12, 12, (3, 3), padding=(1, 1, 1, 1)), 16, ("bias",)),
    ConvWorkload(ConvGeometry(64, 32, 20, 20, (5, 5)), 16, ()),
    ConvWorkload(ConvGeometry(32, 32, 9, 9, (3, 3), groups=32), 16, ()),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_stated_bytes_are_those_of_the_packed_weights(workload):
    weight = np.ones(workload.geometry.weight_shape, np.float32)
    for space in spaces(workload, AVX512).values():
        for schedule in (space[0], space[-1]):
            packed = pack_weights(weight, workload, schedule, AVX512)
            assert weight_bytes(workload, schedule, AVX512) == packed.nbytes
            assert tuple(map(int, emit(workload, schedule, AVX512).params[1].shape)) == packed.shape


def test_exact_leaves_direct_kernels_and_small_stated_errors():
    everything = spaces(WORKLOADS[0], AVX512)
    exact = spaces(WORKLOADS[0], AVX512, exact=True)
    assert exact["direct"] == everything["direct"]
    left_out = [s for name in everything for s in everything[name] if s not in exact.get(name, [])]
    assert left_out
    assert all(error_bound(WORKLOADS[0], s) > EXACT for s in left_out)
    kept = [s for space in exact.values() for s in space if algorithm_of(s) != "direct"]
    assert all(error_bound(WORKLOADS[0], s) <= EXACT for s in kept)


option = st.builds(Option, st.floats(1, 1e4), st.integers(1, 10**6), st.none())


@given(st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_the_bound_is_kept_wherever_it_can_be(options, data):
    sizes = [sum(o.bytes for o in choice) for choice in itertools.product(*options)]
    limit = data.draw(st.integers(1, max(sizes) + 1))
    found = within_bytes(options, limit)
    assert all(o in of_kernel for o, of_kernel in zip(found, options, strict=True))
    total = sum(o.bytes for o in found)
    assert total <= limit if min(sizes) <= limit else total == min(sizes)
    if max(sizes) <= limit:
        assert sum(o.microseconds for o in found) == pytest.approx(
            sum(min(o.microseconds for o in of_kernel) for of_kernel in options)
        )


def test_one_kernel_gets_the_fastest_option_that_fits_on_the_hull():
    options = [[Option(10, 400, "big"), Option(14, 200, "middle"), Option(20, 100, "small")]]
    assert [within_bytes(options, limit)[0].schedule for limit in (500, 399, 199, 50)] == [
        "big",
        "middle",
        "small",
        "small",
    ]


def test_plans_keep_the_bounds(small, tmp_path):
    shape = (8, 3, 18, 18)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    options = {
        "data": x,
        "max_drop": 100,
        "lossless": True,
        "trials": 2,
        "records": tmp_path / "records.jsonl",
    }
    free = tvm_lowrank.plan(small, **options)
    sizes = [layer.weight_bytes for layer in free.layers]
    assert free.result["kernel_weight_bytes"] == sum(sizes) > 0

    exact = tvm_lowrank.plan(small, exact=True, **options)
    for workload, schedule in exact.schedules:
        pair = ConvWorkload.from_json(workload), schedule_from_json(schedule)
        assert algorithm_of(pair[1]) == "direct" or error_bound(*pair) <= EXACT

    with pytest.raises(
        LowRankError, match=r"max_weight_bytes is 1, .* at least \d+ bytes"
    ) as error:
        tvm_lowrank.plan(small, max_weight_bytes=1, **options)
    least = int(str(error.value).split("at least ")[1].split()[0])
    tight = tvm_lowrank.plan(small, max_weight_bytes=least, **options)
    assert tight.result["kernel_weight_bytes"] <= least
    assert np.isfinite(tight.result["latency_after_ms"])


@pytest.mark.parametrize("bound", [0, -5])
def test_a_bound_below_one_byte_is_bad_input(small, bound):
    with pytest.raises(LowRankError, match=f"max_weight_bytes is {bound}; give 1 or more"):
        tvm_lowrank.plan(small, max_weight_bytes=bound, data=np.zeros((4, 3, 18, 18), np.float32))
