"""The shipped demo network and its images."""

import numpy as np
import onnx
import pytest
from onnx import helper

from tvm_lowrank import demo


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(demo.model_path())


@pytest.fixture(scope="module")
def nodes(model: onnx.ModelProto) -> dict[str, list[dict]]:
    """Attributes of the nodes of each operator."""
    found: dict[str, list[dict]] = {}
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        found.setdefault(node.op_type, []).append(attributes)
    return found


def test_model_is_valid_and_small(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert demo.model_path().stat().st_size <= 5_000_000
    assert not any(weight.external_data for weight in model.graph.initializer)


def test_inputs_and_outputs(model: onnx.ModelProto) -> None:
    def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    float32 = onnx.TensorProto.FLOAT
    assert [signature(v) for v in model.graph.input] == [("input", float32, ["N", 3, 32, 32])]
    assert [signature(v) for v in model.graph.output] == [("logits", float32, ["N", 10])]


@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (3, 1), (3, 2), (1, 1)])
def test_kinds_of_convolution(nodes: dict[str, list[dict]], kernel: int, stride: int) -> None:
    kinds = [(tuple(a["kernel_shape"]), tuple(a["strides"])) for a in nodes["Conv"]]
    assert ((kernel, kernel), (stride, stride)) in kinds


def test_batch_norm_is_kept_apart(nodes: dict[str, list[dict]]) -> None:
    assert len(nodes["BatchNormalization"]) == len(nodes["Conv"])
    plain = {"Conv", "BatchNormalization", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}
    assert set(nodes) == plain


@pytest.mark.parametrize(("load", "count"), [(demo.calibration, 512), (demo.evaluation, 1000)])
def test_images(load, count: int) -> None:
    inputs, labels = load()
    assert inputs.shape == (count, 3, 32, 32) and inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    assert labels.shape == (count,) and labels.dtype == np.int64
    assert set(labels) == set(range(len(demo.CLASSES)))
    # Normalised, so about 0 and 1; a thousand photographs leave some room.
    assert np.abs(inputs.mean((0, 2, 3))).max() < 0.1
    assert np.abs(inputs.std((0, 2, 3)) - 1).max() < 0.1


def test_calibration_and_test_images_differ() -> None:
    def keys(inputs: np.ndarray) -> set[bytes]:
        return {image.tobytes() for image in inputs}

    assert not keys(demo.calibration()[0]) & keys(demo.evaluation()[0])


def test_preprocess() -> None:
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 1] = 255, 0, 51
    result = demo.preprocess(images)
    assert result.shape == (1, 3, 2, 2) and result.dtype == np.float32
    expected = (np.array([1, 0, 0.2]) - demo.MEAN) / demo.STD
    np.testing.assert_allclose(result[0, :, 0, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(result[0, :, 1, 1], -np.divide(demo.MEAN, demo.STD), rtol=1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 3, 32, 32), np.uint8)]
)
def test_preprocess_refuses_other_layouts(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        demo.preprocess(images)


def test_top1() -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(demo.model_path(), providers=["CPUExecutionProvider"])
    inputs, labels = demo.evaluation()
    logits = np.concatenate([session.run(None, {"input": x})[0] for x in np.split(inputs, 4)])
    assert np.mean(logits.argmax(1) == labels) >= 0.90
