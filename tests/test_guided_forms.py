"""The benchmark of the guided search with forms: what it holds against the best."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86.isa import AVX512

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.trees import find
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import guided_forms

GEOMETRY = ConvGeometry(16, 32, 8, 8, (3, 3), padding=(1, 1, 1, 1))
WEIGHT = np.zeros(GEOMETRY.weight_shape, np.float32)
LAYER = ConvLayer("conv", GEOMETRY, WEIGHT, np.zeros(32, np.float32))


def candidate(error, us, form="tucker2", rank=(16, 16)):
    return Candidate(form, rank, (GEOMETRY,), (), np.zeros(0), error, us, us, geometry=GEOMETRY)


def compared(guided):
    dense = candidate(0.0, 100.0, "dense", 0)
    best = [candidate(0.1, 70.0), candidate(0.3, 50.0), dense]
    found = {"conv": [*guided, candidate(0.0, 104.0, "dense", 0)]}
    return guided_forms.Compared("net", {"conv": LAYER}, found, {"conv": best}, 2, 1, (3, 8, 20))


def test_the_guided_choice_loses_no_more_than_the_best():
    front = compared([candidate(0.3, 55.0), candidate(0.1, 63.0)]).guided["conv"]
    found = [guided_forms.no_worse(front, candidate(error, 1.0)) for error in (0.3, 0.2, 0.05)]
    assert [one.measured_us for one in found] == [55.0, 63.0, 104.0]


def test_harm_may_be_spread_otherwise_over_the_layers():
    dense, small, large = (candidate(e, us) for e, us in ((0.0, 90.0), (0.1, 60.0), (0.3, 20.0)))
    options = {"a": [large, small, dense], "b": [small, dense]}
    limit = guided_forms.total_harm({"a": large, "b": small}, {"a": 1.0, "b": 1.0})
    assert guided_forms.within(options, limit) == {"a": large, "b": small}
    assert guided_forms.within(options, 0.99 * limit) == {"a": small, "b": small}


def test_a_missed_proposal_counts_as_a_loss():
    best, guided = compared([]).at(0.75)
    assert best["conv"].measured_us == 70.0 and guided["conv"].measured_us == 104.0
    text = compared([]).section()
    assert "| 90% of 100 us | 70.0% | 104.0% | +48.6% |" in text
    assert "asked for 3 of them (37.5%, or 15.0% of all)" in text
    assert "| conv | 16-32@8, 3x3 | tucker2 16-16: 50 | dense: 104 | +108.0% |" in text


class Uneven:
    """A worker whose answers for a schedule come from a list, the last of it again and again."""

    def __init__(self, times):
        self.times, self.asked = times, []

    def ask(self, request):
        tile = request["schedule"]["tile"]
        self.asked.append(tile)
        known = self.times[tile]
        return {"us": known.pop(0) if len(known) > 1 else known[0], "spread": 0.0}


def test_what_may_be_the_fastest_is_measured_again():
    """A second time, and a third where the two disagree; what is far behind, and others, never."""
    target = parse_target("llvm:skylake-avx512")
    records = TuningRecords(None, "avx512", 2, machine="a machine")
    times = {28: [100.0, 101.0], 14: [140.0, 90.0, 91.0], 7: [160.0]}
    timer = KernelTimer(target, records, worker=Uneven(times))
    (workload,) = timer.workloads((GEOMETRY,))
    one = spaces(workload, AVX512)["direct"][0]
    schedules = [replace(one, tile=tile) for tile in times]
    timer.time_all([(workload, schedule) for schedule in schedules])
    timer.asker.worker.asked.clear()
    guided_forms.settle(timer, {workload: schedules})
    assert timer.asker.worker.asked == [28, 14, 14]
    guided_forms.settle(timer, {workload: schedules})
    assert timer.asker.worker.asked == [28, 14, 14]
    assert records.time(workload.key(), schedules[1].to_json()) == 90.0


def on_record():
    """A timer whose records hold three times of the layer, its workload, and the trees."""
    target = parse_target("llvm:skylake-avx512")
    truth = TuningRecords(None, "avx512", 2, machine="a machine")
    truth.remember(machine.COPY, {}, 5000.0)
    space = spaces(machine.reference(AVX512), AVX512)["direct"]
    truth.remember(machine.reference(AVX512).key(), space[0].to_json(), 1000.0)
    timer = KernelTimer(target, truth)
    (workload,) = timer.workloads((GEOMETRY,))
    # Of one family: which others the trees think worth a look is not the matter here.
    direct = spaces(workload, AVX512)["direct"]
    for us, schedule in [(7.0, direct[2]), (5.0, direct[1]), (9.0, direct[3])]:
        truth.remember(workload.key(), schedule.to_json(), us)
    return timer, workload, find(None, AVX512)[0]


def test_a_replay_knows_what_is_on_record_and_measures_nothing():
    truth, workload, trees = on_record()
    replay = guided_forms.Replay(truth.target, truth.records, trees)
    direct = spaces(workload, AVX512)["direct"]
    assert replay.microseconds(workload) == 5.0
    measured = {schedule for _, schedule in replay.usable.measured(workload)}
    assert measured <= {*direct[1:4]}
    assert replay.ask(workload, direct[0]) is None


def test_a_replay_takes_the_layers_as_they_were_measured_last():
    truth, workload, trees = on_record()
    assert guided_forms.replayed([LAYER], truth, trees).dense["conv"].measured_us == 5.0
    schedule = spaces(workload, AVX512)["direct"][1].to_json()
    truth.records.remember(workload.key(), schedule, 4.0)
    assert guided_forms.replayed([LAYER], truth, trees).dense["conv"].measured_us == 4.0
