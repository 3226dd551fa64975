"""Pixels that come in turns from groups of channels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.x86.gather import runs_of
from tvm_lowrank.schedules.x86.interleave import InterleaveWorkload, emit_interleave
from x86_support import CPUS, apply_steps, block, run, runnable_isa, unblock


@st.composite
def workloads(draw):
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    filters, count = draw(st.integers(1, 37)), stride[0] * stride[1]
    channels = count * filters + draw(st.integers(0, 5))
    order = np.arange(channels)
    if draw(st.booleans()):
        order = np.random.default_rng(draw(st.integers(0, 9))).permutation(channels)
    phases = tuple(runs_of(order[p * filters : (p + 1) * filters]) for p in range(count))
    cut = [draw(st.integers(0, step - 1)) for step in stride]
    out_size = (height * stride[0] - cut[0], width * stride[1] - cut[1])
    batch = draw(st.integers(1, 2))
    return InterleaveWorkload(batch, channels, height, width, stride, phases, out_size)


@pytest.mark.parametrize("name", CPUS)
def test_any_workload_and_steps(name):
    isa = runnable_isa(name)
    step = st.sampled_from(["bias", "residual", "gate", "relu", "silu"])

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(workloads(), st.lists(step, max_size=2).map(tuple))
    def check_one(workload, steps):
        rng = np.random.default_rng(0)
        shape = (workload.batch, workload.channels, workload.height, workload.width)
        x = rng.standard_normal(shape).astype("float32")
        y = np.zeros((workload.batch, workload.out_channels, *workload.out_size))
        (down, along), (rows, columns) = workload.stride, workload.out_size
        for phase, runs in enumerate(workload.phases):
            a, b = divmod(phase, along)
            channels = [run.first + i for run in runs for i in range(run.count)]
            part = y[:, :, a:rows:down, b:columns:along]
            part[:] = x[:, channels, : part.shape[2], : part.shape[3]]
        expected, operands = apply_steps(y, steps, isa, rng)
        blocks = -(-workload.out_channels // isa.lanes)
        out_shape = (workload.batch, blocks, rows, columns, isa.lanes)
        inputs = [block(x, isa.lanes), *operands]
        found = run(emit_interleave(workload, isa, steps), isa, inputs, out_shape)
        assert np.isfinite(found).all()
        error = np.abs(unblock(found, workload.out_channels) - expected).max()
        assert error <= 1e-6 * max(1, np.abs(expected).max()), (workload, steps)

    check_one()


def test_phases_that_do_not_fit_are_refused():
    def made(phases, out_size=(4, 4)):
        return InterleaveWorkload(1, 8, 2, 2, (2, 2), phases, out_size)

    whole = tuple(runs_of([2 * p, 2 * p + 1]) for p in range(4))
    assert made(whole).out_channels == 2
    for phases in (whole[:3], (*whole[:3], runs_of([6]))):
        with pytest.raises(ValueError, match="phases"):
            made(phases)
    with pytest.raises(ValueError, match="pixels"):
        made(whole, (5, 4))
