"""The benchmark networks: counts as in the literature, and ONNX files that run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import zoo

# Trained parameters and multiply-adds at batch 1, in millions; torchvision's documentation gives
# the same. VDSR has 665 K parameters for one colour.
LITERATURE = {
    "vgg16": (138.36, 15470),
    "alexnet": (61.10, 714),
    "alexnet_convolutions": (2.47, 656),
    "resnet18": (11.69, 1814),
    "resnet50": (25.56, 4089),
    "googlenet": (6.62, 1498),
    "mobilenet_v2": (3.50, 301),
    "mobilenet_v3_large": (5.48, 217),
    "efficientnet_b0": (5.29, 386),
    "shufflenet_v2": (2.28, 145),
    "regnet_y_400mf": (4.34, 402),
    "densenet121": (7.98, 2834),
    "super_resolution": (0.668, 10928),
    "convnext_tiny": (28.59, 4456),
}
BIG = ("vgg16", "alexnet")


def test_every_network_has_its_figures_here():
    assert set(LITERATURE) == set(zoo.NETWORKS)


@pytest.mark.parametrize("name", LITERATURE)
def test_parameters_and_multiply_adds_are_those_of_the_literature(name):
    graph, output = zoo.NETWORKS[name](1)
    parameters, multiply_adds = LITERATURE[name]
    assert graph.parameters / 1e6 == pytest.approx(parameters, abs=0.006)
    assert graph.multiply_adds / 1e6 == pytest.approx(multiply_adds, abs=1)
    maps = {"super_resolution": (3, 128, 128), "alexnet_convolutions": (256, 6, 6)}
    assert graph.shapes[output] == maps.get(name, (1000,))


@pytest.mark.parametrize("name", [name for name in LITERATURE if name not in BIG])
def test_values_stay_of_order_one(name):
    ort = pytest.importorskip("onnxruntime")
    graph, output = zoo.NETWORKS[name](2)
    model = graph.model(output)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, *graph.shapes["input"])).astype(np.float32)
    (result,) = session.run(None, {"input": x})
    assert result.shape == (2, *graph.shapes[output])
    assert 0.3 < result.std() < 20
    assert np.abs(result[0] - result[1]).max() > 0.1


def test_files_are_made_once_and_replaced_when_the_network_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_LOWRANK_CACHE", str(tmp_path))
    path = zoo.network_file("super_resolution", 2)
    written = path.stat().st_mtime_ns
    assert zoo.network_file("super_resolution", 2) == path
    assert path.stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    first, _ = zoo.NETWORKS["resnet18"](1)
    second, _ = zoo.NETWORKS["resnet18"](1)
    assert first.digest == second.digest
    second.relu("input")
    assert first.digest != second.digest


def test_an_unknown_network_is_a_key_error():
    with pytest.raises(KeyError):
        zoo.network_file("lenet")
