"""Tuning records: append-only, safe against a kill, loud about damage."""

from __future__ import annotations

import json
import math

import pytest

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.records import TuningRecords


def test_records_survive_a_restart_and_merge_by_best_time(tmp_path):
    path = tmp_path / "records.jsonl"
    first = TuningRecords(path, "llvm-x", 2)
    first.add("w", {"tile": 7}, 12.0)
    first.add("w", {"tile": 8}, 9.0)
    first.add("w", {"tile": 7}, 11.0)
    again = TuningRecords(path, "llvm-x", 2)
    assert again.best("w") == ({"tile": 8}, 9.0)
    assert again.time("w", {"tile": 7}) == 11.0
    assert again.time("w", {"tile": 9}) is None
    assert len(path.read_text().splitlines()) == 3


def test_records_of_another_target_or_thread_count_are_kept_apart(tmp_path):
    path = tmp_path / "records.jsonl"
    TuningRecords(path, "llvm-x", 2).add("w", {"tile": 7}, 1.0)
    assert TuningRecords(path, "llvm-y", 2).best("w") is None
    assert TuningRecords(path, "llvm-x", 1).best("w") is None


def test_a_failed_candidate_is_remembered_and_never_chosen(tmp_path):
    path = tmp_path / "records.jsonl"
    TuningRecords(path, "t", 1).add("w", {"tile": 7}, math.inf)
    again = TuningRecords(path, "t", 1)
    assert again.time("w", {"tile": 7}) == math.inf
    assert again.best("w") is None


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "records.jsonl"
    records = TuningRecords(path, "t", 1)
    records.add("a", {"tile": 7}, 1.0)
    records.add("b", {"tile": 7}, 2.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = TuningRecords(path, "t", 1)
    assert again.best("a") is not None and again.best("b") is None
    again.add("b", {"tile": 8}, 3.0)
    assert TuningRecords(path, "t", 1).best("b") == ({"tile": 8}, 3.0)
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
