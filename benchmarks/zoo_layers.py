"""What the networks of the zoo share."""

from __future__ import annotations

from onnx_graph import Graph

CLASSES = 1000


def conv_norm(
    g: Graph,
    x: str,
    filters: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    gain: float = 2.0,
    scale: float = 1.0,
) -> str:
    """A convolution without bias and batch norm; ``gain`` is the weights', ``scale`` the norm's."""
    x = g.conv(x, filters, kernel, stride, groups=groups, bias=False, gain=gain)
    return g.norm(x, gain=scale)


def conv_norm_relu(g: Graph, x: str, filters: int, kernel: int = 1, stride: int = 1) -> str:
    """The same with ReLU."""
    return g.relu(conv_norm(g, x, filters, kernel, stride))


def classifier(g: Graph, x: str) -> str:
    """Mean of each channel, then a dense layer."""
    return g.linear(g.flatten(g.global_pool(x)), CLASSES)
