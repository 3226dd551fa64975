"""Instructions of Hopper's tensor cores and of copies to shared memory that run on by themselves.

A warpgroup (four warps) multiplies 64 rows by up to 256 columns with ``wgmma.mma_async``. Rows come
from its registers, which hold them as PTX says ("Register Fragments for wgmma.mma_async"): with
``group = lane / 4`` and ``t = lane % 4``, a lane has of each warp's 16 rows those of ``group`` and
``group + 8``. Columns lie in shared memory in core matrices of 8 columns by 16 bytes.

Here the rows of two (or one) such products are neighbours in memory: the ``2 * tiles`` rows of a
lane are pixels side by side, which it reads and writes as one vector. `place_of_sum` says where it
keeps its sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import ir, tirx

# Warps that multiply together, and the rows of their product.
WARPS, ROWS = 4, 64
# A core matrix: columns, and bytes along the sum.
CORE_COLUMNS, CORE_BYTES = 8, 16

_COPY = """
__forceinline__ __device__ void tvm_lowrank_copy_{bytes}(
    void* to, const float* from, int offset, int inside) {{
  unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], {bytes}, %2;"
      :: "r"(shared), "l"(from + offset), "r"(inside ? {bytes} : 0) : "memory");
}}
"""
_PREPARE = """
__forceinline__ __device__ void tvm_lowrank_barriers_prepare_{count}_{full}_{free}(
    void* barriers) {{
  if (threadIdx.x == 0 && threadIdx.y == 0) {{
    unsigned shared = (unsigned)__cvta_generic_to_shared(barriers);
    for (int i = 0; i < {count}; ++i) {{
      asm volatile("mbarrier.init.shared::cta.b64 [%0], {full};"
          :: "r"(shared + 8 * i) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], {free};"
          :: "r"(shared + 8 * ({count} + i)) : "memory");
    }}
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }}
  __syncthreads();
}}
"""
_SHARE = """
__forceinline__ __device__ void tvm_lowrank_registers_{change}_{count}() {{
  asm volatile("setmaxnreg.{change}.sync.aligned.u32 {count};" ::: "memory");
}}
"""
_WAIT = """
__forceinline__ __device__ void tvm_lowrank_barrier_wait(void* barrier, int parity) {
  unsigned shared = (unsigned)__cvta_generic_to_shared(barrier), turned;
  do {
    asm volatile(
        "{\\n.reg .pred p;\\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\n"
        "selp.u32 %0, 1, 0, p;\\n}" : "=r"(turned) : "r"(shared), "r"(parity) : "memory");
  } while (!turned);
}
"""
_ARRIVE = """
__forceinline__ __device__ void tvm_lowrank_barrier_arrive(void* barrier, int mine) {
  unsigned shared = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile(
      "{\\n.reg .pred p;\\n"
      "setp.ne.b32 p, %1, 0;\\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\\n}" :: "r"(shared), "r"(mine) : "memory");
}
"""
_ARRIVE_COPIED = """
__forceinline__ __device__ void tvm_lowrank_copies_arrive(void* barrier) {
  unsigned shared = (unsigned)__cvta_generic_to_shared(barrier);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared) : "memory");
}
"""
_SEND = """
__forceinline__ __device__ void tvm_lowrank_send_{bytes}(
    void* to, const void* from, void* barrier, int mine) {{
  if (mine) {{
    unsigned shared = (unsigned)__cvta_generic_to_shared(to);
    unsigned told = (unsigned)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], {bytes};"
        :: "r"(told) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], {bytes}, [%2];" :: "r"(shared), "l"(from), "r"(told) : "memory");
  }}
}}
"""
_READ = """
__forceinline__ __device__ void {name}(unsigned* own, const float* rows) {{
  float read[{pieces}][{values}];
#pragma unroll
  for (int piece = 0; piece < {pieces}; ++piece)
    *({vector}*)read[piece] = *(const {vector}*)(rows + piece * 4 * {line});
#pragma unroll
  for (int tile = 0; tile < {tiles}; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      {convert}
}}
"""
_MULTIPLY = """
__forceinline__ __device__ void {name}(float* sums, const unsigned* own, const void* columns) {{
  unsigned long long place = (unsigned)__cvta_generic_to_shared(columns) >> 4 & 0x3fff;
  place |= {along}ull << 16 | {across}ull << 32;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
{products}
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}}
"""
_FINISH = """
__forceinline__ __device__ void tvm_lowrank_wgmma_finish_{sums}(float* sums) {{
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < {sums}; ++i) asm volatile("" : "+f"(sums[i]) :: "memory");
}}
"""
_PRODUCT = """  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, 1, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{columns}k{k}.f32.{kind}.{kind} "
      "{{{sums}}}, {{{own}}}, %{place}, p, 1, 1{turned};\\n}}\\n"
      : {kept}
      : {given}, "l"(place));"""


@dataclass(frozen=True)
class Factor:
    """A type of factors: its name, PTX's, the sum of one instruction, bytes of a factor."""

    name: str
    ptx: str
    k: int
    bytes: int
    convert: str

    @property
    def per_core(self) -> int:
        """Factors along the sum in a core matrix."""
        return CORE_BYTES // self.bytes

    def slot_of(self, element: ir.Expr | int) -> ir.Expr | int:
        """Where an element of an instruction's sum stands among its packed columns.

        A lane's registers hold the elements ``t``, ``t + 4``, ... for either type; PTX multiplies
        them by what stands at ``t`` and ``t + 4``, or in pairs at ``2 * t`` and ``2 * t + 8``.
        """
        if self.bytes == 4:
            return element
        return element // 8 * 8 + element % 4 * 2 + element % 8 // 4


# Row `i % 2` of the tile, element `i / 2` (a pair of elements, for halves) of the sum.
TF32 = Factor(
    "tf32",
    "tf32",
    8,
    4,
    'asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(own[4 * tile + i]) : '
    '"f"(read[i / 2][2 * tile + i % 2]));',
)
HALF = Factor(
    "half",
    "f16",
    16,
    2,
    'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(own[4 * tile + i]) : '
    '"f"(read[i / 2 * 2 + 1][2 * tile + i % 2]), "f"(read[i / 2 * 2][2 * tile + i % 2]));',
)


def copy(to: ir.Expr, source: ir.Expr, offset: ir.Expr, size: int, inside: ir.Expr) -> ir.Expr:
    """Start a copy of 4 or 16 bytes to shared memory; zeros where not ``inside``.

    What is copied lies ``offset`` float32 values after the address ``source``.
    """
    text = _COPY.format(bytes=size)
    return call(f"tvm_lowrank_copy_{size}", text, to, source, offset, inside.astype("int32"))


def prepare(barriers: ir.Expr, count: int, full: int, free: int) -> ir.Expr:
    """Set up ``count`` barriers that turn after ``full`` arrivals, and as many after ``free``."""
    name = f"tvm_lowrank_barriers_prepare_{count}_{full}_{free}"
    return call(name, _PREPARE.format(count=count, full=full, free=free), barriers)


def share_registers(change: str, count: int) -> ir.Expr:
    """Have a warpgroup's threads give up registers (``dec``) or get more (``inc``)."""
    text = _SHARE.format(change=change, count=count)
    return call(f"tvm_lowrank_registers_{change}_{count}", text)


def wait(barrier: ir.Expr, parity: ir.Expr) -> ir.Expr:
    """Wait until a barrier has turned from ``parity``; a fresh one has turned from 1."""
    return call("tvm_lowrank_barrier_wait", _WAIT, barrier, parity)


def arrive(barrier: ir.Expr, mine: ir.Expr) -> ir.Expr:
    """An arrival of each thread that is to.

    Not by way of a branch, before which the compiler would let all products end.
    """
    return call("tvm_lowrank_barrier_arrive", _ARRIVE, barrier, mine.astype("int32"))


def arrive_copied(barrier: ir.Expr) -> ir.Expr:
    """One arrival for each thread, as soon as all copies that it has started are there."""
    return call("tvm_lowrank_copies_arrive", _ARRIVE_COPIED, barrier)


def send(to: ir.Expr, source: ir.Expr, size: int, barrier: ir.Expr, mine: ir.Expr) -> ir.Expr:
    """Where ``mine``, start one copy of so many bytes, a multiple of 16, and arrive.

    The barrier does not turn before the copy is there.
    """
    name = f"tvm_lowrank_send_{size}"
    text = _SEND.format(bytes=size)
    return call(name, text, to, source, barrier, mine.astype("int32"))


def read(factor: Factor, tiles: int, line: int, own: ir.Expr, rows: ir.Expr) -> ir.Expr:
    """Take a lane's rows of one instruction's sum from shared memory to its registers.

    Parameters
    ----------
    factor : Factor
    tiles : int
        Products of 64 rows, 1 or 2.
    line : int
        Values of shared memory from one element of the sum to the next.
    own, rows : Expr
        Addresses: of ``4 * tiles`` registers; of the lane's first row, element ``t`` of the sum.
    """
    name = f"tvm_lowrank_wgmma_read_{factor.name}_{tiles}_{line}"
    text = _READ.format(
        name=name,
        pieces=factor.k // 4,
        values=2 * tiles,
        tiles=tiles,
        vector=f"float{2 * tiles}",
        line=line,
        convert=factor.convert,
    )
    return call(name, text, own, rows)


def multiply(
    factor: Factor, tiles: int, columns: int, sums: ir.Expr, own: ir.Expr, shared: ir.Expr
) -> ir.Expr:
    """Start adding ``tiles`` products of one instruction's sum; only they are left running.

    Parameters
    ----------
    factor : Factor
    tiles : int
        Products of 64 rows, 1 or 2.
    columns : int
        Columns of each, a multiple of 8 up to 256.
    sums, own, shared : Expr
        Addresses: of the lane's sums; of what `read` left; of the packed columns in shared memory.
    """
    name = f"tvm_lowrank_wgmma_{factor.name}_{tiles}x{columns}"
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    products = []
    for tile in range(tiles):
        kept = ", ".join(f'"+f"(sums[{place_of_sum(i, tile, tiles)}])' for i in range(count))
        products.append(
            _PRODUCT.format(
                columns=columns,
                k=factor.k,
                kind=factor.ptx,
                sums=registers,
                own=", ".join(f"%{count + i}" for i in range(4)),
                place=count + 4,
                turned=", 0" if factor.bytes == 2 else "",
                kept=kept,
                given=", ".join(f'"r"(own[{4 * tile + i}])' for i in range(4)),
            )
        )
    text = _MULTIPLY.format(
        name=name,
        along=columns,
        across=CORE_COLUMNS * CORE_BYTES >> 4,
        products="\n".join(products),
    )
    return call(name, text, sums, own, shared)


def place_of_sum(register: int, tile: int, tiles: int) -> int:
    """Where a lane keeps a register of a product: rows side by side for each column."""
    column, row = register // 4 * 2 + register % 2, register // 2 % 2
    return column * 2 * tiles + 2 * tile + row


def finish(count: int, sums: ir.Expr) -> ir.Expr:
    """Wait for all products; only then may the sums be read."""
    return call(f"tvm_lowrank_wgmma_finish_{count}", _FINISH.format(sums=count), sums)


def call(name: str, text: str, *arguments: ir.Expr) -> ir.Expr:
    """A call of a function that the text of CUDA source defines, with the kernel's source."""
    return tirx.call_intrin("void", "tirx.cuda.func_call", name, *arguments, text)
