"""The plugin's kernels from TIR to code, by the few of TVM's passes that change them.

TVM's default pipeline takes longer over such a kernel than LLVM does. Most of its passes look for
blocks, threads and regions of buffers to make smaller, of which kernels made by an `Emitter` have
none. The one for common subexpressions takes the square of their length and gains nothing: an
`Emitter` binds what is needed twice, and LLVM sees to the rest.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.compilation_pipeline import register_tir_pipeline

# The pipeline's name for ``tvm.compile(..., tir_pipeline=NAME)``, and the attribute of functions
# that are flat already: vectors on one-dimensional buffers, no blocks but the outermost.
NAME = "lowrank"
FLAT = "lowrank.flat"


def lowrank_tir_pipeline() -> tuple[tvm.transform.Pass, Any, Any]:
    """What TVM wants of a pipeline: the passes, and those that finish host and device code.

    Functions that are not marked as `FLAT` take TVM's default pipeline.
    """
    default, finish_host, finish_device = tirx.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0, name="lowrank_tir_pipeline")
    def run(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        flat = {name: func for name, func in mod.functions_items() if FLAT in (func.attrs or {})}
        rest = {name: func for name, func in mod.functions_items() if name not in flat}
        if not flat:
            return default(mod)
        lowered = _flat_passes(alone=not rest)(tvm.IRModule(flat, attrs=mod.attrs))
        if rest:
            lowered.update(default(tvm.IRModule(rest, attrs=mod.attrs)))
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
    passes += [tirx.transform.SplitHostDevice(), tirx.transform.MakePackedAPI()]
    return tvm.ir.transform.Sequential(passes)


register_tir_pipeline(NAME, lowrank_tir_pipeline)
