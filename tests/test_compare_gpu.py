"""The comparison on a GPU: what can be said of it on machines without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tvm
import tvm_ffi

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytest.importorskip("onnxruntime")

import compare
import compare_gpu
import gpu_page
import gpu_runtimes
import results_gpu


@pytest.mark.skipif(tvm.cuda(0).exist, reason="this machine has a GPU")
def test_without_a_gpu_the_comparison_says_that_nothing_was_measured(tmp_path, capsys) -> None:
    report = tmp_path / "report.md"
    assert compare.main(["resnet18", "--target", "cuda", "--markdown", str(report)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "nothing was measured" in said.err
    assert said.out == "" and not report.exists()


def test_the_peers_are_cudnn_with_and_without_tf32_and_onnx_runtime() -> None:
    names = set(gpu_runtimes.VARIANTS)
    assert {"torch", "torch-tf32", "torch-channels-last", "torch-compile"} < names
    assert {"tvm_lowrank", "tvm-cudnn-cublas", "onnxruntime-cuda"} < names
    assert compare_gpu.BATCHES == (1, 128)


def test_a_tvm_without_cudnn_or_cublas_is_a_row_that_says_what_to_build(monkeypatch) -> None:
    found = {"relax.ext.cudnn": None, "relax.ext.cublas": object()}
    monkeypatch.setattr(tvm_ffi, "get_global_func", lambda name, allow_missing: found[name])
    with pytest.raises(RuntimeError, match=r"without cuDNN; build it .*\(USE_CUDNN=ON\)$"):
        gpu_runtimes.require_libraries()
    found["relax.ext.cublas"] = None
    with pytest.raises(RuntimeError, match=r"cuDNN and cuBLAS; .*USE_CUDNN=ON, USE_CUBLAS=ON"):
        gpu_runtimes.require_libraries()
    found.update(dict.fromkeys(found, object()))
    gpu_runtimes.require_libraries()


@pytest.mark.skipif(
    tvm_ffi.get_global_func("relax.ext.cudnn", allow_missing=True) is not None,
    reason="this TVM has cuDNN",
)
def test_this_tvm_has_neither_and_says_so_before_it_reads_a_file() -> None:
    with pytest.raises(RuntimeError, match="built without cuDNN and cuBLAS"):
        gpu_runtimes.VARIANTS["tvm-cudnn-cublas"]("absent.onnx", (1, 3, 8, 8))


def test_rows_have_ratios_errors_and_reasons() -> None:
    def row(median: float, output: list[float]) -> dict:
        return {"median_ms": median, "minimum_ms": median, "about": "x", "output": output}

    found = {
        "tvm_lowrank": row(2.0, [1, 2]),
        "torch": row(3.0, [1, 2.2]),
        "torch-compile": "no gcc",
    }
    text = compare_gpu.table("net, batch 1", compare_gpu.check(found))
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| t")]
    assert [cells[4].strip() for cells in rows] == ["1.00", "1.50", "-"]
    assert [cells[5].strip() for cells in rows] == ["9e-02", "0e+00", "-"]
    assert rows[2][6].strip() == "no gcc"


def test_what_was_measured_is_told_before_the_next_runtime_starts(monkeypatch, capsys) -> None:
    told = []

    def measure(name: str, path: Path, shape: tuple[int, ...]) -> dict | str:
        if name == "torch-compile":
            raise KeyboardInterrupt
        return {"median_ms": 2.0} if name == "torch" else "failed"

    monkeypatch.setattr(compare_gpu, "measure", measure)
    files = dict.fromkeys(("tvm_lowrank", "torch", "torch-compile"), Path("net.onnx"))
    with pytest.raises(KeyboardInterrupt):
        compare_gpu.measure_all(files, (1, 3, 8, 8), lambda found: told.append(dict(found)))
    assert [list(found) for found in told] == [["tvm_lowrank"], ["tvm_lowrank", "torch"]]
    assert capsys.readouterr().out.splitlines() == ["tvm_lowrank: failed", "torch: 2.000 ms"]


def test_times_an_image_stand_side_by_side_for_each_batch() -> None:
    text = compare_gpu.per_image(
        "net",
        {1: {"ours": {"median_ms": 2.0}, "torch": "absent"}, 128: {"ours": {"median_ms": 64.0}}},
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[-4:]]
    assert rows[0] == ["runtime", "batch 1", "batch 128"]
    assert rows[2:] == [["ours", "2.0000", "0.5000"], ["torch", "-", "-"]]


LAYER = {
    "layer": "conv0",
    "shape": "64->64 3x3 @56x56",
    "geometry": {"kernel": [3, 3], "height": 56},
    "schedule": {"kernel": "cuda_winograd"},
    "times": 3,
    "us": 20.0,
    "cudnn_float32": 30.0,
    "cudnn_tf32": 10.0,
}


def test_the_page_says_what_was_reached_and_what_was_not_measured() -> None:
    assert [line.split("|")[3].strip() for line in gpu_page.goals({}, [], [])[2:]] == [
        "not measured"
    ] * 3
    runtimes = {
        "tvm_lowrank": {"median_ms": 2.0},
        "torch": {"median_ms": 5.0},
        "torch-compile": "no gcc",
    }
    compared = [
        {"network": "resnet50", "batch": 1, "algorithms": ["direct"], "runtimes": runtimes},
        {
            "network": "resnet50",
            "batch": 128,
            "algorithms": ["direct", "tf32", "half"],
            "runtimes": {
                **runtimes,
                "torch-tf32": {"median_ms": 3.0},
                "torch-half": {"median_ms": 2.5},
            },
        },
    ]
    geometry = {"batch": 128, "kernel": [3, 3], "height": 56}
    shape = {
        "geometry": geometry,
        "float32": 20.0,
        "tf32": 16.0,
        "half": 15.0,
        "cudnn_float32": 30.0,
        "cudnn_tf32": 12.0,
        "cudnn_half": 18.0,
    }
    shapes = [
        shape,
        {**shape, "float32": 60.0, "geometry": {**geometry, "kernel": [1, 1]}},
        {**shape, "float32": 1.0, "geometry": {**geometry, "kernel": [7, 7]}},
        {**shape, "float32": 1.0, "geometry": {**geometry, "batch": 1}},
    ]
    times = {"transformed": 1.0, "lossless": 1.75}
    row = {"network": "net", "batch": 128, "median_ms": times, "drop": 0.5, "lossless": "dense.so"}
    rows = {"a": row, "b": {**row, "lossless": "original.so"}}
    layers, network, transformed = gpu_page.goals(rows, compared, shapes)[2:]
    assert "float32: 1 of 2 shapes, cuDNN's time over ours 0.50 to 1.50, median 1.00" in layers
    assert "TF32: 0 of 2 shapes, cuDNN's time over ours 0.75 to 0.75" in layers
    assert "float16: 2 of 2 shapes, cuDNN's time over ours 1.20 to 1.20" in layers
    said = "batch 1, float32: 2.50 times (torch); batch 128, float16: 1.25 times (torch-half) |"
    assert said in network
    assert "1.75 times at a drop of 0.50; " in transformed
    assert "1.75 times (direct kernels only) at a drop of 0.50 |" in transformed
    table = compare_gpu.layer_table([LAYER]).splitlines()[-1]
    assert table == "| conv0 | 3 | 64->64 3x3 @56x56 | 20.0 | 30.0 | 10.0 | - | winograd |"


@pytest.mark.skipif(tvm.cuda(0).exist, reason="this machine has a GPU")
def test_a_race_needs_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["results_gpu.py", "race"])
    assert results_gpu.main() == 2
    assert "this machine has none" in capsys.readouterr().err


def test_algorithms_of_tensor_cores_are_known_on_a_gpu_alone(capsys) -> None:
    assert compare.main(["resnet18", "--algorithms", "tf32"]) == 2
    assert "no kernel for llvm" in capsys.readouterr().err
    if not tvm.cuda(0).exist:
        assert compare.main(["resnet18", "--target", "cuda", "--algorithms", "tf32"]) == 2
        assert "nothing was measured" in capsys.readouterr().err
