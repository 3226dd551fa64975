"""Small ONNX graphs, and what lowering makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import operators, relative, run
from onnx import TensorProto, helper, numpy_helper
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions, survey
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target

RNG = np.random.default_rng(0)


class Graph:
    """A small ONNX graph under construction; every method gives the name of its result."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value, dtype=np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, channels: int, filters: int, size: int = 3, **attributes) -> str:
        weight = RNG.standard_normal((filters, channels, size, size)) / (size * channels**0.5)
        bias = self.constant(RNG.standard_normal(filters))
        pads = [size // 2] * 4
        return self.op("Conv", x, self.constant(weight), bias, **{"pads": pads, **attributes})

    def pad(self, x: str, *widths: int) -> str:
        return self.op("Pad", x, self.constant(widths, np.int64))

    def slice(self, x: str, start, stop, axes, step) -> str:
        return self.op("Slice", x, *(self.constant(v, np.int64) for v in (start, stop, axes, step)))

    def model(self, out: str) -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "small",
            [value("x", TensorProto.FLOAT, self.shape)],
            [value(out, TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def lowered(graph: Graph, out: str):
    """Operators of the lowered graph, after its result was found equal to ONNX Runtime's."""
    runtime = pytest.importorskip("onnxruntime")
    model = graph.model(out)
    x = RNG.standard_normal(graph.shape).astype(np.float32)
    session = runtime.InferenceSession(model.SerializeToString())
    target = host_target()
    isa = isa_of(target)
    normalised = normalise(load_model(model))
    mod = LowerConvolutions(isa, lambda workload: default_schedule(workload, isa))(normalised)
    assert relative(run(mod, x, target=target), session.run(None, {"x": x})[0]) < 1e-5
    workloads = survey(normalised, isa, lambda workload: default_schedule(workload, isa))
    return operators(mod), [workload.epilogue for workload in workloads]
