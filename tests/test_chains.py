"""Which stages of a chain become one kernel, by times on record; nothing is run."""

from __future__ import annotations

from test_x86_chain import inverted_residual
from tvm_lowrank.schedules.kernels import algorithm_of
from tvm_lowrank.schedules.x86.chain import FusedSchedule
from tvm_lowrank.schedules.x86.isa import AVX512, AVX512_BF16

from tvm_lowrank.cost.chains import ChainTimer
from tvm_lowrank.cost.usable import Usable
from tvm_lowrank.records import TuningRecords

CHAIN = inverted_residual(16)
BOTH = ("direct", "bfloat16")


class Times:
    """A timer whose times are invented: one kernel is faster than several, pairs are faster yet.

    ``asked`` are the schedules of chains that it would have measured.
    """

    def __init__(self, records, algorithms, isa=AVX512_BF16, exact=False, together=0.5):
        self.records, self.isa, self.together = records, isa, together
        self.usable = Usable(isa, records, algorithms, exact)
        self.asked = []

    def choose(self, workload):
        found = self.usable.spaces(workload)
        return next(iter(found.get("bfloat16") or next(iter(found.values()))))

    def time(self, workload, schedule):
        known = self.records.time(workload.key(), schedule.to_json())
        if known is None:
            self.asked.append(schedule)
            known = sum(self._part(part) for part in schedule.parts)
            self.records.add(workload.key(), schedule.to_json(), known)
        return known

    def _part(self, part):
        if isinstance(part, FusedSchedule):
            return self.together * sum(map(self._part, part.stages)) + 0.01 * part.rows
        return 5.0 if algorithm_of(part) == "bfloat16" else 10.0


def records(path=None, machine="here"):
    return TuningRecords(path, "avx512", 2, machine=machine)


def fuse(*args, trials=2, chain=CHAIN, **options):
    timer = Times(*args, **options)
    return ChainTimer(timer, trials).fuse(chain), timer.asked


def test_all_stages_are_tried_together_the_last_two_and_each_alone():
    found, asked = fuse(records(), ("direct",))
    assert found is not None and not found.rounds and len(found.stages) == 3
    parts = [len(schedule.parts) for schedule in asked]
    assert sorted(parts) == [1, 1, 1, 1, 2, 2, 3]  # the pair's own: one kernel twice, and two
    known = records()
    assert fuse(known, ("direct",), together=2.0)[0] is None
    assert fuse(known, ("direct",), together=2.0) == (None, [])


def test_stages_round_only_where_that_is_asked_for():
    known = records()
    plain, asked = fuse(known, ("direct",))
    assert not any(schedule.fused and schedule.fused.rounds for schedule in asked)
    rounded, asked = fuse(known, BOTH)
    assert rounded.rounds and asked
    assert fuse(known, BOTH) == (rounded, [])
    assert fuse(known, ("direct",)) == (plain, [])
    assert fuse(known, BOTH, exact=True) == (plain, [])
    assert fuse(known, BOTH, isa=AVX512) == (plain, [])


def test_kernels_of_several_stages_may_all_round_where_nothing_else_is_allowed():
    found, asked = fuse(records(), ("bfloat16",))
    assert found.rounds
    assert all(schedule.fused is None or schedule.fused.rounds for schedule in asked)


def test_records_from_elsewhere_that_never_rounded_do_not_cover_a_chain(tmp_path):
    path = tmp_path / "records.jsonl"
    plain, _ = fuse(records(path, "theirs"), ("direct",))
    assert fuse(records(path), ("direct",)) == (plain, [])
    rounded, asked = fuse(records(path), BOTH)
    assert rounded.rounds and asked
    fuse(records(path, "theirs"), BOTH)
    other = records(path, "another")
    assert fuse(other, BOTH)[0].rounds and fuse(other, BOTH)[1] == []


def test_a_chain_without_kernels_for_several_stages_stays_apart():
    found = ChainTimer(Times(records(), ("direct",)), 0).best(CHAIN)
    assert found.is_separate and len(found.parts) == 3
