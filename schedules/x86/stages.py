"""A kernel as its stages: what threads do side by side, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.tirx import ForKind

from .tir_pipeline import FLAT, SUBROUTINE


@dataclass(frozen=True)
class Stage:
    """What is done once for each number below ``extent``, in any order and side by side.

    ``func`` takes the buffers of ``arguments`` and then the number; `subroutines.emit_calls` calls
    it. The buffers are the kernel's parameters by their order, and behind them the memories of
    `Stages.shared`.
    """

    extent: int
    func: tirx.PrimFunc
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Stages:
    """The stages of a kernel in order, and the floats of each memory that they share."""

    stages: tuple[Stage, ...]
    shared: tuple[int, ...]


def stages_of(kernel: tirx.PrimFunc) -> Stages | None:
    """Take a flat kernel apart; None where a stage needs a value that an earlier one has computed.

    Each parallel loop is a stage; what stands between two of them is one for a single thread.
    """
    statements = _listed(kernel.body.block.body)
    views = [s for s in statements if isinstance(s, tirx.DeclBuffer)]
    shared = [s.buffer for s in statements if isinstance(s, tirx.AllocBuffer)]
    parts: list[list[tirx.Stmt]] = []
    for statement in statements:
        if isinstance(statement, tirx.DeclBuffer | tirx.AllocBuffer):
            continue
        if not parts or _is_parallel(statement) or _is_parallel(parts[-1][0]):
            parts.append([])
        parts[-1].append(statement)
    stages = [_stage(part, views, [*kernel.params, *shared]) for part in parts]
    found = tuple(stage for stage in stages if stage is not None)
    if len(found) < len(stages):
        return None
    return Stages(found, tuple(int(buffer.shape[0]) for buffer in shared))


def _stage(
    statements: Sequence[tirx.Stmt],
    views: Sequence[tirx.DeclBuffer],
    memories: Sequence[tirx.Buffer],
) -> Stage | None:
    loop = statements[0]
    number, extent, body = tirx.Var("number", "int32"), 1, list(statements)
    if _is_parallel(loop):
        number, extent, body = loop.loop_var, int(loop.extent), [loop.body]
    missing = _missing(body, [number])
    for view in reversed(views):  # one may be of another
        if any(view.buffer.same_as(var) for var in missing):
            body.insert(0, view)
            missing = _missing(body, [number])
    arguments = [i for i, m in enumerate(memories) if any(m.same_as(var) for var in missing)]
    if len(arguments) < len(missing):
        return None
    block = SBlock([], [], [], "root", tirx.SeqStmt(body))
    parameters = [*(memories[i] for i in arguments), number]
    func = tirx.PrimFunc(parameters, SBlockRealize([], True, block))
    func = func.with_attr({"tirx.noalias": True, "s_tir": True, FLAT: True, SUBROUTINE: True})
    return Stage(extent, func, tuple(arguments))


def _missing(body: Sequence[tirx.Stmt], known: Sequence[tirx.Var]) -> list[tirx.Var]:
    """What statements need and do not define."""
    whole = tirx.SeqStmt([*body, tirx.Evaluate(0)])  # of one statement none can be made
    return list(tirx.analysis.undefined_vars(whole, list(known)))


def _is_parallel(statement: tirx.Stmt) -> bool:
    return isinstance(statement, tirx.For) and statement.kind == ForKind.PARALLEL


def _listed(statement: tirx.Stmt) -> list[tirx.Stmt]:
    return list(statement.seq) if isinstance(statement, tirx.SeqStmt) else [statement]
