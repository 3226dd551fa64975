"""The command: what it writes, how it goes on after a kill, and one sentence for each bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from helpers import RACE, reference, relative, win
from onnx import numpy_helper

import tvm_lowrank
from tvm_lowrank import tune


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    onnx.save(small, folder / "net.onnx")
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 3, 18, 18)).astype(np.float32)
    labels = reference(small, inputs).argmax(1)
    np.savez(folder / "data.npz", inputs=inputs, labels=labels)
    return folder


def run(files, *arguments, model="net.onnx", data="data.npz"):
    given = [str(files / model), "--data", str(files / data), "--trials", "1"]
    return tune.main([*given, *arguments])


def written(folder):
    """What a search left, but for the sensitivities: they are taken where a form was faster."""
    return sorted({p.name for p in folder.iterdir()} - {"sensitivity.json"})


def test_tune_writes_library_plan_and_records(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(files, "-o", str(out), "--max-drop", "30") == 0
    assert written(out) == ["model.so", "plan.json", "plan.npz", "records.jsonl"]
    plan = tvm_lowrank.Plan.load(out / "plan.json")
    assert plan.metric == "top1" and plan.result["samples"] == 20
    assert plan.result["accuracy_before"] == 100.0
    assert plan.result["drop"] <= 30.0
    low, high = plan.result["drop_interval"]
    assert low < plan.result["drop"] < high
    text = capsys.readouterr().out
    assert "conv5" in text and "latency" in text and "top-1" in text and "95 % interval" in text
    x = np.load(files / "data.npz")["inputs"][:1]
    built = tvm_lowrank.load(out / "model.so")(x)
    assert built.shape == (1, 10)


def test_the_same_records_and_seed_give_the_same_plan(files, tmp_path, monkeypatch):
    def last_wins(_asker, _workload, schedules):
        return [100.0 - i for i, _ in enumerate(schedules)]

    monkeypatch.setattr(RACE, win())
    # What runs in turns, here any three schedules, comes in another order than by itself: the
    # second search knows that from the start.
    monkeypatch.setattr("tvm_lowrank.records._NEAR", 100.0)
    monkeypatch.setattr("tvm_lowrank.cost.asking.Asker.in_turns", last_wins)

    def searched(folder):
        assert run(files, "-o", str(folder), "--max-drop", "30") == 0
        plan = json.loads((folder / "plan.json").read_text())
        return plan, dict(np.load(folder / "plan.npz"))

    plan, factors = searched(tmp_path / "first")
    records = (tmp_path / "first" / "records.jsonl").read_bytes()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "records.jsonl").write_bytes(records)
    again, same = searched(tmp_path / "second")
    assert (tmp_path / "second" / "records.jsonl").read_bytes() == records
    for name in ("transformed", "curve", "layers", "schedules", "fused"):
        assert again[name] == plan[name], name
    assert same.keys() == factors.keys()
    assert all(np.array_equal(same[name], factors[name]) for name in factors)


def test_a_budget_that_the_samples_cannot_resolve_is_refused(files, tmp_path, capsys):
    assert run(files, "-o", str(tmp_path), "--max-drop", "1") == 2
    error = capsys.readouterr().err
    assert "max_drop is 1 points of top1, but 20 evaluation samples" in error
    assert "below 12.60 points" in error and "12.60 or more" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_lossless_equals_onnx_runtime(files, small, tmp_path):
    assert run(files, "-o", str(tmp_path), "--lossless", "--batch", "2") == 0
    x = np.load(files / "data.npz")["inputs"][:2]
    built = tvm_lowrank.load(tmp_path / "model.so")(x)
    assert relative(built, reference(small, x)) < 1e-5


def stop_after(command, records, count, number):
    """Start the command, send it a signal once it has that many records, return its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (records.exists() and len(records.read_bytes().splitlines()) >= count):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(timeout=60)


def test_an_interrupted_and_then_killed_run_goes_on_from_its_records(files, tmp_path):
    command = [sys.executable, "-m", "tvm_lowrank.tune", str(files / "net.onnx")]
    command += ["--data", str(files / "data.npz"), "--trials", "2", "-o", str(tmp_path)]
    command += ["--max-drop", "30", "--forms", "dense,separable"]
    records = tmp_path / "records.jsonl"
    assert stop_after(command, records, 2, signal.SIGINT) == 130
    assert list(tmp_path.iterdir()) == [records]
    interrupted = records.read_bytes()
    assert stop_after(command, records, 4, signal.SIGKILL) == -signal.SIGKILL
    killed = records.read_bytes()
    assert killed.startswith(interrupted)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = records.read_bytes()
    assert after.startswith(killed.rpartition(b"\n")[0])
    # What ran in turns does so again with every schedule that comes near it later.
    lines = [r for r in map(json.loads, after.splitlines()) if not r.get("in_turns")]
    # A machine that other work slowed down by half may have taken itself for another in between.
    measured = [(r["machine"], r["workload"], json.dumps(r["schedule"])) for r in lines]
    assert len(measured) == len(set(measured)), "something was measured twice"
    assert written(tmp_path) == ["model.so", "plan.json", "plan.npz", "records.jsonl"]


def test_interruption_says_how_to_go_on(files, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "search", interrupt)
    assert run(files, "-o", str(tmp_path)) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_that_a_callback_swallowed_still_ends_the_run(
    files, tmp_path, monkeypatch, capsys
):
    def swallow(*args, **_):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        args[-1]("stage", 1, 2)

    monkeypatch.setattr(tune, "search", swallow)
    before = signal.getsignal(signal.SIGINT)
    assert run(files, "-o", str(tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "same command goes on" in capsys.readouterr().err


def test_an_interruption_that_became_another_error_is_still_one(files, tmp_path, monkeypatch):
    def turn(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RuntimeError("in a pass") from None

    monkeypatch.setattr(tune, "search", turn)
    assert run(files, "-o", str(tmp_path)) == 130


def bad_model(files, name, change):
    model = onnx.load(files / "net.onnx")
    change(model)
    onnx.save(model, files / name)
    return name


def with_nan(model):
    tensor = model.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def truncated(files):
    (files / "cut.onnx").write_bytes((files / "net.onnx").read_bytes()[:-300])
    return {"model": "cut.onnx"}


def nan_weights(files):
    return {"model": bad_model(files, "nan.onnx", with_nan)}


def wrong_shape(files):
    np.savez(files / "shape.npz", inputs=np.zeros((60, 3, 32, 32), np.float32))
    return {"data": "shape.npz"}


def wrong_labels(files):
    inputs = np.load(files / "data.npz")["inputs"]
    np.savez(files / "labels.npz", inputs=inputs, labels=np.zeros(7, int))
    return {"data": "labels.npz"}


def no_inputs(files):
    np.savez(files / "empty.npz", images=np.zeros(3))
    return {"data": "empty.npz"}


def not_npz(files):
    (files / "text.npz").write_text("hello")
    return {"data": "text.npz"}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (truncated, [], "cut.onnx is not a valid ONNX file"),
        (nan_weights, [], "NaN or infinite"),
        (wrong_shape, [], "(60, 3, 32, 32), but the network takes samples of shape (3, 18, 18)"),
        (wrong_labels, [], "'labels' has shape (7,) for 60 inputs"),
        (no_inputs, [], "no array 'inputs'"),
        (not_npz, [], "not a readable .npz file"),
        (lambda _: {"data": "absent.npz"}, [], "does not exist"),
        (lambda _: {"model": "absent.onnx"}, [], "does not exist"),
        (lambda _: {}, ["--target", "quantum"], "unknown to TVM"),
        (lambda _: {}, ["--target", "cuda:sm_20"], "use sm_75 or later"),
        (lambda _: {}, ["--forms", "origami"], "choose among dense"),
        (lambda _: {}, ["--threads", "0"], "threads is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(files, tmp_path, capsys, make, options, message):
    keep = {"model.so": b"old library", "plan.json": b"old plan"}
    for name, content in keep.items():
        (tmp_path / name).write_bytes(content)
    code = run(files, "-o", str(tmp_path), *options, **make(files))
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == keep


def test_a_damaged_record_file_is_refused_and_kept(files, tmp_path, capsys):
    (tmp_path / "records.jsonl").write_text('{"format": 1}\n')
    (tmp_path / "model.so").write_bytes(b"old library")
    assert run(files, "-o", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "records.jsonl, line 1, are damaged" in error and error.count("\n") == 1
    assert (tmp_path / "records.jsonl").read_text() == '{"format": 1}\n'
    assert (tmp_path / "model.so").read_bytes() == b"old library"


def test_an_unwritable_folder_is_refused(files, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert run(files, "-o", str(blocked / "out")) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert run(files, "-o", str(locked)) == 2


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out
