"""The TF32 product of a warp, ``mma.m16n8k8``: which lane holds what, described for `tensorize`.

The layouts are those of PTX (section "Matrix Fragments for mma.m16n8k8"): a fragment is a buffer of
[lane][register of the lane], in TVM's scope ``warp``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from tvm import ir, tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .arch import WARP

M, N, K = 16, 8, 8
NAME = "tvm_lowrank.mma.tf32"
# Registers of a lane for each of the three fragments.
LEFT, RIGHT, SUMS = M * K // WARP, K * N // WARP, M * N // WARP
_DROPPED_BITS = 13
_ROUND = """
__forceinline__ __device__ float tvm_lowrank_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}
"""
_MULTIPLY = """
__forceinline__ __device__ void tvm_lowrank_mma_tf32(
    float& c0, float& c1, float& c2, float& c3,
    float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
"""


def left_place(row: ir.Expr, k: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
    """Lane and register of an element of the left factor, M x K."""
    return row % 8 * 4 + k % 4, k // 4 * 2 + row // 8


def right_place(k: ir.Expr, column: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
    """Lane and register of an element of the right factor, K x N."""
    return column * 4 + k % 4, k // 4


def sums_place(row: ir.Expr, column: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
    """Lane and register of an element of the sums, M x N."""
    return row % 8 * 4 + column // 2, row // 8 * 2 + column % 2


def round_array(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to TF32's 10 bits of mantissa, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    half, mask = 1 << (_DROPPED_BITS - 1), ~((1 << _DROPPED_BITS) - 1) & 0xFFFFFFFF
    rounded = ((bits + half) & mask).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def round_value(value: ir.Expr, loops: bool) -> ir.Expr:
    """The same of one value in a kernel; on a GPU one instruction."""
    if not loops:
        call = "tirx.cuda.func_call"
        return tirx.call_intrin("float32", call, "tvm_lowrank_tf32", value, _ROUND)
    bits = tirx.reinterpret("uint32", value) + tirx.const(1 << (_DROPPED_BITS - 1), "uint32")
    mask = tirx.const(~((1 << _DROPPED_BITS) - 1) & 0xFFFFFFFF, "uint32")
    return tirx.reinterpret("float32", tirx.bitwise_and(bits, mask))


@functools.cache
def register() -> str:
    """Register the product with TVM, once; its name."""
    TensorIntrin.register(NAME, _function(_multiply), _function(_instruct), override=True)
    return NAME


def _function(body: Callable[[tirx.Buffer, tirx.Buffer, tirx.Buffer], None]) -> tirx.PrimFunc:
    """A function over the three fragments."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        left, right, sums = (
            T.match_buffer(
                T.arg(f"h{i}", T.handle()),
                (WARP, registers),
                "float32",
                align=64,
                offset_factor=1,
                scope="local",
            )
            for i, registers in enumerate((LEFT, RIGHT, SUMS))
        )
        with T.sblock("root"):
            whole = [b[0:WARP, 0 : int(b.shape[1])] for b in (sums, left, right)]
            T.reads(*whole)
            T.writes(whole[0])
            body(left, right, sums)
    return builder.get()


def _multiply(left: tirx.Buffer, right: tirx.Buffer, sums: tirx.Buffer) -> None:
    with T.grid(M, N, K) as (i, j, k), T.sblock("multiply"):
        vi, vj, vk = T.axis.remap("SSR", [i, j, k])
        at = list(sums_place(vi, vj))
        term = left[left_place(vi, vk)] * right[right_place(vk, vj)]
        T.buffer_store(sums, sums[tuple(at)] + term, at)


def _instruct(left: tirx.Buffer, right: tirx.Buffer, sums: tirx.Buffer) -> None:
    """One instruction in each lane, which names the lane's own registers."""
    with T.thread_binding(WARP, "threadIdx.x") as lane, T.sblock("lane"):
        vl = T.axis.spatial(WARP, lane)
        own = [b[vl, 0 : int(b.shape[1])] for b in (sums, left, right)]
        T.reads(*own)
        T.writes(own[0])
        registers = [b[vl, r] for b in (sums, left, right) for r in range(int(b.shape[1]))]
        call = "tirx.cuda.func_call"
        T.evaluate(tirx.call_intrin("void", call, "tvm_lowrank_mma_tf32", *registers, _MULTIPLY))
