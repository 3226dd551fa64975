"""The cost model: counts, trees that learn what counts cannot know, and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_support import LAYERS, ROOFLINE, Counted, invented
from cost_support import layer as workload
from tvm_lowrank.schedules.kernels import spaces
from tvm_lowrank.schedules.x86.isa import AVX2, AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.learned import LearnedModel, renew, roofline_of, train
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.model import AnalyticModel, features, reading_rate
from tvm_lowrank.cost.trees import FILE, Trees, find
from tvm_lowrank.cost.work import work_of
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import Place
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

DIRECT = {"kernel": "direct", "tile": 7, "vectors": 2, "order": "channels", "chunk": 1}
DIRECT |= {"chains": 1, "rows": 1, "prefetch": False}


def test_the_direct_algorithm_is_counted_by_the_definition():
    effort = work_of(workload(64, 28, 1), DIRECT, AVX512).effort
    assert effort.multiplications == 64 * 64 * 28 * 28
    assert effort.weight_bytes == 4 * 64 * 64
    assert effort.tasks == 2 * 28 * 28 // 7
    assert work_of(workload(64, 28), DIRECT, AVX512).map_bytes == 4 * 2 * 64 * 28 * 28
    filled = work_of(workload(60, 28, 1), DIRECT, AVX512).effort
    assert filled.multiplications == 60 * 64 * 28 * 28


def test_taps_on_padding_are_not_counted():
    """A 3x3 kernel on an s x s map meets (3 s - 2)^2 of its 9 s^2 taps."""
    effort = work_of(workload(64, 28), DIRECT, AVX512).effort
    assert effort.multiplications == 64 * 64 * (3 * 28 - 2) ** 2
    # A map of one column is computed as one row, in tiles along it.
    column = ConvGeometry(16, 32, 16, 1, (15, 1), padding=(7, 0, 7, 0))
    effort = work_of(ConvWorkload(column, 16, ("bias",)), {**DIRECT, "tile": 4}, AVX512).effort
    taps = sum(min(15, 16 - row + 7) - max(0, 7 - row) for row in range(16))
    assert effort.multiplications == 16 * 32 * taps


def test_winograd_is_counted_as_its_tiles():
    """Lavin and Gray: F(4x4, 3x3) needs 36 products for 16 outputs of 9 taps each."""
    schedule = {"kernel": "winograd", "tile": [4, 4], "rows": 7, "vectors": 2, "blocks": 1}
    effort = work_of(workload(64, 28), schedule, AVX512).effort
    assert effort.multiplications == 64 * 64 * 28 * 28 * 36 / 16
    assert effort.weight_bytes == 4 * 36 * 64 * 64
    assert effort.operations > 0 and effort.tasks == effort.weight_reads == 7
    assert effort.exchange_bytes == 0 and effort.stages == 1
    staged = work_of(workload(64, 28), {**schedule, "blocks": 0}, AVX512).effort
    assert staged.weight_reads == 1 and staged.stages == 3 and staged.task_bytes == 0
    assert staged.exchange_bytes == 4 * 36 * 49 * (64 + 64)
    # 27 outputs in tiles of 4 are as many as 28.
    assert work_of(workload(64, 27), schedule, AVX512).effort.multiplications == (
        effort.multiplications
    )


def test_fourier_tiles_cost_less_the_larger_the_kernel():
    """The paper's section 4.1: the larger the kernel, the more the transform saves."""
    saved = []
    for kernel in (3, 5, 9):
        layer = workload(64, 32, kernel)
        schedule = {"kernel": "fft", "tile": [16, 16], "rows": 1, "vectors": 2, "blocks": 0}
        effort = work_of(layer, {**schedule, "gauss": False}, AVX512).effort
        gauss = work_of(layer, {**schedule, "gauss": True}, AVX512).effort
        assert gauss.multiplications < effort.multiplications
        assert gauss.weight_bytes > effort.weight_bytes
        saved.append(layer.geometry.multiplications / effort.multiplications)
    assert saved == sorted(saved) and saved[-1] > 4


def test_more_work_and_slower_machines_take_longer():
    model = AnalyticModel(ROOFLINE, AVX512, 2)
    schedule = DIRECT
    times = [model.predict(workload(64, size), [schedule])[0] for size in (14, 28, 56)]
    assert times == sorted(times)
    for slow in (Roofline(100.0, 20.0), Roofline(200.0, 0.1)):
        assert AnalyticModel(slow, AVX512, 2).predict(workload(), [schedule])[0] > times[1]


def test_weights_are_read_as_fast_as_so_many_bytes_are_on_record():
    known = Roofline(200.0, 20.0, ((8 << 20, 100.0), (128 << 20, 25.0)))
    rates = [reading_rate(known, size << 20) for size in (1, 8, 32, 128, 512)]
    assert rates == pytest.approx([100.0, 100.0, 50.0, 25.0, 25.0])
    # Without, as many times a copy as the shipped survey found, in a cache and beyond.
    near, far = (reading_rate(ROOFLINE, size << 20) for size in (8, 128))
    assert near > far > ROOFLINE.gigabytes
    layer = ConvWorkload(ConvGeometry(4096, 8192, 1, 1, (1, 1)), 16, ("bias",))
    schedule = spaces(layer, AVX512)["direct"][0].to_json()
    slow = AnalyticModel(known, AVX512, 2).predict(layer, [schedule])[0]
    size = 4 * 4096 * 8192
    assert slow == pytest.approx(size / 25e3, rel=0.1)
    at = features(layer, schedule, AnalyticModel(known, AVX512, 2))
    assert at["reading"] == pytest.approx(np.log2(25.0))


def test_large_weights_are_not_read_twice():
    """From memory they come past the cache that all share: the time is of one, not of both."""
    layer = ConvWorkload(ConvGeometry(4096, 8192, 1, 1, (1, 1)), 16, ("bias",))
    schedule = spaces(layer, AVX512)["direct"][0].to_json()
    work = work_of(layer, schedule, AVX512)
    parts = AnalyticModel(ROOFLINE, AVX512, 2).parts(work)
    fetch = work.effort.weight_bytes / (1e3 * reading_rate(ROOFLINE, work.effort.weight_bytes))
    assert parts["products"] < fetch and parts["weights"] <= fetch


def records_of(layers, machine_name="chip", slower=1.0, path=None):
    records = TuningRecords(path, "avx512", 2, machine=machine_name)
    for layer in layers:
        for space in spaces(layer, AVX512).values():
            for schedule in space[:6]:
                data = schedule.to_json()
                records.add(layer.key(), data, slower * invented(layer.key(), data))
    return records


@pytest.fixture(scope="module")
def trees():
    return train(records_of(LAYERS), AVX512)


def test_trees_learn_what_counts_cannot_know(trees):
    fresh = workload(96, 20)
    schedules = [s.to_json() for space in spaces(fresh, AVX512).values() for s in space[:8]]
    truth = np.array([invented(fresh.key(), schedule) for schedule in schedules])
    analytic = AnalyticModel(roofline_of(records_of([]), AVX512, Place("chip", 2)), AVX512, 2)
    model = LearnedModel(trees, analytic, Place("chip", 2))
    assert truth[model.pick(fresh, schedules)] < 1.15 * truth.min()
    assert truth[analytic.pick(fresh, schedules)] > 1.5 * truth.min()
    ratio = model.predict(fresh, schedules) / truth
    assert np.median(np.abs(np.log(ratio))) < 0.3


def test_a_place_calibrates_its_own_level():
    records = records_of(LAYERS[:9])
    for key, _, schedule, us in list(records_of(LAYERS[:9], "slow", 5.0).rows()):
        records._keep(key, Place("slow", 2), json.dumps(schedule, sort_keys=True), us)
    trees = train(records, AVX512)
    analytic = AnalyticModel(ROOFLINE, AVX512, 2)
    schedule = [{**spaces(workload(), AVX512)["direct"][0].to_json()}]
    fast, slow = (
        LearnedModel(trees, analytic, Place(name, 2)).predict(workload(), schedule)[0]
        for name in ("chip", "slow")
    )
    assert slow / fast == pytest.approx(5.0, rel=0.2)


def test_machines_without_figures_do_not_shift_what_an_unknown_place_is_told():
    records = records_of(LAYERS[:9])
    reference = machine.reference(AVX512)
    direct = spaces(reference, AVX512)["direct"][0].to_json()
    records.add(machine.COPY, {}, 2 * (64 << 20) / (ROOFLINE.gigabytes * 1e3))
    peak_us = 2 * reference.geometry.multiplications / (ROOFLINE.gflops * 1e3)
    records.add(reference.key(), direct, peak_us)
    for key, _, schedule, us in list(records_of(LAYERS[:9], "slow").rows()):
        for name in ("slow", "slower"):  # no figures on record, nominal ones are far off
            place = Place(name, 2)
            records._keep(key, place, json.dumps(schedule, sort_keys=True), 9 * us)
    analytic = AnalyticModel(ROOFLINE, AVX512, 2)
    model = LearnedModel(train(records, AVX512), analytic)
    found = model.predict(LAYERS[4], [spaces(LAYERS[4], AVX512)["direct"][0].to_json()])[0]
    truth = invented(LAYERS[4].key(), spaces(LAYERS[4], AVX512)["direct"][0].to_json())
    assert found == pytest.approx(truth, rel=0.3)


def test_a_saved_model_predicts_the_same(trees, tmp_path):
    trees.save(tmp_path / FILE)
    again, complaint = find(tmp_path, AVX512)
    assert complaint == ""
    analytic = AnalyticModel(ROOFLINE, AVX512, 2)
    schedules = [s.to_json() for space in spaces(workload(), AVX512).values() for s in space]
    before, after = (
        LearnedModel(each, analytic, Place("chip", 2)).predict(workload(), schedules)
        for each in (trees, again)
    )
    np.testing.assert_allclose(before, after, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=0), "format 0, expected 1"),
        (lambda data: data["families"]["direct"].append("colour"), "direct differ"),
        (lambda data: data["families"].pop("winograd"), "winograd differ"),
        (lambda data: data["names"].pop(), "features"),
        (
            lambda data: data["names"].__setitem__(0, "colour"),
            "this version's features \\(.*colour",
        ),
        (lambda data: data.pop("trees"), "'trees'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_another_one_looked_for(
    trees, tmp_path, change, message
):
    path = tmp_path / FILE
    trees.save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(LowRankError, match=message) as error:
        Trees.load(path, AVX512)
    assert "train it again" in str(error.value) and "\n" not in str(error.value)
    _, complaint = find(tmp_path, AVX512)
    assert complaint == str(error.value)


def test_a_model_of_other_vectors_or_fields_is_refused(trees, tmp_path):
    with pytest.raises(LowRankError, match="does not fit"):
        trees.check(AVX2)
    schedule = {**spaces(workload(), AVX512)["direct"][0].to_json(), "colour": 1}
    model = LearnedModel(trees, AnalyticModel(ROOFLINE, AVX512, 2))
    with pytest.raises(LowRankError, match="knows kernel 'direct' with"):
        model.predict(workload(), [schedule])


def test_training_goes_on_from_the_trees_before(trees, tmp_path):
    records = records_of(LAYERS)
    assert train(records, AVX512, before=trees) is trees
    fresh = [workload(48, size, kernel) for size in (9, 17, 33) for kernel in (1, 3, 5)]
    for key, place, schedule, us in list(records_of(fresh).rows()):
        records._keep(key, place, json.dumps(schedule, sort_keys=True), us)
    more = renew(records, AVX512, tmp_path, 0, trees)
    assert more.rows > trees.rows and more.first_rows == trees.first_rows
    assert more.booster.num_boosted_rounds() > trees.booster.num_boosted_rounds()
    assert (tmp_path / FILE).exists()
    assert train(TuningRecords(None, "avx512", 2), AVX512) is None


def test_shipped_models_fit_the_kernels_of_this_version():
    for isa in (AVX512, AVX2):
        _, complaint = find(None, isa)
        assert complaint == ""


def test_a_network_is_predicted_for_a_machine_that_is_not_at_hand(capsys):
    from tvm_lowrank import predict

    def total(*options):
        command = ["--target", "llvm:haswell", "--bandwidth", "20", *options]
        assert predict.main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        row = next(line for line in lines if line.startswith("│ all"))
        return [float(cell) for cell in row.replace("│", " ").split()[1:]]

    fast, slow = total("--peak", "200"), total("--peak", "20")
    assert fast[0] < fast[1] and slow[0] < slow[1]  # Winograd is worth it
    assert 2 < slow[1] / fast[1] < 10.1
    assert predict.main(["--peak", "0", "--bandwidth", "20"]) == 2
    assert "must be positive" in capsys.readouterr().err


def test_a_trusted_model_picks_alone_and_measures_a_fraction(monkeypatch):
    monkeypatch.setattr("tvm_lowrank.cost.tuner.TRUSTED_ROWS", 100)
    target, fresh = parse_target("llvm:skylake-avx512"), workload(96, 20)
    everything = [s.to_json() for space in spaces(fresh, AVX512).values() for s in space]
    best = min(invented(fresh.key(), schedule) for schedule in everything)
    counts = {}
    for trust in (False, True):
        records = records_of(LAYERS)
        timer = KernelTimer(
            target, records, worker=Counted(), trees=train(records, AVX512), trust=trust
        )
        assert timer.is_trusted() == trust
        assert timer.microseconds(fresh) < 1.2 * best
        counts[trust] = timer.measured
    assert counts[True] == 2 <= len(everything) / 10 < counts[False]
    few = KernelTimer(target, TuningRecords(None, "avx512", 2), worker=Counted(), trust=True)
    assert not few.is_trusted()
