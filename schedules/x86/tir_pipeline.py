"""The plugin's kernels from TIR to code, by the few of TVM's passes that change them.

TVM's default pipeline takes longer over such a kernel than LLVM does. Most of its passes look for
blocks, threads and regions of buffers to make smaller, of which kernels made by an `Emitter` have
none. The one for common subexpressions takes the square of their length and gains nothing: an
`Emitter` binds what is needed twice, and LLVM sees to the rest.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import ir, s_tir, tirx
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from .parallel_loops import share_loops

# The pipeline's name for ``tvm.compile(..., tir_pipeline=NAME)``, and the attribute of functions
# that are flat already: vectors on one-dimensional buffers, no blocks but the outermost.
NAME = "lowrank"
FLAT = "lowrank.flat"
# The attribute of those among them that only other functions of the module call.
SUBROUTINE = "lowrank.subroutine"

_ZERO = tirx.IntImm("int32", 0)
_CPU = 1  # DLPack's number for processors


def lowrank_tir_pipeline() -> tuple[tvm.transform.Pass, Any, Any]:
    """What TVM wants of a pipeline: the passes, and those that finish host and device code.

    Functions that are not marked as `FLAT` take TVM's default pipeline, shared among threads.
    """
    default, finish_host, finish_device = tirx.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0, name="lowrank_tir_pipeline")
    def run(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        flat = {name: func for name, func in mod.functions_items() if FLAT in (func.attrs or {})}
        rest = {name: share_loops(func) for name, func in mod.functions_items() if name not in flat}
        scheduled = default(tvm.IRModule(rest, attrs=mod.attrs)) if rest else None
        if scheduled is not None and not flat:
            return scheduled
        lowered = _flat_passes(alone=not rest)(tvm.IRModule(flat, attrs=mod.attrs))
        if scheduled is not None:
            lowered.update(scheduled)
        return lowered

    return run, finish_host, finish_device


def _flat_passes(alone: bool) -> tvm.transform.Pass:
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.StorageRewrite(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.VerifyMemory(),
    ]
    if alone:
        passes.append(tirx.transform.AnnotateEntryFunc())
    passes += [_Subroutines(), tirx.transform.SplitHostDevice(), tirx.transform.MakePackedAPI()]
    return tvm.ir.transform.Sequential(passes)


@tvm.transform.module_pass(opt_level=0, name="Subroutines")
class _Subroutines:
    """Makes functions with the attribute `SUBROUTINE` private ones, of pointers to their buffers.

    Numbers come behind the pointers. They return 0, or another number where something has failed.
    Their code is in a function of its own, as MakePackedAPI makes one: LLVM is told that its
    pointers do not alias, and keeps it apart from what calls it.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite the module."""
        functions = {
            name: _with_pointers(name.name_hint, func) if SUBROUTINE in func.attrs else func
            for name, func in mod.functions_items()
        }
        return tvm.IRModule(functions, attrs=mod.attrs)


def _with_pointers(name: str, func: tirx.PrimFunc) -> tirx.PrimFunc:
    numbers = [p for p in func.params if isinstance(p.ty, ir.PrimType)]
    buffers = [p for p in func.params if p not in numbers]
    pointers = [tirx.Var(f"{b.name}_data", tirx.buffer_data(b).ty) for b in buffers]
    pairs = zip(buffers, pointers, strict=True)
    views = [tirx.DeclBuffer(buffer, data=pointer) for buffer, pointer in pairs]
    symbol = ir.StringImm(f"{name}_compute_")
    body: tirx.Stmt = tirx.AttrStmt(
        _ZERO, "compute_scope", symbol, tirx.SeqStmt([*views, func.body])
    )
    # Where workspaces are allocated; a packed function finds it in its tensors.
    body = tirx.AttrStmt("default", "device_type", tirx.IntImm("int32", _CPU), body)
    body = tirx.AttrStmt("default", "device_id", _ZERO, body)
    body = tirx.SeqStmt([body, tirx.Return(_ZERO)])
    subroutine = tirx.PrimFunc([*pointers, *numbers], body, ir.PrimType("int32"), func.attrs)
    subroutine = subroutine.without_attr("global_symbol")
    target = func.attrs["target"]
    return subroutine.with_attr("target", target.host or target)


register_tir_pipeline(NAME, lowrank_tir_pipeline)
