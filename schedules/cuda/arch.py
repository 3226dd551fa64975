"""The CUDA architecture of a compilation target: its limits, and the rates of its usual card."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

# Limits that hold for every architecture from sm_70 on.
WARP = 32
MOST_THREADS = 1024
MOST_BLOCKS_X = 2**31 - 1
MOST_BLOCKS_YZ = 65535
# Shared memory that a kernel may declare without asking the driver for more.
STATIC_SHARED_BYTES = 48 << 10
REGISTERS_A_THREAD = 255
# Of a multiprocessor.
REGISTERS = 65536


@dataclass(frozen=True)
class CudaArch:
    """What a kernel and the cost model have to know of a GPU.

    ``lanes`` is what ranks and channels are rounded to: the extent of a tensor core's tile, which
    is also the least tile of the float32 kernels. ``block`` is 1: maps between kernels are NCHW.

    ``multiprocessors``, ``gflops`` (float32, a multiplication and an addition are two),
    ``tensor_gflops`` (float16 in, float32 sums) and ``gigabytes`` (of memory, a second) are the
    published figures of the architecture's usual data-centre card.
    The rest are limits of one multiprocessor. With ``loops``, kernels come as loops that a
    processor runs in one thread (see `threads`).
    """

    name: str
    multiprocessors: int
    gflops: float
    tensor_gflops: float
    gigabytes: float
    threads: int
    shared_bytes: int
    registers: int = REGISTERS
    blocks: int = 32
    lanes: int = 16
    block: int = 1
    loops: bool = False


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        CudaArch("sm_75", 40, 8_100, 65_000, 320, 1024, 64 << 10, blocks=16),  # T4
        CudaArch("sm_80", 108, 19_500, 312_000, 1_555, 2048, 164 << 10),  # A100
        CudaArch("sm_86", 84, 37_400, 150_000, 696, 1536, 100 << 10, blocks=16),  # A40
        CudaArch("sm_89", 142, 91_600, 362_000, 864, 1536, 100 << 10, blocks=24),  # L40S
        CudaArch("sm_90", 132, 66_900, 989_000, 3_350, 2048, 228 << 10),  # H100 SXM
    )
}
# What is compiled for when neither the user nor a GPU names an architecture.
DEFAULT = "sm_80"


def arch_of(target: tvm.target.Target) -> CudaArch:
    """The architecture that code for a CUDA target is for.

    One that is not listed has the figures of the newest listed one before it, under its own name.
    """
    name = str(target.attrs.get("arch", DEFAULT))
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    older = [arch for arch in ARCHITECTURES.values() if version_of(arch.name) <= version_of(name)]
    nearest = max(
        older or ARCHITECTURES.values(),
        key=lambda arch: version_of(arch.name) * (1 if older else -1),
    )
    return CudaArch(**{**nearest.__dict__, "name": name})


def version_of(name: str) -> int:
    """The number of an architecture: 90 for ``sm_90`` and ``sm_90a``."""
    digits = "".join(filter(str.isdigit, name.partition("_")[2]))
    return int(digits or 0)
