"""One ONNX network in several runtimes, in one run: times in turns, and whether they agree."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import compare_gpu
import numpy as np
from cases import BadInput, Case, Parser, check_folder, check_positive, find_case, names
from gpu_runtimes import VARIANTS
from lossless import build_lossless
from machine import describe, disturbance
from peers import PeerError, Timing, outputs_of, take_turns
from runtimes import LOADERS
from tvm_lowrank.schedules.kernels import REDUCED
from zoo import NETWORKS, cache_folder

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.planner import ALGORITHMS
from tvm_lowrank.target import host_target, require_kernels
from tvm_lowrank.threads import physical_cores

OURS = "tvm_lowrank"
METASCHEDULE = "tvm-metaschedule"
PEERS = (*(name for name in LOADERS if name != "tvm"), METASCHEDULE)
_DEFAULT_PEERS = tuple(name for name in PEERS if name != METASCHEDULE)
_GPU_PEERS = tuple(name for name in VARIANTS if name != OURS)
_CHECKED = 3
EXAMPLES = f"""
examples:
  python benchmarks/compare.py resnet18 vgg16
  python benchmarks/compare.py mymodel.onnx --batch 1 16 --against onnxruntime,openvino-default
  python benchmarks/compare.py resnet18 --against onnxruntime,{METASCHEDULE}
  python benchmarks/compare.py resnet50 --target cuda --batch 1 128

networks: {", ".join(NETWORKS)}
Exit codes: 0 done (a runtime that fails is a row with the reason), 2 bad input, 130 interrupted.
"""


@dataclass
class Row:
    """What a runtime showed: a timing or the reason of its failure, and remarks."""

    runtime: str
    timing: Timing | str
    error: float | None = None
    remarks: str = ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    make = Parser(
        prog="compare.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = make.add_argument
    add("networks", nargs="*", metavar="NETWORK", help="names or .onnx files (default: all names)")
    add("--batch", type=int, nargs="+", metavar="N", help="default: 1; on a GPU 1 and 128")
    add("--target", default="llvm", help="cuda compares on this machine's GPU (default: llvm)")
    add("--threads", type=int, default=physical_cores(), help="default: all physical cores")
    add(
        "--against",
        metavar="A,B",
        help=f"of {', '.join(PEERS)}; on a GPU of {', '.join(_GPU_PEERS)}",
    )
    add(
        "--algorithms",
        default=",".join(ALGORITHMS),
        metavar="A,B",
        help=f"{', '.join(ALGORITHMS)}; where there are kernels also {', '.join(REDUCED)}",
    )
    add(
        "--also",
        action="append",
        default=[],
        metavar="A,B",
        help="on a GPU: our library of these --algorithms, too, against the same runs of others",
    )
    add("--trials", type=int, default=4, help="schedules we try a kernel (default: 4)")
    add("--seconds", type=float, default=3.0, help="timing of each runtime (default: 3)")
    add("--records", type=Path, help="our tuning records (default: in the cache folder)")
    add("--libraries", type=Path, metavar="DIR", help="keep our libraries there, use those there")
    add("--build-only", action="store_true", help="fill --libraries, and time nothing")
    add("--metaschedule-trials", type=int, default=512, metavar="N", help="default: 512")
    add("--rows", type=Path, metavar="FILE", help="on a GPU: also write the figures there, as JSON")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    return make


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        args = parser().parse_args(argv)
        gpu = args.target.startswith("cuda")
        peers = _GPU_PEERS if gpu else PEERS
        default = _GPU_PEERS if gpu else _DEFAULT_PEERS
        against = default if args.against is None else names("--against", args.against, peers)
        args.against = against
        known = (*ALGORITHMS, *REDUCED)
        args.algorithms = names("--algorithms", args.algorithms, known)
        args.also = [names("--also", also, known) for also in args.also]
        if not gpu:
            require_kernels(host_target(), args.algorithms)
        check_positive(args, "threads", "trials", "seconds", "metaschedule_trials")
        check_folder(args.markdown)
        check_folder(args.rows)
        if args.build_only and not args.libraries:
            raise BadInput("--build-only needs --libraries, a folder to build into")
        if gpu and args.build_only:
            compare_gpu.build_only(args)
            return 0
        if gpu:
            return _report(compare_gpu.compare(args), args.markdown)
        batches = args.batch or [1]
        cases = [find_case(name, n) for name in args.networks or NETWORKS for n in batches]
        if args.build_only:
            for case in cases:
                library, how, _ = _ours(case, args, Path())
                print(f"{case}: {library}, {how}", flush=True)
            return 0
        sections = [_heading(args)]
        results: list[tuple[Case, list[Row]]] = []
        print(sections[0], flush=True)
        for case in cases:
            rows, remarks = _compare(case, against, args)
            results.append((case, rows))
            sections.append(_section(case, rows, remarks))
            print(sections[-1], flush=True)
        if len(results) > 1:
            sections.append(_summary(results, against))
            print(sections[-1])
    except BadInput as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except LowRankError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted; tuning records are kept", file=sys.stderr)
        return 130
    return _report(sections, args.markdown)


def _report(sections: list[str], path: Path | None) -> int:
    if path:
        path.write_text("\n".join(sections) + "\n", encoding="utf-8")
    return 0


# -- measuring -----------------------------------------------------------------------------------


def _compare(
    case: Case, against: tuple[str, ...], args: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """Rows of a case, ours first, and what there is to say about our build."""
    jobs: dict[str, tuple[str, Path]] = {}
    failed: dict[str, Timing | str] = {}
    remarks: dict[str, str] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        try:
            library, remarks[OURS], calls = _ours(case, args, Path(folder))
            jobs[OURS] = ("tvm", library)
            notes.append(calls)
        except Exception as error:
            failed[OURS] = _reason(error)
        for name in against:
            if name != METASCHEDULE:
                jobs[name] = (name, case.path)
                continue
            try:
                library, remarks[name] = _metaschedule(case, args)
                jobs[name] = ("tvm", library)
            except LowRankError as error:
                failed[name] = str(error)
        checks = np.random.default_rng(1).standard_normal((_CHECKED, *case.shape), np.float32)
        try:
            expected = outputs_of("onnxruntime", case.path, case.shape, args.threads, checks)
        except PeerError as error:
            expected = None
            notes.append(f"results were not compared, ONNX Runtime fails: {error}")
        found = {**take_turns(jobs, case.shape, args.threads, args.seconds, checks), **failed}
    rows = []
    for name in (OURS, *against):
        row = Row(name, found[name], remarks=remarks.get(name, ""))
        if isinstance(row.timing, Timing) and expected is not None:
            row.error = _error(row.timing.outputs, expected)
        rows.append(row)
    return rows, notes


def _ours(case: Case, args: argparse.Namespace, scratch: Path) -> tuple[Path, str, str]:
    """Our library, how it was built, and what it calls; from ``--libraries`` if it is there."""
    folder = scratch
    if args.libraries:
        key = f"{case.path.stem}-batch{case.batch}-threads{args.threads}"
        folder = args.libraries / "-".join([key, *args.algorithms])
        folder.mkdir(parents=True, exist_ok=True)
    library, about = folder / "model.so", folder / "about.json"
    if not about.exists():
        records = args.records or cache_folder() / "records.jsonl"
        built = build_lossless(
            case.path, case.batch, args.threads, args.trials, args.algorithms, records, folder
        )
        texts = [f"{', '.join(args.algorithms)}; {built}", str(built.calls)]
        about.write_text(json.dumps(texts), encoding="utf-8")
    how, calls = json.loads(about.read_text(encoding="utf-8"))
    return library, how, calls


def _error(outputs: np.ndarray | None, expected: np.ndarray) -> float:
    """Largest difference over the largest value, the worst of the inputs."""
    if outputs is None or outputs.shape != expected.shape:
        return math.nan
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(outputs - expected).max(axes) / np.abs(expected).max(axes)).max())


def _metaschedule(case: Case, args: argparse.Namespace) -> tuple[Path, str]:
    """Library of stock TVM and how it was tuned; LowRankError with the reason if there is none."""
    key = f"metaschedule-{case.path.stem}-batch{case.batch}-threads{args.threads}"
    folder = cache_folder() / key
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(Path(__file__).with_name("metaschedule.py")), str(case.path),
        str(folder), "--batch", str(case.batch), "--threads", str(args.threads),
        "--trials", str(args.metaschedule_trials),
    ]  # fmt: skip
    print(f"tuning {case} by MetaSchedule (log in {folder}/log; Ctrl-C skips it)", flush=True)
    start = time.perf_counter()
    with open(folder / "log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            text, _ = process.communicate()
        except KeyboardInterrupt as error:
            process.kill()
            process.wait()
            seconds = time.perf_counter() - start
            raise LowRankError(
                f"interrupted after {seconds / 60:.1f} min; the same command goes on"
            ) from error
    if process.returncode != 0:
        raise LowRankError(f"tuning ended with exit code {process.returncode}, see {folder}/log")
    return folder / "library.so", text.strip().splitlines()[-1]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"


# -- tables --------------------------------------------------------------------------------------


def _heading(args: argparse.Namespace) -> str:
    lines = [
        f"{describe()}, {args.threads} threads.",
        "Medians and minima of single runs in milliseconds, each runtime in a process of its own,",
        "the processes taking turns. *Ratio*: its median over ours (in brackets: of minima); more",
        "than 1 is slower than ours. *Error*: largest difference from ONNX Runtime over its",
        f"largest output, {_CHECKED} random inputs.",
    ]
    warning = disturbance()
    return "\n".join([*lines, f"**Beware: {warning}.**"] if warning else lines)


def _section(case: Case, rows: list[Row], notes: list[str]) -> str:
    lines = [
        f"\n## {case}\n",
        "| runtime | median | minimum | ratio | error | how |",
        "|---|---|---|---|---|---|",
    ]
    ours = rows[0].timing
    for row in rows:
        if isinstance(row.timing, str):
            lines.append(f"| {row.runtime} | - | - | - | - | {row.timing} |")
            continue
        how = "; ".join(text for text in (row.timing.about, row.remarks) if text)
        error = "-" if row.error is None else f"{row.error:.0e}"
        lines.append(
            f"| {row.runtime} | {row.timing.median_ms:.3f} | {row.timing.minimum_ms:.3f} | "
            f"{_ratio(row.timing, ours)} | {error} | {how} |"
        )
    return "\n".join([*lines, *(f"\nOur network: {note}." for note in notes)])


def _ratio(timing: Timing | str, ours: Timing | str) -> str:
    if isinstance(timing, str) or isinstance(ours, str):
        return "-"
    medians, minima = timing.median_ms / ours.median_ms, timing.minimum_ms / ours.minimum_ms
    return f"{medians:.2f} ({minima:.2f})"


def _summary(results: list[tuple[Case, list[Row]]], against: tuple[str, ...]) -> str:
    lines = [
        "\n## Ratios\n",
        "| network | ours, ms | " + " | ".join(against) + " |",
        "|---|" + "---|" * (len(against) + 1),
    ]
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in against}
    for case, (ours, *others) in results:
        own = f"{ours.timing.median_ms:.3f}" if isinstance(ours.timing, Timing) else "failed"
        cells = [str(case), own]
        for row in others:
            cells.append(_ratio(row.timing, ours.timing))
            if isinstance(row.timing, Timing) and isinstance(ours.timing, Timing):
                medians = row.timing.median_ms / ours.timing.median_ms
                minima = row.timing.minimum_ms / ours.timing.minimum_ms
                ratios[row.runtime].append((medians, minima))
        lines.append("| " + " | ".join(cells) + " |")
    means = [_mean(pairs) for pairs in ratios.values()]
    lines.append("| geometric mean | | " + " | ".join(means) + " |")
    return "\n".join(lines)


def _mean(pairs: list[tuple[float, float]]) -> str:
    if not pairs:
        return "-"
    medians, minima = (statistics.geometric_mean(values) for values in zip(*pairs, strict=True))
    return f"{medians:.2f} ({minima:.2f})"


if __name__ == "__main__":
    sys.exit(main())
