"""Importing networks, and refusing those that cannot be used."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from conftest import small_network
from helpers import reference, relative, run, shared
from onnx import numpy_helper
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.data import input_shape
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_is_imported_with_its_batch(small, batch):
    mod = load_model(small, batch)
    assert input_shape(mod) == (batch, 3, 18, 18)
    x = np.random.default_rng(0).standard_normal((batch, 3, 18, 18)).astype(np.float32)
    assert relative(run(mod, x), reference(small, x)) < 1e-5


def test_an_exported_pytorch_program_is_imported(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 4),
    ).eval()
    x = torch.randn(1, 3, 12, 12)
    program = torch.export.export(net, (x,))
    torch.export.save(program, tmp_path / "net.pt2")
    expected = net(x).detach().numpy()
    for model in (program, tmp_path / "net.pt2"):
        mod = normalise(load_model(model))
        assert relative(run(mod, x.numpy()), expected) < 1e-5


@pytest.mark.parametrize("model", ["resnet20-cifar10", "vgg6-cifar10", "crepe-tiny"])
def test_real_networks_import_and_normalise(model):
    path = shared("models", f"{model}.onnx")
    mod = normalise(load_model(path))
    x = np.random.default_rng(0).standard_normal(input_shape(mod)).astype(np.float32)
    assert relative(run(mod, x), reference(path, x)) < 1e-4


def test_a_truncated_file_is_refused(small, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(small.SerializeToString()[:-500])
    with pytest.raises(LowRankError, match=r"cut\.onnx is not a valid ONNX file"):
        load_model(path)


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(LowRankError, match="does not exist"):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "net.h5").write_bytes(b"x")
    with pytest.raises(LowRankError, match="unknown suffix"):
        load_model(tmp_path / "net.h5")
    with pytest.raises(LowRankError, match="a int is not a model"):
        load_model(3)
    with pytest.raises(LowRankError, match="no function 'main'"):
        load_model(tvm.IRModule({}))


def test_nan_weights_are_refused():
    model = small_network()
    weight = next(t for t in model.graph.initializer if t.name == "c1.w")
    array = numpy_helper.to_array(weight).copy()
    array[0, 0, 0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, "c1.w"))
    with pytest.raises(LowRankError, match=r"shape \(24, 24, 3, 3\), holds NaN"):
        load_model(model)


def test_an_operator_that_tvm_lacks_is_named():
    model = small_network()
    node = onnx.helper.make_node("StringNormalizer", ["input"], ["unused"])
    model.graph.node.insert(0, node)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("unused", onnx.TensorProto.STRING, [1])
    )
    with pytest.raises(LowRankError, match="cannot be imported by TVM"):
        load_model(model)


@pytest.mark.parametrize("kind", ["Resize", "Upsample"])
def test_resizing_to_no_whole_number_of_pixels_is_refused(kind):
    def resized(scales, **attributes):
        inputs = ["x", "", "s"] if kind == "Resize" else ["x", "s"]
        node = onnx.helper.make_node(kind, inputs, ["y"], "up", mode="linear", **attributes)
        value = onnx.helper.make_tensor_value_info
        ends = [value("x", 1, [1, 3, 8, 7])], [value("y", 1, None)]
        weights = [onnx.numpy_helper.from_array(np.float32(scales), "s")]
        graph = onnx.helper.make_graph([node], "g", *ends, weights)
        opset = 17 if kind == "Resize" else 9
        opsets = [onnx.helper.make_opsetid("", opset)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)

    with pytest.raises(LowRankError, match=r"up makes 7 pixels 1\.5 times as many, no whole"):
        load_model(resized([1, 1, 2, 1.5]))
    if kind == "Resize":
        load_model(resized([1, 1, 2, 3]))
        load_model(resized([1, 1, 2, 1.5], coordinate_transformation_mode="align_corners"))


def test_exported_programs_that_resize_to_no_whole_number_are_refused():
    torch = pytest.importorskip("torch")

    class Upsampled(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

        def forward(self, x):
            return torch.nn.functional.interpolate(x, mode="bilinear", **self.options)

    def load(**options):
        return load_model(torch.export.export(Upsampled(**options), (torch.zeros(1, 3, 8, 7),)))

    with pytest.raises(LowRankError, match="the exported program: upsample_bilinear2d makes 7"):
        load(scale_factor=1.5)
    for options in ({"scale_factor": 2.0}, {"size": (9, 9)}):
        load(**options)
    load(scale_factor=1.5, align_corners=True)
