"""Schedules whose times come near each other run in turns, which chooses and prices nothing."""

from __future__ import annotations

import json
import math

import pytest
from cost_support import timer, workload
from tvm_lowrank.schedules.kernels import schedule_from_json, spaces
from tvm_lowrank.schedules.x86.isa import AVX512, isa_of

from tvm_lowrank.cost import timing
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target


class SlowAtFirst:
    """The first schedule that is asked for is the best, and takes longer that once."""

    def __init__(self, breaks=False):
        self.asked, self.raced, self.breaks = [], [], breaks

    def us(self, schedule):
        rank = self.asked.index(schedule)
        return (10.0, 10.5)[rank] if rank < 2 else 20.0 + rank

    def ask(self, request):
        if "rivals" in request:
            self.raced.append([schedule_from_json(schedule) for schedule in request["rivals"]])
            return None if self.breaks else {"us": list(map(self.us, self.raced[-1]))}
        self.asked.append(schedule_from_json(request["schedule"]))
        slow = 1.15 if len(self.asked) == 1 else 1.0
        return {"us": slow * self.us(self.asked[-1]), "spread": 0.0}


def test_what_was_measured_in_a_slow_moment_wins_in_turns(tmp_path):
    path = tmp_path / "records.jsonl"
    measuring = timer(TuningRecords(path, "avx512", 2), worker=SlowAtFirst(), trials=8)
    priced = measuring.microseconds(workload())
    worker = measuring.asker.worker
    first, second, third, *_ = worker.asked
    assert measuring.known(workload()) == second
    # Kernels that differ in what they add at the end count as one.
    measuring.compare([workload(), workload(epilogue=("bias",)), workload()])
    assert worker.raced == [[second, first]]
    assert measuring.known(workload()) == measuring.known(workload(epilogue=())) == first
    # What is far behind never runs in turns, and no price changes.
    assert [s for _, s in measuring.usable.measured(workload())][:3] == [second, first, third]
    assert measuring.microseconds(workload()) == priced == 10.5
    # A search that goes on from these records runs nothing, and chooses and prices the same.
    later = timer(TuningRecords(path, "avx512", 2), trials=8)
    later.compare([workload()])
    assert later.measured == 0 and later.asker.worker.asked == []
    assert later.known(workload()) == first and later.microseconds(workload()) == priced


def test_what_does_not_run_in_turns_keeps_its_time(tmp_path):
    path = tmp_path / "records.jsonl"
    measuring = timer(TuningRecords(path, "avx512", 2), worker=SlowAtFirst(True), trials=8)
    measuring.microseconds(workload())
    for _ in range(2):
        measuring.compare([workload()])
    assert len(measuring.asker.worker.raced) == 1
    assert measuring.known(workload()) == measuring.asker.worker.asked[1]


def test_a_new_schedule_near_the_fastest_runs_in_turns_too():
    measuring = timer(worker=SlowAtFirst(), trials=8)
    measuring.microseconds(workload())
    measuring.compare([workload()])
    worker = measuring.asker.worker
    known = {*worker.asked}
    fresh = next(s for s in spaces(workload(), AVX512)["direct"] if s not in known)
    measuring.records.add(workload().key(), fresh.to_json(), 9.8)
    assert measuring.known(workload()) == fresh
    worker.asked.append(fresh)
    measuring.compare([workload()])
    assert worker.raced[1:] == [[fresh, *worker.raced[0]]]
    assert measuring.known(workload()) == worker.asked[0]


def test_kernels_take_turns_and_are_compared_within_each(monkeypatch):
    order = []

    def blocks(run, number, count):
        order.append(run)
        # The machine is slow but for one turn, in which both are faster, and for two in which it
        # becomes faster or slower between the two.
        return [(2.0 if len(order) in (7, 8, 17, 32) else 3.0) * run() for _ in range(count)]

    monkeypatch.setattr(timing, "_blocks", blocks)
    one, other = (lambda: 1e-6), (lambda: 1.1e-6)
    assert timing._in_turns([one, other]) == pytest.approx([2.0, 2.2])
    assert order == [one, other] * (len(order) // 2) and len(order) > 40


def test_rivals_are_compiled_and_run():
    target = host_target()
    schedules = [s.to_json() for s in spaces(workload(), isa_of(target))["direct"][:2]]
    request = {"workload": workload().to_json(), "target": json.loads(str(target))}
    times = timing.time_kernel({**request, "rivals": schedules})["us"]
    assert len(times) == 2 and all(0 < us < math.inf for us in times)


def test_kernels_are_compiled_ahead():
    target, work = host_target(), workload()
    schedules = [s.to_json() for s in spaces(work, isa_of(target))["direct"][:3]]
    named = {"workload": work.to_json(), "target": json.loads(str(target))}
    requests = [{**named, "schedule": schedule} for schedule in schedules]
    broken = {**requests[0], "schedule": {**schedules[0], "tile": 0}}
    ahead = {"target": named["target"], "prepare": [*requests[:2], broken]}
    assert timing.time_kernel(ahead) == {}
    before = timing._compiled.cache_info()
    assert all(timing.time_kernel(request)["us"] > 0 for request in requests[:2])
    after = timing._compiled.cache_info()
    assert after.hits >= before.hits + 2
    with pytest.raises(ValueError):
        timing.time_kernel(broken)
