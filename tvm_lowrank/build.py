"""From a Relax module to something that runs, and to a ``.so``."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from tvm_lowrank import cuda
from tvm_lowrank.deploy import Network
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.passes.merge_calls import MergeCalls
from tvm_lowrank.schedules.x86 import tir_pipeline


def compile_module(
    mod: tvm.IRModule, target: tvm.target.Target, checks: bool = True, merged: bool = True
) -> Any:
    """Compile with TVM's own default pipeline of the target, but for our kernels on processors.

    These take a shorter way (`tir_pipeline`), and the network calls those that follow each other by
    one call (`passes.merge_calls`). For CUDA the default pipeline gives DLight's
    schedules to what has none, and captures the network as a CUDA graph.

    Parameters
    ----------
    mod : tvm.IRModule
    target : tvm.target.Target
    checks : bool
        Whether kernels check the shapes, types and strides of their arguments; on processors, what
        only this process runs goes without: then LLVM has much less to compile.
    merged : bool
        Whether the network calls kernels of processors together; apart each can be timed in it.

    Raises
    ------
    LowRankError
        Something that compiles CUDA is missing.
    """
    if target.kind.name != "cuda":
        unchecked = tvm.transform.PassContext(config={"tirx.disable_assert": True})
        with nullcontext() if checks else unchecked:
            called = MergeCalls(target)(mod) if merged else mod
            return tvm.compile(called, target=target, tir_pipeline=tir_pipeline.NAME)
    cuda.prepare_compiler(target)
    target = cuda.with_every_instruction(target)
    with target, tvm.transform.PassContext(config=cuda.compile_options()):
        return tvm.compile(mod, target=target)


def network_of(executable: Any) -> Network:
    """An executable of `compile_module`, ready to run in this process."""
    return Network(relax.VirtualMachine(executable, tvm.cpu()), tvm.cpu())


def export(executable: Any, path: Path, compiler: str | None = None) -> Path:
    """Write a shared library; an older file of that name is replaced only by a complete one.

    ``compiler`` is the C++ compiler that links it, for another family of processors one like
    ``aarch64-linux-gnu-g++``; by default that of this machine.

    Raises
    ------
    LowRankError
        No C compiler is found, or the folder cannot be written.
    """
    options = {"cc": compiler} if compiler else {}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            fresh = Path(folder) / path.name
            executable.export_library(str(fresh), **options)
            os.replace(fresh, path)
    except OSError as error:
        raise LowRankError(
            f"{path} cannot be written ({error}); free space or check rights"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise LowRankError(
            f"{path} could not be linked ({error}); {compiler or 'a C compiler (gcc or clang)'} "
            "must be on the PATH"
        ) from error
    return path
