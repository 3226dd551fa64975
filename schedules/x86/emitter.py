"""A small builder of TIR for straight-line vector code on flat float32 buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

from tvm import ir, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.tirx import ForKind

from .isa import VectorISA
from .tir_pipeline import FLAT

Index: TypeAlias = "int | ir.Expr"
LoopKind: TypeAlias = Literal["serial", "parallel", "unroll"]

_LOOP_KINDS = {
    "serial": ForKind.SERIAL,
    "parallel": ForKind.PARALLEL,
    "unroll": ForKind.UNROLLED,
}

# TVM lowers smaller allocations to the stack, where LLVM promotes them to registers; from this
# size on they become calls of TVMBackendAllocWorkspace.
_WORKSPACE_BYTES = 1024
# What is smaller is moved by one thread: starting the others costs more.
_SERIAL_BYTES = 1 << 15
# Bytes that the data of every buffer is a multiple of from zero.
ALIGNMENT = 64


def quotient(value: Index, divisor: int) -> Index:
    """``value // divisor`` for a value that is not negative."""
    if isinstance(value, int) or divisor == 1:
        return value if divisor == 1 else value // divisor
    return tirx.truncdiv(value, divisor)


def remainder(value: Index, divisor: int) -> Index:
    """``value % divisor`` for a value that is not negative."""
    if isinstance(value, int) or divisor == 1:
        return 0 if divisor == 1 else value % divisor
    return tirx.truncmod(value, divisor)


def clamp_low(value: Index, low: int) -> Index:
    """``max(value, low)``, folded when both are numbers."""
    return max(value, low) if isinstance(value, int) else tirx.max(value, low)


def clamp_high(value: Index, high: int) -> Index:
    """``min(value, high)``, folded when both are numbers."""
    return min(value, high) if isinstance(value, int) else tirx.min(value, high)


def moving(size: int) -> LoopKind:
    """The kind of a loop that moves ``size`` bytes."""
    return "serial" if size < _SERIAL_BYTES else "parallel"


class Emitter:
    """Collects statements of one PrimFunc over float32 buffers.

    Buffers are addressed by flat element offsets, whatever their shape: a kernel computes the
    offset it means, and TVM has no index arithmetic left to undo. ``load`` and ``store`` move
    ``isa.lanes`` consecutive values.
    """

    def __init__(self, isa: VectorISA) -> None:
        """Start an empty function for ``isa``."""
        self.isa = isa
        self.lanes = isa.lanes
        self._arguments: list[tirx.Buffer] = []
        self._scopes: list[list[tirx.Stmt]] = [[]]
        self._names = 0

    # -- buffers ---------------------------------------------------------------------------

    def argument(self, name: str, shape: Sequence[int]) -> tirx.Buffer:
        """Add a parameter of the given shape; returns its flat view."""
        parameter = tirx.decl_buffer(tuple(shape), "float32", name=name, data_alignment=ALIGNMENT)
        self._arguments.append(parameter)
        size = 1
        for extent in shape:
            size *= extent
        view = tirx.decl_buffer(
            (size,), "float32", name=f"{name}_flat", data_alignment=ALIGNMENT, scope="global"
        )
        self._emit(tirx.DeclBuffer(view, data=tirx.buffer.buffer_data(parameter)))
        return view

    def workspace(self, size: int) -> tirx.Buffer:
        """Allocate ``size`` floats of scratch memory, to be done outside of parallel loops.

        Each execution of the statement is a call into TVM's workspace pool.
        """
        return self._allocate(max(size, _WORKSPACE_BYTES // 4), "workspace")

    def accumulators(self, count: int) -> list[tirx.Buffer]:
        """``count`` vectors that live in registers, not initialised.

        Each is its own allocation of one vector: LLVM turns such an allocation into an SSA
        value, while one array for all of them would stay in memory.
        """
        return [self._allocate(self.lanes, "acc") for _ in range(count)]

    def _allocate(self, size: int, prefix: str) -> tirx.Buffer:
        buffer = tirx.decl_buffer(
            (size,), "float32", name=self._name(prefix), scope="global", data_alignment=ALIGNMENT
        )
        self._emit(tirx.AllocBuffer(buffer))
        return buffer

    # -- values ----------------------------------------------------------------------------

    def bind(self, value: ir.Expr, prefix: str = "t") -> ir.Expr:
        """Compute ``value`` once, here, and return the variable that holds it."""
        variable = tirx.Var(self._name(prefix), value.ty)
        self._emit(tirx.Bind(variable, value))
        return variable

    def bind_index(self, value: Index, prefix: str = "i") -> Index:
        """Like `bind`, for an offset that may be a plain number."""
        return value if isinstance(value, int) else self.bind(value, prefix)

    def constant(self, value: float) -> ir.Expr:
        """A vector with ``value`` in every lane."""
        return tirx.Broadcast(tirx.FloatImm("float32", float(value)), self.lanes)

    def load(self, buffer: tirx.Buffer, offset: Index = 0, stride: int = 1) -> ir.Expr:
        """Load a vector; lanes are ``stride`` elements apart."""
        return self.bind(tirx.BufferLoad(buffer, [tirx.Ramp(offset, stride, self.lanes)]), "v")

    def broadcast(self, buffer: tirx.Buffer, offset: Index) -> ir.Expr:
        """Load one element into all lanes."""
        return self.bind(tirx.Broadcast(tirx.BufferLoad(buffer, [offset]), self.lanes), "b")

    def scalar(self, buffer: tirx.Buffer, offset: Index) -> ir.Expr:
        """Load one element."""
        return self.bind(tirx.BufferLoad(buffer, [offset]), "s")

    def shuffle(self, vectors: Sequence[ir.Expr], lanes: Sequence[int]) -> ir.Expr:
        """The vector of the given lanes of the concatenation of ``vectors``."""
        indices = [tirx.IntImm("int32", lane) for lane in lanes]
        return self.bind(tirx.Shuffle(list(vectors), indices), "p")

    def masked(self, value: ir.Expr, mask: ir.Expr) -> ir.Expr:
        """A vector whose bits are those that are set in ``mask``, an int32, too."""
        bits = tirx.reinterpret(f"int32x{self.lanes}", value)
        bits = tirx.bitwise_and(bits, tirx.Broadcast(mask, self.lanes))
        return self.bind(tirx.reinterpret(f"float32x{self.lanes}", bits), "v")

    def store(self, buffer: tirx.Buffer, value: ir.Expr, offset: Index = 0) -> None:
        """Store a vector."""
        self._emit(tirx.BufferStore(buffer, value, [tirx.Ramp(offset, 1, self.lanes)]))

    def store_scalar(self, buffer: tirx.Buffer, value: ir.Expr, offset: Index) -> None:
        """Store one element."""
        self._emit(tirx.BufferStore(buffer, value, [offset]))

    def value_of(self, accumulator: tirx.Buffer) -> ir.Expr:
        """The value of an accumulator, to be used within the next statement."""
        return tirx.BufferLoad(accumulator, [tirx.Ramp(0, 1, self.lanes)])

    def multiply_add(self, accumulator: tirx.Buffer, a: ir.Expr, b: ir.Expr) -> None:
        """``accumulator += a * b``, which LLVM contracts to one instruction."""
        self.store(accumulator, self.value_of(accumulator) + a * b)

    def prefetch(self, buffer: tirx.Buffer, offset: Index) -> None:
        """Ask for the cache line of an element, which may lie outside of the buffer."""
        address = tirx.call_intrin("handle", "tirx.address_of", tirx.BufferLoad(buffer, [offset]))
        read, all_caches, data = 0, 3, 1
        self._emit(
            tirx.Evaluate(
                tirx.call_intrin("void", "tirx.prefetch", address, read, all_caches, data)
            )
        )

    # -- control ---------------------------------------------------------------------------

    @contextmanager
    def loop(
        self, extent: Index, kind: LoopKind = "serial", start: Index = 0, prefix: str = "i"
    ) -> Iterator[Index]:
        """Emit what the ``with`` block emits as the body of a loop; yields its variable.

        A loop known to run once emits its body alone (TVM's parallel loops excepted). The extent of
        a loop inside of one with another start than 0 must use that one's variable by way of
        `bind_index` only: TVM's CanonicalizeLoop forgets to shift it there.
        """
        if isinstance(extent, int) and extent == 1 and kind != "parallel":
            yield start
            return
        variable = tirx.Var(self._name(prefix), "int32")
        with self._scope() as body:
            yield variable
        self._emit(tirx.For(variable, _expr(start), _expr(extent), _LOOP_KINDS[kind], _seq(body)))

    @contextmanager
    def when(self, condition: ir.Expr) -> Iterator[None]:
        """Emit what the ``with`` block emits as the body of an ``if``."""
        with self._scope() as body:
            yield
        self._emit(tirx.IfThenElse(condition, _seq(body), None))

    @contextmanager
    def attribute(self, key: str, text: str) -> Iterator[None]:
        """Emit what the ``with`` block emits, marked for TVM's code generator."""
        with self._scope() as body:
            yield
        zero = tirx.IntImm("int32", 0)
        self._emit(tirx.AttrStmt(zero, key, ir.StringImm(text), _seq(body)))

    @contextmanager
    def _scope(self) -> Iterator[list[tirx.Stmt]]:
        body: list[tirx.Stmt] = []
        self._scopes.append(body)
        yield body
        self._scopes.pop()

    # -- result ----------------------------------------------------------------------------

    def finish(self) -> tirx.PrimFunc:
        """The function built, private (no global symbol)."""
        # Relax looks for reshapes among kernels of one input and insists on a root block there.
        root = SBlock([], [], [], "root", _seq(self._scopes[0]))
        realize = SBlockRealize([], True, root)
        func = tirx.PrimFunc(self._arguments, realize)
        return func.with_attr({"tirx.noalias": True, "s_tir": True, FLAT: True})

    def _emit(self, stmt: tirx.Stmt) -> None:
        self._scopes[-1].append(stmt)

    def _name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"


def _expr(value: Index) -> ir.Expr:
    return tirx.IntImm("int32", value) if isinstance(value, int) else value


def _seq(stmts: list[tirx.Stmt]) -> tirx.Stmt:
    return stmts[0] if len(stmts) == 1 else tirx.SeqStmt(stmts)
