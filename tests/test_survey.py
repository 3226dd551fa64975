"""Surveys of layer shapes: what they draw, measure again, run in turns, and go on from."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
from cost_support import LAYERS, Counted, invented
from cost_support import layer as workload
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86 import dense
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import tune
from tvm_lowrank.cost import machine, watch
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.sampling import Survey, algorithm_class, form_stages, random_layers
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import LARGE, SMALL
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.shipped import shipped_records
from tvm_lowrank.target import parse_target

ROOFLINE = Roofline(200.0, 20.0)


def surveyed(path, worker, shapes=6):
    records = TuningRecords(path, "avx512", 2, machine="chip")
    timer = KernelTimer(parse_target("llvm:skylake-avx512"), records, worker=worker)
    layers = [layer.geometry for layer in LAYERS[:3]]
    return Survey(timer, layers, shapes, each=2)


def test_a_survey_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    path, whole = tmp_path / "records.jsonl", Counted()
    surveyed(tmp_path / "whole.jsonl", whole).run(lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        surveyed(path, Counted(15)).run(lambda *_: None)
    rest, steps = Counted(), []
    survey = surveyed(path, rest)
    survey.run(lambda *step: steps.append(step))
    assert 15 + rest.asked <= whole.asked + 1  # one look at the reference kernel
    assert sum(map(len, survey.origins.values())) == 6
    assert {name for name, *_ in steps} == set(survey.origins)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(r["workload"], json.dumps(r["schedule"])) for r in lines}) == len(lines)


class Racing(Counted):
    """Races tell what times one by one do, but the fastest half takes so many times as long.

    In the first ``disturbed`` races of each layer.
    """

    def __init__(self, slowed, disturbed):
        super().__init__()
        self.slowed, self.disturbed, self.races = slowed, disturbed, {}

    def ask(self, request):
        if "rivals" not in request:
            return super().ask(request)
        key = ConvWorkload.from_json(request["workload"]).key()
        self.races[key] = self.races.get(key, 0) + 1
        times = [invented(key, rival) for rival in request["rivals"]]
        if self.races[key] <= self.disturbed:
            half = sorted(times)[: len(times) // 2]
            times = [us * self.slowed if us in half else us for us in times]
        return {"us": times}


@pytest.mark.parametrize(
    ("slowed", "disturbed", "races"), [(1.0, 0, 1), (1.05, 9, 1), (20.0, 1, 2), (20.0, 9, 3)]
)
def test_the_algorithms_of_a_networks_layers_run_in_turns(
    slowed, disturbed, races, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    path, worker, steps = tmp_path / "records.jsonl", Racing(slowed, disturbed), []
    survey = surveyed(path, worker)
    survey.run(lambda *_: None)
    survey.settle(lambda *step: steps.append(step))
    records = TuningRecords(path, "avx512", 2, machine="chip")
    choices = set()
    for layer in survey.origins["layers of networks"]:
        best = {}
        for schedule, us in records.measured(layer.key()):
            best.setdefault(algorithm_class(schedule), (schedule, us))
        rivals = [schedule for schedule, _ in best.values()]
        turns = records.race(layer.key(), rivals)
        if len(best) == 1:
            assert turns is None
            continue
        choices.add(layer.key())
        # The least of all races: undisturbed ones, if there were any.
        low = slowed if disturbed >= races else 1.0
        half = len(best) // 2
        expected = [us * (low if i < half else 1.0) for i, (_, us) in enumerate(best.values())]
        assert turns == pytest.approx(expected, rel=1e-3)
        assert worker.races[layer.key()] == len(records.race_by_race(layer.key(), rivals)) == races
    assert len(choices) > 1 and choices == {*worker.races}
    assert len(steps) == sum(worker.races.values())
    # What was settled is so for good.
    before = dict(worker.races)
    surveyed(path, worker).settle(lambda *_: None)
    assert worker.races == before


def test_a_busy_machine_runs_no_races(tmp_path, monkeypatch):
    class Busy(Racing):
        pace = 150.0

        def ask(self, request):
            return {"us": self.pace} if "pace" in request else super().ask(request)

    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    monkeypatch.setattr(watch, "_PATIENCE", 0.0)
    worker, steps = Busy(1.0, 0), []
    survey = surveyed(tmp_path / "records.jsonl", worker)
    survey.run(lambda *_: None)
    survey.timer.records.add(machine.PACE, {}, 100.0)
    survey.settle(lambda *step: steps.append(step))
    assert not worker.races and steps
    worker.pace = 110.0
    survey.settle(lambda *_: None)
    assert len(worker.races) > 1 and {*worker.races.values()} == {1}


class Disturbed(Counted):
    """Some candidates take four times as long when they are first measured."""

    def __init__(self):
        super().__init__()
        self.slowed = {}

    def ask(self, request):
        answer = super().ask(request)
        key = (str(request["workload"]), str(request["schedule"]))
        self.slowed[key] = key not in self.slowed and len(self.slowed) % 17 == 16
        return {**answer, "us": answer["us"] * (4 if self.slowed[key] else 1)}


def test_a_survey_measures_again_what_was_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    path, worker, steps = tmp_path / "records.jsonl", Disturbed(), []
    survey = surveyed(path, worker, shapes=30)
    survey.run(lambda *_: None)
    first, slow = worker.asked, {key for key, slowed in worker.slowed.items() if slowed}
    survey.look_again(lambda *step: steps.append(step))
    assert len(slow) > 5 and not any(worker.slowed[key] for key in slow)
    # Few others are suspected, and nothing is suspected twice.
    assert len(slow) <= steps[-1][2] <= first / 4
    again = worker.asked
    survey.look_again(lambda *_: None)
    assert worker.asked - again < (again - first) / 3
    for workloads in survey.origins.values():
        for w in workloads:
            for data in (schedule.to_json() for schedule in survey._candidates(w)):
                least = survey.timer.records.time(w.key(), data)
                assert least == pytest.approx(invented(w.key(), data), abs=1e-3)


def test_a_survey_covers_every_algorithm_of_a_layer(tmp_path):
    survey = surveyed(None, Counted())
    layer = survey._workload(workload(64, 28).geometry)
    space = [s.to_json() for found in spaces(layer, AVX512).values() for s in found]
    chosen = [algorithm_class(schedule.to_json()) for schedule in survey._candidates(layer)]
    assert set(chosen) == {algorithm_class(schedule) for schedule in space}
    assert max(map(chosen.count, chosen)) <= 2


def test_drawn_shapes_are_the_same_for_one_seed():
    assert random_layers(20, 3) == random_layers(20, 3) != random_layers(20, 4)
    layers = [workload(64, 28).geometry, workload(128, 14, 5).geometry]
    stages = form_stages(layers, 10, 16, 0)
    assert stages == form_stages(layers, 10, 16, 0) and len(stages) == 10
    assert any(last for _, last in stages) and not all(last for _, last in stages)
    assert any(dense.is_dense(geometry) for geometry in random_layers(24, 0))


def test_shipped_records_name_their_networks():
    from tvm_lowrank.cost.sampling import recorded_layers

    layers = recorded_layers(shipped_records("avx512"))
    stem = ConvGeometry(3, 64, 224, 224, (7, 7), (2, 2), (3, 3, 3, 3))
    assert {"resnet18", "resnet50"} <= layers[stem]


def test_a_survey_begins_with_the_layers_of_networks_of_either_size():
    asked = Namespace(model=None, batch=1)
    by_size = tune._surveyed(asked, "avx512", alike=False)
    (everything,) = tune._surveyed(asked, "avx512", alike=True).values()
    assert [*by_size] == [SMALL, LARGE] and set().union(*by_size.values()) == {*everything}
    wide = [layer for layer in everything if layer.weight_count > SMALL << 18]
    assert wide and {*by_size[LARGE]} > {*wide} and not {*wide} & {*by_size[SMALL]}
