"""What lowering makes of operators that gate, shuffle, enlarge and bend maps."""

from __future__ import annotations

import numpy as np
import pytest
from graph_support import RNG, Graph, lowered
from hypothesis import given, settings
from hypothesis import strategies as st


def shuffle(g, x, shape, groups, axes=(0, 2, 1, 3, 4)):
    n, c, h, w = shape
    split = g.op("Reshape", x, g.constant((n, groups, c // groups, h, w), np.int64))
    swapped = g.op("Transpose", split, perm=axes)
    return split, g.op("Reshape", swapped, g.constant(shape, np.int64))


@pytest.mark.parametrize("batch", [1, 2])
def test_shuffled_channels_are_copied_once_for_each_reader(batch):
    g = Graph(batch, 3, 18, 14)
    x = g.op("Relu", g.conv("x", 3, 40, strides=[2, 2]))
    for _ in range(3):
        left = g.slice(x, [0], [20], [1], [1])
        right = g.slice(x, [20], [40], [1], [1])
        right = g.op("Relu", g.conv(right, 20, 20, 1))
        _, x = shuffle(g, g.op("Concat", left, right, axis=1), (batch, 40, 9, 7), 2)
    found, _ = lowered(g, g.conv(x, 40, 8, 1))
    # The first half is no whole number of blocks; what passes by is never copied by itself.
    assert found["lowrank_gather"] == 4
    assert not {"reshape", "permute_dims", "strided_slice", "concat", "take"} & set(found)
    assert found["lowrank_block"] == 0 and found["lowrank_unblock"] == 1


def test_transpositions_that_shuffle_no_channels_or_are_read_elsewhere_stay():
    for axes, read in (((0, 2, 1, 3, 4), True), ((0, 1, 2, 4, 3), False)):
        g = Graph(1, 20, 6, 6)
        split, x = shuffle(g, g.conv("x", 20, 20), (1, 20, 6, 6), 4, axes)
        if read:
            x = g.op("Add", x, g.op("Reshape", split, g.constant((1, 20, 6, 6), np.int64)))
        found, _ = lowered(g, x)
        assert found["permute_dims"] == 1 and found["lowrank_gather"] == 0


def test_channels_in_any_order_are_one_copy():
    g = Graph(1, 16, 5, 5)
    order = RNG.permutation(37)[:30]
    x = g.op("Gather", g.conv("x", 16, 37), g.constant(order, np.int64), axis=1)
    found, _ = lowered(g, g.conv(x, 30, 16))
    assert found["lowrank_gather"] == 1 and found["take"] == 0


@st.composite
def transposed(draw):
    """The attributes of a transposed convolution, and its filters."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    strides = draw(pair)
    kernel = [draw(st.integers(1, 5)) for _ in range(2)]
    pads = [draw(st.integers(0, min(2, kernel[i % 2] - 1))) for i in range(4)]
    extra = [draw(st.integers(0, step - 1)) for step in strides]
    return draw(st.sampled_from([3, 20, 32])), {
        "strides": strides, "kernel_shape": kernel, "pads": pads, "output_padding": extra
    }  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(transposed(), st.integers(1, 2))
def test_transposed_convolutions_are_convolutions_whose_phases_are_interleaved(case, batch):
    filters, attributes = case
    g = Graph(batch, 8, 6, 7)
    weight = g.constant(RNG.standard_normal((24, filters, *attributes["kernel_shape"])) / 10)
    x = g.op("Relu", g.conv("x", 8, 24))
    x = g.op("ConvTranspose", x, weight, g.constant(RNG.standard_normal(filters)), **attributes)
    found, epilogues = lowered(g, g.op("Tanh", x))
    assert not {"add", "tanh", "lowrank_elementwise"} & set(found)
    assert found["nn.conv2d_transpose"] + found["lowrank_interleave"] == 1
    if attributes["strides"] == (2, 2) and max(attributes["pads"]) <= 1:
        assert found["lowrank_interleave"] == 1 and len(epilogues) == 2


def test_transposed_convolutions_in_groups_or_with_holes_stay():
    for attributes, filters in (({"group": 2}, 8), ({"dilations": [2, 2]}, 16)):
        g = Graph(1, 8, 6, 6)
        x = g.conv("x", 8, 16)
        weight = g.constant(RNG.standard_normal((16, filters, 3, 3)) / 10)
        found, _ = lowered(g, g.op("ConvTranspose", x, weight, strides=[2, 2], **attributes))
        assert found["nn.conv2d_transpose"] == 1


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
@pytest.mark.parametrize("filters", [3, 16])
def test_depth_to_space_is_one_copy_with_what_follows(mode, filters):
    g = Graph(2, 8, 6, 5)
    x = g.op("Tanh", g.op("DepthToSpace", g.conv("x", 8, 9 * filters), blocksize=3, mode=mode))
    found, _ = lowered(g, x)
    assert found["lowrank_conv2d"] == found["lowrank_interleave"] == 1
    assert not {"reshape", "permute_dims", "tanh", "lowrank_elementwise"} & set(found)


RESIZED = {
    "nearest": {"mode": "nearest", "nearest_mode": "floor",
                "coordinate_transformation_mode": "asymmetric"},
    "nearest half": {"mode": "nearest", "coordinate_transformation_mode": "half_pixel"},
    "linear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "corners": {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    "pytorch": {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
}  # fmt: skip


@pytest.mark.parametrize("kind", RESIZED)
@pytest.mark.parametrize("sizes", [(14, 10), (21, 13), (3, 4), (7, 5)])
def test_maps_are_resized_in_blocks(kind, sizes):
    g = Graph(2, 8, 7, 5)
    target = g.constant((2, 20, *sizes), np.int64)
    x = g.op("Resize", g.conv("x", 8, 20), "", "", target, **RESIZED[kind])
    lateral = g.op("Resize", g.conv("x", 8, 20), "", "", target, **RESIZED["nearest"])
    found, epilogues = lowered(g, g.op("Add", x, g.conv(lateral, 20, 20, 1)))
    assert found["image.resize2d"] == 0 and ("bias", "residual") in epilogues
    assert found["lowrank_resize"] == 2


def test_cubic_resizing_stays():
    g = Graph(1, 8, 7, 5)
    x = g.op(
        "Resize", g.conv("x", 8, 16), "", "", g.constant((1, 16, 9, 9), np.int64), mode="cubic"
    )
    found, _ = lowered(g, x)
    assert found["image.resize2d"] == 1


def test_slopes_of_prelu_are_steps():
    g = Graph(1, 16, 8, 8)
    x = g.op("PRelu", g.conv("x", 16, 20), g.constant(RNG.uniform(-0.5, 0.5, (20, 1, 1))))
    x = g.op("PRelu", g.conv(x, 20, 16), g.constant([0.25]))
    x = g.op("PRelu", g.conv(x, 16, 16), g.constant(RNG.uniform(0, 0.5, (16, 8, 8))))
    found, epilogues = lowered(g, g.conv(x, 16, 16))
    assert epilogues[:2] == [("bias", "prelu"), ("bias", "leaky_relu:0.25")]
    assert found["nn.prelu"] + found["multiply"] + found["where"] <= 2


def test_activations_of_what_is_in_no_blocks_are_kernels_too():
    g = Graph(1, 16, 8, 8)
    parts = [g.op("Flatten", g.conv("x", 16, filters), axis=2) for filters in (6, 10)]
    x = g.op("Tanh", g.op("Sigmoid", g.op("Concat", *parts, axis=0)))
    g2 = Graph(1, 3, 5, 5)
    y = g2.op("Sigmoid", g2.op("Mul", "x", g2.constant(RNG.standard_normal((5, 5)))))
    for graph, out, count in ((g, x, 2), (g2, g2.conv(y, 3, 8), 1)):
        found, _ = lowered(graph, out)
        assert found["lowrank_activation"] == count and not {"sigmoid", "tanh"} & set(found)


@pytest.mark.parametrize("batch", [1, 3])
def test_squeeze_and_excitation_stays_in_blocks(batch):
    g = Graph(batch, 20, 9, 7)
    x = g.op("HardSwish", g.conv("x", 20, 40))
    for first in (True, False):
        narrow = g.op("Relu", g.conv(g.op("GlobalAveragePool", x), 40, 10, 1))
        gate = g.op("HardSigmoid", g.conv(narrow, 10, 40, 1), alpha=1 / 6, beta=0.5)
        x = g.op("Mul", gate, x) if first else g.op("Mul", x, gate)
        x = g.op("Add", g.op("Relu", g.conv(x, 40, 40, 1)), x)
    found, epilogues = lowered(g, x)
    assert not {"multiply", "add"} & set(found)
    assert found["lowrank_block"] == found["lowrank_unblock"] == 1
    assert found["lowrank_elementwise"] == 2
    assert sum("residual" in steps for steps in epilogues) == 2


def test_a_gate_joins_the_convolution_before_it():
    g = Graph(2, 24, 6, 6)
    gate = g.op("Sigmoid", g.conv(g.op("GlobalAveragePool", "x"), 24, 24, 1))
    found, epilogues = lowered(g, g.op("Mul", g.conv("x", 24, 24), gate))
    assert ("bias", "gate") in epilogues
    assert not {"multiply", "lowrank_elementwise"} & set(found)


def test_products_that_are_no_gates_stay():
    g = Graph(1, 16, 6, 6)
    x, y = g.conv("x", 16, 16), g.conv("x", 16, 1)  # a value a pixel
    found, _ = lowered(g, g.op("Mul", g.op("Mul", x, y), g.conv("x", 16, 16)))
    assert found["multiply"] == 2


def test_a_flat_activation_that_divides_is_one_step():
    g = Graph(1, 16, 8, 8)
    x = g.op("Flatten", g.op("GlobalAveragePool", g.conv("x", 16, 32)))
    x = g.op("Gemm", x, g.constant(RNG.standard_normal((32, 48)) / 6))
    gate = g.op("Clip", g.op("Add", x, g.constant(3.0)), g.constant(0.0), g.constant(6.0))
    x = g.op("Mul", x, g.op("Div", gate, g.constant(6.0)))
    found, epilogues = lowered(g, g.op("Gemm", x, g.constant(RNG.standard_normal((48, 10)) / 7)))
    assert any("hard_swish" in steps for steps in epilogues)
    assert not {"add", "divide", "multiply", "clip"} & set(found)
