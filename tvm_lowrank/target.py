"""Targets: the machine at hand, or one the user names."""

from __future__ import annotations

import json
import platform
from typing import Any

import tvm
from tvm.target import codegen

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.schedules.x86.isa import architecture_of
from tvm_lowrank.threads import physical_cores

# Vector instructions that kernels are built with: LLVM's name, and that of /proc/cpuinfo.
_VECTOR_FEATURES = (("avx512f", "avx512f"), ("avx2", "avx2"), ("fma", "fma"))


def parse_target(spec: Any = None) -> tvm.target.Target:
    """A complete target from what a user writes.

    Parameters
    ----------
    spec : None, str, dict or tvm.target.Target
        None or ``"llvm"`` is this machine's processor; a string may be JSON
        (``'{"kind": "llvm", "mcpu": "haswell"}'``) or another llvm processor as ``"llvm:haswell"``.

    Raises
    ------
    LowRankError
        The target is unknown to TVM, is not an llvm target, or names an unknown processor.
    """
    if spec is None or spec == "llvm":
        return host_target()
    if isinstance(spec, tvm.target.Target):
        target = spec
    else:
        target = tvm.target.Target(_as_dict(spec)) if _known(spec) else _unknown(spec)
    if target.kind.name != "llvm":
        raise LowRankError(
            f"target {target.kind.name!r} has no kernels here yet; "
            "use 'llvm', 'llvm:<mcpu>' or JSON of an llvm target"
        )
    mcpu = str(target.attrs.get("mcpu", "")) if target.attrs else ""
    if mcpu and not codegen.llvm_is_valid_cpu(mcpu, str(target.attrs.get("mtriple", ""))):
        raise LowRankError(
            f"target names the processor {mcpu!r}, which LLVM does not know; "
            "see tvm.target.codegen.llvm_get_cpu_archlist()"
        )
    return target


def host_target() -> tvm.target.Target:
    """The llvm target of the machine that runs this."""
    return tvm.target.Target({"kind": "llvm", "mcpu": _host_mcpu(), "num-cores": physical_cores()})


def require_runnable(target: tvm.target.Target) -> None:
    """Check that this machine can run what is built for ``target``.

    Raises
    ------
    LowRankError
        It is of another family of processors, or lacks vector instructions that the target has.
    """
    architecture, here = architecture_of(target), platform.machine()
    missing = []
    if architecture and architecture != here.replace("arm64", "aarch64").replace("AMD64", "x86_64"):
        missing.append(architecture)
    elif flags := _cpu_flags():
        missing += [
            flag
            for feature, flag in _VECTOR_FEATURES
            if codegen.llvm_cpu_has_features(feature, target) and flag not in flags
        ]
    if missing:
        raise LowRankError(
            f"target {target_key(target)} needs {', '.join(missing)}, which this machine ({here}) "
            "lacks, so nothing can be measured; plan for 'llvm' and build with plan.for_target(...)"
        )


def target_key(target: tvm.target.Target) -> str:
    """Short name of a target for folders and records, as ``llvm-znver4``."""
    mcpu = str(target.attrs.get("mcpu", "")) if target.attrs else ""
    return f"{target.kind.name}-{mcpu or 'generic'}"


def _host_mcpu() -> str:
    """LLVM's name of this processor, unless the machine lacks vectors that the name implies.

    A virtual machine may hide instruction sets of the processor whose model it shows.
    """
    name = str(codegen.llvm_get_system_cpu())
    flags = _cpu_flags()
    if not flags:
        return name
    target = tvm.target.Target({"kind": "llvm", "mcpu": name})
    for feature, flag in _VECTOR_FEATURES:
        if codegen.llvm_cpu_has_features(feature, target) and flag not in flags:
            return "x86-64-v3" if {"avx2", "fma"} <= flags else "x86-64"
    return name


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _as_dict(spec: Any) -> dict[str, Any]:
    if isinstance(spec, dict):
        return spec
    text = str(spec)
    if text.lstrip().startswith("{"):
        return dict(json.loads(text))
    kind, _, mcpu = text.partition(":")
    return {"kind": kind, "mcpu": mcpu} if mcpu else {"kind": kind}


def _known(spec: Any) -> bool:
    try:
        tvm.target.Target(_as_dict(spec))
    except Exception:
        return False
    return True


def _unknown(spec: Any) -> tvm.target.Target:
    raise LowRankError(
        f"target {spec!r} is unknown to TVM; use 'llvm', 'llvm:<mcpu>' such as 'llvm:haswell', "
        'or JSON such as \'{"kind": "llvm", "mcpu": "znver4"}\''
    )
