"""What several tests do: run a module by TVM, an ONNX model by ONNX Runtime, count operators."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax
from tvm_lowrank.passes.graph import dataflow_bindings, op_name
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.frontend import load_model
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner.verify import Latency
from tvm_lowrank.target import host_target

SHARED = Path(__file__).resolve().parents[2] / "shared"


def factored_plan(small) -> Plan:
    """A plan that factors conv1 and conv3 whatever it measures."""
    layers, factors = [], {}

    for layer in collect_layers(normalise(load_model(small))):
        if layer.name not in ("conv1", "conv3"):
            layers.append(LayerPlan(layer.name, layer.geometry))
            continue
        form = FORMS["separable" if layer.name == "conv1" else "tucker2"]
        rank = 24 if layer.name == "conv1" else (16, 16)
        weights = form.fitter(layer.weight.astype(np.float64), layer.geometry, None).fit(rank)
        factors[layer.name] = (tuple(w.astype(np.float32) for w in weights), layer.bias)
        stages = tuple(form.stages(layer.geometry, rank))
        layers.append(
            LayerPlan(
                layer.name, layer.geometry, form.name, rank, stages, ("direct",) * len(stages)
            )
        )
    target = json.loads(str(host_target()))
    return Plan(target, 1, 0, 1.0, "top1", tuple(layers), factors=factors)


def run(mod: tvm.IRModule, *inputs: np.ndarray, target="llvm"):
    """Compile with TVM's stock pipeline and run once."""
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    outputs = machine["main"](*(tvm.runtime.tensor(np.asarray(x, np.float32)) for x in inputs))
    return outputs.numpy() if hasattr(outputs, "numpy") else [o.numpy() for o in outputs]


def reference(model: onnx.ModelProto | Path, inputs: np.ndarray) -> np.ndarray:
    """ONNX Runtime's outputs."""
    ort = pytest.importorskip("onnxruntime")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def operators(mod: tvm.IRModule) -> Counter:
    """How often ``main`` calls each operator; kernels count under their names without numbers."""
    names: Counter = Counter()
    for binding in dataflow_bindings(mod["main"]) or []:
        name = op_name(binding.value)
        if name in ("call_tir", "call_tir_inplace"):
            name = binding.value.args[0].name_hint.rstrip("0123456789")
        if name:
            names[name] += 1
    return names


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def shared(*parts: str) -> Path:
    """A file of the shared models and data; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside this checkout")
    return path


# What `win` replaces.
RACE = "tvm_lowrank.planner.verify.take_turns"


def win():
    """A race that the last library always wins, for searches whose result is expected."""

    def race(paths, _shape, _threads) -> list[Latency]:
        return [Latency(ms, ms, 3) for ms in map(float, range(len(paths), 0, -1))]

    return race
