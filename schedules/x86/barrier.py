"""Where the threads of one function wait until all of them have come.

TVM's own barrier hands its processor to the system between any two looks for the others, which
takes longer than they mostly need to come. Here a thread looks for a microsecond or two first, so
that a barrier takes hardly longer than the news from one core to another. Threads that do not come
by then may need the processor, and get it.

TIR has no atomic operations on processors: these are LLVM code that TVM links to the function and
inlines.
"""

from __future__ import annotations

import platform
import sys

import tvm
from tvm import ir, tirx

from .isa import architecture_of

# What a thread does between two looks, on architectures that have what the code needs.
_PAUSES = {"x86_64": "pause", "aarch64": "yield"}
# Looks before a thread lets others have its processor: a microsecond or two.
_LOOKS = 48
# Elements of 4 bytes that a barrier needs, and where in them its counters are: each has cache lines
# of its own, since all threads look at the second one while one of them changes it.
WORDS = 64
_THREADS, _CAME = 0, 32

_COME, _ALL_CAME = "lowrank_come", "lowrank_all_came"
_CODE = """
define i32 @lowrank_come(ptr %counter) {{
  %before = atomicrmw add ptr %counter, i32 1 release, align 4
  ret i32 %before
}}

define i32 @lowrank_all_came(ptr %came, ptr %threads, i32 %times) {{
entry:
  %count = load i32, ptr %threads, align 4
  %wanted = mul i32 %count, %times
  br label %look

look:
  %looks = phi i32 [ 0, %entry ], [ %next, %wait ]
  %found = load atomic i32, ptr %came acquire, align 4
  %all = icmp sge i32 %found, %wanted
  br i1 %all, label %end, label %wait

wait:
  call void asm sideeffect "{pause}", "~{{memory}}"()
  %next = add i32 %looks, 1
  %patient = icmp slt i32 %next, {looks}
  br i1 %patient, label %look, label %end

end:
  %result = zext i1 %all to i32
  ret i32 %result
}}
"""


def code_for(target: tvm.target.Target) -> str | None:
    """The LLVM code that a `Barrier` calls; None where only TVM's own barrier will do.

    That is on systems without ``sched_yield``, and on architectures that may lack atomic
    instructions.
    """
    triple = str(target.attrs.get("mtriple", "")) if target.attrs else ""
    windows = "windows" in triple if triple else sys.platform == "win32"
    pause = _PAUSES.get(architecture_of(target) or platform.machine().replace("arm64", "aarch64"))
    return None if windows or pause is None else _CODE.format(pause=pause, looks=_LOOKS)


class Barrier:
    """Emits barriers of all threads of a parallel region, one after the other.

    Parameters
    ----------
    buffer : tirx.Buffer
        Of elements of 4 bytes.
    offset : int
        Where in it `WORDS` elements are free, from a cache line on.
    code : str
        Of `code_for`.
    """

    def __init__(self, buffer: tirx.Buffer, offset: int, code: str) -> None:
        self._buffer, self._counters = buffer, (offset + _THREADS, offset + _CAME)
        self._threads, self._came = (
            tirx.address_of(tirx.BufferLoad(buffer, [counter])) for counter in self._counters
        )
        self._code = code
        self._times = 0

    def clear(self) -> list[tirx.Stmt]:
        """What is done before the threads are started."""
        zero = tirx.const(0, self._buffer.dtype)
        return [tirx.BufferStore(self._buffer, zero, [counter]) for counter in self._counters]

    def link(self, body: tirx.Stmt) -> tirx.Stmt:
        """The statement that holds all that this barrier emits."""
        return tirx.AttrStmt(
            tirx.IntImm("int32", 0), "pragma_import_llvm", ir.StringImm(self._code), body
        )

    def enter(self) -> tirx.Stmt:
        """What every thread does first; a barrier of TVM's has to follow before `wait` may."""
        return tirx.Evaluate(tirx.call_extern("int32", _COME, self._threads))

    def wait(self) -> list[tirx.Stmt]:
        """What every thread does next, and is through with when all have come."""
        self._times += 1
        come = tirx.Evaluate(tirx.call_extern("int32", _COME, self._came))
        times = tirx.IntImm("int32", self._times)
        all_came = tirx.call_extern("int32", _ALL_CAME, self._came, self._threads, times)
        rest = tirx.Evaluate(tirx.call_extern("int32", "sched_yield"))
        return [come, tirx.While(tirx.EQ(all_came, tirx.IntImm("int32", 0)), rest)]
