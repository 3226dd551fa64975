"""The records that are installed with the package, and what makes them of a run's own."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import SMALL
from tvm_lowrank.records import schedule_text


def shipped_records(isa: str) -> list[Path]:
    """The files of records for an instruction set that are installed with the package."""
    folder = Path(str(files("tvm_lowrank.tuning_logs"))) / isa
    return sorted(folder.glob("*.jsonl"))


def survey_records(isa: str) -> list[Path]:
    """The files of surveys that are installed with the package: they teach the cost model only."""
    folder = Path(str(files("tvm_lowrank.tuning_logs"))) / isa / "survey"
    return sorted(folder.glob("*.jsonl"))


def condense(source: Path, sink: Path, keep: int = 3) -> int:
    """Write the fastest ``keep`` records of each workload, place and family of kernels, sorted.

    Times in turns stay with what is kept.

    Returns the number of records written.

    Raises
    ------
    LowRankError
        ``source`` does not hold records, or ``sink`` cannot be written.
    """
    groups: dict[tuple[Any, ...], list[tuple[float, str, str]]] = {}
    races: dict[tuple[Any, ...], list[str]] = {}
    try:
        for line in source.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            names = ("isa", "threads", "machine", "workload")
            family, schedule = (
                record["schedule"].get("kernel", ""),
                schedule_text(record["schedule"]),
            )
            size = record.get("network", SMALL)
            group = (*(record[name] for name in names), size, family)
            if "in_turns" in record:
                races.setdefault((*group, schedule), []).append(line)
            elif record["us"] is not None:
                groups.setdefault(group, []).append((record["us"], line, schedule))
        best = []
        for group in sorted(groups):
            kept = sorted(groups[group])[:keep]
            best += [line for _, line, _ in kept]
            best += [race for *_, s in kept for race in races.get((*group, s), ())]
        sink.parent.mkdir(parents=True, exist_ok=True)
        sink.write_text("".join(f"{line}\n" for line in best), encoding="utf-8")
    except OSError as error:
        raise LowRankError(f"tuning records cannot be condensed ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LowRankError(f"tuning records {source} are damaged ({error!r})") from error
    return len(best)
