"""Targets: the machine at hand, or one the user names."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Collection
from typing import Any

import tvm
from tvm.target import codegen

from tvm_lowrank.cuda import gpu_architecture
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.schedules.cuda.arch import DEFAULT, version_of
from tvm_lowrank.schedules.kernels import lacking
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.isa import architecture_of
from tvm_lowrank.threads import physical_cores

# Vector instructions that kernels are built with: LLVM's name, and that of /proc/cpuinfo.
_VECTOR_FEATURES = (("avx512f", "avx512f"), ("avx2", "avx2"), ("fma", "fma"))
# Older architectures are not compiled for by current CUDA toolkits.
_OLDEST_CUDA = 75


def parse_target(spec: Any = None) -> tvm.target.Target:
    """A complete target from what a user writes.

    Parameters
    ----------
    spec : None, str, dict or tvm.target.Target
        None or ``"llvm"`` is this machine's processor; a string may be JSON
        (``'{"kind": "llvm", "mcpu": "haswell"}'``), another llvm processor as ``"llvm:haswell"``,
        ``"cuda"`` (this machine's GPU, else `arch.DEFAULT`) or ``"cuda:sm_90"``.

    Raises
    ------
    LowRankError
        The target is unknown to TVM, is neither an llvm nor a CUDA target, or names an unknown
        processor or architecture.
    """
    if spec is None or spec == "llvm":
        return host_target()
    if isinstance(spec, tvm.target.Target):
        target = spec
    else:
        target = tvm.target.Target(_as_dict(spec)) if _known(spec) else _unknown(spec)
    if target.kind.name == "cuda":
        return _cuda_target(spec, target)
    if target.kind.name != "llvm":
        raise LowRankError(
            f"target {target.kind.name!r} has no kernels here; use 'llvm', 'llvm:<mcpu>', 'cuda', "
            "'cuda:<arch>' or JSON of such a target"
        )
    mcpu = str(target.attrs.get("mcpu", "")) if target.attrs else ""
    if mcpu and not codegen.llvm_is_valid_cpu(mcpu, str(target.attrs.get("mtriple", ""))):
        raise LowRankError(
            f"target names the processor {mcpu!r}, which LLVM does not know; "
            "see tvm.target.codegen.llvm_get_cpu_archlist()"
        )
    return target


def _cuda_target(spec: Any, target: tvm.target.Target) -> tvm.target.Target:
    """A CUDA target with the architecture that was named, else the GPU's, and a host."""
    if isinstance(spec, tvm.target.Target):
        fields = dict(json.loads(str(spec)))
        named = str(fields.get("arch", ""))
    else:
        fields = _as_dict(spec)
        named = str(fields.get("arch", ""))
    arch = named or gpu_architecture() or DEFAULT
    if not re.fullmatch(r"sm_\d{2,3}[a-z]?", arch) or version_of(arch) < _OLDEST_CUDA:
        raise LowRankError(
            f"target names the architecture {arch!r}; use sm_{_OLDEST_CUDA} or later, such as "
            "'cuda:sm_80' or 'cuda:sm_90'"
        )
    host = fields.pop("host", None) or dict(json.loads(str(host_target())))
    return tvm.target.Target({**fields, "kind": "cuda", "arch": arch}, host=host)


def host_target() -> tvm.target.Target:
    """The llvm target of the machine that runs this."""
    return tvm.target.Target({"kind": "llvm", "mcpu": _host_mcpu(), "num-cores": physical_cores()})


def require_runnable(target: tvm.target.Target) -> None:
    """Check that this machine can run what is built for ``target``, where it is a processor.

    Raises
    ------
    LowRankError
        It is of another family of processors, or lacks vector instructions that the target has.
    """
    if target.kind.name == "cuda":
        return  # what cannot be measured here is ranked by a model
    architecture, here = architecture_of(target), platform.machine()
    missing = []
    if architecture and architecture != host_architecture():
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


def require_kernels(target: tvm.target.Target, algorithms: Collection[str]) -> None:
    """Check that algorithms which round are there for ``target``, if some are among those named.

    Raises
    ------
    LowRankError
        The target has no kernel of one of them.
    """
    if missing := lacking(machine_of(target), algorithms):
        name, reason = next(iter(missing.items()))
        raise LowRankError(
            f"algorithm {name} has no kernel for {target_key(target)} ({reason}); leave it out"
        )


def is_measurable(target: tvm.target.Target) -> bool:
    """Whether what is built for ``target`` runs on this machine: CUDA code needs a GPU of its kind.

    Code for one architecture runs on later ones of the same first digits, as sm_80's on sm_86.
    """
    if target.kind.name != "cuda":
        return True
    here, wanted = gpu_architecture(), str(target.attrs["arch"])
    if here is None:
        return False
    return version_of(here) // 10 == version_of(wanted) // 10 and version_of(here) >= version_of(
        wanted
    )


def host_architecture() -> str:
    """This machine's family of processors as in a target's triple."""
    return platform.machine().replace("arm64", "aarch64").replace("AMD64", "x86_64")


def target_key(target: tvm.target.Target) -> str:
    """Short name of a target for folders and records, as ``llvm-znver4`` or ``cuda-sm_90``."""
    if target.kind.name == "cuda":
        return f"cuda-{target.attrs['arch']}"
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
    kind, _, detail = text.partition(":")
    name = "arch" if kind == "cuda" else "mcpu"
    return {"kind": kind, name: detail} if detail else {"kind": kind}


def _known(spec: Any) -> bool:
    try:
        tvm.target.Target(_as_dict(spec))
    except Exception:
        return False
    return True


def _unknown(spec: Any) -> tvm.target.Target:
    raise LowRankError(
        f"target {spec!r} is unknown to TVM; use 'llvm', 'llvm:<mcpu>' such as 'llvm:haswell', "
        "'cuda', 'cuda:<arch>' such as 'cuda:sm_90', "
        'or JSON such as \'{"kind": "llvm", "mcpu": "znver4"}\''
    )
