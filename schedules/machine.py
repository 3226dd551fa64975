"""What kernels are built for, from a compilation target."""

from __future__ import annotations

import tvm

from .cuda.arch import CudaArch, arch_of
from .family import Machine
from .x86.isa import AVX512, AVX512_BF16, VectorISA, isa_of


def machine_of(target: tvm.target.Target) -> VectorISA | CudaArch:
    """The instruction set of an llvm target, or the architecture of a CUDA one."""
    return arch_of(target) if target.kind.name == "cuda" else isa_of(target)


def widest(machine: Machine) -> Machine:
    """The machine of the same name that has kernels of all families: records and models are its."""
    return AVX512_BF16 if machine == AVX512 else machine
