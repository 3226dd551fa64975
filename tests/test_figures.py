"""The benchmark that draws the paper's figures: its page, its drawings, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_lowrank import demo
from tvm_lowrank.data import input_shape
from tvm_lowrank.errors import LowRankError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import figures

TIMES = {1: (2.0, 1.0), 8: (1.6, 0.4)}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The path of a plan; measuring gives `TIMES`."""

    def measure(args, plan, batch, timers, threads):
        times = dict(zip(figures.VARIANTS, TIMES[batch], strict=True))
        return figures.Measured(batch, times, {"conv0": {"original": 30.0, "transformed": 10.0}})

    class Known:
        target = json.dumps({"kind": "llvm"})
        load = staticmethod(lambda path: Known)

    monkeypatch.setattr(figures, "_measure", measure)
    monkeypatch.setattr(figures, "Plan", Known)
    monkeypatch.setattr(figures, "disturbance", lambda: None)
    return ["--plan", "plan.json", "--breakdown", "1", "--target", "llvm", "-o", str(tmp_path)]


def test_the_page_has_every_figure_with_its_table(planned, tmp_path):
    page = tmp_path / "docs" / "page.md"
    assert figures.main([*planned, "--batches", "8", "1", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "| 1 | 2.000 | 1.000 | 2.00 |\n| 8 | 1.600 | 0.400 | 4.00 |" in text
    assert "| conv0 | 30.0 | 10.0 | 3.00 |" in text
    assert f"python benchmarks/figures.py {' '.join(planned)}" in text
    for name in ("time-per-image", "layers-batch1"):
        drawing = (page.parent / f"page-{name}.svg").read_text()
        assert f"![{name}](page-{name}.svg)" in text and "transformed" in drawing
    assert not (page.parent / "page-layers-batch8.svg").exists()


def test_figures_come_as_bitmaps_too(planned, tmp_path):
    pytest.importorskip("resvg_py")
    assert figures.main([*planned, "--batches", "1", "--png"]) == 0
    for name in ("time-per-image", "layers-batch1"):
        assert (tmp_path / f"figures-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_what_draws_bitmaps_they_are_refused(planned, monkeypatch, capsys):
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    assert figures.main([*planned, "--batches", "1", "--png"]) == 2
    assert "pip install resvg-py" in capsys.readouterr().err


def test_a_model_is_read_for_another_batch_than_its_file_states():
    args = type("Args", (), {"model": None})
    assert demo.model_path().suffix == ".onnx"
    assert input_shape(figures._load(args, 3))[0] == 3


def test_a_program_of_one_batch_serves_no_other(tmp_path, monkeypatch):
    def read(path, batch):
        x = relax.Var("x", relax.TensorType((2, 3, 4, 4), "float32"))
        builder = relax.BlockBuilder()
        with builder.function("main", [x]):
            builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
        return builder.get()

    monkeypatch.setattr(figures, "load_model", read)
    args = type("Args", (), {"model": tmp_path / "net.pt2"})
    assert isinstance(figures._load(args, 2), tvm.IRModule)
    with pytest.raises(LowRankError, match=r"net.pt2 is for batch 2; export it with a dynamic one"):
        figures._load(args, 4)


def test_bars_share_a_scale():
    each = figures.Measured(1, {}, {"a": {"original": 50.0, "transformed": 100.0}})
    drawing = figures._bars(each, "net")
    widths = [float(part.split('width="')[1].split('"')[0]) for part in drawing.split("<rect")[2:]]
    assert np.isclose(widths[1], 2 * widths[0])
