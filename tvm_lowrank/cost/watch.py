"""Whether the machine that measures is the one of the records, and as fast as it was."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import Place
from tvm_lowrank.records import AGREEMENT
from tvm_lowrank.schedules.kernels import schedule_from_json

if TYPE_CHECKING:
    from tvm_lowrank.cost.measure import KernelTimer

# Measurements between two of the reference kernel.
_EVERY = 64
# Seconds of looking at a machine's pace when there is none on record.
_FIRST_LOOK = 1.0
# Times that allow for a machine so many times as slow as at first are worth a word.
_SLOW = 1.5

# A calm machine is so many times as slow at most; seconds of a look at that and between two, and of
# waiting for it.
_CALM, _LOOK, _PATIENCE = 1.2, 0.05, 3.0
# Looks at a machine that seems to be another one, and the seconds that it may only be busy for.
_LOOKS, _DOUBT = 3, 10.0


class Watch:
    """Keeps an eye on the machine for a timer: its figures, its name, its steadiness.

    Parameters
    ----------
    timer : KernelTimer
    """

    def __init__(self, timer: KernelTimer) -> None:
        self.timer = timer
        self._slowest = 1.0
        self._looked = 0
        self._paced = False
        self._checked = False
        self._remarks: list[str] = []

    def roofline(self) -> Roofline:
        """Peak of our own kernel on a layer that suits it, and bandwidth of a large copy.

        What the records say of this machine is believed only if it still is as fast: records that
        were brought along from another machine of the same name must not price this one.

        Raises
        ------
        LowRankError
            The kernel does not run on this machine.
        """
        known = machine.figures(self.timer.records, self.timer.isa)
        if known is None:
            self.timer.tune(machine.reference(self.timer.isa), ("direct",))
            if self.timer.records.time(machine.COPY, {}) is None:
                self._read()
                self.timer.records.add(machine.COPY, {}, self.timer.asker.copy())
            known = machine.figures(self.timer.records, self.timer.isa)
            if known is None:
                raise LowRankError(
                    f"kernels for target {self.timer.target} do not run on this machine; "
                    "name one that it can run with --target"
                )
            self._checked = True
        elif not self._checked:
            known = self._recognise(known)
        return known

    def _recognise(self, known: Roofline) -> Roofline:
        """The figures on record that this machine still has; a place of its own if there are none.

        A machine that is busy looks slower than it is: the best of three looks counts, of those
        within some seconds before it is taken for another one, and while others work on it, slower
        figures are no proof of that.
        """
        self._checked = True
        kernel = copy = math.inf
        nearest, now, end = None, known, time.monotonic() + _DOUBT
        for look in itertools.count(1):
            kernel = min(kernel, self._witness() or math.inf)
            copy = min(copy, self.timer.asker.copy())
            if math.isinf(kernel):
                return known  # the kernel on record does not run; measuring will tell
            now = machine.roofline(kernel, copy)
            if machine.apart(now, known) < machine.NOTABLE:
                return known
            if look < _LOOKS:
                continue
            nearest = machine.nearest(now, self._places())
            if nearest is not None and nearest[1] < machine.ANOTHER_MACHINE:
                break
            if now.gflops > known.gflops or time.monotonic() > end:
                break
            time.sleep(_LOOK)
        name = self.timer.records.machine.partition(" [")[0]
        slower = now.gflops < known.gflops and now.gigabytes < machine.NOTABLE * known.gigabytes
        if nearest is not None and (
            nearest[1] < machine.ANOTHER_MACHINE or (slower and machine.is_busy())
        ):
            (self.timer.records.machine, *_), factor = nearest
            if factor > machine.NOTABLE:
                self._remarks.append(
                    f"peak or bandwidth differ from those on record by {factor - 1:.0%} "
                    f"(now {now}): is the machine busy, or another one?"
                )
            return machine.figures(self.timer.records, self.timer.isa) or known
        self.timer.records.machine = f"{name} [{now}]"
        self._remarks.append(
            f"the records come from a machine of the same name with {known}, this one has {now}: "
            "their times are not used, and what has to be compared is measured anew"
        )
        self._read()
        self.timer.records.add(machine.COPY, {}, copy)
        self.timer.tune(machine.reference(self.timer.isa), ("direct",))
        return machine.figures(self.timer.records, self.timer.isa) or now

    def _places(self) -> list[tuple[Place, Roofline]]:
        """Machines of this one's name and threads on record, with their figures."""
        here, name = self.timer.records.here, self.timer.records.machine.partition(" [")[0]
        return [
            (place, found)
            for place in self.timer.records.places()
            if place[1:] == here[1:] and place.machine.partition(" [")[0] == name
            if (found := machine.figures(self.timer.records, self.timer.isa, place)) is not None
        ]

    def _read(self) -> None:
        """Put on record how fast this machine reads, before the copy: that makes figures whole.

        Nothing is predicted by them before, so a search that was killed in between predicts what it
        would have. Where there is a copy on record but no reading, there will be none.
        """
        for size in machine.READING_BYTES:
            key = machine.reading(size)
            if self.timer.records.time(key, {}) is None:
                answer = self.timer.asker.reading(size)
                if answer is not None:
                    self.timer.records.add(key, {}, self.paced(answer)[0])

    def _witness(self) -> float | None:
        """Microseconds now of the reference kernel, if one is on record."""
        workload = machine.reference(self.timer.isa)
        families = machine.direct_families(self.timer.isa)
        best = self.timer.records.best(workload.key(), families=families)
        answer = None if best is None else self.timer.ask(workload, schedule_from_json(best[0]))
        return None if answer is None else float(answer["us"])

    def paced(self, answer: Mapping[str, Any]) -> tuple[float, float | None]:
        """Microseconds of an answer on the machine as it was at first, and how much slower it is.

        A machine that others share is slower than at other times for seconds or minutes. The kernel
        that ran beside the measured one says by how much, if the answer has its time.
        """
        us, pace = float(answer["us"]), answer.get("pace")
        if pace is None:
            return us, None
        first = self.timer.records.time(machine.PACE, {})
        if first is None:
            # What a process measures first may be slow, as its threads are new.
            first = min(pace, self.timer.asker.pace(_FIRST_LOOK) or pace)
            self.timer.records.add(machine.PACE, {}, first)
        self._paced, slower = True, pace / first
        self._slowest = max(self._slowest, slower)
        return us / slower, slower

    def is_calm(self) -> bool:
        """Whether the kernel of the machine's pace takes about as long as at first; waits for that.

        True where there is no pace on record.
        """
        first, end = self.timer.records.time(machine.PACE, {}), time.monotonic() + _PATIENCE
        while first is not None:
            now = self.timer.asker.pace(_LOOK)
            if now is None or now <= _CALM * first:
                break
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK)
        return True

    def look(self) -> None:
        """Now and then, compare the reference kernel with what it took before.

        Where it runs beside each measured kernel anyway, there is no need.
        """
        if self._paced or self.timer.measured - self._looked < _EVERY:
            return
        self._looked = self.timer.measured
        key = machine.reference(self.timer.isa).key()
        families = machine.direct_families(self.timer.isa)
        known = self.timer.records.best(key, families=families)
        now = None if known is None else self._witness()
        if known is not None and now is not None:
            self._slowest = max(self._slowest, now / known[1])

    def complaints(self) -> list[str]:
        """What went wrong with the timer's measurements."""
        parts = list(self._remarks)
        if self.timer.failed:
            parts.append(f"{self.timer.failed} of {self.timer.measured} kernels did not run")
        if self.timer.unsteady:
            parts.append(
                f"the times of {self.timer.unsteady} of {self.timer.measured} kernels varied by "
                f"more than 10 %, one by {self.timer.spread:.0%} (is the machine busy?)"
            )
        if self.timer.disputed:
            parts.append(
                f"{self.timer.disputed} of {self.timer.measured} kernels were timed a third time, "
                f"because two times were more than 10 % apart, of one {self.timer.apart:.0%}"
            )
        if ratios := [ratio for *_, ratio in self.timer.records.disagreements()]:
            parts.append(
                f"{len(ratios)} candidates were measured twice with times more than 10 % apart, "
                f"one with {max(ratios) - 1:.0%}; the lesser counts"
            )
        if self._paced and self._slowest > _SLOW:
            parts.append(
                f"the machine was up to {self._slowest - 1:.0%} slower than at first; times allow "
                "for that, as far as a kernel that ran beside each one tells (is it busy?)"
            )
        elif not self._paced and self._slowest > 1 + AGREEMENT:
            parts.append(
                f"the reference kernel, measured again in between, took up to "
                f"{self._slowest - 1:.0%} longer than at first: some of these times are that much "
                "too long (is the machine busy?)"
            )
        return parts
