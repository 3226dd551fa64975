"""Times by a model of the target where it cannot be measured: no GPU here, no tracker with one."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tvm

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cuda import gpu_name
from tvm_lowrank.place import SMALL
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.kernels import Schedule, predict, schedule_from_json
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.shipped import shipped_records
from tvm_lowrank.target import is_measurable

# Share of its peak that a card's best kernels reach, for the roofline that proposes forms.
_REACHED = 0.6
# Imported times from which on predictions are scaled to the card that they come from.
_LEAST_TIMES = 8
# The place of predictions where no card was ever measured.
NO_CARD = "no card"


def records_for(
    path: Path | None,
    target: tvm.target.Target,
    threads: int,
    shipped: bool,
    fleet: Fleet | None = None,
    network: int = SMALL,
) -> TuningRecords:
    """The records of a target, for the place whose times this machine can use.

    Parameters
    ----------
    path : Path, optional
        The file to read, and to append to.
    target : tvm.target.Target
    threads : int
        Threads of the runtime; kernels of a GPU do not depend on them and count as of one.
    shipped : bool
        Also read the records that are installed with the package.
    fleet : Fleet, optional
        Devices that measure instead of this machine.
    network : int
        MiB of weights, as `place.network_size` gives it. By RPC and on GPUs there is one size only.

    Returns
    -------
    TuningRecords
        Of this machine's processor or GPU; without a GPU, of the card that most times in ``path``
        were imported from, or else of the one that most shipped ones are of.
    """
    name = machine_of(target).name
    more: dict[str, Any] = {"shipped": shipped_records(name) if shipped else ()}
    if target.kind.name != "cuda":
        mcpu = str(target.attrs.get("mcpu", "")) if target.attrs else ""
        if fleet is not None:
            return TuningRecords(path, name, fleet.threads, mcpu, fleet.machine, **more)
        return TuningRecords(path, name, threads, mcpu=mcpu, network=network, **more)
    if fleet is not None:
        return TuningRecords(path, name, 1, machine=fleet.machine, **more)
    if is_measurable(target):
        return TuningRecords(path, name, 1, machine=gpu_name(), **more)
    known = TuningRecords(path, name, 1, machine=NO_CARD, **more)
    cards = Counter((not place.shipped, place.machine) for _, place, _, _ in known.rows())
    # Imported ones before shipped ones, then the most.
    _, card = max(cards, key=lambda each: (each[0], cards[each]), default=(True, NO_CARD))
    known.machine = card
    return known


class PredictingTimer(KernelTimer):
    """A `KernelTimer` that measures nothing.

    A convolution of which the records hold times, imported from a machine with a GPU or shipped,
    has those. Any other has a predicted time, for the schedule that is predicted best, among them
    what records of other cards found best: by the trained cost model of the architecture, or where
    there is none by its family's model; this, where there are enough imported times, of its family
    of kernels or else of all, scaled by their median ratio to the model's. Predictions never get
    into a file.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        records = self.records
        self._asked: set[ConvWorkload] = set()
        for key, place, schedule, us in list(records.rows()):
            known = place.shipped and place.machine == records.machine
            if known and records.time(key, schedule) is None:
                records.remember(key, schedule, us, place)
        # Timers share records, and what another one predicts gets into them later.
        self._measured = {key for key, place, *_ in records.rows() if place == records.here}
        self._scales = self._learnt_scales()

    def time(self, workload: Any, schedule: Any) -> float:
        """Microseconds of one schedule, from the records or predicted."""
        known = self.records.time(workload.key(), schedule.to_json())
        if known is not None:
            return known
        predicted = self._predict(workload, [schedule])[0]
        self.records.remember(workload.key(), schedule.to_json(), predicted)
        return predicted

    def _predict(self, workload: ConvWorkload, schedules: Sequence[Schedule]) -> list[float]:
        """Predicted microseconds of schedules, whatever is on record of them."""
        if self._tuner.trees is not None:
            data = [schedule.to_json() for schedule in schedules]
            return [float(us) for us in self.model.predict(workload, data)]
        found = []
        for schedule in schedules:
            predicted = predict(workload, schedule, self.isa)
            assert predicted is not None
            found.append(predicted * self._scales.get(schedule.kernel, self._scales[""]))
        return found

    def microseconds(self, workload: ConvWorkload, brief: bool = False) -> float:
        """Time of the best schedule on record here, else of the one that is predicted fastest."""
        known = self.usable.best(workload)[1] is not None and workload.key() in self._measured
        if not known and workload not in self._asked:
            self._asked.add(workload)
            for schedule in (self.usable.elsewhere(workload), *self._promising(workload)):
                if schedule is not None:
                    self.time(workload, schedule)
        return self.usable.best(workload)[0]

    def compare(self, workloads: Iterable[ConvWorkload]) -> None:
        """There is nothing to run."""

    def _promising(self, workload: ConvWorkload) -> list[Schedule]:
        """The schedule of each family that is predicted fastest."""
        families = self.usable.spaces(workload).values()
        if self._tuner.trees is None:  # spaces are in the order of the families' own models
            return [space[0] for space in families]
        found = []
        for space in families:
            times = self._predict(workload, space)
            found.append(space[times.index(min(times))])
        return found

    def roofline(self) -> Roofline:
        """The published figures of the architecture's card, as far as kernels reach them."""
        assert isinstance(self.isa, CudaArch)
        return Roofline(self.isa.gflops * _REACHED, self.isa.gigabytes)

    def _learnt_scales(self) -> dict[str, float]:
        """How many times longer than predicted the kernels on record took.

        By family where there are enough of it, and of all under the empty name.
        """
        ratios: dict[str, list[float]] = {"": []}
        for key, place, data, microseconds in self.records.rows():
            if place != self.records.here:
                continue
            try:
                workload, schedule = (
                    ConvWorkload.from_json(json.loads(key)),
                    schedule_from_json(data),
                )
                predicted = predict(workload, schedule, self.isa)
            except (ValueError, KeyError, TypeError):
                continue
            if predicted:
                for name in ("", schedule.kernel):
                    ratios.setdefault(name, []).append(microseconds / predicted)
        enough = {name: each for name, each in ratios.items() if len(each) >= _LEAST_TIMES}
        return {"": 1.0, **{name: statistics.median(each) for name, each in enough.items()}}
