"""Kernels in which each thread runs straight-line code on values that it keeps in registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T
from tvm_lowrank.schedules.transforms.linear_code import LinearCode, Number

from .arch import CudaArch
from .program import Program, Shape, Stage, X, Y

THREADS = 128


class Values:
    """What the code of a thread works with: buffers by name, and register variables."""

    def __init__(self, buffers: Mapping[str, tirx.Buffer]) -> None:
        self.buffers = buffers

    def __getitem__(self, name: str) -> tirx.Buffer:
        """A parameter of the kernel."""
        return self.buffers[name]

    def hold(self, value: ir.Expr) -> ir.Expr:
        """Compute a value here, once."""
        return T.Bind(value)

    def store(self, name: str, value: ir.Expr, place: Sequence[ir.Expr | int]) -> None:
        """Write a value to a parameter."""
        T.buffer_store(self.buffers[name], value, list(place))

    def apply(self, code: LinearCode, values: Sequence[ir.Expr]) -> list[ir.Expr]:
        """The product of a constant matrix with values, in few operations."""

        def scaled(factor: Number, value: ir.Expr) -> ir.Expr:
            if factor == 1:
                return value
            return tirx.const(float(factor), "float32") * value

        def combine(
            left_factor: Number, left: ir.Expr, right_factor: Number, right: ir.Expr | None
        ) -> ir.Expr:
            if right is None:
                return self.hold(scaled(left_factor, left))
            if right_factor == -1:
                return self.hold(scaled(left_factor, left) - right)
            return self.hold(scaled(left_factor, left) + scaled(right_factor, right))

        zero = tirx.const(0, "float32")
        return [zero if out is None else out for out in code.apply(values, combine)]

    def apply_to_grid(
        self, codes: tuple[LinearCode, LinearCode], grid: list[list[ir.Expr]]
    ) -> list[list[ir.Expr]]:
        """One code along each column of a grid of values, then the other along each row."""
        columns = [self.apply(codes[0], column) for column in zip(*grid, strict=True)]
        return [self.apply(codes[1], row) for row in zip(*columns, strict=True)]


def emit_threads(
    count: int,
    parameters: Mapping[str, Shape],
    body: Callable[[ir.Expr, Values], None],
    arch: CudaArch,
    dtypes: Mapping[str, str] | None = None,
) -> tirx.PrimFunc:
    """A kernel of ``count`` threads.

    Parameters
    ----------
    count : int
    parameters : mapping
        Names and shapes of the parameters, in order.
    body : callable
        Emits the code of a thread, given its number and `Values`.
    arch : CudaArch
        With ``loops`` the threads are iterations of a loop.
    dtypes : mapping, optional
        Types of parameters that are not float32.
    """
    dtypes = dtypes or {}
    blocks = -(-count // THREADS)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        values = Values(
            {
                name: T.arg(name, T.buffer(shape, dtypes.get(name, "float32")))
                for name, shape in parameters.items()
            }
        )
        with T.sblock("root"), ExitStack() as stack:
            if arch.loops:
                number = stack.enter_context(T.serial(count))
                body(number, values)
            else:
                block = stack.enter_context(T.thread_binding(blocks, "blockIdx.x"))
                thread = stack.enter_context(T.thread_binding(THREADS, "threadIdx.x"))
                number = T.Bind(block * THREADS + thread)
                if count % THREADS:
                    stack.enter_context(T.If(number < count))
                    stack.enter_context(T.Then())
                body(number, values)
    return builder.get()


def copy_program(arch: CudaArch, floats: int) -> Program:
    """A kernel that copies so many values: what the memory of a GPU can do."""
    shapes = {X: (floats,), Y: (floats,)}
    func = emit_threads(floats, shapes, lambda i, v: v.store(Y, v[X][i], [i]), arch)
    return Program((Stage(func, (X,), Y),), shapes)
