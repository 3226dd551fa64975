"""Real networks, lowered to the kernels, against ONNX Runtime; skipped where they are absent."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from helpers import operators, reference, relative, shared
from tvm import relax
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank import demo
from tvm_lowrank.data import input_shape
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target

# Convolution kernels. Inputs are read as they are, and only the result is converted back.
EXPECTED = {
    "demo": 14,
    "vgg6-cifar10": 9,
    "resnet20-cifar10": 20,
    "crepe-tiny": 7,
    "resnet50-imagenet": 54,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_lowered_networks_equal_onnx_runtime_and_stay_in_blocks(name):
    path = demo.model_path() if name == "demo" else shared("models", f"{name}.onnx")
    target = host_target()
    isa = isa_of(target)
    mod = normalise(load_model(path))
    lowered = LowerConvolutions(isa, lambda workload: default_schedule(workload, isa))(mod)
    found = operators(lowered)
    kinds = ("lowrank_conv2d", "lowrank_block", "lowrank_unblock")
    assert tuple(found[kind] for kind in kinds) == (EXPECTED[name], 0, 1)
    kernels = {"lowrank_max_pool", "lowrank_avg_pool", "lowrank_gather", *kinds}
    assert set(found) <= kernels | {"expand_dims", "permute_dims", "reshape", "nn.softmax"}
    machine = relax.VirtualMachine(tvm.compile(lowered, target=target), tvm.cpu())
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.standard_normal(input_shape(mod)).astype(np.float32)
        outputs = machine["main"](tvm.runtime.tensor(x)).numpy()
        assert relative(outputs, reference(path, x)) < 1e-4
