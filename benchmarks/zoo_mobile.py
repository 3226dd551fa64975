"""Networks of depthwise and grouped convolutions, gates and shuffles, as torchvision has them."""

from __future__ import annotations

from collections.abc import Callable

from onnx_graph import Graph
from zoo_layers import CLASSES, classifier, conv_norm, conv_norm_relu

Activation = Callable[[str], str]


def mobilenet_v2(batch: int = 1) -> tuple[Graph, str]:
    """MobileNetV2 (Sandler et al., 2018): expansion, depthwise 3x3, linear projection."""
    g = Graph("mobilenet_v2", batch=batch)
    x = g.relu6(conv_norm(g, "input", 32, 3, 2))
    settings = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    for expansion, filters, count, first_stride in settings:
        for block in range(count):
            channels, y = g.shapes[x][0], x
            hidden, stride = channels * expansion, first_stride if block == 0 else 1
            if expansion > 1:
                y = g.relu6(conv_norm(g, y, hidden, gain=1.0))
            y = g.relu6(conv_norm(g, y, hidden, 3, stride, groups=hidden))
            x = _project(g, x, y, filters, stride)
    return g, classifier(g, g.relu6(conv_norm(g, x, 1280, gain=1.0)))


def mobilenet_v3_large(batch: int = 1) -> tuple[Graph, str]:
    """MobileNetV3-Large (Howard et al., 2019): squeeze and excitation, hard swish."""
    g = Graph("mobilenet_v3_large", batch=batch)
    x = g.hard_swish(conv_norm(g, "input", 16, 3, 2))
    # Kernel, expanded channels, channels, gate, hard swish, stride.
    settings = (
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2),
        (5, 120, 40, 1, 0, 1), (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1),
        (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
        (5, 960, 160, 1, 1, 1),
    )  # fmt: skip
    for kernel, hidden, filters, gated, hard, stride in settings:
        act, y = g.hard_swish if hard else g.relu, x
        if g.shapes[x][0] != hidden:
            y = act(conv_norm(g, y, hidden, gain=1.0))
        y = act(conv_norm(g, y, hidden, kernel, stride, groups=hidden))
        if gated:
            squeezed = _multiple_of_8(hidden // 4)
            y = _gate(g, y, squeezed, g.relu, g.hard_sigmoid)
        x = _project(g, x, y, filters, stride, gain=8.0 if gated else 2.0)
    x = g.flatten(g.global_pool(g.hard_swish(conv_norm(g, x, 960, gain=3.0))))
    return g, g.linear(g.hard_swish(g.linear(x, 1280)), CLASSES)


def efficientnet_b0(batch: int = 1) -> tuple[Graph, str]:
    """EfficientNet-B0 (Tan and Le, 2019): a gate in every block, SiLU."""
    g = Graph("efficientnet_b0", batch=batch)
    x = g.silu(conv_norm(g, "input", 32, 3, 2))
    # Expansion, kernel, stride of the first block, channels, blocks.
    settings = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
    )  # fmt: skip
    for expansion, kernel, first_stride, filters, count in settings:
        for block in range(count):
            channels, y = g.shapes[x][0], x
            hidden, stride = channels * expansion, first_stride if block == 0 else 1
            if expansion > 1:
                y = g.silu(conv_norm(g, y, hidden, gain=1.0))
            y = g.silu(conv_norm(g, y, hidden, kernel, stride, groups=hidden, gain=3.0))
            y = _gate(g, y, channels // 4, g.silu, g.sigmoid)
            x = _project(g, x, y, filters, stride, gain=8.0)  # gates halve what SiLU leaves
    return g, classifier(g, g.silu(conv_norm(g, x, 1280, gain=1.0)))


def shufflenet_v2(batch: int = 1) -> tuple[Graph, str]:
    """ShuffleNetV2 1.0x (Ma et al., 2018): half of the channels pass each block, then shuffled."""
    g = Graph("shufflenet_v2", batch=batch)
    x = g.max_pool(conv_norm_relu(g, "input", 24, 3, 2), 3, 2, 1)

    def branch(x: str, half: int, stride: int) -> str:
        x = conv_norm_relu(g, x, half)
        x = conv_norm(g, x, half, 3, stride, groups=half)
        return g.relu(conv_norm(g, x, half, gain=1.0))

    for filters, count in ((116, 4), (232, 8), (464, 4)):
        half = filters // 2
        for block in range(count):
            if block == 0:
                channels = g.shapes[x][0]
                left = conv_norm(g, x, channels, 3, 2, groups=channels)
                left = g.relu(conv_norm(g, left, half, gain=1.0))
                right = branch(x, half, 2)
            else:
                left, right = g.channels(x, 0, half), branch(g.channels(x, half, filters), half, 1)
            x = g.shuffle(g.concat([left, right]), 2)
    return g, classifier(g, conv_norm_relu(g, x, 1024))


def regnet_y_400mf(batch: int = 1) -> tuple[Graph, str]:
    """RegNetY-400MF (Radosavovic et al., 2020): groups of eight channels, a gate in every block."""
    g = Graph("regnet_y_400mf", batch=batch)
    x = conv_norm_relu(g, "input", 32, 3, 2)
    for width, depth in ((48, 1), (104, 3), (208, 6), (440, 6)):
        for block in range(depth):
            channels, stride = g.shapes[x][0], 2 if block == 0 else 1
            shortcut = conv_norm(g, x, width, 1, stride) if block == 0 else x
            y = conv_norm_relu(g, x, width)
            y = g.relu(conv_norm(g, y, width, 3, stride, groups=width // 8))
            y = _gate(g, y, round(channels / 4), g.relu, g.sigmoid)
            x = g.relu(g.add(conv_norm(g, y, width, scale=0.3), shortcut))
    return g, classifier(g, x)


def _gate(g: Graph, x: str, squeezed: int, inner: Activation, outer: Activation) -> str:
    """Squeeze and excitation (Hu et al., 2018): a factor a channel, from the means of all."""
    y = inner(g.conv(g.global_pool(x), squeezed, 1))
    return g.multiply(x, outer(g.conv(y, g.shapes[x][0], 1)))


def _project(g: Graph, x: str, y: str, filters: int, stride: int, gain: float = 2.0) -> str:
    """The linear end of an inverted residual, with ``x`` added where the shapes allow it."""
    residual = stride == 1 and g.shapes[x][0] == filters
    y = conv_norm(g, y, filters, gain=gain, scale=0.3 if residual else 1.0)
    return g.add(x, y) if residual else y


def _multiple_of_8(channels: int) -> int:
    """The nearest multiple of 8 that is no tenth less."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
