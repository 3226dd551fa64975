"""What is measured where a cost model guides: little, near the best, and nothing twice."""

from __future__ import annotations

import math

import pytest
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86.isa import AVX2, AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost.guide import PLAUSIBLE, Guide, guide_for
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.trees import find
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target


def workload(channels=64, size=28, kernel=3, out=64):
    pad = (kernel // 2,) * 4
    geometry = ConvGeometry(channels, out, size, size, (kernel, kernel), padding=pad)
    return ConvWorkload(geometry, 16, ("bias", "relu"))


class Askew:
    """A worker that runs nothing: the guide's predictions, some families slower, in zigzag."""

    def __init__(self, guide, slower=()):
        self.guide, self.slower = guide, dict(slower)
        self.prepared, self.asked = [], []

    def ask(self, request):
        if "prepare" in request:
            self.prepared += request["prepare"]
            return {}
        self.asked.append(request)
        work = ConvWorkload.from_json(request["workload"])
        predicted = self.guide.predictions(work, spaces(work, AVX512))
        found = {str(s.to_json()): us for s, us in predicted.items()}
        factor = self.slower.get(request["schedule"]["kernel"], 1.0)
        zigzag = 1 + 0.1 * (request["schedule"].get("rows", 0) % 2)
        return {"us": 3 * factor * zigzag * found[str(request["schedule"])], "spread": 0.0}


def guided(algorithms=("direct", "winograd", "fft"), slower=(), records=None, trials=4):
    if records is None:
        records = TuningRecords(None, "avx512", 2, machine="mine")
    guide = guide_for(records, AVX512)
    target = parse_target("llvm:skylake-avx512")
    worker = Askew(guide, slower)
    return KernelTimer(target, records, trials, algorithms, worker=worker, guide=guide)


def families(timer, work):
    return [schedule["kernel"] for schedule, _ in timer.records.measured(work.key())]


def test_few_kernels_are_measured_and_no_hopeless_family():
    timer, work = guided(), workload(kernel=3)
    predicted = timer.guide.predictions(work, spaces(work, AVX512))
    fastest = next(iter(predicted.values()))
    far = {
        name
        for name, space in spaces(work, AVX512).items()
        if min(predicted.get(s, math.inf) for s in space) > PLAUSIBLE * fastest
    }
    assert far  # the test needs one
    timer.microseconds(work)
    assert timer.measured == 4 and not far & {*families(timer, work)}
    brief = guided()
    brief.microseconds(work, brief=True)
    assert brief.measured == 2


def test_what_is_compiled_ahead_is_what_is_measured():
    timer = guided()
    stages = [workload(kernel=1, out=32).geometry, workload(channels=32).geometry]
    timer.chain(stages)
    worker = timer.asker.worker
    assert len(worker.prepared) >= 2 and all(kernel in worker.asked for kernel in worker.prepared)
    # By then it is on record; and a chain that is not worth measuring is not worth compiling.
    count = len(worker.prepared)
    timer.chain(stages)
    timer.within([workload(kernel=5).geometry], 0.01)
    assert len(worker.prepared) == count


def test_a_family_that_disappoints_leaves_the_looks_to_the_others():
    guide = guided().guide

    def near(work):
        predicted = guide.predictions(work, spaces(work, AVX512))
        limit = 0.9 * PLAUSIBLE * next(iter(predicted.values()))
        return {schedule.kernel for schedule, us in predicted.items() if us < limit}

    shapes = [workload(c, size, k) for k in (3, 5, 7) for c in (16, 64, 256) for size in (7, 28)]
    work = next(shape for shape in shapes if len(near(shape)) > 1)
    predicted = guide.predictions(work, spaces(work, AVX512))
    slow = next(iter(predicted)).kernel
    timer = guided(slower={slow: 2.0}, trials=6)
    timer.microseconds(work)
    found = families(timer, work)
    assert found.count(slow) == 1 and len(found) > 3 and found[0] != slow


def test_what_is_on_record_is_enough_however_it_was_measured():
    """Direct kernels alone first, then all algorithms: both find nothing left the second time."""
    records = TuningRecords(None, "avx512", 2, machine="mine")
    for work in (workload(kernel=3), workload(kernel=5), workload(kernel=1), workload(16, 7)):
        for algorithms in (("direct",), ("direct", "winograd", "fft")):
            guided(algorithms, records=records).microseconds(work)
        for algorithms in (("direct",), ("direct", "winograd", "fft")):
            again = guided(algorithms, records=records)
            again.microseconds(work)
            again.microseconds(work, brief=True)
            assert again.measured == 0


def test_a_chain_is_measured_as_far_as_it_can_be_within_a_limit():
    stages = [workload(64, 28, 1, 32).geometry, workload(32, 28, 3, 64).geometry]
    timer = guided()
    timer.guide.calibrate([(1.0, 3.0)])
    expected = timer.expected(stages)
    assert timer.within(stages, 0.5 * expected) == math.inf and timer.measured == 0
    us = timer.within(stages, 2 * expected)
    assert us == pytest.approx(timer.recorded(stages)) and us < 1.3 * expected
    assert timer.within([workload(64, 28, 1, 32).geometry], us) < us


def test_a_model_that_fits_ships_for_every_x86_instruction_set():
    for isa in (AVX512, AVX2):
        trees, complaint = find(None, isa)
        assert trees is not None and not complaint
        assert guide_for(TuningRecords(None, isa.name, 2), isa, shipped=False) is not None


def test_instruction_sets_without_a_model_are_guided_by_their_records_or_not_at_all(monkeypatch):
    monkeypatch.setattr("tvm_lowrank.cost.guide.find", lambda *_: (None, ""))
    records = TuningRecords(None, "avx2", 2)
    assert isinstance(guide_for(records, AVX2), Guide)
    assert guide_for(records, AVX2, shipped=False) is None
