"""Tuning records: what was measured, one JSON object a line, append-only."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import SMALL, Place
from tvm_lowrank.threads import processor

FORMAT = 3
# Two measurements of one candidate that differ by more than this share disagree.
AGREEMENT = 0.1

# What took so many times as long as the fastest of a workload may still be it, and so many are run
# in turns to tell.
_NEAR, _MOST = 1.2, 3

T = TypeVar("T")


@dataclass
class TuningRecords:
    """Measured times of kernels for one instruction set, kept in text files.

    Each line holds ``{"format", "isa", "threads", "machine", "mcpu", "workload", "schedule",
    "us"}``, ``"network"`` if it is large, ``"spread"``, ``"slower"`` and ``"alone"`` if they are
    known (see `add`), ``"device"`` if another machine measured, and ``"in_turns"``, the name of a
    race, if others ran in turns with it. It is flushed to the disk as it is written, so a run that
    is killed loses at most the kernel it was at. A last line that was cut off by that is dropped on
    reading; any other damage is an error, and the file is then left as it is.

    Of two measurements of one candidate the lesser time counts; `disagreements` knows those that
    differ by more than 10 %. Times in turns are compared with those of the same race only, to
    choose (`in_order`), the least of each if it was run again; `time`, `measured` and `best` know
    nothing of them.

    Records of another machine or thread count, and all that are shipped, tell which schedules are
    good (`elsewhere`), never how long they take: `time` and `measured` know only what was measured
    here. (Machines of one processor can differ in all but its name.) Those of networks of another
    size do not even tell that.

    Parameters
    ----------
    path : Path, optional
        The file to read and append to; without one, records live in memory only.
    isa : str
        Name of the instruction set; lines of others are skipped. The kernels depend on it alone.
    threads : int
        Threads of the runtime.
    mcpu : str
        LLVM's name of the processor, written for information.
    machine : str
        Name of the processor that measures; this one by default.
    shipped : sequence of Path
        Files that are only read, before ``path``.
    network : int
        MiB of weights of the networks that the kernels are for, as a `Place` has them.

    Raises
    ------
    LowRankError
        A line is not a record of this format, or a file cannot be read or written.
    """

    path: Path | None
    isa: str
    threads: int
    mcpu: str = ""
    machine: str = field(default_factory=processor)
    shipped: Sequence[Path] = ()
    network: int = SMALL
    # Workload, then place, then schedule as text: microseconds, infinite for a failure.
    _times: dict[str, dict[Place, dict[str, float]]] = field(default_factory=dict)
    # The same of candidates that were measured twice with times that disagree: their ratio.
    _ratios: dict[tuple[str, Place, str], float] = field(default_factory=dict)
    # Of candidates that ran in turns, by workload and place, then by the name of the race: one time
    # for each time that it was run.
    _races: dict[tuple[str, Place], dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    # Of kernels that are given and leave maps in a layout of their own: the time without that.
    _alone: dict[tuple[str, Place, str], float] = field(default_factory=dict)
    # How often a candidate was measured, where that is more than once.
    _looks: dict[tuple[str, Place, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.shipped:
            self._read_file(path, shipped=True)
        if self.path is not None and self.path.exists():
            whole, cut = self._read_file(self.path)
            if cut:
                with open(self.path, "r+b") as file:
                    file.truncate(len((whole + "\n" if whole else "").encode()))

    def _read_file(self, path: Path, shipped: bool = False) -> tuple[str, str]:
        """Take in a file; returns its text up to the last whole line, and what is left over."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowRankError(
                f"tuning records {path} cannot be read ({error}); move the file away"
            ) from error
        whole, _, cut = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._read(json.loads(line), shipped)
            except (ValueError, KeyError, TypeError) as error:
                raise LowRankError(
                    f"tuning records {path}, line {number}, are damaged ({error!r}); "
                    "delete that line, or move the file away to measure anew"
                ) from error
        return whole, cut

    def _read(self, record: dict[str, Any], shipped: bool) -> None:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, expected {FORMAT}")
        network = int(record.get("network", SMALL))
        place = Place(str(record["machine"]), int(record["threads"]), shipped, network)
        workload, schedule = str(record["workload"]), schedule_text(dict(record["schedule"]))
        microseconds = math.inf if record["us"] is None else float(record["us"])
        if record["isa"] != self.isa:
            return
        if "in_turns" in record:
            races = self._races.setdefault((workload, place), {})
            times = races.setdefault(str(record["in_turns"]), {})
            times.setdefault(schedule, []).append(microseconds)
        else:
            self._keep(workload, place, schedule, microseconds, record.get("alone"))

    def _keep(
        self,
        workload: str,
        place: Place,
        schedule: str,
        microseconds: float,
        alone: float | None = None,
    ) -> None:
        if alone is not None:
            name = (workload, place, schedule)
            self._alone[name] = min(float(alone), self._alone.get(name, math.inf))
        times = self._times.setdefault(workload, {}).setdefault(place, {})
        known = times.get(schedule)
        times[schedule] = microseconds if known is None else min(microseconds, known)
        if known is not None:
            name = (workload, place, schedule)
            self._looks[name] = self._looks.get(name, 1) + 1
            low, high = sorted((known, microseconds))
            if high > (1 + AGREEMENT) * low:
                self._ratios[name] = max(high / low, self._ratios.get(name, 1.0))

    @property
    def here(self) -> Place:
        """This machine with these threads, in networks of this size."""
        return Place(self.machine, self.threads, False, self.network)

    def add(
        self,
        workload: str,
        schedule: dict[str, Any],
        microseconds: float,
        spread: float | None = None,
        device: str | None = None,
        slower: float | None = None,
        alone: float | None = None,
    ) -> None:
        """Append one measurement; an infinite time says that the candidate failed.

        ``spread`` is the share by which repeated minima differed, ``device`` which of several
        machines of this name measured, ``slower`` how many times as slow as usual the machine was,
        which the time allows for, ``alone`` the microseconds without turning maps.
        """
        microseconds = round(microseconds, 3)  # as it will be read again
        alone = None if alone is None else round(alone, 3)
        self._keep(workload, self.here, schedule_text(schedule), microseconds, alone)
        more: dict[str, Any] = {} if alone is None else {"alone": alone}
        if spread is not None:
            more["spread"] = round(spread, 3)
        if device is not None:
            more["device"] = device
        if slower is not None:
            more["slower"] = round(slower, 3)
        self._append(workload, schedule, microseconds, more)

    def add_race(self, workload: str, found: Sequence[tuple[dict[str, Any], float]]) -> None:
        """Append the times of all candidates of a workload that ran in turns with each other."""
        name = _race_name([schedule_text(schedule) for schedule, _ in found])
        times = self._races.setdefault((workload, self.here), {}).setdefault(name, {})
        for schedule, us in found:
            times.setdefault(schedule_text(schedule), []).append(round(us, 3))
            self._append(workload, schedule, round(us, 3), {"in_turns": name})

    def _append(
        self, workload: str, schedule: dict[str, Any], microseconds: float, more: dict[str, Any]
    ) -> None:
        if self.path is None:
            return
        record: dict[str, Any] = {
            "format": FORMAT,
            "isa": self.isa,
            "threads": self.threads,
            "machine": self.machine,
            "mcpu": self.mcpu,
            "workload": workload,
            "schedule": schedule,
            "us": microseconds if math.isfinite(microseconds) else None,
            **more,
        }
        if self.network != SMALL:
            record["network"] = self.network
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LowRankError(
                f"tuning records {self.path} cannot be written ({error}); check space and rights"
            ) from error

    def remember(
        self,
        workload: str,
        schedule: dict[str, Any],
        microseconds: float,
        place: Place | None = None,
    ) -> None:
        """Take a time for one of this place, in memory only; see ``place`` for what else is."""
        known = None if place is None else self.alone(workload, schedule, place)
        self._keep(workload, self.here, schedule_text(schedule), microseconds, known)

    def alone(
        self, workload: str, schedule: dict[str, Any], place: Place | None = None
    ) -> float | None:
        """Microseconds of a schedule without those of turning maps, None if it turns none."""
        return self._alone.get((workload, place or self.here, schedule_text(schedule)))

    def time(self, workload: str, schedule: dict[str, Any]) -> float | None:
        """Microseconds of a schedule here, infinite if it failed, None if it was not measured."""
        return self._times.get(workload, {}).get(self.here, {}).get(schedule_text(schedule))

    def race(
        self, workload: str, schedules: Sequence[dict[str, Any]], place: Place | None = None
    ) -> list[float] | None:
        """Microseconds of schedules when these, and no others, ran in turns; None if they did not.

        At a place, by default here. Of several races the least times count.
        """
        found = self.race_by_race(workload, schedules, place)
        return [min(times) for times in zip(*found, strict=True)] if found else None

    def race_by_race(
        self, workload: str, schedules: Sequence[dict[str, Any]], place: Place | None = None
    ) -> list[tuple[float, ...]]:
        """Microseconds of schedules in each race of these, and no others; see `race`."""
        texts = [schedule_text(schedule) for schedule in schedules]
        times = self._races.get((workload, place or self.here), {}).get(_race_name(texts), {})
        # What was cut off in the middle of a race is none.
        return list(zip(*(times.get(text, []) for text in texts), strict=False))

    def settled(self, workload: str, place: Place) -> dict[str, float]:
        """Microseconds of schedules at a place, by their text, as they were told apart in turns.

        Of each race the least times count, at the level of what its schedules took by themselves:
        what disturbed one of these tells nothing of the others. Only what ran in turns is in it,
        and was measured with this workload's epilogue, not with another alone.
        """
        alone, found = self._times.get(workload, {}).get(place, {}), dict[str, float]()
        for race in self._races.get((workload, place), {}).values():
            ratios = {s: min(us) / alone[s] for s, us in race.items() if alone.get(s)}
            ratios = {s: ratio for s, ratio in ratios.items() if 0 < ratio < math.inf}
            if len(ratios) > 1:
                level = math.exp(statistics.fmean(map(math.log, ratios.values())))
                found |= {s: alone[s] * ratio / level for s, ratio in ratios.items()}
        return found

    def looks(self, workload: str, schedule: dict[str, Any]) -> int:
        """How many times a schedule was measured here."""
        known = self.time(workload, schedule) is not None
        return self._looks.get((workload, self.here, schedule_text(schedule)), 1) if known else 0

    def measured(self, workload: str) -> list[tuple[dict[str, Any], float]]:
        """Schedules that ran here with their microseconds, fastest first."""
        return _ranked(self._times.get(workload, {}).get(self.here, {}))

    def elsewhere(self, workload: str) -> list[dict[str, Any]]:
        """Schedules that ran on other machines or thread counts, most trustworthy first.

        In networks of this size only.

        Those of the same thread count come before those of the nearest, each `in_order`.
        Machines of one thread count take turns. What failed here is left out.
        """
        places = self._times.get(workload, {})
        turns = []
        for place, times in places.items():
            if place != self.here and place.network == self.network:
                far = abs(math.log2(place.threads / self.threads))
                turns += [
                    (far, turn, place, schedule)
                    for turn, schedule in enumerate(self._in_order(workload, place, times))
                ]
        turns.sort(key=lambda item: item[:3])
        return [schedule for *_, schedule in turns if self.time(workload, schedule) != math.inf]

    def _in_order(
        self, workload: str, place: Place, times: dict[str, float]
    ) -> list[dict[str, Any]]:
        found = [(us, schedule) for schedule, us in _ranked(times)]
        return in_order(found, lambda near: self.race(workload, near, place))

    def best(
        self, workload: str, place: Place | None = None, families: Collection[str] = ()
    ) -> tuple[dict[str, Any], float] | None:
        """Fastest schedule of a workload at a place, by default here, and its microseconds.

        ``families``, if any, restrict it to schedules of those kernels. None if nothing ran.
        """
        for schedule, time in _ranked(self._times.get(workload, {}).get(place or self.here, {})):
            if not families or schedule.get("kernel") in families:
                return schedule, time
        return None

    def places(self) -> list[Place]:
        """Where the records were measured, in a fixed order."""
        return sorted({place for places in self._times.values() for place in places})

    def disagreements(self) -> list[tuple[str, dict[str, Any], float]]:
        """Workload, schedule and ratio of what was measured twice here more than 10 % apart."""
        return [
            (workload, json.loads(schedule), ratio)
            for (workload, place, schedule), ratio in self._ratios.items()
            if place == self.here
        ]

    def rows(self) -> Iterator[tuple[str, Place, dict[str, Any], float]]:
        """Every schedule that ran: its workload, its place, itself, and its microseconds."""
        for workload, places in self._times.items():
            for place, times in places.items():
                for schedule, microseconds in _ranked(times):
                    yield workload, place, schedule, microseconds

    def __len__(self) -> int:
        return sum(len(times) for places in self._times.values() for times in places.values())


def near_fastest(found: Sequence[tuple[float, T]]) -> list[T]:
    """Of microseconds with what took them, fastest first, those that may be the fastest."""
    return [each for us, each in found if us <= _NEAR * found[0][0]][:_MOST]


def in_order(
    found: Sequence[tuple[float, T]], race: Callable[[list[T]], list[float] | None]
) -> list[T]:
    """What `found` has, fastest first; those near the fastest as they came when run in turns.

    ``race`` gives their times then; if it has none, their own decide.
    """
    near = near_fastest(found)
    times = race(near)
    if times is not None:
        near = [near[index] for index in sorted(range(len(near)), key=times.__getitem__)]
    return [*near, *(each for _, each in found[len(near) :])]


def _race_name(schedules: Sequence[str]) -> str:
    """Tells races of a workload apart by who took part."""
    return hashlib.sha256("\n".join(sorted(schedules)).encode()).hexdigest()[:8]


def schedule_text(schedule: dict[str, Any]) -> str:
    """A schedule's JSON as one text, by which records know it."""
    return json.dumps(schedule, sort_keys=True)


def _ranked(times: dict[str, float]) -> list[tuple[dict[str, Any], float]]:
    ran = [(time, schedule) for schedule, time in times.items() if math.isfinite(time)]
    return [(json.loads(schedule), time) for time, schedule in sorted(ran)]
