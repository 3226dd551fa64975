"""Well-known networks as ONNX files: real shapes and operators, random weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx_graph import Graph
from zoo_layers import CLASSES, classifier, conv_norm_relu
from zoo_mobile import (
    efficientnet_b0,
    mobilenet_v2,
    mobilenet_v3_large,
    regnet_y_400mf,
    shufflenet_v2,
)


def vgg16(batch: int = 1) -> tuple[Graph, str]:
    """VGG-16 (Simonyan and Zisserman, 2014, configuration D), without batch norm."""
    g, x = Graph("vgg16", batch=batch), "input"
    for filters, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x = g.relu(g.conv(x, filters, 3))
        x = g.max_pool(x, 2, 2)
    return g, _perceptron(g, x)


def alexnet(batch: int = 1) -> tuple[Graph, str]:
    """AlexNet in one column (Krizhevsky, 2014), as torchvision has it."""
    g = Graph("alexnet", batch=batch)
    return g, _perceptron(g, _alexnet_features(g))


def alexnet_convolutions(batch: int = 1) -> tuple[Graph, str]:
    """AlexNet up to its last pooling: its dense layers wait for memory, its convolutions do not."""
    g = Graph("alexnet_convolutions", batch=batch)
    return g, _alexnet_features(g)


def _alexnet_features(g: Graph) -> str:
    x = g.max_pool(g.relu(g.conv("input", 64, 11, 4, 2)), 3, 2)
    x = g.max_pool(g.relu(g.conv(x, 192, 5)), 3, 2)
    for filters in (384, 256, 256):
        x = g.relu(g.conv(x, filters, 3))
    return g.max_pool(x, 3, 2)


def _perceptron(g: Graph, x: str) -> str:
    x = g.flatten(x)
    for features in (4096, 4096):
        x = g.relu(g.linear(x, features))
    return g.linear(x, CLASSES)


def resnet18(batch: int = 1) -> tuple[Graph, str]:
    """ResNet-18 (He et al., 2015), two 3x3 convolutions a block."""

    def branch(g: Graph, x: str, width: int, stride: int) -> str:
        x = conv_norm_relu(g, x, width, 3, stride)
        return g.norm(g.conv(x, width, 3, bias=False), gain=0.3)

    return _resnet("resnet18", batch, branch, (2, 2, 2, 2), 1)


def resnet50(batch: int = 1) -> tuple[Graph, str]:
    """ResNet-50 (He et al., 2015), bottlenecks with the stride in the 3x3 convolution."""

    def branch(g: Graph, x: str, width: int, stride: int) -> str:
        x = conv_norm_relu(g, conv_norm_relu(g, x, width, 1), width, 3, stride)
        return g.norm(g.conv(x, 4 * width, 1, bias=False), gain=0.3)

    return _resnet("resnet50", batch, branch, (3, 4, 6, 3), 4)


def _resnet(
    name: str,
    batch: int,
    branch: Callable[[Graph, str, int, int], str],
    depths: tuple[int, ...],
    expansion: int,
) -> tuple[Graph, str]:
    g = Graph(name, batch=batch)
    x = g.max_pool(conv_norm_relu(g, "input", 64, 7, 2), 3, 2, 1)
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = x
            if g.shapes[x][0] != expansion * width:
                shortcut = g.norm(g.conv(x, expansion * width, 1, stride, bias=False))
            x = g.relu(g.add(branch(g, x, width, stride), shortcut))
    return g, classifier(g, x)


def googlenet(batch: int = 1) -> tuple[Graph, str]:
    """GoogLeNet (Szegedy et al., 2014) as torchvision has it: batch norm, 3x3 for 5x5, one head."""
    g = Graph("googlenet", batch=batch)
    x = g.max_pool(conv_norm_relu(g, "input", 64, 7, 2), 3, 2, ceil=True)
    x = conv_norm_relu(g, conv_norm_relu(g, x, 64, 1), 192, 3)
    x = g.max_pool(x, 3, 2, ceil=True)
    blocks: tuple[tuple[int, ...], ...] = (
        (64, 96, 128, 16, 32, 32),
        (128, 128, 192, 32, 96, 64),
        (),
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
        (),
        (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    )
    for index, widths in enumerate(blocks):
        if not widths:
            x = g.max_pool(x, 3 if index < 5 else 2, 2, ceil=True)
            continue
        one, reduce3, three, reduce5, five, pooled = widths
        x = g.concat(
            [
                conv_norm_relu(g, x, one, 1),
                conv_norm_relu(g, conv_norm_relu(g, x, reduce3, 1), three, 3),
                conv_norm_relu(g, conv_norm_relu(g, x, reduce5, 1), five, 3),
                conv_norm_relu(g, g.max_pool(x, 3, 1, 1), pooled, 1),
            ]
        )
    return g, classifier(g, x)


def densenet121(batch: int = 1) -> tuple[Graph, str]:
    """DenseNet-121 (Huang et al., 2016), growth 32, norm and ReLU before each convolution."""
    g = Graph("densenet121", batch=batch)
    x = g.max_pool(conv_norm_relu(g, "input", 64, 7, 2), 3, 2, 1)
    for index, depth in enumerate((6, 12, 24, 16)):
        for _ in range(depth):
            y = g.conv(g.relu(g.norm(x)), 128, 1, bias=False)
            x = g.concat([x, g.conv(g.relu(g.norm(y)), 32, 3, bias=False)])
        x = g.relu(g.norm(x))
        if index < 3:
            x = g.average_pool(g.conv(x, g.shapes[x][0] // 2, 1, bias=False), 2, 2)
    return g, classifier(g, x)


def super_resolution(batch: int = 1) -> tuple[Graph, str]:
    """VDSR (Kim et al., 2015) in colour: twenty 3x3 convolutions at 128x128, the input added."""
    g = Graph("super_resolution", (3, 128, 128), batch)
    x = g.relu(g.conv("input", 64, 3, gain=1.0))
    for _ in range(18):
        x = g.relu(g.conv(x, 64, 3))
    return g, g.add(g.conv(x, 3, 3, gain=0.02), "input")


def convnext_tiny(batch: int = 1) -> tuple[Graph, str]:
    """ConvNeXt-T (Liu et al., 2022) as PyTorch exports it: MatMul on channels last, GELU by Erf."""
    g = Graph("convnext_tiny", batch=batch)

    def norm(x: str) -> str:
        return g.transpose(g.layer_norm(g.transpose(x, (1, 2, 0))), (2, 0, 1))

    x = "input"
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        x = norm(g.conv(x, 96, 4, 4, 0, gain=1.0)) if x == "input" else x
        if g.shapes[x][0] != width:
            x = g.conv(norm(x), width, 2, 2, 0, gain=1.0)
        for _ in range(depth):
            y = g.transpose(g.conv(x, width, 7, groups=width, gain=1.0), (1, 2, 0))
            y = g.gelu(g.pointwise(g.layer_norm(y), 4 * width))
            y = g.transpose(g.pointwise(y, width, gain=2.0), (2, 0, 1))
            x = g.add(g.scale(y, 0.05, 0.3), x)
    return g, g.linear(g.flatten(norm(g.global_pool(x))), CLASSES)


NETWORKS: dict[str, Callable[[int], tuple[Graph, str]]] = {
    "vgg16": vgg16,
    "alexnet": alexnet,
    "alexnet_convolutions": alexnet_convolutions,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "googlenet": googlenet,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3_large,
    "efficientnet_b0": efficientnet_b0,
    "shufflenet_v2": shufflenet_v2,
    "regnet_y_400mf": regnet_y_400mf,
    "densenet121": densenet121,
    "super_resolution": super_resolution,
    "convnext_tiny": convnext_tiny,
}


def cache_folder() -> Path:
    """Where models and tuning records are kept: ``TVM_LOWRANK_CACHE``, or a temporary folder."""
    given = os.environ.get("TVM_LOWRANK_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / "tvm_lowrank-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def network_file(name: str, batch: int = 1) -> Path:
    """The ONNX file of a network for a batch, made if it is not in the cache.

    Raises KeyError for a name that is not in `NETWORKS`.
    """
    graph, output = NETWORKS[name](batch)
    path = cache_folder() / f"{name}-batch{batch}-{graph.digest}.onnx"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            fresh = Path(file.name)
        try:
            onnx.save(graph.model(output), fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    return path
