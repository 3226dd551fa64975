"""The search: from a network and data to a plan whose library was built, timed and judged."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.cost import learned
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.guide import Guide, guide_for
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import PredictingTimer, records_for
from tvm_lowrank.cost.trees import Trees
from tvm_lowrank.cost.trees import find as find_trees
from tvm_lowrank.cuda import prepare_compiler
from tvm_lowrank.data import Samples, input_shape, split
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.extras import require_torch
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.metrics import Metric, check_resolution, metric_of
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.place import network_size
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.assemble import Assembler
from tvm_lowrank.planner.bench import Bench, MeasuringBench, PredictingBench
from tvm_lowrank.planner.calibrate import input_moments
from tvm_lowrank.planner.candidates import WIDEST
from tvm_lowrank.planner.curve import Curve, Trainer
from tvm_lowrank.planner.judging import Judge
from tvm_lowrank.planner.options import Options
from tvm_lowrank.planner.segments import Segments
from tvm_lowrank.planner.sensitivity import remembered, sensitivities
from tvm_lowrank.planner.survey import Report, Survey
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.kernels import REDUCED
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.target import (
    host_target,
    is_measurable,
    parse_target,
    require_kernels,
    require_runnable,
    target_key,
)
from tvm_lowrank.threads import set_threads

# Kept beside the records.
SENSITIVITY = "sensitivity.json"


def _silent(_stage: str, _done: int, _total: int) -> None:
    pass


def search(
    mod: tvm.IRModule,
    target: Any = None,
    data: Samples | None = None,
    final: Samples | None = None,
    options: Options | None = None,
    records: Path | None = None,
    directory: Path | None = None,
    report: Report = _silent,
    fleet: Fleet | None = None,
    unlabelled: np.ndarray | None = None,
) -> Plan:
    """Plan, build and judge; ``directory``, if given, receives ``model.so``.

    See `tvm_lowrank.plan` for the parameters and errors. With a ``fleet`` kernels are measured on
    its devices; the network is tried and judged here. ``unlabelled`` inputs fit factors.
    """
    options = options or Options()
    if unlabelled is not None and data is None:
        raise LowRankError(
            "unlabelled inputs fit factors, but do not choose among plans: give data too, with "
            "labels where there are any"
        )
    with ExitStack() as stack:
        if directory is None:
            scratch = tempfile.TemporaryDirectory(prefix="tvm_lowrank-")
            directory = Path(stack.enter_context(scratch))
        return _search(
            mod, target, data, final, options, records, directory, report, fleet, unlabelled
        )


def _search(
    mod: tvm.IRModule,
    target_spec: Any,
    data: Samples | None,
    final: Samples | None,
    options: Options,
    records_path: Path | None,
    directory: Path,
    report: Report,
    fleet: Fleet | None,
    unlabelled: np.ndarray | None,
) -> Plan:
    target = parse_target(target_spec)
    require_runnable(target)
    require_kernels(target, options.algorithms)
    if target.kind.name == "cuda":
        prepare_compiler(target)
    if options.metaschedule_trials and not is_measurable(target):
        raise LowRankError(
            "metaschedule_trials is for operators that are measured here, and no GPU that runs "
            f"{target_key(target)} is at hand; leave it out"
        )
    classes = options.metric is None or options.metric in ("top1", "disagreement")
    spare = options.recover > 0
    parts = split(mod, data, final, options.seed, classes, spare, unlabelled)
    labelled = parts.final.labels is not None and parts.select.labels is not None
    metric = metric_of(options.metric, labelled, parts.synthetic)
    threads = set_threads(options.threads)
    normalised = normalise(mod)
    layers = collect_layers(normalised)
    size = network_size(layer.geometry for layer in layers)
    records = records_for(records_path, target, threads, options.shipped_records, fleet, size)
    if not options.lossless:
        check_resolution(metric, options.max_drop, len(parts.final), labelled)

    measured = is_measurable(target)
    isa, folder = machine_of(target), records_path.parent if records_path else None
    trees, complaint = find_trees(folder, isa)
    trees = learned.train(records, isa, options.seed, trees)
    guide = guide_for(records, isa, options.shipped_records)
    timer = _timer(target, records, options, options.algorithms, fleet, trees, guide)
    # What "before" means everywhere: the network as it is, in tuned direct kernels.
    plain = timer
    if options.algorithms != ("direct",) or options.max_weight_bytes is not None:
        plain = _timer(target, records, options, ("direct",), fleet, trees, guide)
    unrounded = timer
    if any(name in options.algorithms for name in REDUCED):
        kept = tuple(name for name in options.algorithms if name not in REDUCED) or ("direct",)
        unrounded = _timer(target, records, options, kept, fleet, trees, guide)
    # Plans are tried out on this machine's processor, whatever they are for.
    trial_timer = timer if target.kind.name == "llvm" else _host_timer(threads, options)
    trainer = _trainer(normalised, layers, options, parts.unlabelled, metric, report)
    survey = Survey(layers, options, timer, plain, unrounded, report)
    survey.measure_dense()

    make_curve = None
    if eligible := survey.eligible():
        segments = Segments(normalised, layers, trial_timer)
        # Noise says nothing of what layers will read, and wide layers read too much to keep.
        known = [x for x in eligible if not parts.synthetic and x.weight[0].size <= WIDEST]
        moments = input_moments(
            segments,
            known,
            parts.fit.inputs,
            options.seed,
            lambda done: report("calibrating", done, len(parts.fit)),
        )
        if candidates := survey.candidates(eligible, moments):
            sensitivity_path = None if records_path is None else records_path.parent / SENSITIVITY

            def make_curve() -> Curve:
                sensitivity = remembered(
                    sensitivity_path,
                    normalised,
                    parts.select.inputs,
                    metric.of_classes,
                    list(candidates),
                    lambda: sensitivities(
                        segments,
                        candidates,
                        parts.select.inputs,
                        metric.of_classes,
                        lambda done: report("sensitivity of layers", done, len(candidates)),
                    ),
                )
                return Curve(
                    segments,
                    candidates,
                    {layer.name: survey.dense[layer.name] for layer in eligible},
                    sensitivity,
                    parts,
                    metric,
                    options.max_drop,
                    options.seed,
                    report,
                    trainer,
                )

    shape = input_shape(mod)
    bench: Bench = MeasuringBench(shape, threads, target.kind.name == "cuda")
    if not measured:
        bench = PredictingBench(normalised, timer, shape[0])
    judge = Judge(
        Assembler(normalised, survey, threads, metric),
        parts,
        shape,
        bench,
        directory,
        (records_path or directory / "model.so").parent / "metaschedule",
        report,
    )
    plan = judge.conclude(make_curve)
    if options.trust_model and not timer.is_trusted():
        complaint = complaint or (
            "the cost model knows too few records of this machine to be trusted; all was measured "
            "as without it; train it with python -m tvm_lowrank.tune --survey"
        )
    if not isinstance(timer, PredictingTimer):  # predictions teach nothing
        learned.renew(records, isa, folder, options.seed, trees)
    complaints = dict.fromkeys((complaint, timer.complaint(), plain.complaint(), *judge.complaints))
    for complaint in filter(None, complaints):
        warnings.warn(complaint, stacklevel=3)
    return plan


def _trainer(
    mod: tvm.IRModule,
    layers: list[ConvLayer],
    options: Options,
    inputs: np.ndarray,
    metric: Metric,
    report: Report,
) -> Trainer | None:
    """What recovers a choice; None where no recovery is asked for.

    Raises
    ------
    LowRankError
        PyTorch is missing, or the network cannot be trained: said before anything is measured.
    """
    if not options.recover or options.lossless:
        return None
    require_torch()
    from tvm_lowrank.planner.recover import recover
    from tvm_lowrank.torch_module import RelaxModule

    RelaxModule(mod, layers)

    def train(choice: Choice, share: float) -> Choice:
        return recover(
            mod,
            layers,
            choice,
            inputs,
            share * options.recover,
            metric.of_classes,
            options.seed,
            lambda done, total: report("recovering", done, total),
        )

    return train


def _timer(
    target: tvm.target.Target,
    records: TuningRecords,
    options: Options,
    algorithms: tuple[str, ...],
    fleet: Fleet | None,
    trees: Trees | None,
    guide: Guide | None,
) -> KernelTimer:
    make = KernelTimer if fleet is not None or is_measurable(target) else PredictingTimer
    trials, seed, exact = options.trials, options.seed, options.exact
    trust = options.trust_model
    return make(target, records, trials, algorithms, seed, exact, fleet, trees, trust, guide)


def _host_timer(threads: int, options: Options) -> KernelTimer:
    """A timer that only knows what the shipped records say of this machine's processor."""
    target = host_target()
    return KernelTimer(target, records_for(None, target, threads, options.shipped_records))
