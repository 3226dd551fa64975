"""Tuning records: what was measured, one JSON object a line, append-only."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_lowrank.errors import LowRankError

FORMAT = 2


@dataclass
class TuningRecords:
    """Measured times of kernels for one target and thread count, kept in a text file.

    Each line holds ``{"format", "target", "threads", "workload", "schedule", "us"}`` and is flushed
    to the disk as it is written, so a run that is killed loses at most the kernel it was at. A last
    line that was cut off by that is dropped on reading; any other damage is an error, and the file
    is then left as it is.

    Parameters
    ----------
    path : Path, optional
        The file; without one the records live in memory only.
    target, threads
        Only lines of this target key and thread count are looked up.

    Raises
    ------
    LowRankError
        A line is not a record of this format, or the file cannot be read or written.
    """

    path: Path | None
    target: str
    threads: int
    _times: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowRankError(
                f"tuning records {self.path} cannot be read ({error}); move the file away"
            ) from error
        whole, _, cut = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            self._read(line, number)
        if cut:
            with open(self.path, "r+b") as file:
                file.truncate(len((whole + "\n" if whole else "").encode()))

    def _read(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, expected {FORMAT}")
            mine = (record["target"], record["threads"]) == (self.target, self.threads)
            workload, schedule = record["workload"], json.dumps(record["schedule"], sort_keys=True)
            microseconds = math.inf if record["us"] is None else float(record["us"])
        except (ValueError, KeyError, TypeError) as error:
            raise LowRankError(
                f"tuning records {self.path}, line {number}, are damaged ({error!r}); "
                "delete that line, or move the file away to measure anew"
            ) from error
        if mine:
            self._keep(workload, schedule, microseconds)

    def _keep(self, workload: str, schedule: str, microseconds: float) -> None:
        times = self._times.setdefault(workload, {})
        times[schedule] = min(microseconds, times.get(schedule, math.inf))

    def add(self, workload: str, schedule: dict[str, Any], microseconds: float) -> None:
        """Append one measurement; an infinite time says that the candidate failed."""
        self._keep(workload, json.dumps(schedule, sort_keys=True), microseconds)
        if self.path is None:
            return
        record = {
            "format": FORMAT,
            "target": self.target,
            "threads": self.threads,
            "workload": workload,
            "schedule": schedule,
            "us": microseconds if math.isfinite(microseconds) else None,
        }
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LowRankError(
                f"tuning records {self.path} cannot be written ({error}); check space and rights"
            ) from error

    def time(self, workload: str, schedule: dict[str, Any]) -> float | None:
        """Microseconds of one schedule, infinite if it failed, None if it was not measured."""
        return self._times.get(workload, {}).get(json.dumps(schedule, sort_keys=True))

    def best(self, workload: str) -> tuple[dict[str, Any], float] | None:
        """The fastest measured schedule of a workload and its microseconds."""
        times = self._times.get(workload)
        if not times:
            return None
        schedule = min(times, key=lambda key: times[key])
        return (json.loads(schedule), times[schedule]) if math.isfinite(times[schedule]) else None

    def __len__(self) -> int:
        return sum(len(times) for times in self._times.values())
