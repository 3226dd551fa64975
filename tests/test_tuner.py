"""Measuring in a process of its own, choosing what to measure, and records of other machines."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from cost_support import timer, workload
from helpers import RACE, reference, relative, win
from tuner_support import Invented
from tvm_lowrank.schedules.kernels import emit, schedule_from_json, spaces
from tvm_lowrank.schedules.x86 import fused_space
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload
from tvm_lowrank.schedules.x86.isa import AVX512, isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

import tvm_lowrank
from tvm_lowrank import tune
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.model import AnalyticModel, features
from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.planner import Options
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.shipped import shipped_records
from tvm_lowrank.target import host_target, parse_target


def test_a_crashing_candidate_is_recorded_and_the_search_goes_on(tmp_path):
    path = tmp_path / "records.jsonl"
    crashing = Worker(1, function="tuner_support:one_order_crashes")
    measuring = timer(TuningRecords(path, "avx512", 2), worker=crashing, trials=8)
    assert math.isfinite(measuring.microseconds(workload()))
    crashing.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    failed = [line for line in lines if line["us"] is None]
    assert 0 < len(failed) < len(lines) and measuring.failed == len(failed)
    assert all(line["schedule"]["order"] == "rows" for line in failed)
    assert f"{len(failed)} of {len(lines)} kernels did not run" in measuring.complaint()
    again = timer(TuningRecords(path, "avx512", 2), trials=8)
    assert again.microseconds(workload()) == measuring.microseconds(workload())
    assert again.measured == 0 and again.complaint() == ""


def test_when_nothing_runs_the_time_is_infinite():
    class Broken:
        def ask(self, request):
            return None

    broken = timer(worker=Broken())
    assert broken.microseconds(workload()) == math.inf
    assert broken.known(workload()) is None
    with pytest.raises(LowRankError, match="do not run on this machine"):
        broken.roofline()


def test_unsteady_times_are_counted():
    class Unsteady:
        def ask(self, request):
            return {"us": 1.0, "spread": 0.25}

    unsteady = timer(worker=Unsteady(), trials=2)
    unsteady.microseconds(workload())
    assert unsteady.unsteady == unsteady.measured == 2
    assert "varied by more than 10 %" in unsteady.complaint()


def test_a_third_time_that_settled_a_dispute_is_told():
    class Disputed:
        def ask(self, request):
            return {"us": 1.0, "spread": 0.01, "apart": 0.4}

    disputed = timer(worker=Disputed(), trials=2)
    disputed.microseconds(workload())
    assert disputed.disputed == 2 and disputed.unsteady == 0
    told = "2 of 2 kernels were timed a third time, because two times were more than 10 % apart"
    assert disputed.complaint() == f"{told}, of one 40%"


def test_times_allow_for_the_pace_of_the_machine(tmp_path):
    class Paced:
        """A machine that gets slower, until everything takes twice as long."""

        slower = 1.0

        def ask(self, request):
            if "pace" in request:
                return {"us": 300.0}
            us = 10.0 + request["schedule"]["tile"]
            return {"us": self.slower * us, "pace": 300.0 * self.slower, "spread": 0.0}

    path, machine = tmp_path / "records.jsonl", Paced()
    candidates = spaces(workload(), AVX512)["direct"][:12]
    measuring = timer(TuningRecords(path, "avx512", 2), worker=machine)
    for index, schedule in enumerate(candidates):
        machine.slower = 1 + index / 11 if index else 1.3  # its threads are new
        assert measuring.time(workload(), schedule) == pytest.approx(10.0 + schedule.tile, abs=1e-3)
    assert measuring.complaint().startswith("the machine was up to 100% slower than at first")
    # A search that goes on keeps the pace that its records have.
    again = timer(TuningRecords(path, "avx512", 2), worker=machine)
    (schedule,) = spaces(workload(), AVX512)["direct"][12:13]
    assert again.time(workload(), schedule) == pytest.approx(10.0 + schedule.tile, abs=1e-3)
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["slower"] == 2.0 and last["us"] == again.time(workload(), schedule)


NETWORK = [workload(c, s, k) for c in (16, 32, 64) for s in (7, 14, 28) for k in (1, 3, 5)]


def tuned(trials=4, seed=0):
    measuring = timer(trials=trials, seed=seed)
    times = [measuring.microseconds(each) for each in NETWORK]
    return measuring, times


def test_the_same_records_and_seed_try_the_same_schedules():
    first, second = tuned(), tuned()
    assert first[0].asker.worker.asked == second[0].asker.worker.asked
    assert first[1] == second[1]


def test_the_model_finds_what_the_families_own_order_misses():
    measuring, times = tuned()
    half = len(NETWORK) // 2
    gains = []
    for each, found in list(zip(NETWORK, times, strict=True))[half:]:
        space = spaces(each, measuring.isa, ("direct",))["direct"]
        plain = min(Invented().ask({"schedule": s.to_json()})["us"] for s in space[:4])
        gains.append(plain - found)
    assert np.mean(gains) > 0
    # A vector more or less is 50 microseconds here.
    assert sum(gain < -10 for gain in gains) < sum(gain > 10 for gain in gains)


def test_every_schedule_of_every_family_has_features():
    model = AnalyticModel(Roofline(100.0, 10.0), timer().isa, 2)
    for each in NETWORK:
        for family, space in spaces(each, timer().isa).items():
            for schedule in space:
                found = features(each, schedule.to_json(), model)
                assert all(math.isfinite(value) for value in found.values()), family
                assert model.predict(each, [schedule.to_json()])[0] > 0


@pytest.mark.parametrize("trials", [1, 2, 4, 7])
def test_no_family_is_tried_more_often_than_allowed(trials):
    measuring = timer(trials=trials)
    measuring.microseconds(workload())
    assert measuring.measured == trials


def test_another_machines_schedule_is_taken_but_its_time_is_not(tmp_path):
    path = tmp_path / "shipped.jsonl"
    theirs = timer(TuningRecords(path, "avx512", 2, machine="another"), trials=8)
    theirs.microseconds(workload())
    best = theirs.known(workload())
    mine = timer(TuningRecords(None, "avx512", 2, machine="mine", shipped=(path,)))
    assert mine.known(workload()) == best
    assert mine.recorded([workload().geometry]) is None
    assert mine.measured == 0
    mine.microseconds(workload())
    assert [r["schedule"] for r in mine.asker.worker.asked] == [best.to_json()]
    assert mine.recorded([workload().geometry]) == mine.microseconds(workload())


def test_a_shipped_schedule_that_fails_here_is_replaced_by_tuning(tmp_path):
    class Picky(Invented):
        def ask(self, request):
            answer = super().ask(request)
            return None if len(self.asked) == 1 else answer

    path = tmp_path / "shipped.jsonl"
    theirs = timer(TuningRecords(path, "avx512", 2, machine="another"), trials=1)
    theirs.microseconds(workload())
    mine = timer(TuningRecords(None, "avx512", 2, shipped=(path,)), worker=Picky())
    assert math.isfinite(mine.microseconds(workload()))
    assert mine.known(workload()) not in (None, theirs.known(workload()))


def test_records_of_unknown_kernels_are_passed_over():
    records = TuningRecords(None, "avx512", 2)
    key = workload().key()
    records.add(key, {"kernel": "quantum", "qubits": 7}, 0.1)
    records.add(key, {"kernel": "direct", "tile": 7, "colour": "blue"}, 0.2)
    records.add(key, {"kernel": "direct", "tile": 99, "vectors": 3}, 0.3)
    measuring = timer(records)
    assert measuring.known(workload()) is None
    assert measuring.microseconds(workload()) > 1.0


def test_algorithms_restrict_what_records_offer(monkeypatch):
    records = TuningRecords(None, "avx512", 2)
    free = timer(records)
    free.microseconds(workload())
    none = timer(records, algorithms=("winograd",))
    monkeypatch.setattr("tvm_lowrank.cost.usable.spaces", lambda *a: {"winograd": ["x"]})
    assert none.known(workload()) is None
    monkeypatch.setattr("tvm_lowrank.cost.usable.spaces", lambda *a: {})
    assert none.known(workload()) == free.known(workload())


def test_a_real_kernel_is_timed_in_the_process():
    target = host_target()
    measuring = KernelTimer(target, TuningRecords(None, "host", 1), trials=1)
    lanes = measuring.isa.lanes
    found = measuring.microseconds(ConvWorkload(workload().geometry, lanes, ("bias", "relu")))
    assert math.isfinite(found) and measuring.failed == 0


def test_a_covered_network_compiles_without_measuring(small, tmp_path, monkeypatch):
    model = tmp_path / "net.onnx"
    onnx.save(small, model)
    command = [str(model), "--lossless", "--trials", "1"]
    monkeypatch.setattr(RACE, win())
    first, second = tmp_path / "first", tmp_path / "second"
    assert tune.main([*command, "--no-shipped-records", "-o", str(first)]) == 0
    shipped = tmp_path / "shipped.jsonl"
    lines = [json.loads(line) for line in (first / "records.jsonl").read_text().splitlines()]
    shipped.write_text("".join(json.dumps({**r, "machine": "another"}) + "\n" for r in lines))
    monkeypatch.setattr("tvm_lowrank.cost.predicting.shipped_records", lambda isa: [shipped])
    monkeypatch.setattr(
        "tvm_lowrank.cost.asking.shared_worker", lambda _: pytest.fail("something is measured")
    )
    assert tune.main([*command, "-o", str(second)]) == 0
    assert not (second / "records.jsonl").exists()
    plans = [tvm_lowrank.Plan.load(folder / "plan.json") for folder in (first, second)]
    assert plans[0].schedules == plans[1].schedules
    for one, other in zip(plans[0].layers, plans[1].layers, strict=True):
        assert one.algorithms == other.algorithms
        assert other.dense_us is None
    x = np.random.default_rng(0).standard_normal((1, 3, 18, 18)).astype(np.float32)
    assert relative(tvm_lowrank.load(second / "model.so")(x), reference(small, x)) < 1e-5


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_shipped_records_are_of_this_versions_kernels(isa):
    target = parse_target("llvm:skylake-avx512" if isa == "avx512" else "llvm:haswell")
    measuring = KernelTimer(target, TuningRecords(None, isa, 2, shipped=shipped_records(isa)))
    taken = {}
    for key, _, schedule, _ in measuring.records.rows():
        taken.setdefault(key, schedule)
    alone = [item for item in taken.items() if "stages" not in json.loads(item[0])]
    for key, schedule in alone[::7]:
        emit(ConvWorkload.from_json(json.loads(key)), schedule_from_json(schedule), measuring.isa)
    chains = [item for item in taken.items() if "stages" in json.loads(item[0])]
    for key, schedule in chains[::3]:
        workload = ChainWorkload.from_json(json.loads(key))
        for part, found in ChainSchedule.from_json(schedule).split(workload):
            if isinstance(part, ChainWorkload):
                assert fused_space.is_legal(part, found, measuring.isa) is None
            else:
                emit(part, found, measuring.isa)


def test_a_family_that_was_not_measured_here_is_believed_from_elsewhere(tmp_path):
    target = parse_target("llvm:skylake-avx512")
    geometry = ConvGeometry(32, 32, 14, 14, (3, 3), padding=(1, 1, 1, 1))
    work = ConvWorkload(geometry, 16, ("bias", "relu"))
    found = spaces(work, isa_of(target))
    direct, winograd = found["direct"][0], found["winograd"][0]
    theirs = TuningRecords(tmp_path / "theirs.jsonl", "avx512", 2, machine="theirs")
    theirs.add(work.key(), winograd.to_json(), 1.0)
    theirs.add(work.key(), found["direct"][1].to_json(), 2.0)
    shipped = (tmp_path / "theirs.jsonl",)
    mine = TuningRecords(None, "avx512", 2, machine="mine", shipped=shipped)
    mine.add(work.key(), direct.to_json(), 3.0)
    assert KernelTimer(target, mine, algorithms=("direct",)).known(work) == direct
    assert KernelTimer(target, mine).known(work) == winograd
    mine.add(work.key(), winograd.to_json(), 4.0)
    assert KernelTimer(target, mine).known(work) == direct


def test_a_batch_without_records_takes_the_schedule_of_the_nearest_one():
    target = parse_target("llvm:skylake-avx512")
    geometry = ConvGeometry(32, 32, 14, 14, (3, 3), padding=(1, 1, 1, 1))
    one, two, four, sixteen = (
        ConvWorkload(replace(geometry, batch=n), 16, ("bias", "relu")) for n in (1, 2, 4, 16)
    )
    first, second, third = spaces(one, isa_of(target))["direct"][:3]
    records = TuningRecords(None, "avx512", 2)
    timer = KernelTimer(target, records)
    records.add(one.key(), second.to_json(), 3.0)
    assert timer.known(sixteen) == second
    records.add(four.key(), third.to_json(), 9.0)
    assert timer.known(sixteen) == third and timer.known(one) == second
    assert timer.known(two) in (second, third)
    records.add(sixteen.key(), first.to_json(), 99.0)
    assert timer.known(sixteen) == first


@pytest.mark.parametrize(("option", "message"), [("trials", "1 or more"), (
    "metaschedule_trials", "0 or more")])  # fmt: skip
def test_bad_counts_are_refused(option, message):
    with pytest.raises(LowRankError, match=f"{option} is -1; give {message}"):
        Options(**{option: -1})
