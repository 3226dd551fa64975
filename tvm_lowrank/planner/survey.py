"""What each layer costs as it is, and what it could become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.decompose.moments import InputMoments
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.candidates import Candidate, confirm, confirm_memory, forms_for, propose
from tvm_lowrank.planner.options import Options
from tvm_lowrank.schedules.kernels import algorithm_of

# Told the stage, how many of its steps are done, and how many there are.
Report = Callable[[str, int, int], None]


@dataclass
class Survey:
    """Measures the layers of a network, and what could replace them.

    Parameters
    ----------
    layers : list of ConvLayer
    options : Options
    timer, plain, unrounded : KernelTimer
        With all allowed algorithms, with the direct one only: "before", and with those that do not
        round, if others are allowed.
    report : callable

    Attributes
    ----------
    dense : dict
        Layer name to its dense candidate, for layers that have kernels; set by `measure_dense`.
    before : dict
        Layer name to microseconds in direct kernels, where known.
    reasons : dict
        Layer name to why it stays as it is.
    """

    layers: list[ConvLayer]
    options: Options
    timer: KernelTimer
    plain: KernelTimer
    unrounded: KernelTimer
    report: Report
    dense: dict[str, Candidate] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def measure_dense(self) -> None:
        """Time every layer as it is; without other forms, only what no record covers."""
        if not self.options.lossless:
            self.roofline = self.plain.roofline()
        self._prepare()
        for done, layer in enumerate(self.layers):
            reason, geometry = layer.reason, layer.geometry
            if reason is None and geometry is not None:
                reason = self.timer.refuse([geometry])
            if reason:
                self.reasons[layer.name] = reason
            elif geometry is not None:
                self.dense[layer.name] = self._dense(layer, geometry)
            self.report("measuring dense layers", done + 1, len(self.layers))
        if self.timer.guide is not None and not self.options.lossless:
            known = [(c, self.timer.expected(c.stages)) for c in self.dense.values()]
            self.timer.guide.calibrate([(expected, c.measured_us) for c, expected in known])

    def _prepare(self) -> None:
        """Measure all layers side by side if there are several devices."""
        shapes = [
            layer.geometry
            for layer in self.layers
            if layer.geometry is not None
            and not (layer.fully_connected and self.options.lossless)
            and not self.timer.refuse([layer.geometry])
        ]
        for timer in dict.fromkeys((self.plain, self.timer)):
            workloads = [
                workload for geometry in shapes for workload in timer.workloads([geometry])
            ]
            if self.options.lossless:
                workloads = [workload for workload in workloads if not timer.is_covered(workload)]
            timer.measure_all(workloads)

    def _dense(self, layer: ConvLayer, geometry: ConvGeometry) -> Candidate:
        stages, lossless = (geometry,), self.options.lossless
        # Nothing is to be compared, so what other machines found best needs no time here.
        covered = lossless and self.options.max_weight_bytes is None
        settled = self.timer.usable.is_complete if layer.fully_connected else self.timer.is_covered
        covered = covered and all(map(settled, self.timer.workloads(stages)))
        measure = KernelTimer.recorded if covered else KernelTimer.chain
        before, us = measure(self.plain, stages), measure(self.timer, stages)
        if before is not None:
            self.before[layer.name] = before
        predicted = math.nan
        if not lossless:
            predicted = self.roofline.microseconds(
                stages, self.timer.isa.lanes, dict.fromkeys(self.timer.usable.algorithms, 1.0)
            )
        if us == math.inf:
            raise LowRankError(
                f"no kernel for {layer.name} ({geometry}) runs on this machine; name a target that "
                f"it can run with --target, not {self.timer.target}"
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

    def _slowness(self, geometry: ConvGeometry) -> dict[str, float]:
        """How many times as long as predicted each algorithm takes for a dense layer, 1 if unknown.

        On small maps and few channels Winograd kernels are far from what their operations promise.
        """
        lanes, (workload,) = self.timer.isa.lanes, self.timer.workloads([geometry])
        found = dict.fromkeys(self.timer.usable.algorithms, 1.0)
        for us, schedule in reversed(self.timer.usable.measured(workload)):
            name = algorithm_of(schedule)
            if name in found:
                # The time of this algorithm alone.
                others = {name: 1.0, "direct": 1.0 if name == "direct" else math.inf}
                predicted = self.roofline.microseconds([geometry], lanes, others)
                if math.isfinite(predicted):
                    found[name] = us / predicted
        return found

    def eligible(self) -> list[ConvLayer]:
        """The layers that an allowed form can compute; the others get their reason."""
        found = []
        for layer in self.layers:
            if layer.geometry is None:
                continue
            if any(fnmatchcase(layer.name, pattern) for pattern in self.options.exclude):
                self.reasons[layer.name] = "excluded"
                continue
            lossy = forms_for(layer, self.options.forms)
            refusals = {FORMS[name].refuse(layer.geometry) for name in lossy}
            if None in refusals and layer.name in self.dense:
                found.append(layer)
            elif layer.name in self.dense or refusals - {None}:
                texts = sorted(text for text in refusals if text)
                self.reasons[layer.name] = "; ".join(texts) or "only the dense form is allowed"
        return found

    def proposals(
        self, eligible: list[ConvLayer], moments: dict[str, InputMoments]
    ) -> Iterator[tuple[ConvLayer, list[Candidate], str | None]]:
        """For each layer what could gain, fitted but not measured, and why there is nothing.

        A layer without moments is fitted to its weight alone. ``moments`` are emptied on the way:
        those of a large network take gigabytes.
        """
        for layer in eligible:
            geometry = layer.geometry
            assert geometry is not None
            given = moments.pop(layer.name, None) or InputMoments.identity(geometry)
            proposed, reason = propose(
                layer,
                given,
                self.options.lossy,
                self.roofline,
                self.timer,
                algorithms=self._slowness(geometry),
            )
            yield layer, proposed, reason

    def candidates(
        self, eligible: list[ConvLayer], moments: dict[str, InputMoments]
    ) -> dict[str, list[Candidate]]:
        """For each layer that could gain, what is measured faster, and the dense form last.

        Of fully connected layers, what keeps fewer weights and is not measured slower. See
        `proposals` for the moments.
        """
        options: dict[str, list[Candidate]] = {}
        for done, (layer, proposed, reason) in enumerate(self.proposals(eligible, moments)):
            dense = self.dense[layer.name]
            if layer.fully_connected:
                found = confirm_memory(proposed, dense, self.timer, self.roofline.gigabytes)
            else:
                found = [*confirm(proposed, dense, self.timer), dense]
            if len(found) > 1:
                options[layer.name] = found
            else:
                none = "smaller and no slower" if layer.fully_connected else "faster"
                self.reasons[layer.name] = reason or f"no candidate is {none}"
            self.report("fitting and measuring forms", done + 1, len(eligible))
        return options
