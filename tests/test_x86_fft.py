import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.transforms.fft_codelets import odd_dft, real_dft, restricted
from tvm_lowrank.schedules.x86 import fft, fft_space
from tvm_lowrank.schedules.x86.fft_schedule import (
    LONG_TILES,
    FFTSchedule,
    axes_of,
    error_bound,
    grid_of,
    is_legal,
    refuse,
)
from tvm_lowrank.schedules.x86.fourier import real_frequencies
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import (
    CPUS,
    Case,
    reference_convolution,
    relative_error,
    run,
    runnable_isa,
    target,
    unblock,
)

from tvm_lowrank.geometry import ConvGeometry

ISAS = list(CPUS)


def check(workload, schedule, isa, scale=1.0):
    case = Case(workload, schedule, isa)
    inputs = [case.inputs[0] * np.float32(scale), *case.inputs[1:]]
    expected = case.expected
    if scale != 1:
        expected = reference_convolution(case.x * np.float32(scale), case.weight, workload.geometry)
    y = run(fft.emit(workload, schedule, isa), isa, inputs, case.out_shape)
    assert np.isfinite(y).all()  # the next kernel reads the lanes beyond F too
    error = relative_error(unblock(y, workload.geometry.out_channels), expected)
    assert error < error_bound(workload, schedule), (workload, schedule)
    return error


@st.composite
def problems(draw, isa):
    """A workload without epilogue and one of its schedules, of the cheaper ones to compile."""
    along = draw(st.sampled_from(["both", "both", "rows", "columns"]))
    long, short = st.integers(3, 40), st.integers(2, 9)
    kernel = {
        "both": st.tuples(st.integers(3, 9), short),
        "rows": st.tuples(long, st.just(1)),
        "columns": st.tuples(st.just(1), long),
    }[along]
    kernel = draw(kernel)
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    extents = [
        draw(st.integers(max(1, r - padding[i] - padding[i + 2]), r + 25))
        for i, r in enumerate(reach)
    ]
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    plain = groups == 1 and draw(st.booleans())
    in_channels = draw(st.integers(1, 4)) if plain else groups * draw(st.integers(1, 20))
    out_channels = groups * draw(st.integers(1, 20))
    if groups == 3 and draw(st.booleans()):
        groups = out_channels = in_channels  # depthwise
    geometry = ConvGeometry(
        in_channels,
        out_channels,
        *extents,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        batch=draw(st.integers(1, 2)),
    )
    workload = ConvWorkload(geometry, 1 if plain else isa.lanes)
    cheap = [s for s in fft_space.space(workload, isa) if max(s.tile) <= 16 or min(s.tile) == 1]
    schedules = cheap or fft_space.space(workload, isa)
    return workload, draw(st.sampled_from(schedules))


@pytest.mark.parametrize("name", ISAS)
def test_any_geometry_schedule_and_scale_keeps_the_stated_error(name):
    isa = runnable_isa(name)

    @settings(max_examples=7, deadline=None, derandomize=True)
    @given(st.data())
    def check_one(data):
        workload, schedule = data.draw(problems(isa))
        check(workload, schedule, isa, scale=10.0 ** data.draw(st.integers(-6, 6)))

    check_one()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    points=st.sampled_from([8, 32, 256]),
    taps=st.integers(2, 70),
    stride=st.integers(1, 6),
    dilation=st.integers(1, 6),
    outputs=st.integers(1, 50),
    padding=st.integers(0, 9),
)
def test_terms_and_classes_of_an_axis_sum_up_to_the_convolution(
    points, taps, stride, dilation, outputs, padding
):
    extent = (outputs - 1) * stride + dilation * (taps - 1) + 1
    geometry = ConvGeometry(
        1, 1, 1, extent, (1, taps), (1, stride), (0, padding, 0, 0), (1, dilation)
    )
    axis = axes_of(geometry, (1, points))[1]
    assert axis.tile_outputs >= points // 4 + 1
    found = {}
    for cls in range(axis.classes):
        for number in range(axis.tiles * axis.tile_outputs):
            output = axis.classes * number + cls
            for term in range(axis.terms):
                phase, part = divmod(term, axis.parts)
                at = number * axis.step + cls * stride - padding
                at += phase * dilation + part * axis.reach * axis.step
                assert len(axis.taps_of(term)) <= axis.reach
                for i, tap in enumerate(axis.taps_of(term)):
                    key = (output, tap)
                    assert key not in found  # each product once
                    found[key] = at + i * axis.step
    count = geometry.out_width
    for output in range(count):
        for tap in range(taps):
            assert found[output, tap] == output * stride + tap * dilation - padding
    assert axis.is_padded or min(found.values()) >= 0


CASES = {
    "border_tiles_on_every_side": (
        ConvGeometry(20, 40, 21, 23, (5, 5), padding=(0, 2, 3, 1), batch=2),
        FFTSchedule((8, 8), 5, 1, False, 2),
    ),
    "inner_tiles_only": (
        ConvGeometry(16, 16, 18, 18, (5, 5)),
        FFTSchedule((8, 8), 3, 1, True, 1),
    ),
    "three_multiplications_in_stages": (
        ConvGeometry(20, 40, 21, 23, (7, 3), padding=(3, 1, 3, 1), batch=2),
        FFTSchedule((16, 8), 5, 1, True, 0),
    ),
    "four_multiplications_in_stages": (
        ConvGeometry(20, 40, 21, 13, (3, 7), padding=(1, 3, 1, 3)),
        FFTSchedule((8, 16), 3, 1, False, 0),
    ),
    "two_passes_along_both_axes": (
        ConvGeometry(3, 8, 40, 37, (21, 22), padding=(10, 11, 10, 10)),
        FFTSchedule((64, 64), 1, 1, False, 1),
    ),
    "parts_along_both_axes": (
        ConvGeometry(3, 8, 14, 15, (9, 13), padding=(4, 6, 4, 6)),
        FFTSchedule((8, 8), 3, 1, False, 0),
    ),
    "row_kernel_on_a_map": (
        ConvGeometry(20, 16, 5, 70, (1, 31), padding=(1, 15, 0, 15), batch=2),
        FFTSchedule((1, 64), 5, 1, True, 2),
    ),
    "column_kernel_on_a_map": (
        ConvGeometry(20, 16, 70, 5, (31, 1), padding=(15, 2, 15, 0), stride=(1, 2)),
        FFTSchedule((128, 1), 3, 1, False, 0),
    ),
    "many_taps_of_one_channel": (
        ConvGeometry(1, 32, 1024, 1, (512, 1), (4, 1), (254, 0, 254, 0)),
        FFTSchedule((1, 128), 4, 1, False, 0),
    ),
    "long_parts": (
        ConvGeometry(8, 8, 600, 1, (300, 1), padding=(150, 0, 149, 0)),
        FFTSchedule((1, 128), 5, 1, False, 0),
    ),
    "groups": (
        ConvGeometry(64, 96, 11, 12, (3, 3), padding=(1, 1, 1, 1), groups=2),
        FFTSchedule((8, 8), 4, 1, False, 0),
    ),
    "depthwise_large_kernel": (
        ConvGeometry(20, 20, 28, 28, (31, 31), padding=(15,) * 4, groups=20),
        FFTSchedule((64, 64)),
    ),
    "depthwise_stride": (
        ConvGeometry(20, 20, 19, 21, (7, 7), (2, 2), (3, 3, 3, 3), groups=20, batch=2),
        FFTSchedule((8, 8)),
    ),
    "padding_wider_than_a_tile": (
        ConvGeometry(4, 8, 2, 3, (3, 3), padding=(17, 16, 16, 17)),
        FFTSchedule((8, 8), 3, 1, False, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_special_shapes(case):
    isa = runnable_isa("avx2")
    geometry, schedule = CASES[case]
    in_block = 1 if geometry.in_channels == 1 else isa.lanes
    check(ConvWorkload(geometry, in_block, ("bias", "residual", "relu")), schedule, isa)


@pytest.mark.parametrize("gauss", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 256])
def test_errors_stay_within_a_tenth_to_one_of_their_bound(channels, gauss):
    isa = runnable_isa("avx2")
    geometry = ConvGeometry(channels, 16, 24, 24, (5, 5), padding=(2,) * 4)
    workload, schedule = ConvWorkload(geometry, isa.lanes), FFTSchedule((16, 16), 4, 1, gauss)
    assert check(workload, schedule, isa) > error_bound(workload, schedule) / 10


@pytest.mark.parametrize("size", LONG_TILES)
def test_real_frequencies_are_all_but_for_conjugates(size):
    found = {0, size // 2}
    for frequency in real_frequencies(size):
        found |= {frequency % size, -frequency % size}
    assert found == set(range(size))
    assert len(real_frequencies(size)) == size // 2 - 1


def test_restricted_code_leaves_out_what_is_zero():
    combine = lambda f, a, g, b: f * a + (0 if b is None else g * b)  # noqa: E731
    whole, part = real_dft(16), restricted(real_dft(16), range(8))
    x = np.random.default_rng(0).standard_normal(8)
    expected = whole.apply([*x, *np.zeros(8)], combine)
    np.testing.assert_allclose(part.apply(list(x), combine), expected, atol=1e-12)
    assert len(part.operations) < len(whole.operations)
    spectrum = np.fft.rfft(x, 16)[1::2]
    parts = np.stack([spectrum.real, spectrum.imag], axis=1).ravel()
    np.testing.assert_allclose(odd_dft(8).apply(list(x), combine), parts, atol=1e-12)


def test_weights_are_transformed_in_float64_and_padded_by_zeros():
    isa = isa_of(target("avx512"))
    geometry = ConvGeometry(20, 40, 8, 8, (3, 3))
    weight = np.random.default_rng(0).standard_normal(geometry.weight_shape).astype("float32")
    expected = np.conj(np.fft.fft2(weight.astype("float64"), (8, 8))) / 64
    workload = ConvWorkload(geometry, 16)
    schedule = FFTSchedule((8, 8), 4, 3)
    packed = fft.pack(weight, workload, schedule, isa).reshape(64, 1, 1, 20, 48)
    assert packed.dtype == np.float32 and not packed[..., 40:].any()
    ends = [(0, 0), (4, 0), (0, 4), (4, 4)]
    for slot, (row, column) in enumerate(ends):
        np.testing.assert_array_equal(
            packed[slot, 0, 0, :, :40], expected[:, :, row, column].real.T.astype("float32")
        )
    first = packed[4:6].reshape(20, 2, 48)[..., :40]  # both parts at frequency (1, 0)
    np.testing.assert_array_equal(first[:, 0], (2 * expected[:, :, 1, 0].real.T).astype("float32"))
    np.testing.assert_array_equal(first[:, 1], (2 * expected[:, :, 1, 0].imag.T).astype("float32"))
    for gauss, slots in ((False, 64), (True, 94)):
        of_kind = dataclasses.replace(schedule, gauss=gauss, rows=2)
        assert kernels.weight_bytes(workload, of_kind, isa) == 4 * slots * 20 * 48
        assert fft.pack(weight, workload, of_kind, isa).size == slots * 20 * 48
    with pytest.raises(ValueError, match="shape"):
        fft.pack(weight[:, :, :1], workload, schedule, isa)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(128, 128, 28, 28, (3, 3), padding=(1, 1, 1, 1)),
        ConvGeometry(64, 192, 27, 27, (5, 5), padding=(2, 2, 2, 2)),
        ConvGeometry(96, 256, 128, 1, (64, 1), padding=(31, 0, 32, 0)),
        ConvGeometry(64, 64, 56, 56, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    ],
    ids=str,
)
def test_space_is_legal_and_varied(name, geometry):
    isa = isa_of(target(name))
    workload = ConvWorkload(geometry, isa.lanes)
    schedules = fft_space.space(workload, isa)
    assert len(schedules) == len(set(schedules)) > 4
    for schedule in schedules:
        assert is_legal(workload, schedule, isa) is None
        assert error_bound(workload, schedule) < 2e-6
    assert len({schedule.tile for schedule in schedules}) > 1
    assert {schedule.blocks > 0 for schedule in schedules} == {True, False}
    assert {schedule.gauss for schedule in schedules} == {True, False}


def test_what_it_cannot_compute_is_refused():
    isa = isa_of(target("avx512"))
    base = ConvGeometry(32, 48, 19, 19, (5, 5))
    for change, in_block, message in (
        ({"kernel": (1, 2)}, 16, "kernel"),
        ({}, 1, "plain map"),
        ({"in_channels": 4, "groups": 2}, 1, "groups"),
        ({}, 8, "in_block"),
    ):
        workload = ConvWorkload(dataclasses.replace(base, **change), in_block)
        assert message in refuse(workload, isa)
        assert fft_space.space(workload, isa) == []
        with pytest.raises(ValueError, match=message):
            fft.emit(workload, FFTSchedule((8, 8), 6, 1), isa)
    workload = ConvWorkload(base, 16)
    for schedule, message in (
        (FFTSchedule((8, 8), 6, 2), "does not divide"),
        (FFTSchedule((8, 8), 8, 3), "vector registers"),
        (FFTSchedule((8, 8), 6, 0), "positive"),
        (FFTSchedule((8, 8), 6, 1, False, -1), "negative"),
        (FFTSchedule((8, 12), 6, 1), "expected"),
        (FFTSchedule((1, 32), 6, 1), "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            fft.emit(workload, schedule, isa)
    depthwise = ConvWorkload(dataclasses.replace(base, out_channels=32, groups=32), 16)
    with pytest.raises(ValueError, match="depthwise"):
        fft.emit(depthwise, FFTSchedule((8, 8), 2, 1), isa)


def test_json_round_trip():
    schedule = FFTSchedule((8, 16), 7, 2, True, 3)
    data = json.loads(json.dumps(schedule.to_json()))
    assert data["kernel"] == "fft"
    assert kernels.schedule_from_json(data) == schedule
    assert kernels.algorithm_of(schedule) == "fft"


def test_exact_takes_fourier_kernels_of_few_channels():
    isa = isa_of(target("avx512"))
    for channels, expected in ((64, True), (1024, False)):
        geometry = ConvGeometry(channels, 32, 28, 28, (5, 5), padding=(2, 2, 2, 2))
        found = kernels.spaces(ConvWorkload(geometry, 16), isa, exact=True)
        assert ("fft" in found) is expected


def test_terms_share_tiles_with_channels():
    isa = isa_of(target("avx512"))
    geometry = ConvGeometry(1, 1024, 1024, 1, (512, 1), (4, 1), (254, 0, 254, 0))
    grid = grid_of(ConvWorkload(geometry, 1), FFTSchedule((1, 128), 4, 1), isa)
    assert (grid.axes[1].phases, grid.axes[1].parts, grid.axes[1].reach) == (4, 2, 64)
    assert grid.tiles == 4
