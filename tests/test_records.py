"""Tuning records: append-only, safe against a kill, loud about damage."""

from __future__ import annotations

import json
import math

import pytest

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.records import TuningRecords, schedule_text
from tvm_lowrank.shipped import condense


def test_records_survive_a_restart_and_keep_the_best_time(tmp_path):
    path = tmp_path / "records.jsonl"
    first = TuningRecords(path, "avx512", 2)
    first.add("w", {"tile": 7}, 12.0)
    first.add("w", {"tile": 8}, 9.0)
    first.add("w", {"tile": 7}, 11.0)
    again = TuningRecords(path, "avx512", 2)
    assert again.measured("w") == [({"tile": 8}, 9.0), ({"tile": 7}, 11.0)]
    assert again.time("w", {"tile": 7}) == 11.0
    assert again.time("w", {"tile": 9}) is None
    assert len(path.read_text().splitlines()) == 3


def test_records_of_another_instruction_set_are_passed_over(tmp_path):
    path = tmp_path / "records.jsonl"
    TuningRecords(path, "avx512", 2).add("w", {"tile": 7}, 1.0)
    other = TuningRecords(path, "avx2", 2)
    assert other.measured("w") == [] and other.elsewhere("w") == [] and len(other) == 0


def test_times_of_other_machines_and_thread_counts_are_never_mixed_with_those_here(tmp_path):
    path = tmp_path / "records.jsonl"
    for machine, threads, tile, us in [
        ("theirs", 2, 1, 1.0),
        ("theirs", 2, 2, 2.0),
        ("mine", 8, 3, 0.1),
        ("another", 2, 4, 9.0),
        ("theirs", 64, 5, 0.01),
    ]:
        TuningRecords(path, "avx512", threads, machine=machine).add("w", {"tile": tile}, us)
    mine = TuningRecords(None, "avx512", 2, machine="mine", shipped=(path,))
    assert mine.time("w", {"tile": 1}) is None and mine.measured("w") == []
    # Machines of the same thread count first and in turns, then the nearest thread count.
    assert [schedule["tile"] for schedule in mine.elsewhere("w")] == [4, 1, 2, 3, 5]
    mine.add("w", {"tile": 1}, math.inf)
    mine.add("w", {"tile": 2}, 50.0)
    assert mine.measured("w") == [({"tile": 2}, 50.0)]
    assert [schedule["tile"] for schedule in mine.elsewhere("w")] == [4, 2, 3, 5]


def test_shipped_files_give_schedules_only_and_are_never_written(tmp_path):
    shipped, own = tmp_path / "shipped.jsonl", tmp_path / "own.jsonl"
    TuningRecords(shipped, "avx512", 2).add("w", {"tile": 7}, 5.0)
    TuningRecords(shipped, "avx512", 2).add("w", {"tile": 8}, 6.0)
    before = shipped.read_bytes()
    records = TuningRecords(own, "avx512", 2, shipped=(shipped,))
    records.add("w", {"tile": 8}, 4.0)
    assert shipped.read_bytes() == before
    assert len(own.read_text().splitlines()) == 1
    merged = TuningRecords(own, "avx512", 2, shipped=(shipped,))
    assert merged.measured("w") == [({"tile": 8}, 4.0)]
    assert merged.elsewhere("w") == [{"tile": 7}, {"tile": 8}]


def test_a_failed_candidate_is_remembered_and_never_chosen(tmp_path):
    path = tmp_path / "records.jsonl"
    TuningRecords(path, "t", 1).add("w", {"tile": 7}, math.inf)
    again = TuningRecords(path, "t", 1)
    assert again.time("w", {"tile": 7}) == math.inf
    assert again.measured("w") == []


def test_condensed_records_keep_the_best_few(tmp_path):
    path, small = tmp_path / "records.jsonl", tmp_path / "new" / "small.jsonl"
    records = TuningRecords(path, "avx512", 2)
    for tile in range(1, 9):
        records.add("w", {"tile": tile}, math.inf if tile == 1 else 10.0 - tile)
        records.add("v", {"tile": tile}, float(tile))
    assert condense(path, small, keep=2) == 4
    found = TuningRecords(None, "avx512", 2, shipped=(small,))
    assert found.elsewhere("w") == [{"tile": 8}, {"tile": 7}]
    assert found.elsewhere("v") == [{"tile": 1}, {"tile": 2}]
    small.write_text("nonsense")
    with pytest.raises(LowRankError, match="are damaged"):
        condense(small, path)


def test_times_in_turns_choose_and_nothing_else(tmp_path):
    path, other = tmp_path / "records.jsonl", tmp_path / "other.jsonl"
    here = TuningRecords(path, "avx512", 2, machine="one")
    kernels = [{"kernel": "direct", "tile": tile} for tile in range(5)]
    for tile, us in ((1, 11.0), (2, 10.0), (3, 13.0), (4, 10.5)):
        here.add("work", kernels[tile], us)
    here.add_race("work", [(kernels[2], 10.4), (kernels[4], 10.2), (kernels[1], 10.0)])
    assert [s["tile"] for s, _ in here.measured("work")] == [2, 4, 1, 3]
    assert here.best("work") == (kernels[2], 10.0)
    assert here.disagreements() == [] and len(here) == 4
    # Elsewhere too, also of what was condensed: three are near, the fourth is not.
    assert condense(path, other) == 6
    for copy, tiles in ((path, [1, 4, 2, 3]), (other, [1, 4, 2])):
        there = TuningRecords(None, "avx512", 2, machine="another", shipped=[copy])
        assert [s["tile"] for s in there.elsewhere("work")] == tiles
    # One that did not run in turns leaves the order to their own times.
    here.add("work", kernels[0], 9.5)
    there = TuningRecords(None, "avx512", 2, machine="another", shipped=[path])
    assert [s["tile"] for s in there.elsewhere("work")] == [0, 2, 4, 1, 3]


def test_races_settle_times_at_the_level_of_what_was_measured_alone(tmp_path):
    here = TuningRecords(tmp_path / "records.jsonl", "avx512", 2, machine="one")
    one, two, three, four = ({"kernel": "direct", "tile": tile} for tile in (1, 2, 3, 4))
    for schedule, us in ((one, 10.0), (two, 40.0), (three, 5.0), (four, math.inf)):
        here.add("work", schedule, us)
    assert here.settled("work", here.here) == {}
    for times in ((30.0, 24.0), (20.0, 20.0)):
        here.add_race("work", [(one, times[0]), (two, times[1])])
    there = TuningRecords(None, "avx512", 2, shipped=[here.path])
    for records, place in ((here, here.here), (there, here.here._replace(shipped=True))):
        found = records.settled("work", place)
        assert found == pytest.approx({schedule_text(one): 20.0, schedule_text(two): 20.0})
        assert records.settled("other", place) == {}
    # What did not run by itself, or alone in a race, settles nothing.
    here.add_race("work", [(three, 9.0), (four, 9.0)])
    assert schedule_text(three) not in here.settled("work", here.here)


def test_races_settle_nothing_of_what_was_measured_with_another_epilogue_only():
    records = TuningRecords(None, "avx512", 2, machine="here")
    one, two, three = ({"tile": tile} for tile in (1, 2, 3))
    records.add("work", one, 10.0)
    records.add_race("work", [(one, 20.0), (two, 10.0)])
    assert records.settled("work", records.here) == {}
    records.add("work", three, 10.0)
    records.add_race("work", [(one, 20.0), (two, 10.0), (three, 20.0)])
    settled = records.settled("work", records.here)
    assert settled == pytest.approx({schedule_text(one): 10.0, schedule_text(three): 10.0})


def test_times_of_two_races_are_never_mixed(tmp_path):
    path = tmp_path / "records.jsonl"
    here = TuningRecords(path, "avx512", 2, machine="one")
    one, two, three = ({"kernel": "direct", "tile": tile} for tile in (1, 2, 3))
    here.add_race("work", [(one, 10.0), (two, 10.1)])
    here.add_race("work", [(three, 11.0), (one, 12.0)])
    for records in (here, TuningRecords(path, "avx512", 2, machine="one")):
        assert records.race("work", [two, one]) == [10.1, 10.0]
        assert records.race("work", [one, three]) == [12.0, 11.0]
        assert records.race("work", [two, three]) is None
        assert records.race("work", [one]) is None and records.race("other", [one, two]) is None
        assert records.race_by_race("work", [two, one]) == [(10.1, 10.0)]
        assert records.race_by_race("work", [two, three]) == []
    # One that was cut off by a kill is none.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    cut = TuningRecords(path, "avx512", 2, machine="one")
    assert cut.race("work", [one, three]) is None and cut.race("work", [one, two]) == [10.0, 10.1]
    # Of the same race, run again, the least times count.
    cut.add_race("work", [(two, 9.9), (one, 10.4)])
    for records in (cut, TuningRecords(path, "avx512", 2, machine="one")):
        assert records.race("work", [one, two]) == [10.0, 9.9]
        assert records.race_by_race("work", [one, two]) == [(10.0, 10.1), (10.4, 9.9)]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    records = TuningRecords(path, "t", 1)
    records.add("a", {"tile": 7}, 1.0)
    records.add("b", {"tile": 7}, 2.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = TuningRecords(path, "t", 1)
    assert again.measured("a") and not again.measured("b")
    again.add("b", {"tile": 8}, 3.0)
    assert TuningRecords(path, "t", 1).measured("b") == [({"tile": 8}, 3.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    "line",
    ["not json", "[]", '{"format": 99}', '{"format": 1, "target": "t", "threads": 1}', "null"],
)
def test_damage_is_named_with_its_line_and_left_alone(tmp_path, line):
    path = tmp_path / "records.jsonl"
    TuningRecords(path, "t", 1).add("a", {"tile": 7}, 1.0)
    with open(path, "a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(LowRankError, match=r"records\.jsonl, line 2, are damaged"):
        TuningRecords(path, "t", 1)
    assert path.read_bytes() == before


def test_binary_garbage_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xff\xfe\x00garbage\n")
    with pytest.raises(LowRankError, match="cannot be read"):
        TuningRecords(path, "t", 1)
