"""Which layout a GPU's kernels work in, as far as the network around them tells.

A kernel of maps with channels last has them turned where its neighbours have not (`cuda.turn`), and
its time on record counts that. In a network of such kernels hardly any map is turned, so that they
may be the fastest together where none of them is alone. Here the times of all kernels without any
turning are on record, and what turning a map takes; the layout of each convolution is the one that
the whole network takes least time with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm

from tvm_lowrank.cost.alike import other_epilogues
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.seams import FIRST, kind_of, unturned
from tvm_lowrank.passes.lower import Choose
from tvm_lowrank.passes.lower_for_cuda import KernelCall, Map, calls_of
from tvm_lowrank.schedules.cuda import turn
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.cuda.channels_last import LastSchedule
from tvm_lowrank.schedules.cuda.few_channels import splits
from tvm_lowrank.schedules.family import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload


@dataclass(frozen=True)
class _Option:
    """A schedule with its microseconds where all maps have its layout already."""

    us: float
    schedule: Schedule


# Of each workload, by the kind of maps.
_Options = Mapping[ConvWorkload, Mapping[str, _Option]]
_Kinds = dict[ConvWorkload, str]


def settle(
    mod: tvm.IRModule, timer: KernelTimer, chosen: Mapping[ConvWorkload, Schedule]
) -> dict[ConvWorkload, Schedule]:
    """Schedules for the kernels of a network: the chosen ones, or others in another layout.

    Parameters
    ----------
    mod : tvm.IRModule
        Normalised, perhaps factored.
    timer : KernelTimer
        Of a GPU; has the times.
    chosen : mapping
        The fastest schedule of each workload with what turning its maps takes.
    """
    assert isinstance(timer.isa, CudaArch)
    network = _Network(calls_of(mod, timer.isa, chosen.__getitem__), timer, chosen)
    kinds = network.best()
    return {
        w: network.options[w][kinds[w]].schedule if w in kinds else s for w, s in chosen.items()
    }


def total(mod: tvm.IRModule, timer: KernelTimer, choose: Choose) -> float:
    """Microseconds of a network's kernels, maps turned between them included.

    Parameters
    ----------
    mod, timer
        As of `settle`.
    choose : callable
        Gives the schedule of a workload.
    """
    assert isinstance(timer.isa, CudaArch)
    calls = calls_of(mod, timer.isa, choose)
    chosen = {w: choose(w) for call in calls if (w := call.workload) is not None}
    network = _Network(calls, timer, chosen, others=False)
    return network.microseconds({w: next(iter(options)) for w, options in network.options.items()})


class _Network:
    """The kernels of a network with their maps."""

    def __init__(
        self,
        calls: Sequence[KernelCall],
        timer: KernelTimer,
        chosen: Mapping[ConvWorkload, Schedule],
        others: bool = True,
    ) -> None:
        self.calls = calls
        self._timer = timer
        self.options: _Options = {
            workload: self._options(workload, schedule, others)
            for workload, schedule in chosen.items()
        }
        self._turning: dict[tuple[tuple[int, ...], str], float] = {}
        self._rates: dict[str, float] = {}

    def _options(
        self, workload: ConvWorkload, chosen: Schedule, others: bool
    ) -> dict[str, _Option]:
        """The fastest schedule of each layout, the chosen one's first."""
        timer, g = self._timer, workload.geometry
        # What dense layers hand on is a vector again in between, and stays NCHW.
        others = others and g.out_height * g.out_width > 1
        found: dict[str, _Option] = {}
        for schedule in (chosen, *(s for _, s in timer.usable.measured(workload) if others)):
            kind = kind_of(schedule)
            us = timer.time_of(workload, schedule) or timer.time(workload, schedule)
            if kind != FIRST:
                assert isinstance(timer.isa, CudaArch)
                us = unturned(timer.isa, timer.records, workload, schedule, us)
            if kind not in found or us < found[kind].us:
                found[kind] = _Option(us, schedule)
        return found

    def best(self) -> _Kinds:
        """The layouts that take the least time together.

        From each layout for all that have it, one workload after the other changes while that
        gains.
        """
        starts = [
            {
                w: kind if kind in options else next(iter(options))
                for w, options in self.options.items()
            }
            for kind in (FIRST, turn.PLAIN, turn.TF32, turn.HALF)
        ]
        starts.append({w: next(iter(options)) for w, options in self.options.items()})
        return min((self._improved(start) for start in starts), key=self.microseconds)

    def _improved(self, kinds: _Kinds) -> _Kinds:
        least, moved = self.microseconds(kinds), True
        while moved:
            moved = False
            for workload, options in self.options.items():
                for kind in options:
                    other = {**kinds, workload: kind}
                    us = self.microseconds(other)
                    if us < least:
                        least, kinds, moved = us, other, True
        return kinds

    def microseconds(self, kinds: _Kinds) -> float:
        """Time of all convolutions, and of turning the maps that need it."""
        us = 0.0
        made: dict[int, str] = {}
        needed: dict[Map, set[str]] = {}
        for call in self.calls:
            if call.workload is None:
                kind = made.get(call.reads[0].number, FIRST)
            else:
                kind = kinds[call.workload]
                us += self.options[call.workload][kind].us
            for index, read in enumerate(call.reads):
                # What splits pixels takes them from NCHW.
                own = index == 0 and self._splits(call.workload, kind)
                needed.setdefault(read, set()).add(FIRST if own else kind)
            made[call.writes.number] = kind
            needed.setdefault(call.writes, set()).update({FIRST} if call.read_elsewhere else ())
        for each, kinds_needed in needed.items():
            there = made.get(each.number, FIRST)
            others = kinds_needed - {there}
            # From one layout with channels last to another by way of NCHW.
            turned = others - {FIRST} | ({there} - {FIRST} if others else set())
            us += sum(self._turn(each, kind) for kind in turned)
        return us

    def _splits(self, workload: ConvWorkload | None, kind: str) -> bool:
        if workload is None:
            return False
        schedule = self.options[workload][kind].schedule
        return isinstance(schedule, LastSchedule) and splits(workload)

    def _turn(self, given: Map, kind: str) -> float:
        """Microseconds of turning a map to a kind or back."""
        name = (given.shape, kind)
        if name not in self._turning:
            arch = self._timer.isa
            assert isinstance(arch, CudaArch)
            # Vectors, of dense layers, are maps of one pixel.
            batch, channels, height, width = (*given.shape, 1, 1)[:4]
            shape = (batch, channels, height, width)
            self._turning[name] = self._rate(kind) * turn.predict(shape, arch, kind)
        return self._turning[name]

    def _rate(self, kind: str) -> float:
        """How many times as long as predicted turning to a kind took where it is on record."""
        if kind not in self._rates:
            arch, records, found = self._timer.isa, self._timer.records, []
            assert isinstance(arch, CudaArch)
            for workload, options in self.options.items():
                if kind not in options:
                    continue
                data = options[kind].schedule.to_json()
                for other in other_epilogues(workload):
                    alone, whole = records.alone(other.key(), data), records.time(other.key(), data)
                    if alone is not None and whole is not None:
                        found.append((whole - alone) / turn.of_convolution(other, arch, kind))
            self._rates[kind] = statistics.median(found) if found else 1.0
        return self._rates[kind]
