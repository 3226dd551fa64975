"""Timing kernels on the machine at hand, and picking their schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import tvm

from tvm_lowrank.cost import rivals, seams
from tvm_lowrank.cost.alike import other_epilogues
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.asking import Asker
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.guide import MARGIN, Guide
from tvm_lowrank.cost.model import CostModel
from tvm_lowrank.cost.trees import Trees
from tvm_lowrank.cost.tuner import Tuner
from tvm_lowrank.cost.usable import Usable
from tvm_lowrank.cost.watch import Watch
from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.passes.blocked_rewriter import PLAIN_CHANNELS
from tvm_lowrank.records import AGREEMENT, TuningRecords
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.kernels import (
    ALGORITHMS,
    Schedule,
    default_schedule,
    refuse,
    spaces,
)
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.chain import ChainSchedule, ChainWorkload
from tvm_lowrank.schedules.x86.workload import ConvWorkload


class KernelTimer:
    """Measures convolution kernels, remembers every time in the records, and picks schedules.

    A workload that records of another machine cover is measured here under their best schedule
    only; any other is tuned.

    Parameters
    ----------
    target : tvm.target.Target
    records : TuningRecords
        Read before anything is measured, appended to after each measurement.
    trials : int
        Schedules tried of each family of kernels at most (see `Tuner`).
    algorithms : collection of str
        Families to choose among; a convolution that none of them can compute takes any.
    seed : int
        Of the tuner.
    exact : bool
        Leave out kernels whose stated error exceeds `kernels.EXACT`.
    worker : Worker or Fleet, optional
        Runs the candidates; by default the one that this process shares.
    trees : Trees, optional
        A cost model trained before; it is trained further on the records.
    trust : bool
        Measure only what a model that knows this machine picks.
    guide : Guide, optional
        Picks what is measured; by default the tuner does, some schedules of every family.

    Attributes
    ----------
    measured, failed, unsteady, disputed : int
        Candidates measured by this timer, those among them that did not run, those whose time
        varied by more than 10 %, and those that two minima disagreed on by as much, so that a third
        was taken.
    spread, apart : float
        The largest share by which the minima that count of one of them differed, and any two.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        records: TuningRecords,
        trials: int = 4,
        algorithms: Collection[str] = ALGORITHMS,
        seed: int = 0,
        exact: bool = False,
        worker: Worker | Fleet | None = None,
        trees: Trees | None = None,
        trust: bool = False,
        guide: Guide | None = None,
    ) -> None:
        self.target = target
        self.isa = machine_of(target)
        self.records = records
        self.measured = self.failed = self.unsteady = self.disputed = 0
        self.spread = self.apart = 0.0
        self._watch = Watch(self)
        self.asker = Asker(target, self.isa, records.threads, records.network, worker)
        self._tuner = Tuner(records, self.isa, trials, seed, trees, trust, guide)
        self.usable = Usable(self.isa, records, algorithms, exact)

    def refuse(self, stages: Sequence[ConvGeometry]) -> str:
        """Why one of a chain of convolutions has no kernel here; empty if all have one."""
        try:
            reasons = [refuse(workload, self.isa) for workload in self.workloads(stages)]
        except ValueError as error:
            return str(error)
        return next((reason for reason in reasons if reason), "")

    def workloads(self, stages: Sequence[ConvGeometry]) -> list[ConvWorkload]:
        """A chain of convolutions as kernels, one each, the last with bias and ReLU."""
        found = []
        for index, stage in enumerate(stages):
            plain = index == 0 and stage.in_channels <= PLAIN_CHANNELS
            epilogue = ("bias", "relu") if index == len(stages) - 1 else ()
            found.append(ConvWorkload(stage, 1 if plain else self.isa.block, epilogue))
        return found

    def chain(self, stages: Sequence[ConvGeometry], brief: bool = False) -> float:
        """Time of a chain of convolutions, infinite where one has no kernel.

        ``brief``: see `Tuner.propose`.
        """
        if self.refuse(stages):
            return math.inf
        workloads = self.workloads(stages)
        self._prepare(workloads, brief)
        us = sum(self.microseconds(workload, brief) for workload in workloads)
        on_gpu = isinstance(self.isa, CudaArch)
        return (self.recorded(stages) or us) if on_gpu else us

    def within(self, stages: Sequence[ConvGeometry], limit: float) -> float:
        """Time of a chain as `chain` gives it, from a brief look at each stage with a guide.

        Infinite from the stage on where what is measured and what the guide expects of the rest
        make clearly more than ``limit`` microseconds: the rest is then not measured. On a GPU what
        a stage takes depends on the next (`seams`), so that none or all of them are.
        """
        if self.guide is None or self.refuse(stages):
            return self.chain(stages)
        workloads, total = self.workloads(stages), 0.0
        if isinstance(self.isa, CudaArch):
            hopeless = self._expected(workloads) / MARGIN > limit
            return math.inf if hopeless else self.chain(stages, brief=True)
        if self._expected(workloads) / MARGIN <= limit:
            self._prepare(workloads, brief=True)
        for index, workload in enumerate(workloads):
            if total + self._expected(workloads[index:]) / MARGIN > limit:
                return math.inf
            total += self.microseconds(workload, brief=True)
        return total

    def expected(self, stages: Sequence[ConvGeometry]) -> float:
        """Microseconds that a chain should take here by the guide, infinite without a kernel."""
        return math.inf if self.refuse(stages) else self._expected(self.workloads(stages))

    def _expected(self, workloads: Sequence[ConvWorkload]) -> float:
        assert self.guide is not None
        times = [self.guide.expected(w, self.usable.spaces(w)) for w in workloads]
        return seams.joined(self.isa, self.records, workloads, times)

    def microseconds(self, workload: ConvWorkload, brief: bool = False) -> float:
        """Time here of the workload under its best schedule, measuring what has to be.

        Infinite if no schedule runs. ``brief``: see `Tuner.propose`.
        """
        while (schedule := self._next(workload, brief)) is not None:
            self.time(workload, schedule)
        return self.usable.best(workload)[0]

    def _prepare(self, workloads: Iterable[ConvWorkload], brief: bool = False) -> None:
        """Have compiled what is likely to be measured for workloads, if one worker measures here.

        Compiling takes far longer than measuring, and can use cores that measuring cannot share.
        """
        if not self.asker.takes_turns:
            return
        pairs = [
            (workload, schedule)
            for workload in dict.fromkeys(workloads)
            if self.usable.elsewhere(workload) is None
            for schedule in self._tuner.ahead(workload, self.usable.spaces(workload), brief)
        ]
        if len(pairs) > 1:
            self.asker.prepare(pairs)

    def _next(self, workload: ConvWorkload, brief: bool = False) -> Schedule | None:
        """The schedule to measure next for a workload, None when enough were."""
        elsewhere = self.usable.elsewhere(workload)
        if elsewhere is not None:
            known = self.records.time(workload.key(), elsewhere.to_json())
            if known is None or known < math.inf:
                return elsewhere if known is None else None
        return self._tuner.propose(workload, self.usable.spaces(workload), brief)

    def measure_all(self, workloads: Iterable[ConvWorkload], brief: bool = False) -> None:
        """What `microseconds` measures for each workload, on all devices side by side.

        One worker alone measures one after the other anyway, when the times are asked for.
        """
        if self.asker.fleet is None:
            return
        left = [w for w in dict.fromkeys(workloads) if not refuse(w, self.isa)]
        while left:
            batch = [(w, s) for w in left if (s := self._next(w, brief)) is not None]
            left = [workload for workload, _ in batch]
            self.time_all(batch)

    def time_all(self, pairs: Sequence[tuple[ConvWorkload, Schedule]]) -> None:
        """Measure schedules that are not on record yet, side by side if there are many devices."""
        pairs = [p for p in pairs if self.records.time(p[0].key(), p[1].to_json()) is None]
        self.again(pairs)

    def again(self, pairs: Sequence[tuple[ConvWorkload, Schedule]]) -> None:
        """Measure schedules whatever is on record; the least of all times counts."""
        if self.asker.fleet is not None:
            for index, answer in self.asker.side_by_side(pairs):
                self._keep(*pairs[index], answer)
            self._watch.look()
        else:
            for pair in pairs:
                self._keep(*pair, self.ask(*pair))
                self._watch.look()

    def compare(self, workloads: Iterable[ConvWorkload]) -> None:
        """Run what comes near the fastest schedule of each workload in turns with it.

        See `rivals`. What servers or a GPU measure is left as it is.
        """
        if self.asker.takes_turns:
            rivals.compare(self, workloads)

    def is_calm(self) -> bool:
        """Whether the machine is about as fast now as on record, after waiting for that a little.

        True where no record says how fast it was.
        """
        return self._watch.is_calm()

    @property
    def guide(self) -> Guide | None:
        """What picks the kernels that are measured, if anything does."""
        return self._tuner.guide

    @property
    def model(self) -> CostModel:
        """The cost model of this machine, as far as it is trained."""
        return self._tuner.model

    def is_trusted(self) -> bool:
        """Whether the cost model picks what is measured: asked to, and knowing this machine."""
        return self._tuner.is_trusted()

    def predict(self, stages: Sequence[ConvGeometry]) -> float:
        """Predicted microseconds of a chain in the best schedules; infinite where one has none."""
        if self.refuse(stages):
            return math.inf
        workloads = self.workloads(stages)
        spaces = [self.usable.spaces(w).values() for w in workloads]
        times = [
            self.model.ranked(workload, [s for family in families for s in family])
            for workload, families in zip(workloads, spaces, strict=True)
        ]
        return seams.joined(self.isa, self.records, workloads, times)

    def time_of(self, workload: ConvWorkload, schedule: Schedule) -> float | None:
        """Microseconds of a schedule here if they are on record, whatever the epilogue."""
        times = [self.records.time(w.key(), schedule.to_json()) for w in other_epilogues(workload)]
        return next((time for time in times if time is not None), None)

    def recorded(self, stages: Sequence[ConvGeometry]) -> float | None:
        """Time of a chain as `chain` gives it, if the records hold all of it, else None."""
        workloads = self.workloads(stages)
        best = [self.usable.best(workload) for workload in workloads]
        if any(schedule is None for _, schedule in best):
            return None
        on_gpu = isinstance(self.isa, CudaArch)
        times = [self.usable.measured(w) for w in workloads] if on_gpu else [[b] for b in best]
        return seams.joined(self.isa, self.records, workloads, times)

    def choose(self, workload: ConvWorkload, raced: bool = True) -> Schedule:
        """Best schedule on record for this convolution, else the default; see `known`."""
        return self.known(workload, raced) or default_schedule(workload, self.isa)

    def known(self, workload: ConvWorkload, raced: bool = True) -> Schedule | None:
        """Best schedule on record for this convolution, whatever its epilogue, or None.

        Those near each other as they came in turns, unless told not to (``raced``): what is chosen
        before they run so must be chosen again by a search that finds them on record.

        What was measured here wins over what is only known from elsewhere, unless the best from
        there is of a family that was never measured here.
        """
        same = other_epilogues(workload)
        elsewhere = next(filter(None, map(self.usable.elsewhere, same)), None)
        if raced:
            measured = rivals.ranked(self, workload)
        else:
            measured = [schedule for _, schedule in self.usable.measured(workload)]
        if measured and (elsewhere is None or elsewhere.kernel in {s.kernel for s in measured}):
            return measured[0]
        return elsewhere

    def is_covered(self, workload: ConvWorkload) -> bool:
        """Whether the records tell the best schedule, so that nothing need be measured for it."""
        return self.known(workload) is not None and self.usable.is_complete(workload)

    def roofline(self) -> Roofline:
        """Peak of our own direct kernel on a layer that suits it, and bandwidth of a large copy.

        Raises
        ------
        LowRankError
            The kernel does not run on this machine.
        """
        return self._watch.roofline()

    def tune(self, workload: ConvWorkload, algorithms: Collection[str]) -> None:
        """Measure the schedules of some algorithms, whatever other machines know."""
        allowed = spaces(workload, self.isa, algorithms)
        while (schedule := self._tuner.propose(workload, allowed)) is not None:
            self.time(workload, schedule)

    def complaint(self) -> str:
        """One sentence on what went wrong with this timer's measurements; empty if nothing."""
        return "; ".join(self._watch.complaints())

    def time(
        self, workload: ConvWorkload | ChainWorkload, schedule: Schedule | ChainSchedule
    ) -> float:
        """Microseconds of one schedule here, from the records or measured."""
        key, data = workload.key(), schedule.to_json()
        known = self.records.time(key, data)
        if known is not None:
            return known
        microseconds = self._keep(workload, schedule, self.ask(workload, schedule))
        self._watch.look()
        return microseconds

    def _keep(self, workload: Any, schedule: Any, answer: Any) -> float:
        """Put an answer on record; returns its microseconds."""
        self.measured += 1
        microseconds, slower = (math.inf, None) if answer is None else self._watch.paced(answer)
        spread = None if answer is None else float(answer["spread"])
        self.failed += answer is None
        self.unsteady += spread is not None and spread > AGREEMENT
        self.spread = max(self.spread, spread or 0.0)
        apart = 0.0 if answer is None else float(answer.get("apart", 0.0))
        self.disputed += apart > AGREEMENT
        self.apart = max(self.apart, apart)
        device = None if answer is None else answer.get("device")
        alone = None if answer is None else answer.get("alone")
        self.records.add(
            workload.key(), schedule.to_json(), microseconds, spread, device, slower, alone
        )
        return microseconds

    def ask(self, workload: Any, schedule: Any) -> Any:
        """The answer for a schedule, put on no record; None if it does not run."""
        return self.asker.one(workload, schedule)
