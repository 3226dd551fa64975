"""Drawings of layers: what they hold, and the command line."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
from forms_support import example

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.report import layer as drawing
from tvm_lowrank.report.__main__ import main

NAMESPACE = "{http://www.w3.org/2000/svg}"


def grey(path):
    """Grey squares of a drawing."""
    squares = ElementTree.parse(path).iter(f"{NAMESPACE}rect")
    return [s for s in squares if len({s.get("fill")[i : i + 2] for i in (1, 3, 5)}) == 1]


def texts(path):
    return [t.text for t in ElementTree.parse(path).iter(f"{NAMESPACE}text")]


def test_every_form_is_drawn_at_its_rank(tmp_path):
    geometry, weight, moments = example()
    filters, errors, clusters = drawing.write("conv0", weight, geometry, moments, tmp_path)
    words = texts(filters)
    assert words[0] == "original"
    assert {word.split(",")[0] for word in words[1:]} == set(FORMS)
    # 10 filters of 4 channels of 3x3, for the original and each form.
    assert len(grey(filters)) == 10 * 4 * 9 * (1 + len(FORMS))
    assert set(FORMS) <= set(texts(errors))
    curves = list(ElementTree.parse(errors).iter(f"{NAMESPACE}polyline"))
    assert len(curves) == 2 * len(FORMS)
    assert len(grey(clusters)) == 2 * 8 * 10


def test_points_hold_the_errors_of_their_weights():
    geometry, weight, _ = example()
    for point in drawing.measure(weight, geometry, None, ("separable", "cp")):
        lost = np.sum((weight - point.weight) ** 2) / np.sum(weight**2)
        assert point.error == pytest.approx(lost)
        assert point.share < 1


def test_a_layer_that_nothing_can_replace_is_named(tmp_path):
    depthwise = ConvGeometry(8, 8, 5, 5, (3, 3), groups=8)
    weight = np.ones(depthwise.weight_shape)
    with pytest.raises(drawing.LowRankError, match="conv9"):
        drawing.write("conv9", weight, depthwise, None, tmp_path)


def test_command_line_draws_and_names_what_is_wrong(small, tmp_path, capsys):
    model = tmp_path / "small.onnx"
    onnx.save(small, model)
    assert main([str(model), "--layer", "conv1", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "conv1-errors.svg").exists()
    assert main([str(model), "--layer", "conv99"]) == 2
    assert "no layer conv99; there are conv0" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is no folder of tune" in capsys.readouterr().err
