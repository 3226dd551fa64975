"""The comparison of runtimes: rows for what runs and what fails, one sentence for bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
import in_network
import peers
import probes
import roofline
import zoo
from helpers import reference, relative
from tvm_lowrank.passes.count_calls import count_calls
from tvm_lowrank.passes.graph import op_name
from tvm_lowrank.passes.pipeline import normalise

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target

pytest.importorskip("onnxruntime")

SHAPE = (1, 3, 18, 18)


@pytest.fixture(scope="module")
def model(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "net.onnx"
    onnx.save(small, path)
    return path


@pytest.fixture(autouse=True)
def cache(model, monkeypatch):
    """One folder for all tests: what is on record need not be measured again."""
    monkeypatch.setenv("TVM_LOWRANK_CACHE", str(model.parent))
    monkeypatch.setattr(peers, "_REST", 0.0)


def test_a_peer_is_timed_and_a_missing_one_has_its_reason(model, tmp_path):
    checks = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"nonsense")
    jobs = {
        "good": ("onnxruntime", model),
        "unknown": ("lenin", model),
        "damaged": ("onnxruntime", damaged),
    }
    found = peers.take_turns(jobs, SHAPE, 1, 0.1, checks)
    timing = found["good"]
    assert isinstance(timing, peers.Timing)
    assert 0 < timing.minimum_ms <= timing.median_ms
    assert "ONNX Runtime" in timing.about and "1 threads" in timing.about
    for x, outputs in zip(checks, timing.outputs, strict=True):
        assert relative(outputs, reference(model, x)) < 1e-6
    assert "KeyError" in found["unknown"]
    assert isinstance(found["damaged"], str) and found["damaged"]


def test_compare_prints_ours_and_the_peers(model, tmp_path, capsys, monkeypatch):
    markdown = tmp_path / "tables.md"
    command = [
        str(model), "--batch", "2", "--threads", "2", "--trials", "1", "--seconds", "0.05",
        "--against", "onnxruntime", "--algorithms", "direct", "--markdown", str(markdown),
        "--libraries", str(tmp_path / "libraries"),
    ]  # fmt: skip
    assert compare.main([*command, "--build-only"]) == 0
    assert "model.so, direct; built in" in capsys.readouterr().out
    monkeypatch.delattr(compare, "build_lossless")  # what is there is not built again
    assert compare.main(command) == 0
    text = capsys.readouterr().out
    assert markdown.read_text().split() == text.split()
    assert "## net, batch 2" in text and "| onnxruntime |" in text
    assert "geometric mean" not in text
    (ours,) = [line for line in text.splitlines() if line.startswith("| tvm_lowrank |")]
    cells = [cell.strip() for cell in ours.split("|")]
    assert float(cells[2]) >= float(cells[3]) > 0
    assert cells[4] == "1.00 (1.00)" and float(cells[5]) < 1e-5
    assert "direct" in cells[6] and "built in" in cells[6]
    assert text.count("Our network: ") == 1


def test_a_failure_of_ours_is_a_row(model, capsys, monkeypatch):
    def fail(*_arguments):
        raise LowRankError("this network is not for us")

    monkeypatch.setattr(compare, "build_lossless", fail)
    command = [str(model), "--batch", "1", "2", "--seconds", "0.05", "--against", "onnxruntime"]
    assert compare.main(command) == 0
    text = capsys.readouterr().out
    assert "## net, batch 1" in text and "## net, batch 2" in text
    assert "| geometric mean | | - |" in text
    assert "| tvm_lowrank | - | - | - | - | LowRankError: this network is not for us |" in text
    assert "| onnxruntime | 0" in text or "| onnxruntime | 1" in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["lenet"], "none of vgg16"),
        (["missing.onnx"], "does not exist"),
        (["resnet18", "--batch", "0"], "positive"),
        (["resnet18", "--threads", "0"], "--threads is 0"),
        (["resnet18", "--against", "caffe"], "choose among onnxruntime"),
        (["resnet18", "--algorithms", ""], "choose among direct"),
        (["resnet18", "--markdown", "/nowhere/at/all.md"], "does not exist"),
        (["resnet18", "--trials", "many"], "invalid int value"),
        (["resnet18", "--build-only"], "needs --libraries"),
    ],
)
def test_bad_input_is_one_sentence(command, words, capsys):
    assert compare.main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("compare: ") and captured.err.count("\n") == 1
    assert words in captured.err and not captured.out


def test_damaged_and_fixed_files_are_bad_input(model, tmp_path, capsys):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"nonsense")
    assert compare.main([str(damaged)]) == roofline.main([str(damaged)]) == 2
    fixed = onnx.load(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(fixed, tmp_path / "fixed.onnx")
    assert compare.main([str(tmp_path / "fixed.onnx"), "--batch", "4"]) == 2
    assert "fixed shape (1, 3, 18, 18), not of batch 4" in capsys.readouterr().err


def test_operators_left_to_tvm_are_counted(small):
    calls = count_calls(normalise(load_model(small)))
    assert calls.kernels.total() == 0
    assert calls.others["nn.conv2d"] == 6
    assert "reshape" not in calls.others
    assert str(calls).startswith("0 calls of kernels (none)")


def test_the_torch_conversion_equals_onnx_runtime(small, model):
    torch = pytest.importorskip("torch")
    from torch_model import load_torch

    x = np.random.default_rng(0).standard_normal((2, *SHAPE[1:])).astype(np.float32)
    with torch.no_grad():
        outputs = load_torch(model)(torch.from_numpy(x)).numpy()
    assert relative(outputs, reference(model, x)) < 1e-5


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2"])
def test_the_torch_conversion_knows_gates_and_shuffles(name, tmp_path):
    torch = pytest.importorskip("torch")
    from torch_model import load_torch

    graph, output = zoo.NETWORKS[name](1)
    onnx.save(graph.model(output), tmp_path / "net.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        outputs = load_torch(tmp_path / "net.onnx")(torch.from_numpy(x)).numpy()
    assert relative(outputs, reference(tmp_path / "net.onnx", x)) < 1e-4


def test_the_torch_conversion_pads_slices_and_adds_axes(tmp_path):
    torch = pytest.importorskip("torch")
    from torch_model import load_torch

    rng = np.random.default_rng(0)
    arrays = {
        "axes": np.array([1, 3]),
        "pads": np.array([0, 0, 2, 1, 0, 0, 0, 3]),
        "fill": np.array(0.5, np.float32),
        "starts": np.array([1, 0]),
        "ends": np.array([-1, 2**31 - 1]),
        "sliced": np.array([3, 1]),
        "steps": np.array([2, 3]),
        "weight": rng.standard_normal((4, 1, 3, 2)).astype(np.float32),
    }
    nodes = [
        onnx.helper.make_node("Unsqueeze", ["x", "axes"], ["planes"]),
        onnx.helper.make_node("Pad", ["planes", "pads", "fill"], ["padded"]),
        onnx.helper.make_node("Conv", ["padded", "weight"], ["all"], pads=[1, 0, 0, 2]),
        onnx.helper.make_node("Slice", ["all", "starts", "ends", "sliced", "steps"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "pads", [value("x", 1, (2, 9))], [value("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "pads.onnx"
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    x = rng.standard_normal((2, 9)).astype(np.float32)
    with torch.no_grad():
        outputs = load_torch(path)(torch.from_numpy(x)).numpy()
    assert relative(outputs, reference(path, x)) < 1e-5


def test_probes_measure_something():
    assert probes.peak_gflops(host_target(), 1) > 1
    assert probes.read_gigabytes(host_target(), 1, 1 << 20) > 0.1


def test_roofline_prints_every_kernel(model, capsys):
    command = [str(model), "--batch", "2", "--trials", "1", "--algorithms", "direct"]
    assert roofline.main(command) == 0
    text = capsys.readouterr().out
    assert "Multiply-adds from registers" in text and "whole / sum" in text
    rows = [line for line in text.splitlines() if line.startswith("| 1 |")]
    convolutions = [row for row in rows if not row.startswith("| 1 | |")]
    kernels = {row.split("|")[3].split()[0] for row in convolutions}
    assert {"direct", "dense"} <= kernels <= {"direct", "dense", "depthwise"}
    assert all(row.endswith("% |") for row in convolutions)
    # What runs as a chain (which depends on what is faster) is among the others.
    others = [row.split("|")[3].strip() for row in rows if row not in convolutions]
    assert any(name.startswith("lowrank_unblock") for name in others)
    assert len(rows) >= 5


def test_layers_are_timed_in_their_network_and_priced_by_both_sizes(model, tmp_path, capsys):
    page = tmp_path / "page.md"
    command = [str(model), "--trials", "1", "--markdown", str(page)]
    assert in_network.main(command) == 0
    assert page.read_text().split() == capsys.readouterr().out.split()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.read_text().splitlines()
        if line.startswith("| ")
    ]
    _, *layers, total = rows
    calls = sum(op_name(b.value) == "nn.conv2d" for b in bindings(normalise(load_model(model))))
    # What runs as a chain (which depends on what is faster) is not among them.
    assert 1 <= sum(int(cells[0]) for cells in layers) == int(total[0]) <= calls
    for column in (3, 4, 6):
        whole = sum(int(cells[0]) * float(cells[column]) for cells in layers)
        assert float(total[column]) == pytest.approx(whole, abs=0.051 * (calls + 1)) and whole > 0
    # Microseconds have one digit: what is left of a quotient depends on how many there are.
    inside, large, quotient = map(float, total[3:6])
    assert (large - 0.051) / (inside + 0.051) - 0.0051 < quotient
    assert quotient < (large + 0.051) / (inside - 0.051) + 0.0051


def bindings(mod):
    return [binding for block in mod["main"].body.blocks for binding in block.bindings]
