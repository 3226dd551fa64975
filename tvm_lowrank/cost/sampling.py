"""Which convolutions, and which kernels of each, a survey measures to train the cost model."""

from __future__ import annotations

import functools
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tvm_lowrank.cost.learned import LearnedModel, analytic_of, train
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.rivals import race
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import LARGE, SMALL, network_size
from tvm_lowrank.records import AGREEMENT
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import refuse, spaces
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# What random shapes are drawn from: those of real networks, and odd ones in between.
_CHANNELS = (3, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
_SIZES = (6, 7, 8, 12, 13, 14, 16, 20, 24, 27, 28, 32, 40, 48, 56, 64, 80, 96, 112, 160, 224)
_KERNELS = ((1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (3, 1), (1, 3), (5, 1), (1, 7), (2, 2))
_BATCHES = (1, 1, 1, 1, 2, 4, 8, 16)
# First layers of networks: filters with their strides.
_FIRST = ((3, 1), (3, 2), (5, 1), (7, 2), (9, 1), (11, 4))
_IMAGES = (96, 112, 128, 160, 192, 224, 256)
# Taps of filters over signals, which have one column, and how long those are.
_TAPS = (4, 9, 16, 25, 32, 64, 128)
_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Fully connected layers: how many samples, and the side of the map that they flatten.
_SAMPLES = (1, 1, 1, 2, 4, 8, 16, 32, 64, 128)
_FLATTENED = (1, 1, 4, 6, 7)
# So many ordinary layers are drawn for one of each other kind.
_INNER = 5
# Above this a candidate takes too long to measure, and below it only the launch counts.
_MOST = 1 << 31
_LEAST = 1 << 17
# Workloads between two reports of progress, whose kernels several devices share.
_BATCH = 8
# What takes so much longer than the model expects was perhaps disturbed when it was measured.
_SUSPECT = 1.15
# Races of the same schedules at most, where they and the times one by one disagree.
_RACES = 3


def algorithm_class(schedule: dict[str, Any]) -> str:
    """What is chosen among before any schedule: the kernel family and the tile of a transform.

    ``schedule`` is given as JSON values; for example ``"direct"``, ``"winograd 4x4"``.
    """
    tile = schedule.get("tile")
    return schedule["kernel"] + (f" {tile[0]}x{tile[1]}" if isinstance(tile, list) else "")


@functools.lru_cache(maxsize=4096)
def candidates(
    workload: ConvWorkload, isa: Machine, each: int, seed: int, algorithms: tuple[str, ...]
) -> tuple[Any, ...]:
    """Schedules of every algorithm class: the first of each, and one at random among the rest.

    ``each`` is their number a class; spaces of fewer are taken whole.
    """
    classes: dict[str, list[Any]] = {}
    for space in spaces(workload, isa, algorithms).values():
        for schedule in space:
            classes.setdefault(algorithm_class(schedule.to_json()), []).append(schedule)
    rng = random.Random(zlib.crc32(workload.key().encode()) + seed)
    chosen = []
    for members in classes.values():
        first, rest = members[: max(1, each - 1)], members[max(1, each - 1) :]
        chosen += first + (rng.sample(rest, 1) if rest and each > 1 else [])
    return tuple(chosen)


def recorded_layers(files: Iterable[Path]) -> dict[ConvGeometry, set[str]]:
    """The convolutions in files of records, each with the names of the files: the networks."""
    found: dict[ConvGeometry, set[str]] = {}
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            workload = json.loads(line)["workload"]
            if workload.startswith('{"epilogue"'):  # not a chain, nor a copy
                geometry = ConvGeometry.from_json(json.loads(workload)["geometry"])
                found.setdefault(geometry, set()).add(path.stem)
    return found


def recorded_by_size(files: Iterable[Path]) -> dict[int, list[ConvGeometry]]:
    """The layers in files of records, by the size of network that they are in; see `place`.

    The convolutions of one sample make a network; those of other batches go with them. What takes
    too long to survey is left out, such as fully connected layers of large batches.
    """
    networks: dict[str, list[ConvGeometry]] = {}
    for layer, names in recorded_layers(files).items():
        for name in names:
            networks.setdefault(name, []).append(layer)
    found: dict[int, dict[ConvGeometry, None]] = {SMALL: {}, LARGE: {}}
    for layers in networks.values():
        size = network_size(layer for layer in layers if layer.batch == 1)
        found[size] |= {layer: None for layer in layers if layer.multiplications <= _MOST}
    return {size: [*layers] for size, layers in found.items()}


def random_layers(count: int, seed: int) -> list[ConvGeometry]:
    """Convolutions drawn at random, most of them as networks have them.

    Now and then one is a network's first layer, one runs over a signal, one is fully connected.
    """
    rng = random.Random(seed)
    kinds = [_inner_layer] * _INNER + [_first_layer, _signal_layer, _fully_connected]
    found: dict[ConvGeometry, None] = {}
    while len(found) < count:
        geometry = kinds[len(found) % len(kinds)](rng)
        if _LEAST <= geometry.multiplications <= _MOST:
            found[geometry] = None
    return list(found)


def _inner_layer(rng: random.Random) -> ConvGeometry:
    kernel, size = rng.choice(_KERNELS), rng.choice(_SIZES)
    inputs, outputs, groups = rng.choice(_CHANNELS), rng.choice(_CHANNELS[1:]), 1
    if inputs == outputs and kernel != (1, 1) and rng.random() < 0.5:
        groups = inputs
    stride, batch = rng.choice((1, 1, 1, 2)), rng.choice(_BATCHES)
    columns = max(kernel[1], size + rng.choice((0, 0, 0, -1, 3)))
    strides, padding = (stride, stride), (kernel[0] // 2, kernel[1] // 2)
    return ConvGeometry(
        inputs, outputs, size, columns, kernel, strides, padding * 2, groups=groups, batch=batch
    )


def _first_layer(rng: random.Random) -> ConvGeometry:
    taps, stride = rng.choice(_FIRST)
    inputs, outputs, size = rng.choice((1, 3, 3)), rng.choice((16, 32, 64, 96)), rng.choice(_IMAGES)
    strides, padding = (stride, stride), (taps // 2,) * 4
    return ConvGeometry(inputs, outputs, size, size, (taps, taps), strides, padding)


def _signal_layer(rng: random.Random) -> ConvGeometry:
    taps, length, stride = rng.choice(_TAPS), rng.choice(_LENGTHS), rng.choice((1, 1, 2, 4))
    inputs, outputs = rng.choice((1, *_CHANNELS[1:12])), rng.choice(_CHANNELS[1:12])
    padding = (taps // 2, 0, taps // 2, 0)
    return ConvGeometry(inputs, outputs, length, 1, (taps, 1), (stride, 1), padding)


def _fully_connected(rng: random.Random) -> ConvGeometry:
    side, inputs, outputs = rng.choice(_FLATTENED), rng.choice(_CHANNELS), rng.choice(_CHANNELS[1:])
    batch = rng.choice(_SAMPLES)
    return ConvGeometry(inputs, 4 * outputs, side, side, (side, side), batch=batch)


def form_stages(
    layers: Sequence[ConvGeometry], count: int, lanes: int, seed: int
) -> list[tuple[ConvGeometry, bool]]:
    """Stages of forms of these layers at random ranks, and whether each is the last of its form."""
    rng = random.Random(seed)
    found: dict[tuple[ConvGeometry, bool], None] = {}
    names = list(FORMS)
    for _ in range(20 * count):
        if len(found) >= count or not layers:
            break
        layer, form = rng.choice(layers), FORMS[rng.choice(names)]
        if form.refuse(layer) is not None:
            continue
        ranks = form.ranks(layer, lanes)
        if ranks:
            stages = form.stages(layer, rng.choice(ranks))
            index = rng.randrange(len(stages))
            found[stages[index], index == len(stages) - 1] = None
    return list(found)


def look_again(
    timer: KernelTimer,
    measured: Mapping[ConvWorkload, Sequence[Any]],
    seed: int,
    report: Callable[[str, int, int], None],
) -> None:
    """Measure again, once, what took much longer than the model expects of all the others.

    A machine that others share is slow for seconds at a time, so that repeated runs agree; only
    another time tells. What was measured twice already is left alone.

    Parameters
    ----------
    timer : KernelTimer
    measured : dict
        Workloads with the schedules to look at; those that are on no record are passed over.
    seed : int
        Of the model, which is trained on all records of the timer.
    report : callable
        Told "a second look", what is done and all.
    """
    trees = train(timer.records, timer.isa, seed)
    if trees is None:
        return
    place = timer.records.here
    analytic = analytic_of(timer.records, timer.isa, place)
    model, suspects = LearnedModel(trees, analytic, place), []
    for workload, schedules in measured.items():
        pairs = [(s, s.to_json()) for s in schedules]
        known = [(s, data, timer.records.time(workload.key(), data)) for s, data in pairs]
        ran = [(s, data, us) for s, data, us in known if us is not None and us < math.inf]
        if not ran:
            continue
        expected = model.predict(workload, [data for _, data, _ in ran])
        suspects += [
            (workload, schedule)
            for (schedule, data, us), guess in zip(ran, expected, strict=True)
            if us > _SUSPECT * guess and timer.records.looks(workload.key(), data) == 1
        ]
    for start in range(0, len(suspects), _BATCH):
        timer.again(suspects[start : start + _BATCH])
        report("a second look", min(start + _BATCH, len(suspects)), len(suspects))


def best_of_each(schedules: Sequence[dict[str, Any]], times: Sequence[float]) -> dict[str, int]:
    """Of each algorithm, which schedule takes the least time."""
    best: dict[str, int] = {}
    for index in sorted(range(len(times)), key=times.__getitem__):
        best.setdefault(algorithm_class(schedules[index]), index)
    return best


def settle(
    timer: KernelTimer,
    measured: Mapping[ConvWorkload, Sequence[Any]],
    report: Callable[[str, int, int], None],
) -> None:
    """Run the best schedule of each algorithm of a convolution in turns: which one is the best?

    Where they have not, and only while the machine is calm: what is left then is for another run.
    A race that tells something else than the times one by one is run again after all others,
    `_RACES` times at most. Servers and GPUs are passed over. ``report`` is told "in turns", what is
    done and all.
    """
    for count in range(_RACES if timer.asker.takes_turns else 0):
        contests = []
        for workload, schedules in measured.items():
            data = [schedule.to_json() for schedule in schedules]
            known = [timer.records.time(workload.key(), each) for each in data]
            times = [math.inf if us is None else us for us in known]
            best = [i for i in best_of_each(data, times).values() if times[i] < math.inf]
            rivals, alone = [data[i] for i in best], [times[i] for i in best]
            if len(best) > 1 and len(timer.records.race_by_race(workload.key(), rivals)) == count:
                raced = timer.records.race(workload.key(), rivals)
                if raced is None or _is_disputed(alone, raced):
                    contests.append((workload, [schedules[i] for i in best], alone))
        for index, contest in enumerate(contests):
            race(timer, *contest, calm=True)
            report("in turns", index + 1, len(contests))


def _is_disputed(alone: Sequence[float], raced: Sequence[float]) -> bool:
    """Whether what one way of measuring puts near the best is elsewhere by the other."""
    for pair in zip(alone, raced, strict=True):
        low, high = sorted(us / min(times) for us, times in zip(pair, (alone, raced), strict=True))
        if low <= 1 + AGREEMENT and high > (1 + AGREEMENT) * low:
            return True
    return False


@dataclass
class Survey:
    """Workloads to measure, by where they come from, and how far the records cover them.

    Parameters
    ----------
    timer : KernelTimer
    layers : list of ConvGeometry
        Of networks.
    shapes : int
        Workloads in all: the layers first, then as many stages of their forms as random shapes.
    each : int
        Schedules of an algorithm class to measure.
    seed : int
    """

    timer: KernelTimer
    layers: Sequence[ConvGeometry]
    shapes: int
    each: int = 3
    seed: int = 0
    origins: dict[str, list[ConvWorkload]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shapes < 1:
            raise LowRankError(f"shapes is {self.shapes}; give 1 or more")
        isa = self.timer.isa
        layers = [*dict.fromkeys(self.layers)]
        random.Random(self.seed).shuffle(layers)
        # Convolutions with a choice of algorithm teach most.
        layers.sort(key=lambda g: max(g.kernel) == 1 or g.groups > 1 or max(g.stride) > 1)
        known = layers[: self.shapes]
        rest = self.shapes - len(known)
        stages = form_stages(known, (rest + 1) // 2, isa.lanes, self.seed)
        drawn = random_layers(rest - len(stages), self.seed)
        self.origins = {
            "layers of networks": [self._workload(g) for g in known],
            "stages of forms": [self._workload(g, last) for g, last in stages],
            "random shapes": [self._workload(g) for g in drawn],
        }
        for name, workloads in self.origins.items():
            algorithms = self.timer.usable.algorithms
            kept = [w for w in dict.fromkeys(workloads) if not refuse(w, isa, algorithms)]
            self.origins[name] = kept

    def _workload(self, geometry: ConvGeometry, last: bool = True) -> ConvWorkload:
        found = self.timer.workloads([geometry])[0]
        return found if last else ConvWorkload(geometry, found.in_block)

    def run(self, report: Callable[[str, int, int], None]) -> None:
        """Measure what the records lack; ``report`` is told the origin, what is done and all."""
        self.timer.roofline()
        for name, workloads in self.origins.items():
            for start in range(0, len(workloads), _BATCH):
                batch = workloads[start : start + _BATCH]
                pairs = [(w, schedule) for w in batch for schedule in self._candidates(w)]
                self.timer.time_all(pairs)
                report(name, min(start + _BATCH, len(workloads)), len(workloads))

    def look_again(self, report: Callable[[str, int, int], None]) -> None:
        """Measure again, once, what took much longer than expected; see `look_again`."""
        workloads = [w for workloads in self.origins.values() for w in workloads]
        look_again(self.timer, {w: self._candidates(w) for w in workloads}, self.seed, report)

    def settle(self, report: Callable[[str, int, int], None]) -> None:
        """Run the best schedule of each algorithm of networks' layers in turns; see `settle`."""
        layers = self.origins["layers of networks"]
        settle(self.timer, {w: self._candidates(w) for w in layers}, report)

    def _candidates(self, workload: ConvWorkload) -> tuple[Any, ...]:
        algorithms = self.timer.usable.algorithms
        return candidates(workload, self.timer.isa, self.each, self.seed, algorithms)

    def table(self) -> Table:
        """Coverage: of each origin the workloads measured whole, and the records by class."""
        made = Table("shapes from", "measured", "kernels on record", title="coverage")
        for name, workloads in self.origins.items():
            done, counts = 0, Counter[str]()
            for workload in workloads:
                wanted = [(s, s.to_json()) for s in self._candidates(workload)]
                key, records = workload.key(), self.timer.records
                known = [data for _, data in wanted if records.time(key, data) is not None]
                done += len(known) == len(wanted)
                counts.update(algorithm_class(data) for data in known)
            classes = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            made.add_row(name, f"{done} of {len(workloads)}", classes or "none")
        return made
