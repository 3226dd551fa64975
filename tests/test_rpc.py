"""Measuring behind TVM's RPC tracker: two servers on loopback, one of them killed midway."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import tvm
from cuda_support import needs_nvcc
from tvm_lowrank.schedules.kernels import default_schedule, emit
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import tune
from tvm_lowrank.cost import device, fleet, sampling
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.target import host_target, parse_target

AARCH64 = '{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}'
TARGET = json.loads(str(host_target()))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(module, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def tracker():
    """Address of a tracker, and its two servers by address."""
    pytest.importorskip("tornado", reason="TVM's tracker needs it")
    port = free_port()
    processes = [start("rpc_tracker", "--port", port, "--port-end", port + 1)]
    servers = {}
    for _ in range(2):
        own = free_port()
        options = ("--port", own, "--port-end", own + 1, "--key", "loop")
        servers[f"127.0.0.1:{own}"] = start(
            "rpc_server", *options, "--tracker", f"127.0.0.1:{port}"
        )
    address, deadline = f"127.0.0.1:{port}", time.monotonic() + 120
    while True:
        with contextlib.suppress(LowRankError):
            if fleet._registered(address, "loop") == 2:
                break
        assert time.monotonic() < deadline, "tracker and servers do not start"
        time.sleep(0.5)
    yield address, servers
    for process in [*processes, *servers.values()]:
        kill(process)


def workload(size=14):
    geometry = ConvGeometry(16, 16, size, size, (3, 3), padding=(1, 1, 1, 1))
    return ConvWorkload(geometry, isa_of(host_target()).lanes, ("bias",))


def request(schedule=None, size=14):
    schedule = schedule or default_schedule(workload(size), isa_of(host_target())).to_json()
    return {"target": TARGET, "workload": workload(size).to_json(), "schedule": schedule}


def test_a_fleet_measures_and_tells_bad_kernels_from_lost_devices(tracker):
    both = Fleet(tracker[0], "loop", TARGET, threads=1)
    try:
        assert {each.name for each in both.devices} == set(tracker[1])
        bad = request({"kernel": "direct", "tile": 99, "vectors": 3})
        answers = dict(both.ask_all([request(size=7), bad, request(size=9), request(size=11)]))
        assert sorted(answers) == [0, 1, 2, 3] and answers[1] is None
        assert all(answers[i]["us"] > 0 and answers[i]["device"] in tracker[1] for i in (0, 2, 3))
        assert sum(each.measured for each in both.devices) == 4
        assert sum(each.failed for each in both.devices) == 1
        assert all(each.state == "ready" for each in both.devices)
    finally:
        both.close()


def test_a_device_whose_process_does_not_start_again_is_lost(tracker):
    both = Fleet(tracker[0], "loop", TARGET, threads=1)
    try:
        broken, other = both.devices
        broken.worker.close()
        broken.worker = Worker(1, function="no_such_module:f")
        answers = dict(both.ask_all([request(size=7), request(size=9), request(size=11)]))
        assert [answers[i]["device"] for i in range(3)] == [other.name] * 3
        assert "does not start" in broken.state and both.ready() == [other]
    finally:
        both.close()


@pytest.mark.skipif(tvm.cuda(0).exist, reason="this machine has a GPU")
@needs_nvcc
def test_servers_without_a_gpu_are_named_where_kernels_need_one(tracker, tmp_path, capsys):
    command = ["--target", "cuda:sm_80", "--lossless", "-o", str(tmp_path / "out")]
    command += ["--rpc-tracker", tracker[0], "--rpc-key", "loop"]
    assert tune.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 servers of key 'loop', none of which can" in error
    assert re.search("has no GPU|not enabled", error)


def test_a_server_that_dies_midway_costs_nothing(tracker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "_WAIT", 2.0)  # nothing takes the place of the dead one
    monkeypatch.setattr(sampling, "_MOST", 1 << 24)  # of multiplications: one that is soon measured
    address, servers = tracker
    records = tmp_path / "records.jsonl"
    victim = []

    def read():
        text = records.read_text() if records.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]

    def murder():
        while len(lines := [r for r in read() if "device" in r and r["workload"][0] == "{"]) < 3:
            time.sleep(0.02)
        victim.append(lines[-1]["device"])
        kill(servers[victim[0]])

    killer = threading.Thread(target=murder, daemon=True)
    killer.start()
    command = ["--survey", "--shapes", "1", "--trials", "1", "--threads", "1", "-o", str(tmp_path)]
    assert tune.main([*command, "--rpc-tracker", address, "--rpc-key", "loop"]) == 0
    killer.join(timeout=1)
    lines = read()
    assert all(line["us"] is not None for line in lines)
    assert {line["device"] for line in lines if "device" in line} == set(servers)
    output = capsys.readouterr().out
    assert "1 of 1" in output and "lost" in output and all(name in output for name in servers)


def test_what_is_no_tracker_or_has_no_servers_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tvm.rpc.base.connect_with_retry", refused)
    command = ["--survey", "-o", str(tmp_path)]
    for options, message in [
        (["--rpc-tracker", "localhost", "--rpc-key", "k"], "give HOST:PORT"),
        (["--rpc-tracker", "localhost:1", "--rpc-key", "k"], "no RPC tracker answers"),
        (["--rpc-tracker", "localhost:1"], "belong together"),
    ]:
        assert tune.main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(fleet, "_registered", lambda *_: 0)
    with pytest.raises(LowRankError, match="has 0 servers of key 'k'"):
        Fleet("localhost:1", "k", TARGET)


def refused(*_, **__):
    raise ConnectionRefusedError("connection refused")


def test_kernels_for_another_architecture_travel_as_objects(tmp_path, monkeypatch):
    class Session:
        def upload(self, path):
            with tarfile.open(path) as archive:
                for member in archive.getmembers():
                    (tmp_path / Path(member.name).name).write_bytes(
                        archive.extractfile(member).read()
                    )

        def load_module(self, name):
            assert name.endswith(".tar")
            return self

        def remove(self, name):
            pass

        time_evaluator = None

    monkeypatch.setattr(device._Device, "session", Session())
    target = parse_target(AARCH64)
    work = ConvWorkload(workload().geometry, isa_of(target).lanes, ("bias",))
    device._upload(emit(work, default_schedule(work, isa_of(target)), isa_of(target)), target)
    headers = [path.read_bytes()[:20] for path in tmp_path.rglob("*.o")]
    machines = {struct.unpack("<H", header[18:20])[0] for header in headers}
    assert headers and all(header[:4] == b"\x7fELF" for header in headers)
    assert 183 in machines  # EM_AARCH64
