"""What lowering makes of operators around convolutions: counts of kernels, and their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import RNG, Graph, lowered
from helpers import operators
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target


def test_a_residual_network_is_as_many_kernels_as_convolutions():
    g = Graph(1, 3, 20, 20)
    x = g.op("Relu", g.conv("x", 3, 32, 7, strides=[2, 2]))
    x = g.op("MaxPool", g.pad(x, 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=[3, 3], strides=[2, 2])
    for stride, channels in ((1, 32), (2, 32)):
        y = g.op("Relu", g.conv(x, channels, 64, strides=[stride, stride]))
        y = g.conv(y, 64, 64)
        short = g.conv(x, channels, 64, 1, strides=[stride, stride])
        x = g.op("Relu", g.op("Add", y, short))
        x = g.conv(x, 64, 32, 1)
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    out = g.op("Gemm", x, g.constant(RNG.standard_normal((32, 10)) / 6))
    found, epilogues = lowered(g, out)
    assert found["lowrank_conv2d"] == 1 + 4 + 4 + 1
    assert epilogues.count(("bias", "residual", "relu")) == 2
    # The input is read as it is, and ten numbers come out of their block.
    assert found["lowrank_block"] == 0 and found["lowrank_unblock"] == 1
    assert not {"nn.pad", "add", "nn.relu", "lowrank_gather", "lowrank_elementwise"} & set(found)


def test_pads_join_convolutions_and_stay_where_zeros_could_win_a_maximum():
    g = Graph(1, 3, 9, 9)
    x = g.conv(g.pad("x", 0, 0, 1, 2, 0, 0, 2, 1), 3, 16, pads=[0, 1, 1, 0])
    x = g.op("MaxPool", g.pad(x, 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=[3, 3], strides=[2, 2])
    found, _ = lowered(g, x)
    assert found["nn.pad"] == 0
    assert found["lowrank_gather"] == 1  # x may be negative everywhere


def test_shortcuts_by_slice_and_pad_are_one_copy():
    g = Graph(1, 16, 12, 12)
    a = g.op("Relu", g.conv("x", 16, 16))
    b = g.conv(a, 16, 32, strides=[2, 2])
    short = g.slice(a, [0, 0], [12, 12], [2, 3], [2, 2])
    out = g.op("Relu", g.op("Add", b, g.pad(short, 0, 8, 0, 0, 0, 8, 0, 0)))
    found, epilogues = lowered(g, out)
    assert found["lowrank_gather"] == 1 and ("bias", "residual", "relu") in epilogues


def test_concatenation_and_slices_stay_in_blocks():
    g = Graph(1, 16, 8, 8)
    parts = [g.op("Relu", g.conv("x", 16, filters, 1)) for filters in (16, 24, 40)]
    x = g.op("Concat", *parts, axis=1)
    x = g.op("Concat", x, g.slice(x, [3], [9], [1], [1]), axis=1)
    x = g.op("Relu", g.op("Mul", x, g.constant(RNG.standard_normal((1, 86, 1, 1)))))
    found, _ = lowered(g, g.conv(x, 86, 16, 1))
    assert found["lowrank_gather"] == 1  # which multiplies and clips, too
    assert found["lowrank_block"] == 1 and found["lowrank_unblock"] == 1
    assert not {"concat", "strided_slice", "multiply", "lowrank_elementwise"} & set(found)


def test_a_growing_concatenation_is_copied_once_for_each_reader():
    g = Graph(2, 32, 10, 9)
    x = g.op("Relu", g.conv("x", 32, 48))
    for channels in (48, 64, 80):
        vector = g.constant(RNG.standard_normal((1, channels, 1, 1)))
        y = g.conv(g.op("Relu", g.op("Add", x, vector)), channels, 16)
        x = g.op("Concat", x, y, axis=1)
    found, epilogues = lowered(g, g.conv(x, 96, 16, 1))
    # The first reader is of no concatenation; the last, a convolution, takes no steps before it.
    assert found["lowrank_elementwise"] == 1 and found["lowrank_gather"] == 3
    assert len(epilogues) == 5


def test_convolutions_write_their_parts_of_a_concatenation():
    g = Graph(1, 16, 9, 8)
    parts = [g.op("Relu", g.conv("x", 16, f)) for f in (32, 16)]
    parts.append(g.op("MaxPool", "x", kernel_shape=[3, 3], pads=[1] * 4))
    parts.append(g.conv(g.conv("x", 16, 16, 1), 16, 10))
    x = g.op("Concat", *parts, axis=1)
    found, _ = lowered(g, g.conv(g.op("MaxPool", x, kernel_shape=[2, 2]), 74, 16))
    assert found["lowrank_conv2d"] == 5
    assert found["lowrank_gather"] == 1  # of what pooling made


def test_what_others_read_too_is_copied_into_a_concatenation():
    g = Graph(1, 16, 9, 8)
    a, b = (g.op("Relu", g.conv("x", 16, 16)) for _ in range(2))
    x = g.conv(g.op("Concat", a, b, a, axis=1), 48, 16)
    y = g.conv(g.op("Concat", g.op("Concat", a, g.conv("x", 16, 32), axis=1), x, axis=1), 64, 16)
    found, _ = lowered(g, g.op("Add", y, b))
    assert found["lowrank_conv2d"] == 5


def test_blocks_of_channels_are_read_where_they_are():
    g = Graph(1, 16, 9, 8)
    x = g.op("Relu", g.conv("x", 16, 72))
    halves = [g.slice(x, [a], [b], [1], [1]) for a, b in ((16, 48), (48, 72), (20, 52))]
    halves = [g.conv(half, c, 16) for half, c in zip(halves, (32, 24, 32), strict=True)]
    found, _ = lowered(g, g.op("Add", g.op("Add", *halves[:2]), halves[2]))
    assert found["lowrank_conv2d"] == 4
    assert found["lowrank_gather"] == (1 if lanes() > 4 else 0)


def lanes() -> int:
    return isa_of(host_target()).lanes


def test_a_residual_is_added_in_the_convolution_rather_than_in_a_copy():
    g = Graph(1, 16, 8, 8)
    parts = [g.conv("x", 16, 16, 1), g.conv("x", 16, 32)]
    x = g.op("Concat", *parts, axis=1)
    found, epilogues = lowered(g, g.op("Add", x, g.conv("x", 16, 48)))
    assert found["lowrank_gather"] == 0 and ("bias", "residual") in epilogues


def test_activations_join_kernels_however_they_are_written():
    g = Graph(1, 16, 8, 8)
    number = g.constant
    x = g.op("Clip", g.conv("x", 16, 16), number(-0.5), number(6.0))
    x = g.op("HardSwish", g.conv(x, 16, 16))
    x = g.op("LeakyRelu", g.conv(x, 16, 16), alpha=0.1)
    x = g.conv(x, 16, 16)
    x = g.op("Mul", x, g.op("Sigmoid", x))
    x = g.conv(x, 16, 16)
    erf = g.op("Add", g.op("Erf", g.op("Div", x, number(2**0.5))), number(1.0))
    x = g.op("Mul", g.op("Mul", x, erf), number(0.5))
    x = g.op("Gelu", g.conv(x, 16, 16))
    x = g.op("HardSigmoid", g.conv(x, 16, 16), alpha=1 / 6, beta=0.5)
    x = g.conv(x, 16, 16)
    gate = g.op("Clip", g.op("Add", x, number(3.0)), number(0.0), number(6.0))
    x = g.op("Mul", x, g.op("Div", gate, number(6.0)))
    found, epilogues = lowered(g, x)
    assert found["lowrank_conv2d"] == 8
    assert set(found) <= {"lowrank_conv2d", "lowrank_block", "lowrank_unblock"}
    names = [[step.partition(":")[0] for step in steps[1:]] for steps in epilogues]
    assert names[1][0] == names[7][0] == "hard_swish"
    assert [steps[0] for steps in names[2:6]] == ["leaky_relu", "silu", "gelu", "gelu"]


def test_an_activation_whose_parts_are_read_elsewhere_stays_spelt_out():
    g = Graph(1, 16, 8, 8)
    x = g.conv("x", 16, 16)
    gate = g.op("Sigmoid", x)
    _, epilogues = lowered(g, g.op("Add", g.op("Mul", x, gate), gate))
    assert not any("silu" in steps for steps in epilogues)


@pytest.mark.parametrize("last", [False, True])
def test_flattened_maps_reach_the_dense_layer_in_blocks(last):
    g = Graph(2, 3, 10, 8)
    x = g.op("MaxPool", g.op("Relu", g.conv("x", 3, 16)), kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("Transpose", x, perm=[0, 2, 3, 1]) if last else x
    weight = g.constant(RNG.standard_normal((320, 32)) / 18)
    found, _ = lowered(g, g.op("MatMul", g.op("Flatten", x), weight))
    assert found["lowrank_conv2d"] == 2
    assert set(found) == {"lowrank_conv2d", "lowrank_max_pool", "reshape"}


def test_channels_last_regions_stay_in_blocks():
    g = Graph(1, 3, 12, 12)
    short = x = g.conv("x", 3, 32, 4, strides=[4, 4], pads=[0] * 4)
    x = g.op("Transpose", g.conv(x, 32, 32), perm=[0, 2, 3, 1])
    scale, shift = (g.constant(RNG.standard_normal(32)) for _ in range(2))
    x = g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-6)
    for rows, columns in ((32, 64), (64, 32)):
        x = g.op("MatMul", x, g.constant(RNG.standard_normal((rows, columns)) / rows**0.5))
        x = g.op("Add", x, g.constant(RNG.standard_normal(columns)))
        x = g.op("Gelu", x) if columns == 64 else x
    x = g.op("Mul", x, g.constant(RNG.standard_normal(32)))
    x = g.op("Add", g.op("Transpose", x, perm=[0, 3, 1, 2]), short)
    found, epilogues = lowered(g, x)
    assert found["lowrank_conv2d"] == 4 and found["lowrank_layer_norm"] == 1
    assert set(found) <= {"lowrank_conv2d", "lowrank_layer_norm", "lowrank_unblock"}
    assert ("bias", "gelu") in epilogues and ("bias", "residual") in epilogues


def test_functions_that_only_look_like_pads_are_left_alone():
    model = Graph(1, 3, 6, 6)
    mod = load_model(model.model(model.op("Pad", "x", model.constant([0] * 8, np.int64))))
    assert operators(normalise(mod))["nn.pad"] <= 1
    reflected = Graph(1, 3, 6, 6)
    widths = reflected.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    found, _ = lowered(reflected, reflected.op("Pad", "x", widths, mode="reflect"))
    assert found["nn.pad"] == 0


@pytest.mark.parametrize(
    ("batch", "pieces", "size", "slices"), [(8, 4, 18, 2), (7, 7, 18, 5), (8, 4, 20, 0)]
)
def test_a_batch_whose_maps_are_large_runs_in_pieces(batch, pieces, size, slices, monkeypatch):
    # A cache of six maps: two images at a time, or one, where two do not divide the batch.
    monkeypatch.setattr("tvm_lowrank.passes.split_batch._CACHE_BYTES", 6 * 32 * size * size * 4)
    g = Graph(batch, 3, size, size)
    x = g.op("Relu", g.conv("x", 3, 32))
    x = g.op("Relu", g.op("Add", g.conv(x, 32, 32), x))
    x = g.op("MaxPool", g.conv(x, 32, 32, strides=[2, 2]), kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("Flatten", g.op("GlobalAveragePool", g.op("Relu", g.conv(x, 32, 16))))
    found, _ = lowered(g, g.op("MatMul", x, g.constant(RNG.standard_normal((16, 10)))))
    assert found["lowrank_conv2d"] == 2 * pieces + 3
    # Pieces that start on a line of the cache are read where they are in the input.
    assert found["strided_slice"] == slices and found["concat"] == 0
    # Ten numbers come out of their block, once.
    assert found["lowrank_elementwise"] == 0 and found["lowrank_unblock"] == 1


def test_what_mixes_images_keeps_a_batch_together(monkeypatch):
    monkeypatch.setattr("tvm_lowrank.passes.split_batch._CACHE_BYTES", 1000)
    g = Graph(2, 3, 18, 18)
    x = g.op("Concat", "x", "x", axis=0)
    found, _ = lowered(g, g.conv(g.op("Relu", g.conv(x, 3, 32)), 32, 16))
    assert found["lowrank_conv2d"] == 2
