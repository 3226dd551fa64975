"""The process that measures, and what becomes of it when a candidate brings it down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.errors import LowRankError


@pytest.fixture(scope="module")
def worker():
    made = Worker(1, timeout=2.0, function="tuner_support:behave")
    yield made
    made.close()


@pytest.mark.parametrize("fault", ["crash", "hang", "exit"])
def test_a_fault_costs_one_answer_and_a_new_process(worker, fault):
    before = worker.ask("a")
    starts = worker.starts
    assert worker.ask(fault) is None
    after = worker.ask("b")
    assert after["request"] == "b"
    assert after["pid"] != before["pid"]
    assert worker.starts == starts + 1


def test_an_exception_costs_no_process_and_prints_are_no_answers(worker):
    pid = worker.ask("a")["pid"]
    assert worker.ask("raise") is None
    assert worker.ask("print")["pid"] == pid


def test_requests_of_threads_take_turns(worker):
    answers = {}

    def ask(request):
        answers[request] = worker.ask(request)["request"]

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {str(i): str(i) for i in range(16)}


def test_closing_ends_what_another_thread_waits_for():
    worker = Worker(1, timeout=300.0, function="tuner_support:behave")
    worker.ask("a")
    found = []
    thread = threading.Thread(target=lambda: found.append(worker.ask("hang")))
    thread.start()
    while worker._turn.acquire(blocking=False):
        worker._turn.release()
        time.sleep(0.01)
    worker.close()
    thread.join(timeout=60)
    assert found == [None]


def test_a_process_that_cannot_start_is_one_sentence():
    with pytest.raises(LowRankError, match=r"does not start.*no_such_module"):
        Worker(1, function="no_such_module:f").ask({})


def test_the_process_ends_with_its_parent():
    code = """
import os, signal
from tvm_lowrank.cost.model import AnalyticModel, features
from tvm_lowrank.cost.worker import Worker
worker = Worker(1, function="tuner_support:behave")
print(worker.ask("a")["pid"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while _alive(pid):
        assert time.monotonic() < deadline, "the measuring process outlives its parent"
        time.sleep(0.05)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
