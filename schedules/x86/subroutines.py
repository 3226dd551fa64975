"""A function that runs the stages of many kernels, one after the other.

TVM's virtual machine calls a kernel with tensors: it allocates the output, and the kernel checks
all of them and starts its threads, once for each of its parallel loops. Between kernels of one
function pointers are enough, and the threads are started once: after each stage they wait for each
other, which takes less time than to start them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import ir, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from .tir_pipeline import FLAT

# TVM's number for functions that its fusion leaves alone.
_OPAQUE = 8
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
    parameters: Sequence[tirx.Buffer], calls: Sequence[StageCall], failed: Place
) -> tirx.PrimFunc:
    """The function of ``parameters`` that makes ``calls`` in order.

    All threads are in every stage. One that fails (a workspace that cannot be allocated) must not
    keep the others waiting: it makes a note at ``failed``, an element that is free for it, and the
    function fails with a RuntimeError at its end.
    """
    note = parameters[failed.parameter]
    stages = [_emit_stage(call, parameters, note, failed.offset) for call in calls]
    region = _pragma("parallel_launch_point", tirx.SeqStmt(stages))
    succeeded = tirx.EQ(tirx.BufferLoad(note, [failed.offset]), _float(0))
    message = "a kernel of the network could not allocate its workspace; free memory"
    check = tirx.AssertStmt(succeeded, ir.StringImm("RuntimeError"), [ir.StringImm(message)])
    body = [tirx.BufferStore(note, _float(0), [failed.offset]), region, check]
    block = SBlock([], [], [], "root", tirx.SeqStmt(body))
    func = tirx.PrimFunc(list(parameters), SBlockRealize([], True, block))
    return func.with_attr({"tirx.noalias": True, "s_tir": True, FLAT: True, "op_pattern": _OPAQUE})


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
    loop = tirx.For(number, _ZERO, extent, tirx.ForKind.PARALLEL, body)
    return _pragma("parallel_barrier_when_finish", loop)


def _pragma(name: str, body: tirx.Stmt) -> tirx.Stmt:
    return tirx.AttrStmt(_ZERO, f"pragma_{name}", _ONE, body)


def _float(value: float) -> ir.Expr:
    return tirx.FloatImm("float32", float(value))


def _pointer(buffer: tirx.Buffer, offset: int) -> ir.Expr:
    if offset == 0:
        return tirx.buffer_data(buffer)
    return tirx.address_of(tirx.BufferLoad(buffer, [offset]))
