"""A function that calls kernels one after the other, and the kernels as what it calls.

TVM's virtual machine calls a kernel with tensors: it allocates the output, and the kernel checks
all of them. Between kernels of one function pointers are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import ir, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from .tir_pipeline import FLAT, SUBROUTINE

# TVM's number for functions that its fusion leaves alone.
_OPAQUE = 8


@dataclass(frozen=True)
class Place:
    """Where an argument of a kernel begins: in a parameter, so many elements from its start."""

    parameter: int
    offset: int = 0


@dataclass(frozen=True)
class KernelCall:
    """A kernel of the module, and where its arguments are."""

    kernel: tvm.ir.GlobalVar
    places: tuple[Place, ...]


def emit_calls(parameters: Sequence[tirx.Buffer], calls: Sequence[KernelCall]) -> tirx.PrimFunc:
    """The function of ``parameters`` that makes ``calls`` in order.

    The kernels must be subroutines (`as_subroutine`). The first that fails ends the function, which
    fails with the same error.
    """
    body: list[tirx.Stmt] = []
    for number, call in enumerate(calls):
        pointers = [_pointer(parameters[p.parameter], p.offset) for p in call.places]
        code = tirx.Var(f"code{number}", "int32")
        body.append(tirx.Bind(code, ir.Call(call.kernel, pointers, ret_ty="int32")))
        failed = tirx.NE(code, tirx.IntImm("int32", 0))
        body.append(tirx.IfThenElse(failed, tirx.Evaluate(tirx.tvm_throw_last_error()), None))
    block = SBlock([], [], [], "root", tirx.SeqStmt(body))
    func = tirx.PrimFunc(list(parameters), SBlockRealize([], True, block))
    return func.with_attr({"tirx.noalias": True, "s_tir": True, FLAT: True, "op_pattern": _OPAQUE})


def as_subroutine(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel for calls from `emit_calls`; `tir_pipeline` gives it pointers for parameters."""
    return kernel.with_attr(SUBROUTINE, True)


def _pointer(buffer: tirx.Buffer, offset: int) -> ir.Expr:
    if offset == 0:
        return tirx.buffer_data(buffer)
    return tirx.address_of(tirx.BufferLoad(buffer, [offset]))
