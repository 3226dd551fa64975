"""``python -m tvm_lowrank.tune``: from a trained network to a faster ``.so``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from rich.console import Console

from tvm_lowrank import demo
from tvm_lowrank.console import Bars, interruptible
from tvm_lowrank.cost import learned
from tvm_lowrank.cost.batch import candidates_of, export_batch, import_results
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.predicting import records_for
from tvm_lowrank.cost.sampling import Survey, recorded_by_size
from tvm_lowrank.cost.trees import FILE
from tvm_lowrank.cuda import prepare_compiler
from tvm_lowrank.data import Samples, read_npz
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import collect_layers
from tvm_lowrank.metrics import BUILT_IN
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.place import SMALL, network_size
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import ALGORITHMS, Options, search
from tvm_lowrank.report import render
from tvm_lowrank.schedules.kernels import REDUCED
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.shipped import shipped_records
from tvm_lowrank.target import (
    is_measurable,
    parse_target,
    require_kernels,
    require_runnable,
    target_key,
)
from tvm_lowrank.threads import set_threads

NOT_MEASURED = (
    "no GPU that runs {} is at hand, so kernels and forms are ranked by the cost model and the "
    "records only, times are predicted and not measured, and accuracy is that of the same network "
    "on this machine's processor"
)
ALGORITHM_HELP = (
    f"among {','.join((*ALGORITHMS, *REDUCED))} (default: {','.join(ALGORITHMS)}; tf32 and "
    "half: products of TF32 or float16 factors with float32 sums, on a GPU's tensor cores; "
    "bfloat16: the same by AVX512-BF16)"
)
EXAMPLES = """\
examples:
  python -m tvm_lowrank.tune
      tunes the demo network that ships with the package
  python -m tvm_lowrank.tune resnet.onnx --data images.npz --max-drop 1.0 -o out
      images.npz holds 'inputs' (samples first, preprocessed) and, optionally, 'labels'
  python -m tvm_lowrank.tune resnet.onnx --data images.npz --lossless -o out
      the same network with tuned kernels, nothing approximated

  python -m tvm_lowrank.tune resnet.onnx --data images.npz --rpc-tracker host:9190 --rpc-key xeon
      kernels are measured on all servers of that key, side by side
  python -m tvm_lowrank.tune --survey --shapes 200 -o out
      measures kernels of many shapes, which trains the cost model for this machine

out receives model.so, plan.json, plan.npz and records.jsonl. A run that was interrupted goes on
from the records when it is started again. Kernels that the records shipped with the package cover
are not tuned again. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = argparse.ArgumentParser(
        prog="python -m tvm_lowrank.tune",
        description="Rewrite a trained CNN into a faster one and build it as a shared library.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("model", nargs="?", metavar="MODEL", help=".onnx or .pt2; the demo network if left out")
    add(
        "--target",
        default="llvm",
        help="llvm (this machine), llvm:<mcpu>, cuda (this machine's GPU), cuda:<arch>, or JSON",
    )
    add("--data", type=Path, metavar="X.npz", help="inputs and labels to fit, choose and judge by")
    add("--max-drop", type=float, default=1.0, metavar="POINTS", help="budget (default: 1.0)")
    add(
        "--metric",
        metavar="NAME",
        help=f"what the budget counts: {', '.join(BUILT_IN)} or module:function (default: top1, "
        "without labels disagreement)",
    )
    add(
        "--recover",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="train factored networks without labels so that faster ones keep the budget (needs "
        "the torch extra; default: 0, off)",
    )
    add(
        "--unlabelled",
        type=Path,
        metavar="X.npz",
        help="more inputs, of which no label is known: factors are fitted to them and --recover "
        "trains on them, so that more of --data is left to choose and to judge",
    )
    add("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    add(
        "--trials",
        type=int,
        default=4,
        metavar="N",
        help="schedules tried of each kernel at most; of each family of kernels where no cost "
        "model ships (default: 4)",
    )
    add("--no-shipped-records", action="store_true", help="tune everything on this machine")
    add(
        "--metaschedule-trials",
        type=int,
        default=0,
        metavar="N",
        help="candidates of MetaSchedule for all operators without kernels here (default: 0, off)",
    )
    add("--lossless", action="store_true", help="keep every convolution dense")
    add("--forms", type=_names, metavar="A,B", help=f"among dense,{','.join(FORMS)}")
    add("--algorithms", type=_names, metavar="A,B", help=ALGORITHM_HELP)
    add("--exact", action="store_true", help="only algorithms that state an error of 1e-6 or less")
    add("--trust-model", action="store_true", help="measure only what the cost model picks")
    add(
        "--max-weight-bytes",
        type=int,
        metavar="N",
        help="bound of the weights as kernels keep them (default: none)",
    )
    add(
        "--exclude", type=_names, default=(), metavar="A,B", help="layers (patterns) to leave alone"
    )
    add("--batch", type=int, default=1, metavar="N", help="samples a call (default: 1)")
    add("--threads", type=int, metavar="N", help="default: all physical cores")
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--export-batch",
        type=Path,
        metavar="FOLDER",
        help="compile kernels to be measured elsewhere, with the script that does it, and stop",
    )
    add(
        "--import-results",
        type=Path,
        metavar="FOLDER",
        help="take the times of such a folder into DIR/records.jsonl, and stop",
    )
    add("--rpc-tracker", metavar="HOST:PORT", help="measure on the servers of this TVM RPC tracker")
    add("--rpc-key", metavar="KEY", help="which of its servers")
    add("--survey", action="store_true", help="measure shapes for the cost model, build nothing")
    add("--shapes", type=int, default=200, metavar="N", help="of a survey (default: 200)")
    return make


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    # A file or a pipe has no width of its own; the table takes what it needs.
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with (
            warnings.catch_warnings(),
            interruptible() as check,
            _fleet(args, console) as fleet,
        ):
            warnings.showwarning = _show_warning
            if args.import_results or args.export_batch:
                console.print(_travel(args))
                return 0
            if args.survey:
                _survey(args, console, check, fleet)
                return 0
            plan = _tune(args, console, check, fleet)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"interrupted; what was measured is in {args.output}, the same command goes on from it",
            file=sys.stderr,
        )
        return 130
    console.print(render(plan))
    measured = ", records.jsonl" if (args.output / "records.jsonl").exists() else ""
    console.print(f"written   {args.output}/model.so, plan.json, plan.npz{measured}")
    return 0


@contextmanager
def _fleet(args: argparse.Namespace, console: Console) -> Iterator[Fleet | None]:
    """The devices of the tracker, if one is named; in the end, which of them measured what."""
    if (args.rpc_tracker is None) != (args.rpc_key is None):
        raise LowRankError("--rpc-tracker and --rpc-key belong together; give both or neither")
    if args.rpc_tracker is None:
        yield None
        return
    parsed = parse_target(args.target)
    if parsed.kind.name == "cuda":
        prepare_compiler(parsed)
    target = dict(json.loads(str(parsed)))
    fleet = Fleet(args.rpc_tracker, args.rpc_key, target, args.threads)
    try:
        yield fleet
    finally:
        console.print(fleet.table())
        fleet.close()


def _survey(
    args: argparse.Namespace,
    console: Console,
    check: Callable[[], None],
    fleet: Fleet | None,
) -> None:
    target = parse_target(args.target)
    if fleet is None:
        require_runnable(target)
    require_kernels(target, args.algorithms or ())
    if fleet is None and not is_measurable(target):
        raise LowRankError("a survey measures, and no GPU that runs this --target is at hand")
    _make_writable(args.output)
    path = args.output / "records.jsonl"
    threads = fleet.threads if fleet else set_threads(args.threads)
    options = Options(algorithms=args.algorithms or ALGORITHMS, trials=args.trials)
    shipped, isa, trees = not args.no_shipped_records, machine_of(target), None
    # By RPC and on GPUs the size of a network makes no difference.
    alike = fleet is not None or target.kind.name == "cuda"
    for size, layers in _surveyed(args, isa.name, alike).items():
        records = records_for(path, target, threads, shipped, fleet, size)
        timer = KernelTimer(
            target, records, options.trials, options.algorithms, args.seed, worker=fleet
        )
        survey = Survey(timer, layers, args.shapes, max(2, args.trials - 1), args.seed)
        try:
            with Bars(console, check) as bars:
                survey.run(bars.report)
                survey.look_again(bars.report)
                survey.settle(bars.report)
        finally:
            console.print(survey.table())
        trees = learned.renew(records, isa, args.output, args.seed, None)
        if complaint := timer.complaint():
            warnings.warn(complaint, stacklevel=2)
    model = "" if trees is None else f", {FILE}"
    console.print(f"written   {args.output}/records.jsonl{model}")


def _surveyed(args: argparse.Namespace, isa: str, alike: bool) -> dict[int, list[ConvGeometry]]:
    """The layers that a survey begins with, by the size of their networks unless all are alike."""
    if args.model is not None:
        collected = collect_layers(normalise(load_model(args.model, args.batch)))
        layers = [layer.geometry for layer in collected if layer.geometry is not None]
        return {SMALL if alike else network_size(layers): layers}
    sizes = recorded_by_size(shipped_records(isa))
    return {SMALL: [*dict.fromkeys(chain(*sizes.values()))]} if alike else sizes


def _tune(
    args: argparse.Namespace,
    console: Console,
    check: Callable[[], None],
    fleet: Fleet | None,
) -> Plan:
    target = parse_target(args.target)
    options = Options(
        max_drop=args.max_drop,
        forms=("dense",) if args.lossless else args.forms or ("dense", *FORMS),
        algorithms=args.algorithms or ALGORITHMS,
        exclude=args.exclude,
        threads=args.threads,
        seed=args.seed,
        trials=args.trials,
        shipped_records=not args.no_shipped_records,
        metaschedule_trials=args.metaschedule_trials,
        exact=args.exact,
        trust_model=args.trust_model,
        max_weight_bytes=args.max_weight_bytes,
        metric=args.metric,
        recover=args.recover,
    )
    mod = load_model(args.model or demo.model_path(), args.batch)
    data, final = _samples(args)
    more = None if args.unlabelled is None else read_npz(args.unlabelled).inputs
    _make_writable(args.output)
    console.print(f"target {target_key(target)}, batch {args.batch}, output {args.output}")
    if fleet is None and not is_measurable(target):
        print(f"note: {NOT_MEASURED.format(target_key(target))}", file=sys.stderr)
    _remove_leftovers(args.output)
    scratch = Path(tempfile.mkdtemp(dir=args.output, prefix=f".tune-{os.getpid()}-"))
    try:
        with Bars(console, check) as bars:
            records = args.output / "records.jsonl"
            plan = search(
                mod, target, data, final, options, records, scratch, bars.report, fleet, more
            )
        plan.save(args.output / "plan.json")
        os.replace(scratch / "model.so", args.output / "model.so")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return plan


def _travel(args: argparse.Namespace) -> str:
    """Export or import kernels that are measured on another machine; what was done, in words."""
    path = args.output / "records.jsonl"
    if args.import_results:
        added, missing = import_results(args.import_results, path)
        left = f"; {missing} candidates have no result yet" if missing else ""
        return f"{added} times from {args.import_results} added to {path}{left}"
    target, threads = parse_target(args.target), args.threads or 1
    require_kernels(target, args.algorithms or ())
    records = records_for(path, target, threads, shipped=False)
    algorithms, forms = args.algorithms or ALGORITHMS, args.forms or tuple(FORMS)
    timer = KernelTimer(target, records, args.trials, algorithms, args.seed, args.exact)
    mod = load_model(args.model or demo.model_path(), args.batch)
    lossy = [] if args.lossless else [name for name in forms if name != "dense"]
    candidates = candidates_of(mod, timer, lossy, args.trials)
    export_batch(candidates, target, threads, args.export_batch)
    return (
        f"{len(candidates)} candidates compiled into {args.export_batch}; on a machine with "
        f"{target_key(target)} and TVM's runtime run 'python measure.py' there, then give the "
        f"folder back with --import-results {args.export_batch} -o {args.output}"
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _samples(args: argparse.Namespace) -> tuple[Samples | None, Samples | None]:
    if args.data is not None:
        return read_npz(args.data), None
    if args.model is None:
        return Samples(*demo.calibration()), Samples(*demo.evaluation())
    print(
        "warning: no --data: factors are fitted to the weights alone and accuracy is not measured",
        file=sys.stderr,
    )
    return None, None


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LowRankError(
            f"output folder {folder} cannot be written ({error.strerror}); choose another with -o"
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Delete the scratch folders of runs that were killed."""
    for left in folder.glob(".tune-*-*"):
        try:
            os.kill(int(left.name.split("-")[1]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:
            pass  # it lives, under another user


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
