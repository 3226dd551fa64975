"""Shared by the tests: a small network with every kind of layer, and the host's threads."""

from __future__ import annotations

import math

import tvm_lowrank  # noqa: F401 - before NumPy: see `tvm_lowrank.threads.let_blas_rest`

# isort: split
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def pytest_configure() -> None:
    from tvm_lowrank.threads import set_threads

    set_threads()


@pytest.fixture(scope="session", autouse=True)
def one_machine():
    """However busy, the machine stays the one of its records: no test depends on its speed.

    So races need not tell libraries apart.
    """
    from tvm_lowrank.cost import machine
    from tvm_lowrank.planner import verify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "ANOTHER_MACHINE", math.inf)
        patch.setattr(machine, "READING_BYTES", ())  # half a gigabyte, and seconds
        patch.setattr(verify, "RACE_SECONDS", 0.1)
        yield


def small_network(seed: int = 0, classes: int = 10, batch: int | str = "N") -> onnx.ModelProto:
    """Convolutions 5x5, 3x3 (stride 1 and 2, dilated), 1x1 and depthwise; batch norm; residuals."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []

    def tensor(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def conv(x, name, c, f, k, bias=False, **attrs):
        c = c // attrs.get("group", 1)
        scale = np.sqrt(2 / (c * k * k))
        inputs = [x, tensor(f"{name}.w", rng.normal(0, scale, (f, c, k, k)))]
        if bias:
            inputs.append(tensor(f"{name}.b", rng.normal(0, 0.1, f)))
        nodes.append(helper.make_node("Conv", inputs, [name], kernel_shape=[k, k], **attrs))
        return name

    def norm(x, f):
        parts = [
            tensor(f"{x}.gamma", rng.uniform(0.5, 1.5, f)),
            tensor(f"{x}.beta", rng.normal(0, 0.1, f)),
            tensor(f"{x}.mean", rng.normal(0, 0.1, f)),
            tensor(f"{x}.var", rng.uniform(0.5, 1.5, f)),
        ]
        nodes.append(helper.make_node("BatchNormalization", [x, *parts], [f"{x}.bn"]))
        return f"{x}.bn"

    def op(kind, inputs, name, **attrs):
        nodes.append(helper.make_node(kind, inputs, [name], **attrs))
        return name

    x = op("Relu", [norm(conv("input", "c0", 3, 24, 5, pads=[2, 2, 2, 2]), 24)], "r0")
    y = op("Relu", [norm(conv(x, "c1", 24, 24, 3, pads=[1, 1, 1, 1]), 24)], "r1")
    y = norm(conv(y, "c2", 24, 24, 3, pads=[2, 2, 2, 2], dilations=[2, 2]), 24)
    x = op("Relu", [op("Add", [y, x], "a0")], "r2")
    x = op("MaxPool", [x], "p0", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = op("Relu", [conv(x, "c3", 24, 32, 3, True, pads=[1, 0, 1, 1], strides=[2, 2])], "r3")
    x = norm(x, 32)  # after the activation: it cannot join the convolution before
    x = op("Relu", [conv(x, "c4", 32, 32, 3, True, pads=[1, 1, 1, 1], group=32)], "r4")
    x = op("Relu", [conv(x, "c5", 32, 48, 1, True)], "r5")
    x = op("GlobalAveragePool", [x], "gap")
    x = op("Flatten", [x], "flat")
    x = op(
        "Gemm",
        [
            x,
            tensor("fc.w", rng.normal(0, 0.3, (classes, 48))),
            tensor("fc.b", rng.normal(0, 0.1, classes)),
        ],
        "output",
        transB=1,
    )
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 18, 18])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, classes])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def small() -> onnx.ModelProto:
    return small_network()
