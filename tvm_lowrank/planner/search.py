"""The search: from a network and data to a plan whose library was built, timed and judged."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost import metaschedule
from tvm_lowrank.cost.chains import choose_chains
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.data import DataSplit, Samples, input_shape, split
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.metrics import Quality, check_resolution, judge
from tvm_lowrank.passes.lower_convolutions import survey
from tvm_lowrank.passes.pipeline import factor, normalise
from tvm_lowrank.plan import LayerPlan, Plan
from tvm_lowrank.planner import verify
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.candidates import Candidate, confirm, propose
from tvm_lowrank.planner.curve import Curve, Report
from tvm_lowrank.planner.memory import Option, within_bytes
from tvm_lowrank.planner.trial import TrialNetwork
from tvm_lowrank.records import TuningRecords, shipped_records
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.kernels import ALGORITHMS, algorithm_of, weight_bytes
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.target import parse_target, require_runnable
from tvm_lowrank.threads import set_threads

# Workloads and their schedules, both as JSON values.
Schedules = tuple[tuple[dict[str, Any], dict[str, Any]], ...]
# Built networks that may miss the budget before the original is returned.
_BUILDS = 4
# A network that is not faster by this much is not worth its error.
_WORTHWHILE = 0.98


def _silent(_stage: str, _done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """What a search may do; see `tvm_lowrank.plan` for the meaning of each."""

    max_drop: float = 1.0
    forms: tuple[str, ...] = ("dense", *FORMS)
    algorithms: tuple[str, ...] = ALGORITHMS
    exclude: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0
    trials: int = 4
    shipped_records: bool = True
    metaschedule_trials: int = 0
    exact: bool = False
    max_weight_bytes: int | None = None

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("forms", self.forms, ("dense", *FORMS)),
            ("algorithms", self.algorithms, ALGORITHMS),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise LowRankError(f"{kind}={list(given)}: choose among {', '.join(known)}")
        if not self.max_drop >= 0:
            raise LowRankError(f"max_drop is {self.max_drop}; give points, 0 or more")
        if self.trials < 1:
            raise LowRankError(f"trials is {self.trials}; give 1 or more")
        if self.max_weight_bytes is not None and self.max_weight_bytes < 1:
            raise LowRankError(f"max_weight_bytes is {self.max_weight_bytes}; give 1 or more")
        if self.metaschedule_trials < 0:
            raise LowRankError(f"metaschedule_trials is {self.metaschedule_trials}; give 0 or more")


def search(
    mod: tvm.IRModule,
    target: Any = None,
    data: Samples | None = None,
    final: Samples | None = None,
    options: Options | None = None,
    records: Path | None = None,
    directory: Path | None = None,
    report: Report = _silent,
) -> Plan:
    """Plan, build and judge; ``directory``, if given, receives ``model.so``.

    See `tvm_lowrank.plan` for the parameters and errors.
    """
    options = options or Options()
    if directory is not None:
        return _Search(mod, target, data, final, options, records, directory, report).run()
    with tempfile.TemporaryDirectory(prefix="tvm_lowrank-") as scratch:
        return _Search(mod, target, data, final, options, records, Path(scratch), report).run()


@dataclass
class _Search:
    mod: tvm.IRModule
    target_spec: Any
    data: Samples | None
    final: Samples | None
    options: Options
    records_path: Path | None
    directory: Path
    report: Report
    reasons: dict[str, str] = field(default_factory=dict)
    dense: dict[str, Candidate] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def run(self) -> Plan:
        self.target = parse_target(self.target_spec)
        require_runnable(self.target)
        self.split: DataSplit = split(self.mod, self.data, self.final, self.options.seed)
        self.metric = "output_error" if self.split.synthetic else "disagreement"
        if self.split.final.labels is not None and self.split.select.labels is not None:
            self.metric = "top1"
        self.threads = set_threads(self.options.threads)
        self.shape = input_shape(self.mod)
        records = self._records()
        if self.options.forms != ("dense",):
            check_resolution(self.metric, self.options.max_drop, len(self.split.final))
        self.timer = self._timer(records, self.options.algorithms)
        # What "before" means everywhere: the network as it is, in tuned direct kernels.
        self.plain = self.timer
        if self.options.algorithms != ("direct",) or self.options.max_weight_bytes is not None:
            self.plain = self._timer(records, ("direct",))
        self.normalised = normalise(self.mod)
        self.layers = collect_layers(self.normalised)
        self._measure_dense()
        candidates = self._candidates()
        plan = self._conclude(candidates)
        complaints = dict.fromkeys(
            (self.timer.complaint(), self.plain.complaint(), *self.complaints)
        )
        for complaint in filter(None, complaints):
            warnings.warn(complaint, stacklevel=4)
        return plan

    def _records(self) -> TuningRecords:
        isa = isa_of(self.target).name
        return TuningRecords(
            self.records_path,
            isa,
            self.threads,
            mcpu=str(self.target.attrs.get("mcpu", "")) if self.target.attrs else "",
            shipped=shipped_records(isa) if self.options.shipped_records else (),
        )

    def _timer(self, records: TuningRecords, algorithms: tuple[str, ...]) -> KernelTimer:
        options = self.options
        return KernelTimer(
            self.target, records, options.trials, algorithms, options.seed, options.exact
        )

    # -- the candidates of each layer ----------------------------------------------------------

    def _measure_dense(self) -> None:
        """Time every layer as it is; without other forms, only what no record covers."""
        lossless = self.options.forms == ("dense",)
        if not lossless:
            self.roofline = self.plain.roofline()
        for done, layer in enumerate(self.layers):
            reason, geometry = layer.reason, layer.geometry
            if reason is None and geometry is not None:
                reason = self.timer.refuse([geometry])
            if reason:
                self.reasons[layer.name] = reason
            elif geometry is not None:
                self.dense[layer.name] = self._dense(layer, geometry, lossless)
            self.report("measuring dense layers", done + 1, len(self.layers))

    def _dense(self, layer: ConvLayer, geometry: ConvGeometry, lossless: bool) -> Candidate:
        stages = (geometry,)
        # Nothing is to be compared, so what other machines found best needs no time here.
        bounded = self.options.max_weight_bytes is not None
        covered = lossless and not bounded
        covered = covered and all(map(self.timer.known, self.timer.workloads(stages)))
        measure = KernelTimer.recorded if covered else KernelTimer.chain
        before, us = measure(self.plain, stages), measure(self.timer, stages)
        if before is not None:
            self.before[layer.name] = before
        predicted = math.nan
        if not lossless:
            predicted = self.roofline.microseconds(stages, self.timer.isa.lanes)
        if us == math.inf:
            raise LowRankError(
                f"no kernel for {layer.name} ({geometry}) runs on this machine; name a target that "
                f"it can run with --target, not {self.target}"
            )
        return Candidate(
            "dense",
            0,
            stages,
            (layer.weight,),
            layer.bias,
            0.0,
            predicted,
            math.nan if us is None else us,
        )

    def _eligible(self) -> list[ConvLayer]:
        lossy = [name for name in self.options.forms if name != "dense"]
        eligible = []
        for layer in self.layers:
            if layer.geometry is None:
                continue
            if any(fnmatchcase(layer.name, pattern) for pattern in self.options.exclude):
                self.reasons[layer.name] = "excluded"
                continue
            refusals = {FORMS[name].refuse(layer.geometry) for name in lossy}
            if None in refusals and layer.name in self.dense:
                eligible.append(layer)
            elif layer.name in self.dense or refusals - {None}:
                texts = sorted(text for text in refusals if text)
                self.reasons[layer.name] = "; ".join(texts) or "only the dense form is allowed"
        return eligible

    def _candidates(self) -> dict[str, list[Candidate]]:
        """For each layer that could gain, the dense form and what is measured faster."""
        forms = [name for name in self.options.forms if name != "dense"]
        eligible = self._eligible()
        if not eligible:
            return {}
        self.observer = TrialNetwork(self.normalised, self.layers, self.timer, expose=True)
        total = len(self.split.fit)
        moments = input_moments(
            self.observer,
            eligible,
            self.split.fit.inputs,
            self.options.seed,
            lambda done: self.report("calibrating", done, total),
        )
        options: dict[str, list[Candidate]] = {}
        for done, layer in enumerate(eligible):
            dense = self.dense[layer.name]
            proposed, reason = propose(
                layer, moments.pop(layer.name), forms, self.roofline, self.timer
            )
            faster = confirm(proposed, dense, self.timer)
            if faster:
                options[layer.name] = [*faster, dense]
            else:
                self.reasons[layer.name] = reason or "no candidate measured faster"
            self.report("fitting and measuring forms", done + 1, len(eligible))
        return options

    # -- the network ---------------------------------------------------------------------------

    def _conclude(self, candidates: dict[str, list[Candidate]]) -> Plan:
        """Build the fastest choice that promises to keep the budget, and judge the library.

        A library that misses the budget on the evaluation samples is followed by one with three
        quarters of its gain, a few times; then, or when it is not faster, the network is returned
        with no form changed, in the algorithms that are fastest.
        """
        final, limit = self.split.final, self.options.max_drop
        slow_plan = self._plan({}, self.plain)
        dense_plan = slow_plan if self.plain is self.timer else self._plan({})
        original_path = self._build(slow_plan, self.directory / "original.so")
        dense_path = original_path
        if dense_plan.schedules != slow_plan.schedules:
            dense_path = self._build(dense_plan, self.directory / "dense.so")
        original = self._outputs(original_path)
        before = judge(original, original, final.labels, self.metric)
        reason = "no layer has a faster candidate"
        if self.options.forms == ("dense",):
            reason = "only the dense form is allowed"
        if candidates:
            curve = self._curve(candidates)
            point = curve.search()
            reason = f"no choice keeps {self.metric} within {limit} on the selection samples"
            for attempt in range(_BUILDS):
                if point is None:
                    break
                self.report("building and judging", attempt, _BUILDS)
                plan = self._plan(point.choice)
                built = self._build(plan, self.directory / f"attempt{attempt}.so")
                after = judge(self._outputs(built), original, final.labels, self.metric)
                if after.drop > limit:
                    reason = (
                        f"{self.metric} falls by {after.drop:.2f}, more than {limit}, "
                        "on the evaluation samples"
                    )
                    point = curve.step_back(point)
                    continue
                slow, dense, fast = self._race(original_path, dense_path, built)
                if fast.median_ms > _WORTHWHILE * dense.median_ms:
                    reason = (
                        f"the transformed network takes {fast.median_ms:.3f} ms, with no form "
                        f"changed it takes {dense.median_ms:.3f} ms"
                    )
                    break
                self.report("building and judging", _BUILDS, _BUILDS)
                return self._finish(plan, built, before, after, slow, fast)
        slow, fast = self._race(original_path, dense_path)
        after = judge(self._outputs(dense_path), original, final.labels, self.metric)
        if fast.median_ms > slow.median_ms or after.drop > limit:
            dense_plan, dense_path, after, fast = slow_plan, original_path, before, slow
        plan = replace(dense_plan, transformed=False, reason=reason)
        return self._finish(plan, dense_path, before, after, slow, fast)

    def _outputs(self, path: Path) -> np.ndarray:
        network = verify.load(path, self.threads)
        return verify.run_all(network, self.split.final.inputs, self.shape[0])

    def _race(self, *paths: Path) -> list[verify.Latency]:
        """Latency of each library, in turns; of one that is listed twice, once."""
        distinct = list(dict.fromkeys(paths))
        latencies = verify.take_turns(distinct, self.shape, self.threads)
        return [latencies[distinct.index(path)] for path in paths]

    def _finish(
        self,
        plan: Plan,
        built: Path,
        before: Quality,
        after: Quality,
        slow: verify.Latency,
        fast: verify.Latency,
    ) -> Plan:
        """The plan with its figures; its library becomes ``model.so``."""
        built.rename(self.directory / "model.so")
        return replace(plan, result=self._result(before, after, slow, fast, plan))

    def _curve(self, candidates: dict[str, list[Candidate]]) -> Curve:
        return Curve(
            TrialNetwork(self.normalised, self.layers, self.timer),
            self.observer,
            candidates,
            self.split,
            self.metric,
            self.options.max_drop,
            self.options.seed,
            self.report,
        )

    # -- making values ---------------------------------------------------------------------------

    def _plan(self, choice: Choice, timer: KernelTimer | None = None) -> Plan:
        """The plan of a choice, with schedules by ``timer`` for every kernel of the network."""
        timer = timer or self.timer
        layers, factors = [], {}
        for layer in self.layers:
            dense = self.dense.get(layer.name)
            taken = choice.get(layer.name, dense)
            reason = self.reasons.get(layer.name)
            if taken is None or dense is None or taken.form == "dense":
                if reason is None and choice:
                    reason = "its error would cost more accuracy than its time is worth"
                stages = (layer.geometry,) if layer.geometry is not None else ()
                us = dense.measured_us if dense else None
                before = self.before.get(layer.name)
                layers.append(
                    LayerPlan(
                        layer.name,
                        layer.geometry,
                        stages=stages,
                        dense_us=before,
                        predicted_us=_known(dense.predicted_us if dense else None),
                        measured_us=before if timer is self.plain else _known(us),
                        reason=reason,
                    )
                )
                continue
            factors[layer.name] = (taken.factors, taken.bias.astype(np.float32))
            layers.append(
                LayerPlan(
                    layer.name,
                    layer.geometry,
                    taken.form,
                    taken.rank,
                    taken.stages,
                    error=taken.error,
                    dense_us=self.before.get(layer.name),
                    predicted_us=taken.predicted_us,
                    measured_us=taken.measured_us,
                )
            )
        plan = Plan(
            target=_target_json(self.target),
            threads=self.threads,
            seed=self.options.seed,
            max_drop=self.options.max_drop,
            metric=self.metric,
            layers=tuple(layers),
            factors=factors,
        )
        factored = factor(self.normalised, plan.chains())
        plan = replace(plan, schedules=self._schedules(factored, plan, timer))
        found = choose_chains(factored, plan.scheduler(), timer, self.options.trials)
        plan = replace(plan, fused=_as_json(found))
        return replace(plan, layers=tuple(self._describe(layer, plan, timer) for layer in layers))

    def _describe(self, layer: LayerPlan, plan: Plan, timer: KernelTimer) -> LayerPlan:
        """The layer with what the plan's schedules make of it."""
        if layer.name not in self.dense:
            return layer
        workloads = timer.workloads(layer.stages)
        schedules = [plan.scheduler()(workload) for workload in workloads]
        pairs = list(zip(workloads, schedules, strict=True))
        times = [timer.time_of(workload, schedule) for workload, schedule in pairs]
        return replace(
            layer,
            algorithms=tuple(map(algorithm_of, schedules)),
            weight_bytes=sum(weight_bytes(w, s, timer.isa) for w, s in pairs),
            measured_us=layer.measured_us if None in times else sum(filter(None, times)),
        )

    def _schedules(self, factored: tvm.IRModule, plan: Plan, timer: KernelTimer) -> Schedules:
        """Best schedule of every workload of the lowered network, measured where none is known."""
        workloads = survey(factored, timer.isa, plan.scheduler())
        for workload in workloads:
            if timer.known(workload) is None:
                timer.microseconds(workload)
        chosen = {workload: timer.choose(workload) for workload in workloads}
        if self.options.max_weight_bytes is not None and timer is self.timer:
            chosen = self._bounded(Counter(workloads), self.options.max_weight_bytes)
        return _as_json(chosen)

    def _bounded(self, calls: Counter[ConvWorkload], limit: int) -> dict[ConvWorkload, Any]:
        """The fastest schedules whose weights take at most ``limit`` bytes in all kernels."""
        # Kernels that differ in their epilogue only share a schedule.
        kinds: dict[Any, list[ConvWorkload]] = {}
        for workload in calls:
            kinds.setdefault((workload.geometry, workload.in_block), []).append(workload)
        options = []
        for same in kinds.values():
            count, first = sum(calls[workload] for workload in same), same[0]
            options.append(
                [
                    Option(
                        count * us, count * weight_bytes(first, schedule, self.timer.isa), schedule
                    )
                    for us, schedule in self.timer.measured_schedules(first)
                ]
            )
        found = within_bytes(options, limit)
        total = sum(option.bytes for option in found)
        if total > limit:
            raise LowRankError(
                f"max_weight_bytes is {limit}, but the weights of this network take at least "
                f"{total} bytes in the kernels measured; give that much or leave it out"
            )
        return {
            workload: option.schedule
            for same, option in zip(kinds.values(), found, strict=True)
            for workload in same
        }

    def _build(self, plan: Plan, path: Path) -> Path:
        trials = self.options.metaschedule_trials
        mod = plan.lower(factor(self.normalised, plan.chains()))
        if trials:
            folder = (self.records_path or path).parent / "metaschedule"
            mod = metaschedule.prepare(mod, self.target)
            tuned = metaschedule.tune(mod, self.target, folder, trials, self.options.seed)
            self.complaints.append(tuned.complaint())
            mod = metaschedule.apply(mod, self.target, folder)
        return export(compile_module(mod, self.target), path)

    def _result(
        self,
        before: Quality,
        after: Quality,
        slow: verify.Latency,
        fast: verify.Latency,
        plan: Plan,
    ) -> dict[str, Any]:
        built = self.directory / "model.so"
        alone = verify.one_thread(built, self.shape) if self.threads > 1 else fast.median_ms
        weights = [layer.geometry.weight_count for layer in self.layers if layer.geometry]
        kept = [sum(stage.weight_count for stage in layer.stages) for layer in plan.layers]
        return {
            "samples": after.samples,
            "synthetic_data": self.split.synthetic,
            "accuracy_before": before.accuracy,
            "accuracy_after": after.accuracy,
            "drop": after.drop,
            "drop_interval": None if after.interval is None else list(after.interval),
            "agreement": after.agreement,
            "output_error": after.output_error,
            "latency_before_ms": slow.median_ms,
            "latency_after_ms": fast.median_ms,
            "speedup": slow.median_ms / fast.median_ms,
            "latency_one_thread_ms": alone,
            "parallel_efficiency": alone / (self.threads * fast.median_ms) if alone else None,
            "runs": fast.runs,
            "batch": self.shape[0],
            "weight_bytes_before": 4 * sum(weights),
            "weight_bytes_after": 4 * sum(kept),
            "kernel_weight_bytes": sum(layer.weight_bytes or 0 for layer in plan.layers),
        }


def _known(us: float | None) -> float | None:
    """A time for the plan: none instead of NaN."""
    return None if us is None or math.isnan(us) else us


def _as_json(chosen: Mapping[Any, Any]) -> Schedules:
    """Workloads with their schedules as a plan keeps them, in a fixed order."""
    pairs = sorted(chosen.items(), key=lambda pair: pair[0].key())
    return tuple((workload.to_json(), schedule.to_json()) for workload, schedule in pairs)


def _target_json(target: tvm.target.Target) -> dict[str, Any]:
    return dict(json.loads(str(target)))
