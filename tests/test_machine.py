"""Records of several machines: told apart by their figures, merged, and never mixed."""

from __future__ import annotations

import json

import pytest
from tuner_support import Invented
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank import merge
from tvm_lowrank.cost import asking, machine, timing, watch
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

ANOTHER_MACHINE = machine.ANOTHER_MACHINE  # before the tests make it infinite
SIZES = (8 << 20, 128 << 20)
LAYER = [ConvGeometry(32, 64, 14, 14, (3, 3), padding=(1, 1, 1, 1))]


class Slower(Invented):
    """A machine whose kernels take ``factor`` times as long, from now on."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def ask(self, request):
        answer = super().ask(request)
        return {**answer, "us": self.factor * answer["us"]}


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    monkeypatch.setattr(machine, "copy_microseconds", lambda: 10_000.0)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    monkeypatch.setattr(machine, "ANOTHER_MACHINE", ANOTHER_MACHINE)
    monkeypatch.setattr(watch, "_DOUBT", 0.0)


def timer(path, factor=1.0, name="chip", **options):
    records = TuningRecords(path, "avx512", 2, machine=name)
    target = parse_target("llvm:skylake-avx512")
    options = {"algorithms": ("direct",), "worker": Slower(factor), **options}
    return KernelTimer(target, records, **options)


def test_the_figures_follow_from_the_reference_kernel_and_the_copy(tmp_path):
    found = timer(tmp_path / "r.jsonl").roofline()
    geometry = machine.reference(AVX512).geometry
    records = TuningRecords(tmp_path / "r.jsonl", "avx512", 2, machine="chip")
    _, best = records.best(machine.reference(AVX512).key())
    assert found.gflops == pytest.approx(2e-3 * geometry.multiplications / best)
    assert found.gigabytes == pytest.approx(2 * (64 << 20) / 1e7)


class Reads:
    """Stands in for the process that reads: a gigabyte takes 20 ms, or it fails."""

    def __init__(self, fails=False):
        self.asked, self.fails = [], fails

    def ask(self, request):
        self.asked.append(request["reading"])
        return None if self.fails else {"us": request["reading"] / 5e4, "spread": 0.0}


@pytest.fixture
def reads(monkeypatch):
    found = Reads()
    monkeypatch.setattr(machine, "READING_BYTES", SIZES)
    monkeypatch.setattr(asking, "shared_worker", lambda _threads: found)
    return found


def test_reading_is_measured_once_and_before_the_figures_are_whole(tmp_path, reads):
    path = tmp_path / "r.jsonl"
    found = timer(path).roofline()
    assert [size for size, _ in found.readings] == reads.asked == [*SIZES]
    assert [rate for _, rate in found.readings] == pytest.approx([50.0, 50.0])
    assert timer(path).roofline() == found and len(reads.asked) == 2
    workloads = [json.loads(line)["workload"] for line in path.read_text().splitlines()]
    assert workloads[-3:] == ["reading of 8 MiB", "reading of 128 MiB", "copy of 64 MiB"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))  # killed midway
    assert timer(path).roofline() == found and reads.asked[2:] == [128 << 20]


def test_records_without_readings_price_as_they_did(tmp_path, reads, monkeypatch):
    path = tmp_path / "r.jsonl"
    monkeypatch.setattr(machine, "READING_BYTES", ())
    before = timer(path).roofline()
    monkeypatch.setattr(machine, "READING_BYTES", SIZES)
    assert before.readings == () and timer(path).roofline() == before and not reads.asked


def test_a_machine_that_cannot_be_read_has_a_peak_and_a_copy(tmp_path, reads):
    reads.fails = True
    found = timer(tmp_path / "r.jsonl").roofline()
    assert found.readings == () and found.gigabytes > 0


def test_another_machine_of_the_same_name_is_read_too(tmp_path, reads):
    path = tmp_path / "r.jsonl"
    timer(path).roofline()
    other = timer(path, 2.0)
    assert [size for size, _ in other.roofline().readings] == [*SIZES] and len(reads.asked) == 4


def test_the_measuring_process_reads():
    target = json.loads(str(parse_target("llvm")))
    answer = timing.time_kernel({"target": target, "reading": 1 << 20})
    assert answer["us"] > 0 and answer["spread"] >= 0


def test_the_same_machine_goes_on_from_its_records(tmp_path):
    path = tmp_path / "r.jsonl"
    first = timer(path)
    before = first.roofline(), first.chain(LAYER)
    again = timer(path, 1.05)
    assert (again.roofline(), again.chain(LAYER)) == before
    assert again.measured == 0 and again.complaint() == ""


def test_a_machine_that_is_somewhat_slower_is_named_and_its_records_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    first = timer(path)
    before = first.roofline()
    again = timer(path, 1.3)
    assert again.roofline() == before and again.records.machine == "chip"
    assert "differ from those on record by 30%" in again.complaint()


def test_a_busy_machine_is_not_taken_for_another(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    before = timer(path).roofline()
    monkeypatch.setattr(machine, "is_busy", lambda: True)
    slow = timer(path, 2.0)
    assert slow.roofline() == before and slow.records.machine == "chip"
    assert "is the machine busy, or another one" in slow.complaint()
    fast = timer(path, 0.5)
    assert fast.roofline().gflops > 1.9 * before.gflops


def test_a_machine_that_is_slow_for_a_moment_is_not_taken_for_another(tmp_path, monkeypatch):
    class Recovering(Slower):
        def ask(self, request):
            self.factor = 2.0 if len(self.asked) < 6 else 1.0
            return super().ask(request)

    monkeypatch.setattr(watch, "_DOUBT", 60.0)
    path, worker = tmp_path / "r.jsonl", Recovering()
    before = timer(path).roofline()
    again = timer(path, worker=worker)
    assert again.roofline() == before and again.records.machine == "chip"
    assert again.complaint() == "" and len(worker.asked) == 7


def test_another_machine_of_the_same_name_prices_nothing_here(tmp_path):
    path = tmp_path / "r.jsonl"
    first = timer(path)
    fast = first.roofline()
    time = first.chain(LAYER)
    other = timer(path, 2.0)
    assert machine.apart(other.roofline(), fast) == pytest.approx(2.0)
    assert other.recorded(LAYER) is None
    assert other.chain(LAYER) == pytest.approx(2 * time, rel=1e-3)
    assert "come from a machine of the same name with" in other.complaint()
    third = timer(path, 2.0)  # the second machine again: it knows itself
    assert third.roofline() == other.roofline() and third.recorded(LAYER) == other.chain(LAYER)
    assert third.measured == 0 and third.complaint() == ""
    assert timer(path).roofline() == fast  # and so does the first


def test_a_machine_that_slows_down_midway_is_noticed(tmp_path):
    measuring = timer(tmp_path / "r.jsonl", trials=24)
    measuring.roofline()
    measuring.asker.worker.factor = 1.4
    for size in range(7, 16):
        geometry = ConvGeometry(32, 64, size, size, (3, 3), padding=(1, 1, 1, 1))
        measuring.microseconds(ConvWorkload(geometry, 16, ("bias", "relu")))
    assert "took up to 40% longer than at first" in measuring.complaint()


def test_two_measurements_that_disagree_are_remembered_over_restarts(tmp_path):
    path = tmp_path / "r.jsonl"
    for us in (10.0, 10.9, 13.0):
        TuningRecords(path, "avx512", 2, machine="chip").add("w", {"tile": 7}, us, spread=0.02)
    measuring = timer(path)
    assert measuring.records.disagreements() == [("w", {"tile": 7}, pytest.approx(1.3))]
    assert "measured twice with times more than 10 % apart, one with 30%" in measuring.complaint()
    assert measuring.records.time("w", {"tile": 7}) == 10.0
    assert json.loads(path.read_text().splitlines()[0])["spread"] == 0.02


def test_merged_records_keep_machines_apart(tmp_path, capsys):
    paths = [tmp_path / f"{name}.jsonl" for name in "abcd"]
    factors = {paths[0]: ("chip", 1.0), paths[1]: ("chip", 1.1), paths[2]: ("chip", 3.0)}
    for path, (name, factor) in factors.items():
        measuring = timer(path, factor, name)
        measuring.roofline()
        measuring.chain(LAYER)
    timer(paths[3], 1.0, "other").chain(LAYER)
    sink = tmp_path / "new" / "all.jsonl"
    assert merge.main([*map(str, paths), "-o", str(sink)]) == 0
    output = capsys.readouterr().out
    assert "3.00x" in output and "not on record" in output
    records = TuningRecords(sink, "avx512", 2, machine="chip")
    names = {place[0] for place in records.places()}
    assert len(names) == 3 and {"chip", "other"} < names
    # The two that are alike count as one, with the lesser times.
    assert timer(sink).recorded(LAYER) == timer(paths[0]).recorded(LAYER)
    before = sink.read_text()
    merge.merge([sink, sink], sink)
    assert sink.read_text() == before


def test_merged_records_of_cards_are_counted_too(tmp_path, capsys):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, card, isa in zip(paths, ("H100", "B200"), ("sm_90", "sm_100"), strict=True):
        TuningRecords(path, isa, 1, machine=card).add("w", {"kernel": "cuda_gemm"}, 3.0)
    origins = merge.merge(paths, tmp_path / "all.jsonl")
    assert [(o.isa, o.place[0], o.records) for o in origins] == [
        ("sm_90", "H100", 1),
        ("sm_100", "B200", 1),
    ]
    assert merge.main([str(tmp_path / "all.jsonl")]) == 0
    assert "H100" in capsys.readouterr().out


def test_merging_nonsense_is_one_sentence(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n")
    assert merge.main([str(bad), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "bad.jsonl, line 1, are damaged" in capsys.readouterr().err
    with pytest.raises(LowRankError, match="do not exist"):
        merge.merge([tmp_path / "absent.jsonl"])
    assert not (tmp_path / "out.jsonl").exists()
