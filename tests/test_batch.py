"""Kernels that are compiled here, measured by a script of their own, and taken back as records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from cuda_support import needs_nvcc
from tvm_lowrank.schedules.machine import machine_of

from tvm_lowrank import tune
from tvm_lowrank.cost import measure_batch
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cuda import architectures_in
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target

BARE = """
import sys
sys.modules["tvm_lowrank"] = None  # any import of the plugin fails
sys.argv = sys.argv[1:]
names = {"__name__": "__main__", "__file__": sys.argv[0]}
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), names)
"""


@pytest.fixture(scope="module")
def network(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnx.save(small, path)
    return path


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "batch"
    command = [str(network), "--export-batch", str(folder), "--trials", "1", "--threads", "1"]
    assert tune.main([*command, "--forms", "linear_combination", "--algorithms", "direct"]) == 0
    return folder


def measure(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE, str(folder / "measure.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_batch_measured_by_its_script_becomes_records(exported, tmp_path, capsys) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    count = len(manifest["candidates"])
    assert manifest["device"] == "cpu" and count > 2
    # A candidate that cannot run must not take the others with it.
    broken = json.loads(json.dumps(manifest))
    broken["candidates"][1]["stages"][0]["function"] = "absent"
    (exported / "manifest.json").write_text(json.dumps(broken))
    done = measure(exported)
    assert done.returncode == 0, done.stderr
    lines = (exported / "results.jsonl").read_text().splitlines()
    results = {result["index"]: result for result in map(json.loads, lines)}
    assert sorted(results) == list(range(count)) and len(lines) == count
    assert results[1]["us"] is None and "absent" in results[1]["error"]
    assert all(result["us"] > 0 for index, result in results.items() if index != 1)
    assert "0 of" in measure(exported).stdout, "what was measured is measured again"

    out = tmp_path / "out"
    assert tune.main(["--import-results", str(exported), "-o", str(out)]) == 0
    assert f"{count} times" in capsys.readouterr().out.replace("\n", " ")
    first = (out / "records.jsonl").read_bytes()
    assert tune.main(["--import-results", str(exported), "-o", str(out)]) == 0
    assert (out / "records.jsonl").read_bytes() == first
    # The times count as this machine's own, and the failure is remembered as one.
    target = host_target()
    records = TuningRecords(out / "records.jsonl", machine_of(target).name, 1)
    timer = KernelTimer(target, records)
    known = [(key, place) for key, place, _, _ in records.rows()]
    assert len(known) == count - 1 and {place for _, place in known} == {records.here}
    entry = manifest["candidates"][0]
    workload, schedule = entry["workload"], entry["schedule"]
    key = json.dumps(workload, sort_keys=True, separators=(",", ":"))
    assert records.time(key, schedule) == round(results[0]["us"], 3)
    assert timer.measured == 0


def test_folders_without_results_and_used_ones_are_refused(exported, network, tmp_path, capsys):
    assert tune.main(["--import-results", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "run measure.py in it first" in capsys.readouterr().err
    assert tune.main([str(network), "--export-batch", str(exported), "--lossless"]) == 2
    assert "holds a batch already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"us": "soon"}', '{"us": -1.0}', '{"us": 1.0, "index": 10000}']
)
def test_damaged_results_are_one_sentence(exported, tmp_path, capsys, line) -> None:
    manifest = (exported / "manifest.json").read_text()
    folder = tmp_path / "batch"
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    good = {"batch": json.loads(manifest)["batch"], "index": 0, "us": 5.0, "machine": "x"}
    bad = json.dumps({**good, **json.loads(line)}) if line[1:2] == '"' else line
    (folder / "results.jsonl").write_text(f"{json.dumps(good)}\n{bad}\n")
    out = tmp_path / "out"
    assert tune.main(["--import-results", str(folder), "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert "holds no measured batch" in error and error.count("\n") == 1
    assert not (out / "records.jsonl").exists()
    # What an interrupted run has written of a line is no damage.
    (folder / "results.jsonl").write_text(f'{json.dumps(good)}\n{{"batch": "')
    assert tune.main(["--import-results", str(folder), "-o", str(out)]) == 0
    measure_batch.mend(folder / "results.jsonl")
    assert (folder / "results.jsonl").read_text() == json.dumps(good) + "\n"


def test_a_candidate_that_hangs_is_ended_and_fails(tmp_path, monkeypatch) -> None:
    """Here the process that measures knows one trick: it finishes candidate 0 and sleeps."""
    line = json.dumps({"batch": "b", "index": 0, "us": 1.0})
    script = tmp_path / "measure.py"
    script.write_text(f"""import time
open({str(tmp_path / "results.jsonl")!r}, "a").write({line!r} + "\\n")
time.sleep(60)
""")
    monkeypatch.setattr(measure_batch, "__file__", str(script))
    monkeypatch.setattr(measure_batch, "PATIENCE", 1.0)
    assert measure_batch.run(tmp_path, [0, 1]) == "no result after 1 s"
    manifest = {"batch": "b", "candidates": [{}, {}]}
    assert measure_batch.remaining(tmp_path, manifest) == [1]


@needs_nvcc
def test_a_batch_for_cuda_holds_machine_code_and_every_stage(network, tmp_path) -> None:
    folder = tmp_path / "batch"
    command = [str(network), "--target", "cuda:sm_90", "--export-batch", str(folder)]
    assert tune.main([*command, "--lossless", "--trials", "1", "--algorithms", "winograd"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"] == "cuda" and manifest["isa"] == "sm_90"
    for library in {entry["library"] for entry in manifest["candidates"]}:
        assert set(architectures_in(folder / library)) == {"sm_90"}
    for entry in manifest["candidates"]:
        assert entry["stages"][-1]["writes"] == "y"
        named = {name for stage in entry["stages"] for name in (*stage["reads"], stage["writes"])}
        assert named == set(entry["values"])
    done = measure(folder)
    if done.returncode:  # no GPU here
        assert "cuda" in done.stderr and not (folder / "results.jsonl").exists()
