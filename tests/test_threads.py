"""Where the thread that measures runs beside TVM's pool, and when NumPy's threads rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from tvm_lowrank.threads import apart_from_pool

needs_processors = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two processors, and a system that tells which",
)


@pytest.fixture
def bound():
    """A thread bound to one of our processors, as those of the pool are; that processor."""
    processor, ready, done = max(os.sched_getaffinity(0)), threading.Event(), threading.Event()

    def wait():
        os.sched_setaffinity(0, {processor})
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    yield processor
    done.set()
    thread.join()


@needs_processors
def test_the_caller_keeps_off_the_processors_of_the_pool(bound):
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), apart_from_pool():
        within = os.sched_getaffinity(0)
        raise ZeroDivisionError
    assert bound in before and bound not in within and within
    assert os.sched_getaffinity(0) == before


@needs_processors
def test_a_caller_that_is_bound_itself_stays_where_it_is(bound):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {bound})
        with apart_from_pool():
            assert os.sched_getaffinity(0) == {bound}
    finally:
        os.sched_setaffinity(0, before)


_TELL = """
import json, os, sys
attention = os.environ.get("OPENBLAS_THREAD_TIMEOUT")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print(json.dumps([attention, os.environ.get("OPENBLAS_THREAD_TIMEOUT")]))
            raise SystemExit
sys.meta_path.insert(0, Finder())
import tvm_lowrank
"""


@pytest.mark.parametrize("given", [None, "26"])
def test_blas_is_told_to_rest_before_it_is_loaded_unless_the_user_said_otherwise(given):
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"}
    env |= {} if given is None else {"OPENBLAS_THREAD_TIMEOUT": given}
    told = subprocess.run([sys.executable, "-c", _TELL], env=env, capture_output=True, text=True)
    before, after = json.loads(told.stdout)
    assert before == given
    assert after == (given or "18")
