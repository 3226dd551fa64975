"""What a guided search loses where layers may take forms, against measuring every candidate.

    python benchmarks/guided_forms.py vgg6-cifar10 --markdown docs/guided-forms.md

The schedules of all layers are measured, up to ``--each`` of a family in its own order, then those
of all proposals of forms, fitted to the network's data. With ``--again``, what may be the fastest
of its convolution is measured a second time after all others, and a third time where the two
disagree. A guided search is replayed on these times: what it asks for it gets from there. So both
choose among the same candidates, with the same times. Nothing shipped is read but the cost model.
An interrupted run goes on from ``--folder``; once all is measured, the replay needs no quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from machine import processor
from networks import NETWORKS, Network
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import Schedule, spaces
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.guide import Guide
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import records_for
from tvm_lowrank.cost.sampling import look_again
from tvm_lowrank.cost.trees import Trees, find
from tvm_lowrank.cost.usable import Usable
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.place import network_size
from tvm_lowrank.planner.allocate import Choice, around, microseconds, total_harm
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.candidates import Candidate, confirm
from tvm_lowrank.planner.options import Options
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.planner.survey import Survey
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import host_target
from tvm_lowrank.threads import set_threads

FOLDER = Path(__file__).resolve().parents[1] / "build" / "guided_forms"
# Shares of the dense network's time that choices are compared at.
SHARES = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4)
# The one that is shown layer by layer.
SHOWN = 0.6
# What took longer than the fastest of its convolution by more is not measured again: it was either
# disturbed so much that the model of all the others tells, or is not the fastest.
NEAR = 1.5
# Kernels between two reports of progress.
_BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {network.name: network for network in NETWORKS}
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)} (default: demo)")
    parser.add_argument("--samples", type=int, default=256, help="that forms are fitted to")
    parser.add_argument("--each", type=int, default=8, help="schedules of a family (default: 8)")
    parser.add_argument(
        "--again", action="store_true", help="a second look at what may be the fastest"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of records")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the page, also printed")
    args = parser.parse_args()
    names = args.names or ["demo"]
    if unknown := [name for name in names if name not in known]:
        print(f"error: {unknown[0]!r} is none of {', '.join(known)}", file=sys.stderr)
        return 2
    if min(args.samples, args.each) < 1:
        print("error: give positive numbers of samples and schedules", file=sys.stderr)
        return 2
    sections = []
    for name in names:
        if reason := known[name].missing:
            print(f"{name}: skipped, {reason}", file=sys.stderr)
            continue
        network = known[name]
        try:
            compared = compare(network, args.samples, args.each, args.folder / name, args.again)
        except LowRankError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sections.append(compared.section())
        print(sections[-1])
    if sections and args.markdown:
        options = (f" --each {args.each}" if args.each != 8 else "") + " --again" * args.again
        command = f"python benchmarks/guided_forms.py {' '.join(names)}{options}"
        intro = _INTRO.format(
            command=f"{command} --markdown {args.markdown}",
            cpu=processor(),
            each=args.each,
            looks=_LOOKS.format(near=NEAR - 1) * args.again,
        )
        args.markdown.write_text(intro + "\n".join(sections), encoding="utf-8")
    return 0


_INTRO = """# What the cost model's guidance loses with forms in play

Written by `{command}`.

{cpu}. Both choose among the same proposals of forms, and the same schedules: the first
{each} of each family. All were measured{looks}. The guided search is replayed on these times, and
knows only what it asks for. *Best* weighs the errors of all layers alike. The guided search takes
the fastest that it found and that harms no more: in any one layer, or in all together.

"""

_LOOKS = """; what took 15 % longer
than a model of them all expects, or up to {near:.0%} longer than the fastest of its convolution, a
second time after all others, and a third time where the two were more than 10 % apart; the least
time counts"""


@dataclass(frozen=True)
class Compared:
    """What a guided search found of a network, and what was to be found.

    ``guided`` holds each layer's front as the search found it, ``best`` all proposals in their
    fastest kernels; both have the dense layer too. ``kernels`` are how many the guided search asked
    for, how many were measured, and how many there are.
    """

    name: str
    layers: dict[str, ConvLayer]
    guided: dict[str, list[Candidate]]
    best: dict[str, list[Candidate]]
    proposals: int
    confirmed: int
    kernels: tuple[int, int, int]

    @property
    def dense_us(self) -> float:
        """Microseconds of the layers as they are, in their fastest kernels."""
        dense = (next(c for c in front if c.form == "dense") for front in self.best.values())
        return sum(candidate.measured_us for candidate in dense)

    def at(self, share: float) -> tuple[Choice, Choice]:
        """The best choice within a share of the dense network's time, and the guided one for it."""
        even, limit = dict.fromkeys(self.best, 1.0), share * self.dense_us
        # By relaxation alone, as `within` finds the other.
        best = around(self.best, even, lambda choice: microseconds(choice) <= limit)[1]
        layerwise = {name: no_worse(self.guided[name], one) for name, one in best.items()}
        return best, min(layerwise, within(self.guided, total_harm(best, even)), key=microseconds)

    def section(self) -> str:
        """The network's part of the page."""
        measured, known, everything = self.kernels
        lines = [
            f"## {self.name}",
            "",
            f"{self.proposals} proposals for {len(self.layers)} layers, in {everything} kernels. "
            f"{known} of these were measured; the guided search asked for {measured} of them "
            f"({measured / known:.1%}, or {measured / everything:.1%} of all) and kept "
            f"{self.confirmed} proposals.",
            "",
            "| the best within | is, of the dense network | guided search | slower by |",
            "|---|---|---|---|",
        ]
        dense, seen = self.dense_us, set[float]()
        for share in SHARES:
            best, guided = self.at(share)
            least, taken = microseconds(best), microseconds(guided)
            if least in seen:
                continue
            seen.add(least)
            lines.append(
                f"| {share:.0%} of {dense:.0f} us | {least / dense:.1%} | {taken / dense:.1%} | "
                f"{taken / least - 1:+.1%} |"
            )
        best, guided = self.at(SHOWN)
        lines += [
            "",
            f"Layer by layer, within {SHOWN:.0%} of the dense network's time:",
            "",
            "| layer | shape | best of all: us | guided search: us | slower by |",
            "|---|---|---|---|---|",
        ]
        for name, one in best.items():
            other, g = guided[name], self.layers[name].geometry
            assert g is not None
            shape = f"{g.in_channels}-{g.out_channels}@{g.height}, {g.kernel[0]}x{g.kernel[1]}"
            lines.append(
                f"| {name} | {shape} | {_text(one)} | {_text(other)} | "
                f"{other.measured_us / one.measured_us - 1:+.1%} |"
            )
        return "\n".join([*lines, ""])


class Recorded(Usable):
    """What may be taken of ``usable``, as far as ``truth`` has a time of it."""

    def __init__(self, usable: Usable, truth: TuningRecords) -> None:
        super().__init__(usable.isa, usable.records, usable.algorithms, usable.exact)
        self.truth = truth

    def allowed(self, workload: ConvWorkload) -> dict[str, list[Any]]:
        """The schedules that have a time, of the families that have one."""
        found = {
            family: [s for s in space if self.truth.time(workload.key(), s.to_json()) is not None]
            for family, space in super().allowed(workload).items()
        }
        return {family: space for family, space in found.items() if space}


class Replay(KernelTimer):
    """A guided timer that takes its times from records, and chooses among what they hold.

    Parameters
    ----------
    target : tvm.target.Target
    truth : TuningRecords
        With figures of the machine.
    trees : Trees
    """

    def __init__(self, target: tvm.target.Target, truth: TuningRecords, trees: Trees) -> None:
        isa, self.truth = machine_of(target), truth
        here = {"machine": truth.machine, "network": truth.network}
        records = TuningRecords(None, isa.name, truth.threads, **here)
        for key in machine.figure_keys(isa):
            for schedule, us in truth.measured(key):
                records.remember(key, schedule, us)
        super().__init__(target, records, guide=Guide(trees, records, isa))
        self.usable = Recorded(self.usable, truth)

    def roofline(self) -> Roofline:
        """The figures on record."""
        found = machine.figures(self.records, self.isa)
        assert found is not None
        return found

    def ask(self, workload: ConvWorkload, schedule: Schedule) -> dict[str, float] | None:
        """The least time on record; None for what did not run."""
        us = self.truth.time(workload.key(), schedule.to_json())
        return None if us is None or math.isinf(us) else {"us": us, "spread": 0.0}


def compare(
    network: Network, samples: int, each: int, folder: Path, again: bool = False
) -> Compared:
    """Measure what is not on record yet, and replay a guided search of it.

    Raises LowRankError if no cost model ships for this machine's instructions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, threads = host_target(), set_threads(None)
    module = normalise(load_model(network.model))
    size = network_size(layer.geometry for layer in collect_layers(module))
    records = records_for(folder / "records.jsonl", target, threads, False, network=size)
    truth = KernelTimer(target, records)
    if machine.figures(truth.records, truth.isa) is None:
        truth.roofline()
    trees, complaint = find(None, truth.isa)
    if trees is None:
        raise LowRankError(complaint or f"no cost model ships for {truth.isa.name}")
    layers = [layer for layer in collect_layers(module) if not layer.fully_connected]
    shapes = [layer.geometry for layer in layers if layer.geometry is not None]
    measure(truth, [(geometry,) for geometry in shapes], each, f"{network.name}, layers", again)
    survey = replayed(layers, truth, trees)
    eligible = survey.eligible()
    segments = Segments(module, collect_layers(module), truth)
    moments = input_moments(segments, eligible, network.data()[0][0][:samples], 0)
    proposed = {layer.name: found for layer, found, _ in survey.proposals(eligible, moments)}
    wanted = {name: [*found, survey.dense[name]] for name, found in proposed.items()}
    chains = [candidate.stages for of in wanted.values() for candidate in of]
    workloads = measure(truth, chains, each, f"{network.name}, forms", again)
    # On the final times: those of the layers may have been taken again.
    survey = replayed(layers, truth, trees)
    timer = survey.timer
    fronts = {
        name: [*confirm(candidates, survey.dense[name], timer), survey.dense[name]]
        for name, candidates in proposed.items()
    }
    looked, known = (
        sum(len(source.records.measured(workload.key())) for workload in workloads)
        for source in (timer, truth)
    )
    every = sum(len(of) for w in workloads for of in spaces(w, truth.isa).values())
    wanted = {name: [*found, survey.dense[name]] for name, found in proposed.items()}
    return Compared(
        network.name,
        {layer.name: layer for layer in eligible},
        fronts,
        {name: [replace(c, measured_us=best(c, truth)) for c in of] for name, of in wanted.items()},
        sum(map(len, proposed.values())),
        sum(len(front) - 1 for front in fronts.values()),
        (looked, known, every),
    )


def replayed(layers: list[ConvLayer], truth: KernelTimer, trees: Trees) -> Survey:
    """A guided search that has taken the times of the layers as they are."""
    timer = Replay(truth.target, truth.records, trees)
    survey = Survey(layers, Options(), timer, timer, timer, lambda *_: None)
    survey.measure_dense()
    return survey


def measure(
    timer: KernelTimer,
    chains: Sequence[Sequence[ConvGeometry]],
    each: int,
    what: str,
    again: bool = False,
) -> list[ConvWorkload]:
    """Measure ``each`` schedules of each family for the kernels of chains; returns these.

    With ``again``, what took much longer than a model of the records expects is measured twice, and
    what may be the fastest as `settle` does.
    """
    workloads = list(dict.fromkeys(w for stages in chains for w in timer.workloads(stages)))
    wanted: dict[ConvWorkload, list[Any]] = {}
    for done, workload in enumerate(workloads):
        report(what, done, len(workloads))
        families = spaces(workload, timer.isa).values()
        wanted[workload] = [schedule for space in families for schedule in space[:each]]
        timer.time_all([(workload, schedule) for schedule in wanted[workload]])
    if again:
        look_again(timer, wanted, 0, report)
        settle(timer, wanted)
    return workloads


def settle(timer: KernelTimer, measured: Mapping[ConvWorkload, Sequence[Any]]) -> None:
    """Measure what may be the fastest of its workload twice, and thrice where that disagrees."""
    for looks in (1, 2):
        disputed = {
            (key, json.dumps(data, sort_keys=True))
            for key, data, _ in timer.records.disagreements()
        }
        pairs: list[tuple[ConvWorkload, Any]] = []
        for workload, schedules in measured.items():
            key = workload.key()
            data = {schedule: schedule.to_json() for schedule in schedules}
            times = {s: timer.records.time(key, data[s]) or math.inf for s in schedules}
            limit = NEAR * min(times.values(), default=0.0)
            pairs += [
                (workload, schedule)
                for schedule, us in times.items()
                if us <= limit < math.inf
                and timer.records.looks(key, data[schedule]) == looks
                and (looks == 1 or (key, json.dumps(data[schedule], sort_keys=True)) in disputed)
            ]
        for start in range(0, len(pairs), _BATCH):
            timer.again(pairs[start : start + _BATCH])
            report(f"look {looks + 1}", min(start + _BATCH, len(pairs)), len(pairs))


def report(what: str, done: int, total: int) -> None:
    """Progress on one line."""
    print(f"{what}: {done} of {total}   ", end="\r", file=sys.stderr)


def no_worse(front: Sequence[Candidate], one: Candidate) -> Candidate:
    """The fastest candidate of no larger error than ``one``."""
    allowed = [candidate for candidate in front if candidate.error <= one.error]
    return min(allowed, key=lambda candidate: candidate.measured_us)


def within(options: Mapping[str, Sequence[Candidate]], limit: float) -> Choice:
    """The fastest choice of no larger total harm, by bisection of the price of time."""
    even = dict.fromkeys(options, 1.0)
    return around(options, even, lambda choice: total_harm(choice, even) > limit)[0]


def best(candidate: Candidate, truth: KernelTimer) -> float:
    """Microseconds of a candidate in the fastest kernels on record, infinite without any."""
    us = truth.recorded(candidate.stages)
    return math.inf if us is None else us + candidate.extra_us


def _text(candidate: Candidate) -> str:
    rank = candidate.rank
    ranks = rank if isinstance(rank, tuple) else (rank,) * (candidate.form != "dense")
    return (
        f"{candidate.form} {'-'.join(map(str, ranks))}".strip() + f": {candidate.measured_us:.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
