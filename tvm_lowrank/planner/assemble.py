"""From one candidate a layer to a plan with a schedule for every kernel of the network."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm

from tvm_lowrank.cost import layouts
from tvm_lowrank.cost.chains import choose_chains
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.metrics import Metric
from tvm_lowrank.passes.lower import survey
from tvm_lowrank.passes.pipeline import factor
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.memory import Option, within_bytes
from tvm_lowrank.planner.survey import Survey
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.kernels import algorithm_of, weight_bytes
from tvm_lowrank.schedules.x86.workload import ConvWorkload

# Workloads and their schedules, both as JSON values.
Schedules = tuple[tuple[dict[str, Any], dict[str, Any]], ...]


@dataclass(frozen=True)
class Assembler:
    """Makes plans for a normalised network, measuring what no record covers.

    Parameters
    ----------
    normalised : tvm.IRModule
    survey : Survey
        Of its layers, with the dense ones measured.
    threads : int
    metric : Metric
    """

    normalised: tvm.IRModule
    survey: Survey
    threads: int
    metric: Metric

    def plan(self, choice: Choice, timer: KernelTimer | None = None, bounded: bool = True) -> Plan:
        """The plan of a choice, with schedules by ``timer`` for every kernel of the network.

        Layers that the choice leaves out stay dense. What is only compared with need not be
        ``bounded``.

        Raises
        ------
        LowRankError
            ``bounded``, and no choice of schedules keeps ``max_weight_bytes``.
        """
        options, timer = self.survey.options, timer or self.survey.timer
        layers, factors = [], {}
        for layer in self.survey.layers:
            taken = choice.get(layer.name)
            if taken is None or taken.form == "dense":
                refitted = taken is not None and taken.factors[0] is not layer.weight
                layers.append(self._dense(layer, timer, bool(choice), refitted))
                if taken is not None and refitted:
                    factors[layer.name] = (taken.factors, taken.bias.astype("float32"))
                continue
            factors[layer.name] = (taken.factors, taken.bias.astype("float32"))
            layers.append(
                LayerPlan(
                    layer.name,
                    layer.geometry,
                    taken.form,
                    taken.rank,
                    taken.stages,
                    error=taken.error,
                    fitted=taken.fitted,
                    dense_us=self.survey.before.get(layer.name),
                    predicted_us=taken.predicted_us,
                    measured_us=taken.measured_us,
                )
            )
        plan = Plan(
            target=dict(json.loads(str(timer.target))),
            threads=self.threads,
            seed=options.seed,
            max_drop=options.max_drop,
            metric=self.metric.name,
            layers=tuple(layers),
            factors=factors,
        )
        factored = factor(self.normalised, plan.chains())
        plan = replace(plan, schedules=self._schedules(factored, plan, timer, bounded))
        found = choose_chains(factored, plan.scheduler(), timer, options.trials)
        plan = replace(plan, fused=_as_json(found))
        return replace(plan, layers=tuple(self._describe(layer, plan, timer) for layer in layers))

    def _dense(
        self, layer: ConvLayer, timer: KernelTimer, among_others: bool, refitted: bool
    ) -> LayerPlan:
        dense, before = self.survey.dense.get(layer.name), self.survey.before.get(layer.name)
        reason = self.survey.reasons.get(layer.name)
        if reason is None and among_others:
            reason = "its error would cost more accuracy than its time is worth"
        us = before if timer is self.survey.plain else None
        if timer is self.survey.timer and dense is not None:
            us = _known(dense.measured_us)
        return LayerPlan(
            layer.name,
            layer.geometry,
            stages=(layer.geometry,) if layer.geometry is not None else (),
            dense_us=before,
            predicted_us=_known(dense.predicted_us if dense else None),
            measured_us=us,
            reason=reason,
            refitted=refitted,
        )

    def _describe(self, layer: LayerPlan, plan: Plan, timer: KernelTimer) -> LayerPlan:
        """The layer with what the plan's schedules make of it; times are of separate kernels."""
        if layer.name not in self.survey.dense:
            return layer
        workloads = timer.workloads(layer.stages)
        schedules, fused = map(plan.scheduler(), workloads), plan.fused_algorithms()
        pairs = list(zip(workloads, schedules, strict=True))
        times = [timer.time_of(workload, schedule) for workload, schedule in pairs]
        if layer.geometry is not None and layer.form != "dense":
            # What moves between branches is not in the times of the stages.
            branches = FORMS[layer.form].branches(layer.geometry, layer.rank)
            times += [None] * (len(branches) > 1)
        return replace(
            layer,
            algorithms=tuple(fused.get(w.geometry) or algorithm_of(s) for w, s in pairs),
            weight_bytes=sum(weight_bytes(w, s, timer.isa) for w, s in pairs),
            measured_us=layer.measured_us if None in times else sum(filter(None, times)),
        )

    def _schedules(
        self, factored: tvm.IRModule, plan: Plan, timer: KernelTimer, bounded: bool
    ) -> Schedules:
        """Best schedule of every workload of the lowered network, measured where none is known."""
        workloads = survey(factored, timer.isa, plan.scheduler())
        for workload in workloads:
            if not timer.is_covered(workload):
                timer.microseconds(workload)
        timer.compare(workloads)
        chosen = {workload: timer.choose(workload) for workload in workloads}
        limit = self.survey.options.max_weight_bytes
        if limit is not None and bounded:
            chosen = _bounded(Counter(workloads), limit, timer)
        elif isinstance(timer.isa, CudaArch):
            chosen = layouts.settle(factored, timer, chosen)
        return _as_json(chosen)


def _bounded(
    calls: Counter[ConvWorkload], limit: int, timer: KernelTimer
) -> dict[ConvWorkload, Any]:
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
                Option(count * us, count * weight_bytes(first, schedule, timer.isa), schedule)
                for us, schedule in timer.usable.measured(first)
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


def _known(us: float | None) -> float | None:
    """A time for the plan: none instead of NaN."""
    return None if us is None or math.isnan(us) else us


def _as_json(chosen: Mapping[Any, Any]) -> Schedules:
    """Workloads with their schedules as a plan keeps them, in a fixed order."""
    pairs = sorted(chosen.items(), key=lambda pair: pair[0].key())
    return tuple((workload.to_json(), schedule.to_json()) for workload, schedule in pairs)
