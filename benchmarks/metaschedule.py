"""Stock TVM tuned by MetaSchedule: run as a script on one ONNX file, it leaves a library.

Stopping it loses nothing but the candidates in flight: started again it goes on from its records
to the number of trials asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import tvm
from tvm import relax
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.support.tar import tar

from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target
from tvm_lowrank.threads import set_threads

_FAILED = 1e9  # seconds


@derived_object
class InProcessBuilder(PyBuilder):
    """Builds candidates in this process.

    The stock LocalBuilder imports TVM's tensor intrinsics in every fresh worker, which takes longer
    than its own time limit.
    """

    def build(self, build_inputs):
        """Compile and archive each candidate; a failure is its own result."""
        results = []
        for given in build_inputs:
            try:
                mod = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(given.mod)
                library = tvm.driver.build(mod, target=given.target)
                path = Path(tempfile.mkdtemp(dir=_scratch.name)) / "candidate.tar"
                library.export_library(str(path), fcompile=tar)
                results.append(BuilderResult(str(path), None))
            except Exception as error:
                results.append(BuilderResult(None, str(error)))
        return results


_scratch = tempfile.TemporaryDirectory(prefix="metaschedule-")


def recorded(folder: Path) -> tuple[int, int]:
    """Trials on record in the folder of a run, and how many of them failed."""
    path = folder / "database_tuning_record.json"
    lines = path.read_text().splitlines() if path.exists() else []
    # A record is [workload, [trace, seconds, ...]]; failures are kept with absurd times.
    failed = sum(min(json.loads(line)[1][1], default=_FAILED) >= _FAILED for line in lines)
    return len(lines), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="receives records and library.so")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trials", type=int, default=512, help="in all (default: 512)")
    args = parser.parse_args()
    set_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    target = host_target()
    mod = _prepare(load_model(args.model, args.batch), target)
    start, (before, _) = time.perf_counter(), recorded(args.folder)
    if before < args.trials:
        # Rules for llvm targets name intrinsics that are registered by this import alone.
        importlib.import_module("tvm.s_tir.tensor_intrin")

        tasks = ms.relax_integration.extract_tasks(mod, target, {})
        ms.relax_integration.tune_relax(
            mod,
            {},
            target,
            str(args.folder),
            args.trials - before,
            num_trials_per_iter=max(1, min(64, (args.trials - before) // max(1, len(tasks)))),
            builder=InProcessBuilder(),
            runner=ms.runner.LocalRunner(
                evaluator_config=ms.runner.EvaluatorConfig(
                    number=1, repeat=5, min_repeat_ms=20, enable_cpu_cache_flush=False
                )
            ),
            seed=0,
        )
    trials, failed = recorded(args.folder)
    if trials == failed:
        print("no candidate could be measured", file=sys.stderr)
        return 1
    database = ms.database.JSONDatabase(work_dir=str(args.folder))
    with target, database:
        mod = relax.transform.MetaScheduleApplyDatabase()(mod)
    tvm.compile(mod, target=target).export_library(str(args.folder / "library.so"))
    print(f"{trials} trials ({failed} failed), {before} of them before, {_minutes(start)} min")
    return 0


def _prepare(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Functions to tune; tasks are found, and later replaced, only in a network made of them."""
    passes = [
        relax.transform.DecomposeOpsForInference("main"),
        relax.transform.FoldConstant(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with target:
        return tvm.ir.transform.Sequential(passes)(mod)


def _minutes(start: float) -> str:
    return f"{(time.perf_counter() - start) / 60:.1f}"


if __name__ == "__main__":
    sys.exit(main())
