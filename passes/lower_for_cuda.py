"""Give convolutions the plugin's CUDA kernels, with what follows them in their epilogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.activations import Activation, find_activations
from tvm_lowrank.passes.fold_affine import is_canonical_conv2d
from tvm_lowrank.passes.graph import (
    Rewriter,
    constant,
    constant_array,
    is_constant,
    op_name,
    static_shape,
)
from tvm_lowrank.passes.grow_epilogues import ACTIVATIONS, append_channelwise
from tvm_lowrank.passes.kernel_calls import Convolution
from tvm_lowrank.passes.lower_reductions import pool_workload
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda import pooling, turn
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.cuda.epilogue import map_shape
from tvm_lowrank.schedules.cuda.program import WEIGHTS, Program, X, Y
from tvm_lowrank.schedules.family import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import conv2d_geometry, product_geometry

_SKIPPED = object()


@tvm.transform.module_pass(opt_level=0, name="LowerForCuda")
class LowerForCuda:
    """Convolutions and dense layers become ``call_tir`` of CUDA kernels on plain NCHW data.

    Elementwise operators with a single reader join the kernel before them: bias, per-channel scale
    and shift, activations, the addition of another tensor. Every other operator stays as it is, for
    TVM's own fusion and DLight schedules.

    Parameters
    ----------
    arch : CudaArch
        The architecture of the target.
    choose : callable
        Takes a `ConvWorkload`, gives the schedule to emit it with.
    """

    def __init__(self, arch: CudaArch, choose: Callable[[ConvWorkload], Schedule]) -> None:
        self.arch = arch
        self.choose = choose

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite ``main``."""
        return _Lowerer(mod, self.arch, self.choose).run()


def survey(
    mod: tvm.IRModule, arch: CudaArch, choose: Callable[[ConvWorkload], Schedule]
) -> list[ConvWorkload]:
    """The convolutions and dense layers that `LowerForCuda` gives kernels, one a call."""
    lowerer = _Lowerer(mod, arch, choose, only_survey=True)
    lowerer.run()
    return lowerer.workloads


@dataclass(frozen=True)
class KernelCall:
    """A convolution's kernels in a network, or pooling (no ``workload``) in its input's layout.

    ``read_elsewhere`` tells whether something that is neither reads the result.
    """

    workload: ConvWorkload | None
    reads: tuple[Map, ...]
    writes: Map
    read_elsewhere: bool = False


@dataclass(frozen=True)
class Map:
    """A map between kernels: its number in the network, and its NCHW shape."""

    number: int
    shape: tuple[int, ...]


def calls_of(
    mod: tvm.IRModule, arch: CudaArch, choose: Callable[[ConvWorkload], Schedule]
) -> list[KernelCall]:
    """The convolutions that `LowerForCuda` gives kernels, in order, with the maps between them."""
    lowerer = _Lowerer(mod, arch, choose, only_survey=True)
    lowerer.run()
    # What stands for these reads nothing, so all that is read is read by others.
    lowered = Rewriter(lowerer.builder.get())
    numbers: dict[Any, int] = {}

    def of(value: relax.Expr) -> Map:
        return Map(numbers.setdefault(value, len(numbers)), static_shape(value) or ())

    return [
        KernelCall(workload, tuple(map(of, reads)), of(result), result in lowered.users)
        for workload, reads, result in lowerer.calls
    ]


@dataclass
class _Pending:
    """A convolution whose kernel is not written yet, because what follows may join it."""

    source: relax.Expr
    convolution: Convolution
    type: relax.TensorType
    written: relax.Expr | None = None


class _Lowerer(Rewriter):
    """Takes each operator in order; a pending convolution is written when it is read."""

    def __init__(
        self,
        mod: tvm.IRModule,
        arch: CudaArch,
        choose: Callable[[ConvWorkload], Schedule],
        only_survey: bool = False,
    ) -> None:
        super().__init__(mod)
        self.arch = arch
        self.choose = choose
        self.only_survey = only_survey
        self.made = {binding.var: binding.value for binding in self.bindings or []}
        self.workloads: list[ConvWorkload] = []
        self.calls: list[tuple[ConvWorkload | None, list[relax.Expr], relax.Expr]] = []
        self.count = 0
        self.programs: dict[Any, tuple[Program, list[tvm.ir.GlobalVar]]] = {}
        # NCHW maps that are there with channels last too, with values of a kind; which of them
        # nobody reads goes.
        self.twins: dict[tuple[Any, str], relax.Expr] = {}
        self.activations = find_activations(self.bindings or [], self.users)
        self.skipped = {var for found in self.activations.values() for var in found.inner}
        for found in self.activations.values():
            self.users[found.source] -= found.reads - 1

    def rewrite(self, var: relax.Var, value: relax.Expr) -> Any:
        if var in self.skipped:
            return _SKIPPED
        name, result = op_name(value), None
        if var in self.activations:
            result = self._activation(self.activations[var])
        elif name == "nn.conv2d":
            layer = f"conv{self.count}"
            self.count += 1
            result = self._convolution(value, layer)
        elif name == "matmul":
            result = self._dense(value)
        elif name in ("add", "multiply"):
            result = self._binary(name, value)
        elif name == "nn.max_pool2d":
            result = self._pool(value)
        elif name in ACTIVATIONS:
            result = self._append(value.args[0], ACTIVATIONS[name](value), [])
        if result is not None:
            return result
        for inner in self.bindings or []:
            # What was left out for the sake of an activation that found no kernel.
            if var in self.activations and inner.var in self.activations[var].inner:
                self.values[inner.var] = self.emit(self.substitute(inner.value))
        return self.emit(self.substitute(value))

    def resolve(self, value: Any) -> relax.Expr:
        if not isinstance(value, _Pending):
            return value
        if value.written is None:
            value.written = self._write(value)
        return value.written

    # -- what becomes of operators -------------------------------------------------------------

    def _convolution(self, value: relax.Call, layer: str) -> _Pending | None:
        if not is_canonical_conv2d(value):
            return None
        return self._wait(value, conv2d_geometry(value), constant_array(value.args[1]), layer)

    def _dense(self, value: relax.Call) -> _Pending | None:
        geometry = product_geometry(value, self.made)
        if geometry is None:
            return None
        weight = np.ascontiguousarray(constant_array(value.args[1]).T)
        return self._wait(value, geometry, weight.reshape(geometry.weight_shape), None)

    def _pool(self, value: relax.Call) -> relax.Expr | None:
        """Pooling of a map that has its channels last; None if it has not."""
        source = self.substitute(value.args[0])
        shape = static_shape(source)
        if shape is None or len(shape) != 4:
            return None
        n, c, h, w = shape
        workload = pool_workload(value, (n, c, h, w))
        if workload is None or pooling.refuse(workload):
            return None
        if self.only_survey:
            result = self.builder.emit(relax.op.zeros(value.ty.shape, "float32"))
            self.calls.append((None, [source], result))
            return result
        kind = next(
            (k for k in (turn.HALF, turn.TF32, turn.PLAIN) if (source, k) in self.twins), ""
        )
        if not kind:
            return None
        if (workload, kind) not in self.programs:
            self._keep((workload, kind), pooling.emit(workload, kind, self.arch), "cuda_pool")
        return self._call(*self.programs[workload, kind], {X: source})

    def _wait(
        self, value: relax.Call, geometry: ConvGeometry, weight: np.ndarray, layer: str | None
    ) -> _Pending | None:
        """A convolution as a pending kernel; None if no kernel takes it."""
        try:
            workload = ConvWorkload(geometry, self.arch.block)
        except ValueError:
            return None
        if kernels.refuse(workload, self.arch):
            return None
        convolution = Convolution(geometry, weight, layer)
        return _Pending(self.substitute(value.args[0]), convolution, value.ty)

    def _pending(self, expr: relax.Expr) -> _Pending | None:
        """The convolution behind ``expr`` if it takes further steps: nothing else reads it."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, _Pending) and value.written is None and self.users[expr] == 1:
            return value
        return None

    def _append(self, expr: relax.Expr, step: str, operands: list[Any]) -> _Pending | None:
        pending = self._pending(expr)
        if pending is not None:
            pending.convolution.steps.append((step, operands))
        return pending

    def _activation(self, found: Activation) -> _Pending | None:
        pending = self._append(found.source, found.step, [])
        if pending is not None and found.scale != 1:
            channels = pending.convolution.geometry.out_channels
            vector = np.full(channels, found.scale, np.float32)
            append_channelwise(pending.convolution.steps, "multiply", vector)
        return pending

    def _binary(self, name: str, value: relax.Call) -> _Pending | None:
        left, right = value.args
        if is_constant(left) or is_constant(right):
            tensor, const = (right, left) if is_constant(left) else (left, right)
            pending = self._pending(tensor)
            vector = None if pending is None else _channel_vector(const, pending)
            if pending is None or vector is None:
                return None
            append_channelwise(pending.convolution.steps, name, vector)
            return pending
        if name != "add" or left.same_as(right):
            return None
        for here, there in ((right, left), (left, right)):
            pending = self._pending(here)
            if pending is None:
                continue
            other = self.substitute(there)
            shape = map_shape(pending.convolution.geometry)
            if static_shape(other) == static_shape(value) == shape:
                return self._append(here, "residual", [other])
        return None

    # -- kernels -------------------------------------------------------------------------------

    def _write(self, pending: _Pending) -> relax.Expr:
        """Call the kernels of a convolution."""
        convolution = pending.convolution
        workload = convolution.workload(self.arch.block)
        self.workloads.append(workload)
        if self.only_survey:
            result = self.builder.emit(relax.op.zeros(pending.type.shape, "float32"))
            added = [given for step, given in convolution.steps if step == "residual"]
            self.calls.append(
                (workload, [pending.source, *(m for given in added for m in given)], result)
            )
            return result
        schedule = self.choose(workload)
        program, functions = self._program(workload, schedule)
        weight = np.asarray(convolution.weight, np.float32)
        packed = kernels.pack_weights(weight, workload, schedule, self.arch)
        source = self._reshape(pending.source, program.shapes[X])
        values: dict[str, relax.Expr] = {X: source, WEIGHTS: relax.const(packed)}
        operands = [
            operand if isinstance(operand, relax.Expr) else constant(operand)
            for _, given in convolution.steps
            for operand in given
        ]
        values.update(zip(program.operands, operands, strict=True))
        result = self._call(program, functions, values)
        return self._reshape(result, [int(extent) for extent in pending.type.shape])

    def _call(
        self,
        program: Program,
        functions: Sequence[tvm.ir.GlobalVar],
        values: dict[str, relax.Expr],
    ) -> relax.Expr:
        """Call the kernels of a program on what is given; the NCHW map that they make."""
        for stage, gvar in zip(program.stages, functions, strict=True):
            name = stage.writes
            turned = values[stage.reads[0]] if program.twins.get(stage.reads[0]) == name else None
            if (turned, program.kind) in self.twins:
                values[name] = self.twins[turned, program.kind]
                continue
            type = relax.TensorType(program.shapes[name], program.dtype(name))
            call = relax.call_tir(gvar, [values[read] for read in stage.reads], type)
            values[name] = self.emit(call)
            if turned is not None:
                self.twins[turned, program.kind] = values[name]
        if Y in program.twins:
            self.twins[values[Y], program.kind] = values[program.twins[Y]]
        return values[Y]

    def _reshape(self, value: relax.Expr, shape: Sequence[int]) -> relax.Expr:
        """The same memory as a tensor of another shape: dense layers are convolutions of maps."""
        if static_shape(value) == tuple(shape):
            return value
        return self.emit(relax.op.reshape(value, list(shape)))

    def _program(
        self, workload: ConvWorkload, schedule: Schedule
    ) -> tuple[Program, Sequence[tvm.ir.GlobalVar]]:
        """The kernels of a workload, which are added to the module once."""
        if (workload, schedule) not in self.programs:
            program = kernels.emit(workload, schedule, self.arch)
            self._keep((workload, schedule), program, schedule.kernel)
        return self.programs[workload, schedule]

    def _keep(self, key: Any, program: Program, name: str) -> None:
        """Add the kernels of a program to the module."""
        functions = [
            self.builder.add_func(stage.func, f"lowrank_{name}") for stage in program.stages
        ]
        self.programs[key] = program, functions


def _channel_vector(const: relax.Expr, pending: _Pending) -> np.ndarray | None:
    """A constant operand as one value a channel, or None."""
    array, channels = constant_array(const), pending.convolution.geometry.out_channels
    if array.dtype != np.float32 or not array.size:
        return None
    if (array == array.reshape(-1)[0]).all() and array.ndim <= 4:
        return np.full(channels, array.reshape(-1)[0], np.float32)
    # The axis of the channels is the last of what a dense layer gives.
    last = (channels, 1, 1) if len(pending.type.shape) == 4 else (channels,)
    if array.size == channels and array.shape[-len(last) :] == last:
        return array.reshape(-1)
    return None
