"""Where the thread that measures runs while TVM's pool has its own on processors of theirs."""

from __future__ import annotations

import os
import threading

import pytest

from tvm_lowrank.threads import apart_from_pool

pytestmark = pytest.mark.skipif(
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


def test_the_caller_keeps_off_the_processors_of_the_pool(bound):
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), apart_from_pool():
        within = os.sched_getaffinity(0)
        raise ZeroDivisionError
    assert bound in before and bound not in within and within
    assert os.sched_getaffinity(0) == before


def test_a_caller_that_is_bound_itself_stays_where_it_is(bound):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {bound})
        with apart_from_pool():
            assert os.sched_getaffinity(0) == {bound}
    finally:
        os.sched_setaffinity(0, before)
