"""Drawings of layers: what they hold, and the command line."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import onnx
import pytest
from forms_support import example
from helpers import factored_plan

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.plan import Plan
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
    able = {name for name, form in FORMS.items() if not form.refuse(geometry)}
    assert words[0] == "original"
    assert {word.split(",")[0] for word in words[1:]} == able
    # 10 filters of 4 channels of 3x3, for the original and each form.
    assert len(grey(filters)) == 10 * 4 * 9 * (1 + len(able))
    assert able <= set(texts(errors))
    curves = list(ElementTree.parse(errors).iter(f"{NAMESPACE}polyline"))
    assert len(curves) == 2 * len(able)
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


def curve_of(*drops):
    return tuple(
        {
            "microseconds": 80.0 / (1 + index),
            "dense_us": 160.0,
            "drop": drop,
            "interval": [drop - 0.5, drop + 0.5],
            "agreement": 99.0,
            "samples": 64,
            "rewritten": 1 + index,
            "keeps": drop <= 1.0,
            "recovered": index == 2,
        }
        for index, drop in enumerate(drops)
    )


def test_the_curve_is_listed_and_drawn(small, tmp_path, capsys):
    result = dict.fromkeys(
        ["latency_before_ms", "latency_after_ms", "speedup", "output_error", "agreement"], 1.0
    )
    result |= {"runs": 1, "batch": 1, "samples": 9, "synthetic_data": False, "drop": 0.5}
    result |= {"accuracy_before": 90.0, "accuracy_after": 89.5, "kernel_weight_bytes": 4}
    result |= {"weight_bytes_before": 4, "weight_bytes_after": 4}
    plan = replace(factored_plan(small), curve=curve_of(0.4, 2.5, 0.9), result=result)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").curve == plan.curve
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "choices tried" in text and "2.00x" in text and "6.00x" in text
    assert text.count("missed") == 1 and "kept, trained" in text
    assert "no kernels" not in text
    replace(plan, result={**result, "left_to_tvm": {"concat": 1, "nn.prelu": 2}}).save(
        tmp_path / "plan.json"
    )
    assert main([str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no kernels for 1 concat, 2 nn.prelu: TVM's own loops" in text
    drawn = tmp_path / "curve.svg"
    circles = list(ElementTree.parse(drawn).iter(f"{NAMESPACE}circle"))
    assert len(circles) == 3 + 2  # a point each, and the two in the legend
    heights = [float(circle.get("cy")) for circle in circles if circle.get("r") == "4"]
    assert {"budget", "refitted", "trained"} <= set(texts(drawn)) and len(set(heights)) == 5
