import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.x86.gather import ChannelRun, GatherWorkload, emit_gather
from tvm_lowrank.schedules.x86.normalisation import emit_layer_norm
from tvm_lowrank.schedules.x86.packing import pack_channels
from x86_support import CPUS, block, relative_error, run, runnable_isa, unblock


def reference(workload: GatherWorkload, sources: list[np.ndarray]) -> np.ndarray:
    parts = [
        np.full((workload.batch, r.count, workload.height, workload.width), workload.fill)
        if r.source < 0
        else sources[r.source][:, r.first : r.first + r.count]
        for r in workload.runs
    ]
    whole = np.concatenate(parts, axis=1)
    out = np.full((workload.batch, workload.out_channels, *workload.out_size), workload.fill)
    for i in range(workload.out_size[0]):
        for j in range(workload.out_size[1]):
            row = workload.origin[0] + i * workload.stride[0]
            column = workload.origin[1] + j * workload.stride[1]
            if 0 <= row < workload.height and 0 <= column < workload.width:
                out[:, :, i, j] = whole[:, :, row, column]
    return out


def check(workload: GatherWorkload, name: str) -> None:
    isa = runnable_isa(name)
    rng = np.random.default_rng(0)
    sources = [
        rng.standard_normal((workload.batch, c, workload.height, workload.width)).astype("float32")
        for c in workload.channels
    ]
    out_shape = (
        workload.batch,
        -(-workload.out_channels // isa.lanes),
        *workload.out_size,
        isa.lanes,
    )
    blocked = [block(source, isa.lanes) for source in sources]
    y = run(emit_gather(workload, isa), isa, blocked, out_shape)
    assert np.isfinite(y).all()
    expected = reference(workload, sources).astype("float32")
    np.testing.assert_array_equal(unblock(y, workload.out_channels), expected)


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("channels", [(16, 32), (64, 32, 16), (5, 7, 20), (3,), (48, 24)])
def test_concatenation(name, channels):
    check(GatherWorkload.concatenation(2, channels, 9, 8), name)


@pytest.mark.parametrize("name", CPUS)
def test_steps_are_applied_to_what_is_copied(name):
    isa = runnable_isa(name)
    workload = GatherWorkload.concatenation(2, (20, 33), 7, 5)
    rng = np.random.default_rng(2)
    first, second, residual = (
        rng.standard_normal((2, c, 7, 5)).astype("float32") for c in (20, 33, 53)
    )
    scale, shift = rng.standard_normal((2, 53)).astype("float32")
    whole = np.concatenate([first, second], 1) + residual
    expected = np.maximum(whole * scale[:, None, None] + shift[:, None, None], 0)
    operands = [pack_channels(vector, isa) for vector in (scale, shift)]
    maps = [block(x, isa.lanes) for x in (first, second, residual)]
    func = emit_gather(workload, isa, ("residual", "affine", "relu"))
    y = run(func, isa, [*maps, *operands], maps[2].shape)
    assert relative_error(unblock(y, 53), expected) < 1e-6


def test_steps_where_pixels_move_are_refused():
    moved = GatherWorkload(1, (16,), 4, 4, (ChannelRun(0, 0, 16),), (2, 2), stride=(2, 2))
    with pytest.raises(ValueError, match="takes no steps"):
        emit_gather(moved, runnable_isa("generic"), ("relu",))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_windows_and_channels_of_any_kind(data):
    draw = data.draw
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    channels = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=2)))
    runs = []
    for _ in range(draw(st.integers(1, 3))):
        source = draw(st.integers(-1, len(channels) - 1))
        first = draw(st.integers(0, channels[source] - 1)) if source >= 0 else 0
        most = channels[source] - first if source >= 0 else 20
        runs.append(ChannelRun(source, first, draw(st.integers(1, most))))
    check(
        GatherWorkload(
            draw(st.integers(1, 2)),
            channels,
            height,
            width,
            tuple(runs),
            (draw(st.integers(1, 9)), draw(st.integers(1, 9))),
            (draw(st.integers(-3, 3)), draw(st.integers(-3, 3))),
            (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            draw(st.sampled_from([0.0, -2.5])),
        ),
        draw(st.sampled_from(["generic", "avx2"])),
    )


def test_channels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="beyond the 16 channels"):
        GatherWorkload(1, (16,), 4, 4, (ChannelRun(0, 8, 16),), (4, 4))


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (13, 9)])
def test_layer_norm(name, size):
    isa = runnable_isa(name)
    channels = 3 * isa.lanes
    rng = np.random.default_rng(1)
    x = (10 + rng.standard_normal((2, channels, *size))).astype("float32")
    scale, shift = rng.standard_normal((2, channels)).astype("float32")
    exact = x.astype(np.float64)
    mean, variance = exact.mean(1, keepdims=True), exact.var(1, keepdims=True)
    expected = (exact - mean) / np.sqrt(variance + 1e-6) * scale[:, None, None]
    expected += shift[:, None, None]
    func = emit_layer_norm(2, channels, *size, 1e-6, isa)
    blocked = block(x, isa.lanes)
    y = run(func, isa, [blocked, scale, shift], blocked.shape)
    assert relative_error(unblock(y, channels), expected) < 1e-5


def test_layer_norm_refuses_broken_vectors():
    with pytest.raises(ValueError, match="whole vectors"):
        emit_layer_norm(1, 6, 2, 2, 1e-6, runnable_isa("generic"))
