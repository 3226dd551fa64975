"""The vector instruction set of a compilation target."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.target.codegen import llvm_cpu_has_features


@dataclass(frozen=True)
class VectorISA:
    """What a kernel has to know of the processor.

    ``lanes`` is the number of float32 values in a vector, and with it the channel block of every
    ``NCHWc`` map; ``registers`` is the number of architectural vector registers; ``bfloat16`` says
    whether there are products of bfloat16 pairs.
    """

    name: str
    lanes: int
    registers: int
    bfloat16: bool = False

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        return 4 * self.lanes

    @property
    def block(self) -> int:
        """Channels in a block of a map."""
        return self.lanes


AVX512 = VectorISA("avx512", 16, 32)
# Its records and cost model are those of AVX-512: kernels of float32 are the same.
AVX512_BF16 = VectorISA("avx512", 16, 32, bfloat16=True)
AVX2 = VectorISA("avx2", 8, 16)
NEON = VectorISA("neon", 4, 32)
GENERIC = VectorISA("generic", 4, 16)


def isa_of(target: tvm.target.Target) -> VectorISA:
    """Return the instruction set that code for ``target`` may use.

    Only the target is asked, never the machine that compiles: the two differ when a network is
    compiled for another computer. Targets that are not LLVM CPUs count as ``GENERIC``.
    """
    if target.kind.name != "llvm":
        return GENERIC
    if llvm_cpu_has_features("avx512f", target):
        return AVX512_BF16 if llvm_cpu_has_features("avx512bf16", target) else AVX512
    if llvm_cpu_has_features(["avx2", "fma"], target):
        return AVX2
    if architecture_of(target) == "aarch64":
        return NEON
    return GENERIC


def architecture_of(target: tvm.target.Target) -> str:
    """The family of processors that a target's triple names; empty if it has none."""
    triple = str(target.attrs.get("mtriple", "")) if target.attrs else ""
    return triple.partition("-")[0].replace("arm64", "aarch64")
