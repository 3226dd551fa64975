"""What the cost model's choices cost: regret against exhaustive measurement, by network held out.

Networks are those of the shipped records at batch 1, each judged at the place (processor, threads,
size of networks) of its size where there are records of that. A layer counts where the place's hold
every algorithm, and every size of tile, that its kernels can compute it by. The model is trained
without every layer of the network it is judged on, on the records of all machines, and, if there
are several, also without those of the machine it is judged on.
`tune --survey` makes such records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import regret_page
import rules_of_thumb
from regret_page import ELSEWHERE, LEARNED, TRIALS
from rules_of_thumb import Score
from train_cost_model import MACHINES
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import ALGORITHMS, families_of, schedule_from_json, spaces
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.guide import Guide
from tvm_lowrank.cost.learned import LearnedModel, analytic_of, train
from tvm_lowrank.cost.sampling import algorithm_class, best_of_each, recorded_layers
from tvm_lowrank.cost.trees import Trees, signature
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import SMALL, Place, network_size
from tvm_lowrank.records import TuningRecords, schedule_text
from tvm_lowrank.shipped import shipped_records, survey_records

ISAS = {isa.name: isa for isa in MACHINES}


@dataclass(frozen=True)
class Layer:
    """A workload with what was measured of it at the place.

    ``races`` are the microseconds of each algorithm's best schedule whenever these ran in turns.
    """

    workload: ConvWorkload
    schedules: list[dict[str, Any]]
    microseconds: np.ndarray
    races: Sequence[Mapping[str, float]] = ()

    @property
    def classes(self) -> list[str]:
        """The algorithm of each schedule: family and tile."""
        return [algorithm_class(schedule) for schedule in self.schedules]

    def candidates(self, isa: Machine) -> int:
        """How many schedules there are to choose among, measured or not."""
        return sum(len(space) for space in spaces(self.workload, isa).values())

    def has_choice(self, isa: Machine) -> bool:
        """Whether there are two algorithms or more, all of them measured."""
        names = {
            algorithm_class(schedule.to_json())
            for space in spaces(self.workload, isa).values()
            for schedule in space
        }
        return len(names) > 1 and names <= {*self.classes}

    def algorithm_regret(self, scores: np.ndarray) -> float:
        """The best measured time of the picked algorithm over the best of all, less one.

        Of times in turns, if there are any.
        """
        picked = algorithm_class(self.schedules[int(np.argmin(scores))])
        times = _least(self.races)
        if not times:
            best = best_of_each(self.schedules, self.microseconds)
            times = {name: float(self.microseconds[index]) for name, index in best.items()}
        return times[picked] / min(times.values()) - 1

    def race_regrets(self) -> list[float]:
        """What picking by one race costs by the others, of each race, if there are several."""
        found = []
        for index, race in enumerate(self.races):
            if times := _least([*self.races[:index], *self.races[index + 1 :]]):
                found.append(
                    times[min(race, key=lambda name: race[name])] / min(times.values()) - 1
                )
        return found

    def schedule_regret(self, scores: np.ndarray) -> float:
        """The time of the picked schedule over the best of all, less one."""
        picked = self.microseconds[int(np.argmin(scores))]
        return float(picked / self.microseconds.min() - 1)


def _least(races: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least time of each algorithm; empty without races."""
    return {name: min(race[name] for race in races) for name in (races[0] if races else ())}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path, help="default: the shipped surveys")
    parser.add_argument("--isa", choices=sorted(ISAS), default="avx512")
    parser.add_argument(
        "--machine", default="", metavar="TEXT", help="in its name; default: of most records"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="predicted against measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table, also printed")
    args = parser.parse_args()
    isa, shipped = ISAS[args.isa], shipped_records(args.isa)
    surveys = args.records or survey_records(args.isa)
    records = TuningRecords(None, isa.name, 1, shipped=[*shipped, *surveys])
    place = _place(TuningRecords(None, isa.name, 1, shipped=surveys), args.machine)
    if place is None:
        print(
            f"error: no records of a machine named {args.machine!r} for {isa.name}; "
            "run python -m tvm_lowrank.tune --survey first",
            file=sys.stderr,
        )
        return 2
    networks: dict[str, set[ConvGeometry]] = {}
    for geometry, names in recorded_layers(shipped).items():
        for name in names if geometry.batch == 1 else ():
            networks.setdefault(name, set()).add(geometry)
    judged = _judge(records, isa, place, networks, args.seed)
    text = regret_page.table(judged, place, len(records))
    print(text)
    if args.markdown:
        command = f"python benchmarks/regret.py --isa {isa.name} --markdown {args.markdown}"
        command += f" --machine '{args.machine}'" if args.machine else ""
        command += f" --svg {args.svg}" if args.svg else ""
        read = regret_page.READ_GPU if isinstance(isa, CudaArch) else regret_page.READ
        title = f"# Regret of the cost model, {isa.name}\n\nWritten by `{command}`.\n{read}"
        plot = f"\n\n![predicted against measured]({args.svg.name})" if args.svg else ""
        args.markdown.write_text(f"{title}{text}{plot}\n", encoding="utf-8")
    if args.svg:
        args.svg.write_text(regret_page.plot(judged), encoding="utf-8")
    return 0


def _place(records: TuningRecords, name: str) -> Place | None:
    """The place of small networks on the machine with most records that has this in its name."""
    counts: dict[Place, int] = {}
    for _, place, *_ in records.rows():
        if name in place.machine:
            place = place._replace(network=SMALL)
            counts[place] = counts.get(place, 0) + 1
    return max(counts, key=lambda place: counts[place], default=None)


def _layers(
    records: TuningRecords, place: Place, geometries: set[ConvGeometry], isa: Machine
) -> list[Layer]:
    found: dict[str, tuple[list[dict[str, Any]], list[float]]] = {}
    # Kernels that round are chosen only where they are asked for.
    exact = {name for name, each in families_of(isa).items() if each.algorithm in ALGORITHMS}
    kernels = {name: fields for name, fields in signature(isa).items() if name in exact}
    for key, where, schedule, us in records.rows():
        current = kernels.get(schedule.get("kernel", "")) == sorted(schedule)
        if current and where == place and key.startswith('{"epilogue"'):
            schedules, times = found.setdefault(key, ([], []))
            schedules.append(schedule)
            times.append(us)
    layers = []
    for key, (schedules, times) in found.items():
        workload = ConvWorkload.from_json(json.loads(key))
        if workload.geometry in geometries:
            best = best_of_each(schedules, times)
            rivals = [schedules[index] for index in best.values()]
            races = records.race_by_race(key, rivals, place)
            named = [dict(zip(best, race, strict=True)) for race in races]
            settled = records.settled(key, place)
            pairs = zip(schedules, times, strict=True)
            truth = [settled.get(schedule_text(schedule), us) for schedule, us in pairs]
            layers.append(Layer(workload, schedules, np.array(truth), named))
    return layers


@dataclass(frozen=True)
class Judged:
    """A network: where, its layers, and for each model the scores of each layer's schedules.

    ``choices`` are the layers with a choice of algorithm, ``candidates`` all schedules of all
    layers, ``guided`` what a search that a trained model guides measures: how many kernels, and the
    time of the best of them over the best of all, less one.
    """

    name: str
    place: Place
    layers: list[Layer]
    scores: dict[str, list[np.ndarray]]
    choices: list[int]
    candidates: int = 0
    guided: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def network_error(self, model: str) -> float:
        """Predicted over measured time of the network in the kernels that the model picks, less 1.

        Each distinct layer counts once.
        """
        predicted = measured = 0.0
        for layer, scores in zip(self.layers, self.scores[model], strict=True):
            picked = int(np.argmin(scores))
            predicted += scores[picked]
            measured += layer.microseconds[picked]
        return predicted / measured - 1


def _judge(
    records: TuningRecords,
    isa: Machine,
    here: Place,
    networks: Mapping[str, set[ConvGeometry]],
    seed: int,
) -> list[Judged]:
    judged = []
    known = records.places()
    for name, geometries in sorted(networks.items()):
        sized = here._replace(network=network_size(geometries))
        place = sized if sized in known else here
        analytic = analytic_of(records, isa, place)
        layers = _layers(records, place, geometries, isa)
        choices = [i for i, layer in enumerate(layers) if layer.has_choice(isa)]
        if not choices:
            continue
        held = {layer.workload.geometry for layer in layers} | geometries

        def keep(key: str, _place: Place, held: set[ConvGeometry] = held) -> bool:
            if not key.startswith('{"epilogue"'):
                return False
            return ConvGeometry.from_json(json.loads(key)["geometry"]) not in held

        def keep_others(key: str, other: Place, keep: Callable[[str, Place], bool] = keep) -> bool:
            return other.machine != here.machine and keep(key, other)

        trained = {LEARNED: train(records, isa, seed, keep=keep)}
        if len({other.machine for other in records.places()}) > 1:
            trained[ELSEWHERE] = train(records, isa, seed, keep=keep_others)
        trees = {model: found for model, found in trained.items() if found is not None}
        models: dict[str, Score] = {
            model: LearnedModel(found, analytic, place).predict for model, found in trees.items()
        }
        models["analytic"] = analytic.predict
        models |= rules_of_thumb.scores(isa)
        scores = {
            model: [score(layer.workload, layer.schedules) for layer in layers]
            for model, score in models.items()
        }
        guided = {
            model: _guided(layers, found, records, isa, place) for model, found in trees.items()
        }
        candidates = sum(layer.candidates(isa) for layer in layers)
        judged.append(Judged(name, place, layers, scores, choices, candidates, guided))
    return judged


def _guided(
    layers: Sequence[Layer],
    trees: Trees,
    records: TuningRecords,
    isa: Machine,
    place: Place,
) -> tuple[int, float]:
    """What a search measures of these layers, and what that loses; see `Judged`."""
    here = TuningRecords(
        None, isa.name, place.threads, machine=place.machine, network=place.network
    )
    for key in machine.figure_keys(isa):
        for known, where, schedule, us in records.rows():
            if known == key and where == place:
                here.remember(key, schedule, us)
    guide, count, taken, best = Guide(trees, here, isa), 0, 0.0, 0.0
    for layer in layers:
        truth = {
            schedule_from_json(schedule): us
            for schedule, us in zip(layer.schedules, layer.microseconds, strict=True)
        }
        times: dict[str, dict[Any, float | None]] = {
            family: {schedule: None for schedule in space if schedule in truth}
            for family, space in spaces(layer.workload, isa).items()
        }
        times = {family: known for family, known in times.items() if known}
        looked = []
        while (schedule := guide.next(layer.workload, times, TRIALS)) is not None:
            times[schedule.kernel][schedule] = truth[schedule]
            looked.append(truth[schedule])
        count += len(looked)
        taken += min(looked)
        best += float(layer.microseconds.min())
    return count, taken / best - 1


if __name__ == "__main__":
    sys.exit(main())
