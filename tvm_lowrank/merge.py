"""``python -m tvm_lowrank.merge``: tuning records of several files or machines in one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import SMALL, Place
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.cuda.arch import ARCHITECTURES
from tvm_lowrank.schedules.x86.isa import AVX2, AVX512_BF16, GENERIC, NEON

EXAMPLES = """\
example:
  python -m tvm_lowrank.merge first/records.jsonl second/records.jsonl -o records.jsonl

Times stay with the machine that measured them: those of one never price what runs on another.
Machines of one name whose peak or bandwidth differ by more than half get a name each. Without -o
nothing is written. Exit codes: 0 done, 2 bad input.
"""

_MACHINES = {isa.name: isa for isa in (AVX512_BF16, AVX2, NEON, GENERIC)} | ARCHITECTURES


@dataclass(frozen=True)
class Origin:
    """One place of one instruction set in merged records, with what is known of its machine."""

    isa: str
    place: Place
    records: int
    workloads: int
    figures: Roofline | None


def merge(sources: Sequence[Path], sink: Path | None = None) -> list[Origin]:
    """Write the records of all files into one, each line once; returns where they come from.

    Machines of one name and thread count that differ by more than `machine.ANOTHER_MACHINE` are
    told apart by their figures in brackets.

    Raises
    ------
    LowRankError
        A file does not hold records, or ``sink`` cannot be written.
    """
    lines: dict[str, None] = {}
    known: dict[tuple[str, str, int], Roofline] = {}
    for source in sources:
        if not source.is_file():
            raise LowRankError(f"tuning records {source} do not exist; name files of records")
        names = {}
        for origin in _origins([source]):
            name, threads = origin.place.machine, origin.place.threads
            if origin.figures is not None:
                first = known.setdefault((origin.isa, name, threads), origin.figures)
                if machine.apart(first, origin.figures) > machine.ANOTHER_MACHINE:
                    names[(origin.isa, name, threads)] = f"{name} [{origin.figures}]"
        for record in _lines(source):
            key = (record["isa"], record["machine"], record["threads"])
            record["machine"] = names.get(key, record["machine"])
            lines[json.dumps(record, sort_keys=True)] = None
    if sink is None:
        return _origins(sources)
    scratch = sink.with_name(f".{sink.name}.{os.getpid()}")
    try:
        sink.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(scratch, sink)
    except OSError as error:
        raise LowRankError(f"tuning records {sink} cannot be written ({error})") from error
    return _origins([sink])


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The records of a file that `TuningRecords` has accepted."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return map(json.loads, whole.splitlines())


def _origins(paths: Sequence[Path]) -> list[Origin]:
    # Read as shipped files are: nothing is cut off or written.
    TuningRecords(None, "", 1, shipped=paths)  # all lines are records
    found = []
    for name in dict.fromkeys(record["isa"] for path in paths for record in _lines(path)):
        records = TuningRecords(None, name, 1, shipped=paths)
        rows, isa = list(records.rows()), _MACHINES.get(name)
        for place in records.places():
            keys = [key for key, where, *_ in rows if where == place]
            known = machine.figures(records, isa, place) if isa else None
            found.append(Origin(name, place, len(keys), len(set(keys)), known))
    return found


def table(origins: Sequence[Origin]) -> Table:
    """The origins as a table; the last column compares each with the first that has figures."""
    first = next((origin.figures for origin in origins if origin.figures), None)
    names = ("isa", "machine", "threads", "networks", "records", "workloads", "peak, bandwidth")
    made = Table(*names, "apart")
    for origin in origins:
        figures = origin.figures
        factor = "" if first is None or figures is None else f"{machine.apart(first, figures):.2f}x"
        made.add_row(
            origin.isa,
            origin.place.machine.replace("[", r"\["),
            str(origin.place.threads),
            "small" if origin.place.network == SMALL else "large",
            str(origin.records),
            str(origin.workloads),
            "not on record" if figures is None else str(figures),
            factor,
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    make = argparse.ArgumentParser(
        prog="python -m tvm_lowrank.merge",
        description="Merge tuning records, and tell which machines they come from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("records", nargs="+", type=Path, metavar="RECORDS.jsonl")
    make.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write them")
    args = make.parse_args(argv)
    try:
        origins = merge(args.records, args.output)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(table(origins))
    return 0


if __name__ == "__main__":
    sys.exit(main())
