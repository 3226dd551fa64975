"""Calls of kernels that follow each other become one call of a function that runs them all.

A call costs the virtual machine about a microsecond: it allocates the output, passes tensors
and lets them go; and the kernel starts its threads anew. Of

    lv = call_tir(conv2d, (x, w0), T0)
    lv1 = call_tir(conv2d1, (lv, w1), T1)
    gv = call_tir(conv2d2, (lv1, w2), T2)

this pass makes

    several = call_tir(calls, (x, weights), (T2, Workspace))
    gv = several[0]

where ``calls`` starts the threads once and passes pointers to the stages of the kernels.
``weights`` are the constants, one after the other; ``lv`` and ``lv1`` lie in the workspace, each
for as long as it is read, and so does what the stages of a kernel share. A stage is a function of
its own, so a kernel that is called often is compiled once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm_lowrank.passes.graph import Rewriter, constant, is_constant, op_name, static_shape
from tvm_lowrank.schedules.x86 import barrier
from tvm_lowrank.schedules.x86.emitter import ALIGNMENT
from tvm_lowrank.schedules.x86.stages import Stages, stages_of
from tvm_lowrank.schedules.x86.subroutines import NOTES, Place, StageCall, emit_calls
from tvm_lowrank.schedules.x86.tir_pipeline import FLAT
from tvm_lowrank.schedules.x86.workspace import Lifetime, plan_offsets

_VIEWS = ("reshape", "flatten", "squeeze", "expand_dims")
_BYTES = 4


@tvm.transform.module_pass(opt_level=0, name="MergeCalls")
class MergeCalls:
    """Merges two and more neighbouring calls of the plugin's x86 kernels in ``main``.

    Reshapes between them are free and join; any other operator stays where it is, between two
    merged calls, and so does a kernel whose stages hand each other values outside of memory. What
    comes out builds with the TIR pipeline ``"lowrank"`` only, since TVM's own gives every function
    the interface for tensors.

    Parameters
    ----------
    target : tvm.target.Target
        What the module is to be built for.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self._code = barrier.code_for(target)

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite the module."""
        names = [gvar.name_hint for gvar in mod.get_global_vars()]
        if "main" not in names or not isinstance(mod["main"], relax.Function):
            return mod
        merger = _Merger(mod, self._code)
        return merger.run() if merger.runs else mod


@dataclass(eq=False)
class _Memory:
    """What a run reads from outside (``outside``), or memory that its kernels write.

    ``first`` and ``last`` are the numbers of the first and the last call that it is an argument of,
    ``escapes`` the variables by which what follows the run knows it.
    """

    shape: tuple[int, ...]
    first: int
    last: int
    outside: relax.Expr | None = None
    escapes: list[relax.Var] = field(default_factory=list)


class _Run:
    """Neighbouring bindings that may become one call."""

    def __init__(self, is_kernel: Callable[[tvm.ir.GlobalVar], bool]) -> None:
        self.bindings: list[Any] = []
        self.calls: list[tuple[tvm.ir.GlobalVar, list[_Memory]]] = []
        self.memories: list[_Memory] = []
        self._is_kernel = is_kernel
        self._of: dict[relax.Expr, _Memory] = {}

    def take(self, binding: Any) -> bool:
        """Add a binding that follows; False where it cannot be part of this run."""
        value, shape = binding.value, static_shape(binding.var)
        if shape is None:
            return False
        if op_name(value) in _VIEWS:
            if static_shape(value.args[0]) is None:
                return False
            self._of[binding.var] = self._read(value.args[0])
        elif not self._call(binding.var, value, shape):
            return False
        self.bindings.append(binding)
        return True

    def _call(self, var: relax.Var, value: relax.Expr, shape: tuple[int, ...]) -> bool:
        name = op_name(value)
        if name not in ("call_tir", "call_tir_inplace") or not self._is_kernel(value.args[0]):
            return False
        args = list(value.args[1])
        if any(static_shape(arg) is None for arg in args):
            return False
        number = len(self.calls)
        if name == "call_tir_inplace":
            # Kernels write their last argument. Memory from outside is left to a call of its own.
            written = self._of.get(args.pop())
            if written is None or written.outside is not None:
                return False
        else:
            written = _Memory(shape, number, number)
            self.memories.append(written)
        operands = [*(self._read(arg) for arg in args), written]
        for memory in operands:
            memory.last = number
        self.calls.append((value.args[0], operands))
        self._of[var] = written
        return True

    def _read(self, expr: relax.Expr) -> _Memory:
        if expr not in self._of:
            shape, number = static_shape(expr), len(self.calls)
            assert shape is not None
            self._of[expr] = _Memory(shape, number, number, outside=expr)
            self.memories.append(self._of[expr])
        return self._of[expr]

    def find_escapes(self, users: dict[Any, int]) -> None:
        """Note which variables are read after the run, of the readers that each has in all."""
        inside = Counter(
            var for binding in self.bindings for var in relax.analysis.free_vars(binding.value)
        )
        for binding in self.bindings:
            if users.get(binding.var, 0) > inside[binding.var]:
                self._of[binding.var].escapes.append(binding.var)


class _Merger(Rewriter):
    """``runs`` are those that are worth a function, ``code`` that of its barriers."""

    def __init__(self, mod: tvm.IRModule, code: str | None) -> None:
        super().__init__(mod)
        self._code = code
        self._taken_apart: dict[tvm.ir.GlobalVar, Stages | None] = {}
        self.runs = [run for run in self._find() if len(run.calls) > 1]
        self._ends = {run.bindings[-1].var: run for run in self.runs}
        self._inside = {binding.var for run in self.runs for binding in run.bindings}
        self._functions: dict[tvm.ir.GlobalVar, list[tvm.ir.GlobalVar]] = {}
        self._readers = self._readers_of_constants()

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        """All of a run is written where it ends; nothing else reads it before."""
        if var in self._ends:
            self._write(self._ends[var])
            return self.values.get(var)
        return None if var in self._inside else super().rewrite(var, value)

    def _find(self) -> list[_Run]:
        runs = [_Run(self._is_kernel)]
        for binding in self.bindings or []:
            if not runs[-1].take(binding):
                runs.append(_Run(self._is_kernel))
                runs[-1].take(binding)
        return runs

    def _is_kernel(self, gvar: tvm.ir.GlobalVar) -> bool:
        return self._stages(gvar) is not None

    def _stages(self, kernel: tvm.ir.GlobalVar) -> Stages | None:
        """The stages of a flat kernel, None for any other function."""
        if kernel not in self._taken_apart:
            func = self.mod[kernel]
            flat = FLAT in (func.attrs or {})
            self._taken_apart[kernel] = stages_of(func) if flat else None
        return self._taken_apart[kernel]

    def _write(self, run: _Run) -> None:
        run.find_escapes(self.users)
        outside = [memory for memory in run.memories if memory.outside is not None]
        made = [memory for memory in run.memories if memory.outside is None]
        results = [memory for memory in made if memory.escapes]
        local = [memory for memory in made if not memory.escapes]
        memories = [self._memories(kernel, i) for i, (kernel, _) in enumerate(run.calls)]
        notes = _Memory((NOTES,), 0, len(run.calls))
        local += [*itertools.chain(*memories), notes]
        lifetimes = [Lifetime(_BYTES * math.prod(m.shape), m.first, m.last) for m in local]
        offsets, total = plan_offsets(lifetimes, ALIGNMENT)

        weights = [memory for memory in outside if self._is_own(memory)]
        others = [memory for memory in outside if memory not in weights]
        joined, starts = _join([memory.outside for memory in weights])
        args = [self.substitute(memory.outside) for memory in others] + joined
        written = [static_shape(memory.escapes[0]) for memory in results]
        written.append((total // _BYTES,))

        places = {memory: Place(i) for i, memory in enumerate(others)}
        places |= {m: Place(len(others), start) for m, start in zip(weights, starts, strict=True)}
        places |= {memory: Place(i) for i, memory in enumerate(results, start=len(args))}
        workspace = len(args) + len(results)
        for memory, offset in zip(local, offsets, strict=True):
            places[memory] = Place(workspace, offset // _BYTES)
        parameters = [
            tirx.decl_buffer(shape, "float32", name=f"tensor{i}", data_alignment=ALIGNMENT)
            for i, shape in enumerate([*map(static_shape, args), *written])
        ]
        calls = [
            call
            for (kernel, operands), shared in zip(run.calls, memories, strict=True)
            for call in self._calls(kernel, [places[memory] for memory in (*operands, *shared)])
        ]
        func = emit_calls(parameters, calls, places[notes], self._code)
        gvar = self.builder.add_func(func, "lowrank_calls")
        types = [relax.TensorType(shape, "float32") for shape in written]
        value = self.emit(relax.call_tir(gvar, args, types))
        for index, memory in enumerate(results):
            self._give(memory, self.emit(relax.TupleGetItem(value, index)))
        for memory, tensor in zip(others, args, strict=False):
            self._give(memory, tensor)

    def _give(self, memory: _Memory, tensor: relax.Expr) -> None:
        """The variables that what follows reads, as views of one tensor."""
        for var in memory.escapes:
            shape = static_shape(var)
            same = shape == static_shape(tensor)
            self.values[var] = tensor if same else self.emit(relax.op.reshape(tensor, shape))

    def _readers_of_constants(self) -> dict[relax.Expr, set[Any]]:
        """The runs, and the bindings outside of them, that read each constant."""
        runs = {binding.var: run for run in self.runs for binding in run.bindings}
        readers: dict[relax.Expr, set[Any]] = defaultdict(set)
        for binding in self.bindings or []:
            reader = runs.get(binding.var, binding.var)

            def visit(expr: relax.Expr, reader: Any = reader) -> None:
                if is_constant(expr):
                    readers[expr].add(reader)

            relax.analysis.post_order_visit(binding.value, visit)
        return readers

    def _is_own(self, memory: _Memory) -> bool:
        """Whether it is a constant of one run alone, so that joining does not make it twice."""
        expr = memory.outside
        return is_constant(expr) and len(self._readers[expr]) == 1 and not memory.escapes

    def _memories(self, kernel: tvm.ir.GlobalVar, number: int) -> list[_Memory]:
        """What the stages of a kernel share during the call of a number."""
        stages = self._stages(kernel)
        assert stages is not None
        return [_Memory((size,), number, number) for size in stages.shared]

    def _calls(self, kernel: tvm.ir.GlobalVar, places: Sequence[Place]) -> list[StageCall]:
        """A call of a kernel as calls of its stages, which are added to the module once."""
        found = self._stages(kernel)
        assert found is not None
        if kernel not in self._functions:
            name = f"{kernel.name_hint}_stage"
            functions = [self.builder.add_func(stage.func, name) for stage in found.stages]
            self._functions[kernel] = functions
        return [
            StageCall(function, stage.extent, tuple(places[i] for i in stage.arguments))
            for function, stage in zip(self._functions[kernel], found.stages, strict=True)
        ]


def _join(constants: Sequence[relax.Expr]) -> tuple[list[relax.Expr], list[int]]:
    """Constants as one, if there are any, and where in it each starts.

    One tensor is passed and checked faster than many, in much less code.
    """
    arrays = [np.from_dlpack(expr.value).ravel() for expr in constants]
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.size * _BYTES // ALIGNMENT) * ALIGNMENT // _BYTES
    whole = np.zeros(size, np.float32)
    for start, array in zip(starts, arrays, strict=True):
        whole[start : start + array.size] = array
    return [constant(whole)] if arrays else [], starts
