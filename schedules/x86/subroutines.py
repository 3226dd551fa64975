"""A function that runs the stages of many kernels, one after the other.

TVM's virtual machine calls a kernel with tensors: it allocates the output, and the kernel checks
all of them and starts its threads, once for each of its parallel loops. Between kernels of one
function pointers are enough, and the threads are started once: after each stage they wait for each
other, which takes less time than to start them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import ir, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from .barrier import WORDS, Barrier
from .tir_pipeline import FLAT

# TVM's number for functions that its fusion leaves alone.
_OPAQUE = 8
# Elements that `emit_calls` keeps its notes in: one, and then those of a barrier, from the next
# cache line on.
_LINE = 16
NOTES = _LINE + WORDS
_ZERO, _ONE = (tirx.IntImm("int32", value) for value in (0, 1))


@dataclass(frozen=True)
class Place:
    """Where an argument of a stage begins: in a parameter, so many elements from its start."""

    parameter: int
    offset: int = 0


@dataclass(frozen=True)
class StageCall:
    """The function of a `Stage` in the module, its extent, and where its buffers are."""

    function: tvm.ir.GlobalVar
    extent: int
    places: tuple[Place, ...]


def emit_calls(
    parameters: Sequence[tirx.Buffer], calls: Sequence[StageCall], notes: Place, code: str | None
) -> tirx.PrimFunc:
    """The function of ``parameters`` that makes ``calls`` in order.

    All threads are in every stage. One that fails (a workspace that cannot be allocated) must not
    keep the others waiting: it makes a note, and the function fails with a RuntimeError at its end.

    Parameters
    ----------
    parameters : sequence of tirx.Buffer
        All of float32.
    calls : sequence of StageCall
    notes : Place
        Where `NOTES` elements are free, from a cache line on.
    code : str, optional
        `barrier.code_for` the target; without it the threads wait as TVM has them wait.
    """
    buffer, note = parameters[notes.parameter], notes.offset
    stages = [_emit_stage(call, parameters, buffer, note) for call in calls]
    before = [tirx.BufferStore(buffer, _float(0), [note])]
    # What only the first thread does need not wait for what only it has done, and what follows the
    # last stage not at all: all tasks of a region have ended when it has.
    waits = [one.extent > 1 or other.extent > 1 for one, other in itertools.pairwise(calls)]
    if code is None or sum(waits) < 2:
        body = [_with_barrier(s) if w else s for s, w in zip(stages, [*waits, False], strict=True)]
        region = tirx.SeqStmt([tirx.Evaluate(0), *body])
    else:
        barrier = Barrier(buffer, note + _LINE, code)
        before += barrier.clear()
        region = _emit_region(stages, waits, barrier)
    region = _pragma("parallel_launch_point", region)
    succeeded = tirx.EQ(tirx.BufferLoad(buffer, [note]), _float(0))
    message = "a kernel of the network could not allocate its workspace; free memory"
    check = tirx.AssertStmt(succeeded, ir.StringImm("RuntimeError"), [ir.StringImm(message)])
    block = SBlock([], [], [], "root", tirx.SeqStmt([*before, region, check]))
    func = tirx.PrimFunc(list(parameters), SBlockRealize([], True, block))
    return func.with_attr({"tirx.noalias": True, "s_tir": True, FLAT: True, "op_pattern": _OPAQUE})


def _emit_region(stages: Sequence[tirx.Stmt], waits: Sequence[bool], barrier: Barrier) -> tirx.Stmt:
    """Stages, and a barrier behind each that the next one has to wait for.

    The first of these is TVM's: after it the threads are known.
    """
    first = waits.index(True)
    body = [barrier.enter(), *stages[:first], _with_barrier(stages[first])]
    for stage, wait in zip(stages[first + 1 :], [*waits[first + 1 :], False], strict=True):
        body += [stage, *(barrier.wait() if wait else [])]
    return barrier.link(tirx.SeqStmt(body))


def _emit_stage(
    call: StageCall, parameters: Sequence[tirx.Buffer], note: tirx.Buffer, offset: int
) -> tirx.Stmt:
    number, code = tirx.Var("number", "int32"), tirx.Var("code", "int32")
    pointers = [_pointer(parameters[place.parameter], place.offset) for place in call.places]
    run = tirx.Bind(code, ir.Call(call.function, [*pointers, number], ret_ty="int32"))
    note_failure = tirx.BufferStore(note, _float(1), [offset])
    body: tirx.Stmt = tirx.SeqStmt([run, tirx.IfThenElse(tirx.NE(code, _ZERO), note_failure, None)])
    if call.extent == 1:  # TVM makes no loop of it, and then all threads would do it
        body = tirx.IfThenElse(tirx.EQ(number, _ZERO), body, None)
    extent = tirx.IntImm("int32", max(call.extent, 2))
    return tirx.For(number, _ZERO, extent, tirx.ForKind.PARALLEL, body)


def _with_barrier(stage: tirx.Stmt) -> tirx.Stmt:
    return _pragma("parallel_barrier_when_finish", stage)


def _pragma(name: str, body: tirx.Stmt) -> tirx.Stmt:
    return tirx.AttrStmt(_ZERO, f"pragma_{name}", _ONE, body)


def _float(value: float) -> ir.Expr:
    return tirx.FloatImm("float32", float(value))


def _pointer(buffer: tirx.Buffer, offset: int) -> ir.Expr:
    if offset == 0:
        return tirx.buffer_data(buffer)
    return tirx.address_of(tirx.BufferLoad(buffer, [offset]))
