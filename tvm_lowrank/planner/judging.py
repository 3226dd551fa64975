"""Building plans as libraries and judging those on the evaluation samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tvm_lowrank.build import compile_module, export
from tvm_lowrank.cost import metaschedule
from tvm_lowrank.data import DataSplit
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.metrics import Quality, judge
from tvm_lowrank.passes.count_calls import count_calls
from tvm_lowrank.passes.pipeline import factor
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import verify
from tvm_lowrank.planner.assemble import Assembler
from tvm_lowrank.planner.bench import Bench
from tvm_lowrank.planner.curve import Curve
from tvm_lowrank.planner.survey import Report

# Built networks that may miss the budget before the original is returned.
_BUILDS = 4
# A network that is not faster by this much is not worth its error, unless it keeps fewer weights.
_WORTHWHILE = 0.98


@dataclass
class Judge:
    """Builds libraries, races them, and returns the plan whose library wins within the budget.

    Parameters
    ----------
    assembler : Assembler
    split : DataSplit
    shape : tuple of int
        Of the network's input.
    bench : Bench
        Runs the libraries.
    directory : Path
        Receives the libraries; the winner's becomes ``model.so``.
    metaschedule_folder : Path
        Where MetaSchedule keeps its database.
    report : callable
    """

    assembler: Assembler
    split: DataSplit
    shape: tuple[int, ...]
    bench: Bench
    directory: Path
    metaschedule_folder: Path
    report: Report
    complaints: list[str] = field(default_factory=list)
    plans: dict[Path, Plan] = field(default_factory=dict)
    # Operators that have no kernels, by the library: on a GPU TVM schedules them.
    left: dict[Path, dict[str, int]] = field(default_factory=dict)

    def conclude(self, make_curve: Callable[[], Curve] | None) -> Plan:
        """Build the fastest choice that promises to keep the budget, and judge the library.

        A library that misses the budget on the evaluation samples is followed by the next slower
        one, a few times; then, or when it is not faster, the network is returned
        with no form changed, in the algorithms that are fastest. The same without a curve.
        """
        options, survey = self.assembler.survey.options, self.assembler.survey
        metric, limit = self.assembler.metric, options.max_drop
        slow_plan = self.assembler.plan({}, survey.plain, bounded=False)
        dense_plan = slow_plan if survey.plain is survey.timer else self.assembler.plan({})
        self.bench.prepare()  # from here on, no kernel is timed for a while
        original_path = self._build(slow_plan, self.directory / "original.so")
        dense_path = original_path
        if dense_plan.schedules != slow_plan.schedules:
            dense_path = self._build(dense_plan, self.directory / "dense.so")
        original, labels = self._outputs(original_path), self.split.final.labels
        before = judge(original, original, labels, metric)
        reason = "no layer has a faster candidate"
        tried: tuple[dict[str, Any], ...] = ()
        if options.lossless:
            reason = "only the dense form is allowed"
        # With no form changed: judged once, at first if kernels round.
        alone: Quality | None = None
        if not self.bench.predicted and (rounding := dense_plan.rounding()):
            alone = judge(self._outputs(dense_path), original, labels, metric)
            if alone.drop > limit:
                reason = (
                    f"{metric.name} falls by {alone.drop:.2f}, more than {limit}, by the rounding "
                    f"of {' and '.join(rounding)} kernels alone"
                )
                self.complaints.append(f"{reason}; leave them out of the algorithms")
                make_curve = None
                dense_plan = self.assembler.plan({}, survey.unrounded)
                dense_path = self._build(dense_plan, self.directory / "unrounded.so")
                alone = None
        if make_curve is not None:
            curve = make_curve()
            point = curve.search()
            reason = f"no choice keeps {metric.name} within {limit} on the selection samples"
            for attempt in range(_BUILDS):
                if point is None:
                    break
                self.report("building and judging", attempt, _BUILDS)
                plan = self.assembler.plan(point.choice)
                built = self._build(plan, self.directory / f"attempt{attempt}.so")
                after = judge(self._outputs(built), original, labels, metric)
                if after.drop > limit:
                    reason = (
                        f"{metric.name} falls by {after.drop:.2f}, more than {limit}, "
                        "on the evaluation samples"
                    )
                    point = curve.step_back(point)
                    continue
                smaller = any(FORMS[layer.form].keeps_memory for layer in plan.rewritten)
                most = 1.0 if smaller else _WORTHWHILE
                slow, dense, fast = self._contest(most, original_path, dense_path, built)
                if fast.median_ms > most * dense.median_ms:
                    reason = (
                        f"the transformed network takes {fast.median_ms:.3f} ms, with no form "
                        f"changed it takes {dense.median_ms:.3f} ms"
                    )
                    break
                self.report("building and judging", _BUILDS, _BUILDS)
                plan = replace(plan, curve=curve.to_json())
                return self._finish(plan, built, before, after, slow, fast)
            tried = curve.to_json()
        slow, fast = self._contest(1.0, original_path, dense_path)
        if alone is None:
            outputs = original if dense_path == original_path else self._outputs(dense_path)
            alone = judge(outputs, original, labels, metric)
        final_path, after = dense_path, alone
        if self._fits(slow_plan):
            if fast.median_ms > slow.median_ms or alone.drop > limit:
                final_path, after, fast = original_path, before, slow
        elif alone.drop > limit:
            # Both are bounded: direct kernels again, fewer bytes than those that are the fastest.
            final_path = self._build(
                self.assembler.plan({}, survey.plain), self.directory / "smaller.so"
            )
            after = judge(self._outputs(final_path), original, labels, metric)
            slow, fast = self._race(original_path, final_path)
        plan = replace(self.plans[final_path], transformed=False, reason=reason, curve=tried)
        return self._finish(plan, final_path, before, after, slow, fast)

    def _fits(self, plan: Plan) -> bool:
        most = self.assembler.survey.options.max_weight_bytes
        return most is None or plan.kernel_weight_bytes <= most

    def _build(self, plan: Plan, path: Path) -> Path:
        target, options = self.assembler.survey.timer.target, self.assembler.survey.options
        mod = plan.lower(factor(self.assembler.normalised, plan.chains()))
        if target.kind.name == "llvm":
            self.left[path] = dict(count_calls(mod).others)
        if options.metaschedule_trials:
            folder = self.metaschedule_folder
            mod = metaschedule.prepare(mod, target)
            tuned = metaschedule.tune(
                mod, target, folder, options.metaschedule_trials, options.seed
            )
            self.complaints.append(tuned.complaint())
            mod = metaschedule.apply(mod, target, folder)
        self.plans[path] = plan
        return export(compile_module(mod, target), path)

    def _outputs(self, path: Path) -> np.ndarray:
        return self.bench.outputs(self.plans[path], path, self.split.final.inputs)

    def _race(self, *paths: Path) -> list[verify.Latency]:
        return self.bench.race([(self.plans[path], path) for path in paths])

    def _contest(self, most: float, *paths: Path) -> list[verify.Latency]:
        """A race, and another one if the last takes over ``most`` of the time of the one before it.

        Its kernels were measured faster, and what disturbs a race only makes it slower: the lesser
        median of each counts.
        """
        raced = self._race(*paths)
        *_, before, last = raced
        if self.bench.predicted or last.median_ms <= most * before.median_ms:
            return raced
        again = self._race(*paths)
        return [
            min(pair, key=lambda found: found.median_ms) for pair in zip(raced, again, strict=True)
        ]

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
        result = self._result(before, after, slow, fast, plan)
        return replace(plan, result={**result, "left_to_tvm": self.left.get(built, {})})

    def _result(
        self,
        before: Quality,
        after: Quality,
        slow: verify.Latency,
        fast: verify.Latency,
        plan: Plan,
    ) -> dict[str, Any]:
        built, threads = self.directory / "model.so", self.assembler.threads
        alone = self.bench.one_thread(built) if threads > 1 else fast.median_ms
        layers = self.assembler.survey.layers
        weights = [layer.geometry.weight_count for layer in layers if layer.geometry]
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
            "parallel_efficiency": alone / (threads * fast.median_ms) if alone else None,
            "runs": fast.runs,
            "predicted": self.bench.predicted,
            "batch": self.shape[0],
            "weight_bytes_before": 4 * sum(weights),
            "weight_bytes_after": 4 * sum(kept),
            "kernel_weight_bytes": plan.kernel_weight_bytes,
        }
