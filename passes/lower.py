"""The lowering pass of a machine: which one gives its kernels to a normalised network."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm_lowrank.passes import lower_convolutions, lower_for_cuda
from tvm_lowrank.passes.blocked_rewriter import Fuse
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.family import Schedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvWorkload

Choose = Callable[[ConvWorkload], Schedule]


def lower(
    mod: tvm.IRModule, machine: VectorISA | CudaArch, choose: Choose, fuse: Fuse | None = None
) -> tvm.IRModule:
    """A normalised, perhaps factored module with the kernels of a machine.

    ``choose`` gives the schedule of a workload, ``fuse`` that of a chain of convolutions as one
    kernel, on machines that have such kernels.
    """
    if isinstance(machine, CudaArch):
        return lower_for_cuda.LowerForCuda(machine, choose)(mod)
    return lower_convolutions.LowerConvolutions(machine, choose, fuse=fuse)(mod)


def survey(mod: tvm.IRModule, machine: VectorISA | CudaArch, choose: Choose) -> list[ConvWorkload]:
    """The single convolutions of a normalised module that `lower` gives kernels, one a call."""
    if isinstance(machine, CudaArch):
        return lower_for_cuda.survey(mod, machine, choose)
    return lower_convolutions.survey(mod, machine, choose)
