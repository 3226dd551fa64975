"""MetaSchedule for what the kernels of this package do not cover."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import tvm
from tvm import relax

# Kernels of this package are called so, and are opaque to MetaSchedule.
_OWN = "lowrank_"


@dataclass
class Outcome:
    """What a run of MetaSchedule came to: functions tuned, candidates that ran and that failed."""

    functions: int
    measured: int
    failed: int

    def complaint(self) -> str:
        """One sentence on what went wrong; empty if nothing did."""
        if self.functions and not self.measured:
            return (
                f"MetaSchedule measured no candidate for {self.functions} functions "
                f"({self.failed} failed): they keep TVM's default schedule"
            )
        if self.failed:
            return f"{self.failed} of {self.failed + self.measured} MetaSchedule candidates failed"
        return ""


def prepare(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Legalise and fuse a lowered network into the functions that are tuned and replaced.

    A database matches functions by structure, so both sides must have gone through these passes.
    """
    with target:
        return tvm.ir.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
            ]
        )(mod)


def tune(
    prepared: tvm.IRModule, target: tvm.target.Target, folder: Path, trials: int, seed: int = 0
) -> Outcome:
    """Tune the functions of a prepared network that the database in ``folder`` does not know.

    Parameters
    ----------
    prepared : tvm.IRModule
        From `prepare`.
    target : tvm.target.Target
    folder : Path
        Holds the database, ``database_*.json``, and MetaSchedule's logs; made if it is missing.
    trials : int
        Candidates to measure, of all functions together.
    seed : int
    """
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks
    from tvm.s_tir.meta_schedule.utils import fork_seed

    database = _database(folder)
    tasks = [
        task
        for task in extract_tasks(prepared, target)
        if _OWN not in task.task_name and not _known(database, task.dispatched[0], target)
    ]
    outcome = Outcome(len(tasks), 0, 0)
    if not tasks:
        return outcome
    _load_intrinsics()
    contexts = [
        ms.TuneContext(
            mod=task.dispatched[0],
            target=task.target,
            space_generator="post-order-apply",
            search_strategy="evolutionary",
            task_name=task.task_name,
            rand_state=state,
        ).clone()
        for task, state in zip(tasks, fork_seed(seed, n=len(tasks)), strict=True)
    ]
    ms.tune.tune_tasks(
        tasks=contexts,
        task_weights=[task.weight for task in tasks],
        work_dir=str(folder),
        max_trials_global=trials,
        num_trials_per_iter=max(1, min(16, trials // len(tasks))),
        builder=_builder(),
        database=database,
        measure_callbacks=[
            ms.measure_callback.AddToDatabase(),
            ms.measure_callback.RemoveBuildArtifact(),
            ms.measure_callback.UpdateCostModel(),
            _counter(outcome),
        ],
    )
    return outcome


def apply(prepared: tvm.IRModule, target: tvm.target.Target, folder: Path) -> tvm.IRModule:
    """A prepared network with the best schedules of the database in ``folder``."""
    with target, _database(folder):
        return relax.transform.MetaScheduleApplyDatabase()(prepared)


def _database(folder: Path) -> Any:
    from tvm.s_tir import meta_schedule as ms

    folder.mkdir(parents=True, exist_ok=True)
    return ms.database.JSONDatabase(work_dir=str(folder))


def _known(database: Any, mod: tvm.IRModule, target: tvm.target.Target) -> bool:
    return bool(database.query_tuning_record(mod, target, "main") is not None)


def _load_intrinsics() -> None:
    """Import TVM's tensor intrinsics, which `TuneContext` would, but in seconds.

    For each of some hundred TVM asks `inspect` for the module of every frame of the call stack; the
    frames of Python's own importer, not being in any file, have it look through all modules each
    time, which takes a minute. So they are named beforehand, and a thread has no further frames.
    """
    modules: dict[str, str] = getattr(inspect, "modulesbyfile", {})
    for name in ("importlib._bootstrap", "importlib._bootstrap_external"):
        modules[os.path.abspath(f"<frozen {name}>")] = name
    thread = Thread(target=importlib.import_module, args=("tvm.s_tir.tensor_intrin",))
    thread.start()
    thread.join()


def _builder() -> Any:
    """Builds candidates in this process.

    MetaSchedule's own builder imports all tensor intrinsics in each new worker process, which takes
    longer than the time it gives a build, so every candidate would fail.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
    from tvm.s_tir.meta_schedule.builder.local_builder import default_build, default_export

    @derived_object
    class InProcessBuilder(PyBuilder):
        def build(self, build_inputs: Sequence[Any]) -> list[Any]:
            results = []
            for given in build_inputs:
                try:
                    module = default_build(given.mod, given.target, None)
                    results.append(BuilderResult(default_export(module), None))
                except Exception as error:
                    results.append(BuilderResult(None, str(error)))
            return results

    return InProcessBuilder()


def _counter(outcome: Outcome) -> Any:
    """A callback that counts candidates that ran and candidates that did not."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback

    @derived_object
    class Counter(PyMeasureCallback):
        def apply(
            self,
            task_scheduler: Any,
            task_id: int,
            measure_candidates: Any,
            builder_results: Any,
            runner_results: Any,
        ) -> None:
            for built, ran in zip(builder_results, runner_results, strict=True):
                failed = built.error_msg is not None or ran.error_msg is not None
                outcome.failed += failed
                outcome.measured += not failed

    return Counter()
