"""What a warpgroup does where rows and columns both lie in shared memory, and to channels of maps.

Rows are core matrices of 8 rows by 16 bytes there, as columns are. A lane's share of the sums (see
`wgmma`) are pairs of columns, 8 apart; `channel_of` says which output channels these are, so that
a lane has 16 bytes of channels that are neighbours in memory, and its quad 64.
"""

from __future__ import annotations

from tvm import ir

from .gemm import Index
from .wgmma import CORE_BYTES, CORE_COLUMNS, ROWS, Factor, call

_COPY = """
__forceinline__ __device__ void tvm_lowrank_copy_line_{bytes}(
    void* to, const {type}* from, int offset, int inside) {{
  unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
      :: "r"(shared), "l"(from + offset), "r"(inside ? 16 : 0) : "memory");
}}
"""
_MULTIPLY = """
__forceinline__ __device__ void {name}(float* sums, const void* rows, const void* columns) {{
  unsigned long long left = (unsigned)__cvta_generic_to_shared(rows) >> 4 & 0x3fff;
  unsigned long long right = (unsigned)__cvta_generic_to_shared(columns) >> 4 & 0x3fff;
  left |= {line}ull << 16 | {across}ull << 32;
  right |= {columns}ull << 16 | {across}ull << 32;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
{products}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}}
"""
_PRODUCT = """  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, 1, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{columns}k{k}.f32.{kind}.{kind} "
      "{{{sums}}}, %{place}, %{next}, p, 1, 1{turned};\\n}}\\n"
      : {kept}
      : "l"(left + {left}), "l"(right + {right}));"""
_FETCH = """
__forceinline__ __device__ void tvm_lowrank_fetch_channels_{bytes}(
    unsigned* held, const {type}* from, int offset) {{
  *(uint4*)held = *(const uint4*)(from + offset);
}}
"""
_UNPACK = {
    2: """
__forceinline__ __device__ void tvm_lowrank_unpack_channels_2(
    float* values, const unsigned* held) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = __half22float2(*(const __half2*)(held + i));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}
""",
    4: """
__forceinline__ __device__ void tvm_lowrank_unpack_channels_4(
    float* values, const unsigned* held) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(held[i]);
}
""",
}
_STORE = {
    2: """
__forceinline__ __device__ void tvm_lowrank_store_channels_2(
    half* to, int offset, const float* values) {
  uint4 written;
  __half2* pairs = (__half2*)&written;
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  *(uint4*)(to + offset) = written;
}
""",
    4: """
__forceinline__ __device__ void tvm_lowrank_store_channels_4(
    float* to, int offset, const float* values) {
  unsigned rounded[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded[i]) : "f"(values[i]));
  *(uint4*)(to + offset) = *(uint4*)rounded;
}
""",
}


def group_of(factor: Factor) -> int:
    """Columns of which each lane of a quad has neighbouring channels: 16 bytes of them."""
    return 4 * factor.per_core


def channel_of(factor: Factor, column: Index | int) -> Index | int:
    """The output channel, of a block's, that a column of its products is."""
    group, at = group_of(factor), column % group_of(factor)
    return column // group * group + at % 8 // 2 * factor.per_core + at // 8 * 2 + at % 2


def column_of(factor: Factor, channel: Index | int) -> Index | int:
    """The inverse of `channel_of`."""
    group, at = group_of(factor), channel % group_of(factor)
    neighbour = at % factor.per_core
    return channel // group * group + neighbour // 2 * 8 + at // factor.per_core * 2 + at % 2


def register_of(factor: Factor, half: Index, group: Index, neighbour: Index) -> Index:
    """Which of a product's registers has a neighbour of a lane's channels, of its row of 2."""
    column = group * (factor.per_core // 2) + neighbour // 2
    return column * 4 + half * 2 + neighbour % 2


def copy(factor: Factor, to: ir.Expr, source: ir.Expr, offset: ir.Expr, inside: ir.Expr) -> ir.Expr:
    """Start a copy of 16 bytes of a map to shared memory; zeros where not ``inside``.

    What is copied lies ``offset`` values after the address ``source``.
    """
    text = _COPY.format(bytes=factor.bytes, type="half" if factor.bytes == 2 else "float")
    name = f"tvm_lowrank_copy_line_{factor.bytes}"
    return call(name, text, to, source, offset, inside.astype("int32"))


def multiply(
    factor: Factor,
    tiles: int,
    columns: int,
    steps: int,
    line: int,
    sums: ir.Expr,
    rows: ir.Expr,
    weights: ir.Expr,
) -> ir.Expr:
    """Start adding a piece's products, when those before have ended.

    What others have copied to shared memory is there for the tensor cores from here on.

    Parameters
    ----------
    factor : Factor
    tiles : int
        Products of 64 rows, 1 or 2.
    columns : int
        Columns of each, a multiple of `group_of` up to 256.
    steps : int
        How many instructions the piece's sum takes.
    line : int
        Units of 16 bytes from 16 bytes of all rows to the next.
    sums, rows, weights : Expr
        Addresses: of the lane's sums, of the warpgroup's first row, of the packed columns.
    """
    name = f"tvm_lowrank_wgmma_shared_{factor.name}_{tiles}x{columns}x{steps}_{line}"
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    products = [
        _PRODUCT.format(
            columns=columns,
            k=factor.k,
            kind=factor.ptx,
            sums=registers,
            place=count,
            next=count + 1,
            turned=", 0, 0" if factor.bytes == 2 else "",
            kept=", ".join(f'"+f"(sums[{tile * count + i}])' for i in range(count)),
            left=2 * step * line + tile * ROWS,
            right=2 * step * columns,
        )
        for step in range(steps)
        for tile in range(tiles)
    ]
    text = _MULTIPLY.format(
        name=name,
        line=line,
        columns=columns,
        across=CORE_COLUMNS * CORE_BYTES >> 4,
        products="\n".join(products),
    )
    return call(name, text, sums, rows, weights)


def fetch(factor: Factor, held: ir.Expr, source: ir.Expr, offset: ir.Expr) -> ir.Expr:
    """Read 16 bytes of channels of a map, ``offset`` values after ``source``, to 4 registers."""
    text = _FETCH.format(bytes=factor.bytes, type="half" if factor.bytes == 2 else "float")
    return call(f"tvm_lowrank_fetch_channels_{factor.bytes}", text, held, source, offset)


def unpack(factor: Factor, values: ir.Expr, held: ir.Expr) -> ir.Expr:
    """What `fetch` read, as float32."""
    name = f"tvm_lowrank_unpack_channels_{factor.bytes}"
    return call(name, _UNPACK[factor.bytes], values, held)


def store(factor: Factor, sink: ir.Expr, offset: ir.Expr, values: ir.Expr) -> ir.Expr:
    """Write 16 bytes of channels of a map, rounded."""
    name = f"tvm_lowrank_store_channels_{factor.bytes}"
    return call(name, _STORE[factor.bytes], sink, offset, values)
