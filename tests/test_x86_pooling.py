import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.x86.pooling import PoolWorkload, emit_pool
from x86_support import CPUS, TOLERANCE, block, relative_error, run, runnable_isa, unblock, windows


def reference(x, workload):
    geometry = workload.geometry()
    if min(geometry.padding) < 0:  # rows or columns at the end that no window reaches
        x = x[:, :, : x.shape[2] + min(0, geometry.padding[2])]
        x = x[:, :, :, : x.shape[3] + min(0, geometry.padding[3])]
        geometry = type(geometry)(
            **{
                **vars(geometry),
                "height": x.shape[2],
                "width": x.shape[3],
                "padding": tuple(max(0, p) for p in geometry.padding),
            }
        )
    if workload.kind == "max":
        return windows(x, geometry, -np.inf).max(axis=(0, 1))
    total = windows(x, geometry).sum(axis=(0, 1))
    if workload.count_include_pad:
        # Ones on the map and on its padding, zeros beyond (windows of ceil_mode).
        reach = [g - w for g, w in zip(geometry.padding[2:], workload.padding[2:], strict=True)]
        ones = np.pad(np.ones_like(x), ((0, 0), (0, 0)) + ((100, 100),) * 2, constant_values=1)
        top, left = geometry.padding[:2]
        ones = ones[
            :,
            :,
            100 - top : 100 + x.shape[2] + geometry.padding[2],
            100 - left : 100 + x.shape[3] + geometry.padding[3],
        ].copy()
        if reach[0] > 0:
            ones[:, :, -reach[0] :] = 0
        if reach[1] > 0:
            ones[:, :, :, -reach[1] :] = 0
        bare = type(geometry)(
            **{
                **vars(geometry),
                "height": ones.shape[2],
                "width": ones.shape[3],
                "padding": (0, 0, 0, 0),
            }
        )
        return total / windows(ones, bare).sum(axis=(0, 1))
    return total / windows(np.ones_like(x), geometry).sum(axis=(0, 1))


def check(workload, isa):
    rng = np.random.default_rng(0)
    shape = (workload.batch, workload.channels, workload.height, workload.width)
    x = rng.standard_normal(shape).astype("float32")
    blocks = -(-workload.channels // isa.lanes)
    out = (workload.batch, blocks, workload.out_height, workload.out_width, isa.lanes)
    y = run(emit_pool(workload, isa), isa, [block(x, isa.lanes)], out)
    assert relative_error(unblock(y, workload.channels), reference(x, workload)) < TOLERANCE
    assert np.isfinite(y).all()


@st.composite
def pools(draw):
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = draw(st.tuples(*[st.integers(0, size // 2) for size in (kernel[0], kernel[1]) * 2]))
    kind = draw(st.sampled_from(["max", "avg"]))
    return PoolWorkload(
        kind,
        batch=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 40)),
        height=draw(st.integers(7, 12)),
        width=draw(st.integers(7, 40)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        count_include_pad=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", CPUS)
def test_any_pooling(name):
    isa = runnable_isa(name)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(pools())
    def check_one(workload):
        check(workload, isa)

    check_one()


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_output_rounded_up(kind, include):
    isa = runnable_isa("generic")
    size = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "out_size": (5, 12)}
    check(PoolWorkload(kind, 1, 6, 8, 22, count_include_pad=include, **size), isa)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 33)])
@pytest.mark.parametrize("name", CPUS)
def test_global_average(name, size):
    check(PoolWorkload.global_average(2, 20, *size), runnable_isa(name))


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="kind"):
        PoolWorkload("median", 1, 1, 4, 4, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="empty"):
        PoolWorkload("max", 1, 1, 1, 4, (2, 2), (2, 2))
