"""Calls of the plugin's x86 kernels, written into a function that a pass builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax, tirx
from tvm_lowrank.passes.graph import Rewriter, constant
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86 import (
    elementwise,
    fused,
    gather,
    interleave,
    layout,
    normalisation,
    packing,
    pooling,
    resizing,
)
from tvm_lowrank.schedules.x86.chain import ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.placement import Images, Part, place
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

# (N, C, H, W); maps of flat tensors (N, C) have one pixel.
Shape = tuple[int, int, int, int]
# A step of an epilogue with its operands: channel vectors for ``bias``, ``affine`` and ``prelu``, a
# blocked tensor for ``residual`` and ``gate``, none for the others.
Step: TypeAlias = tuple[str, list[Any]]


class Weights(Enum):
    """What becomes of the weights and first biases of kernels.

    They are constants of the module; or those of the layers that plans name are its parameters; or
    nothing is laid out, and the module only shows which kernels it would call.
    """

    CONSTANTS = auto()
    PARAMETERS = auto()
    ABSENT = auto()


@dataclass(frozen=True)
class WeightParameter:
    """A parameter that stands for a layer's weight or bias when weights are the function's inputs.

    ``pack`` takes the OIHW weight, or the bias of shape (F,), to the array that the kernel reads.
    """

    layer: str
    kind: str
    pack: Callable[[np.ndarray], np.ndarray]


@dataclass
class Convolution:
    """A convolution to be called: its weight and the epilogue steps with their operands.

    ``layer`` names it as plans do, None where they do not. Steps are those of
    `ConvWorkload.epilogue`. ``arrange`` takes ``weight``, which is as plans keep
    it, to OIHW in the order of the kernel's input, where that is another.
    """

    geometry: ConvGeometry
    weight: np.ndarray
    layer: str | None
    steps: list[Step] = field(default_factory=list)
    arrange: Callable[[np.ndarray], np.ndarray] | None = None

    def workload(self, in_block: int) -> ConvWorkload:
        """What its kernel computes, of an input in blocks of so many channels."""
        return ConvWorkload(self.geometry, in_block, tuple(name for name, _ in self.steps))


@dataclass(frozen=True)
class Source:
    """The map that a kernel reads, or the tensor of which it is a part."""

    blocks: relax.Expr
    part: Part | Images | None = None


@dataclass(frozen=True)
class Sink:
    """The part of a map that a kernel writes.

    ``written`` is that map with the parts of the kernels before, None for the first. The value of
    the call is the same memory with one part more, so nothing may read ``written`` any more.
    """

    part: Part | Images
    written: relax.Expr | None


class KernelCalls:
    """Writes kernel calls through a `Rewriter`; each kernel is added to the module once.

    Parameters
    ----------
    rewriter : Rewriter
        Receives the bindings and the kernels.
    isa : VectorISA
        Vector width and registers of the target.
    choose : callable
        Takes a `ConvWorkload`, gives the schedule to emit it with.
    weights : Weights
        Those that are not constants are ``variables``; ``parameters`` tells which they are.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights: Weights,
    ) -> None:
        self.rewriter = rewriter
        self.isa = isa
        self.choose = choose
        self.weights = weights
        self.parameters: list[WeightParameter] = []
        self.variables: list[relax.Var] = []
        self.workloads: list[ConvWorkload] = []
        self._kernels: dict[Any, tvm.ir.GlobalVar] = {}
        self._packed: dict[Any, tuple[np.ndarray, relax.Expr]] = {}

    def block(self, plain: relax.Expr, shape: Shape) -> relax.Expr:
        """NCHW to NCHW[x]c."""
        gvar = self._kernel(("block", shape), lambda: layout.emit_block(*shape, self.isa), "block")
        return self._call(gvar, [plain], self.blocked_type(shape))

    def unblock(self, blocked: relax.Expr, shape: Shape) -> relax.Expr:
        """NCHW[x]c to NCHW."""
        gvar = self._kernel(
            ("unblock", shape), lambda: layout.emit_unblock(*shape, self.isa), "unblock"
        )
        return self._call(gvar, [blocked], relax.TensorType(shape, "float32"))

    def pool(self, blocked: relax.Expr, workload: pooling.PoolWorkload) -> relax.Expr:
        """Pooling of a blocked map."""
        gvar = self._kernel(
            workload, lambda: pooling.emit_pool(workload, self.isa), f"{workload.kind}_pool"
        )
        shape = (workload.batch, workload.channels, workload.out_height, workload.out_width)
        return self._call(gvar, [blocked], self.blocked_type(shape))

    def convolve(
        self, source: Source, in_block: int, conv: Convolution, sink: Sink | None = None
    ) -> relax.Expr:
        """A convolution with epilogue, of a blocked map (``in_block`` lanes) or a plain one (1)."""
        workload = conv.workload(in_block)
        schedule = self.choose(workload)
        self.workloads.append(workload)
        gvar = self._kernel(
            (workload, schedule),
            lambda: kernels.emit(workload, schedule, self.isa),
            "conv2d",
            source.part,
            sink,
        )
        args = [source.blocks, *self._parameters(conv, workload, schedule)]
        return self._call(gvar, args, self._result_type(conv.geometry), sink)

    def convolve_chain(
        self,
        source: Source,
        convs: Sequence[Convolution],
        workload: ChainWorkload,
        schedule: FusedSchedule,
        sink: Sink | None = None,
    ) -> relax.Expr:
        """A chain of convolutions of a blocked map, in one kernel."""
        gvar = self._kernel(
            (workload, schedule),
            lambda: fused.emit(workload, schedule, self.isa),
            "chain",
            source.part,
            sink,
        )
        args = [source.blocks]
        for conv, stage, tiles in zip(convs, workload.stages, schedule.stages, strict=True):
            args += self._parameters(conv, stage, tiles)
        return self._call(gvar, args, self._result_type(convs[-1].geometry), sink)

    def _parameters(
        self, conv: Convolution, workload: ConvWorkload, schedule: Schedule
    ) -> list[relax.Expr]:
        """The weights of a convolution and the operands of its epilogue."""

        def pack_weight(weight: np.ndarray) -> np.ndarray:
            return kernels.pack_weights(weight, workload, schedule, self.isa)

        def arrange_and_pack(weight: np.ndarray) -> np.ndarray:
            return pack_weight(conv.arrange(weight) if conv.arrange else weight)

        weights = self._weight(conv.layer, "weight", arrange_and_pack, conv.weight)
        return [weights, *self._operands(conv.steps, conv.layer)]

    def _result_type(self, geometry: ConvGeometry) -> relax.TensorType:
        rows, columns = geometry.out_height, geometry.out_width
        return self.blocked_type((geometry.batch, geometry.out_channels, rows, columns))

    def elementwise(
        self, source: relax.Expr, shape: Shape, steps: list[Step], sink: Sink | None = None
    ) -> relax.Expr:
        """Epilogue steps alone on a blocked map."""
        names = tuple(name for name, _ in steps)
        gvar = self._kernel(
            ("elementwise", shape, names),
            lambda: elementwise.emit_elementwise(*shape, names, self.isa),
            "elementwise",
            sink=sink,
        )
        args = [source, *self._operands(steps, None)]
        return self._call(gvar, args, self.blocked_type(shape), sink)

    def activation(self, source: relax.Expr, count: int, step: str) -> relax.Expr:
        """An activation of a vector of ``count`` values."""
        gvar = self._kernel(
            ("activation", count, step),
            lambda: elementwise.emit_activation(count, step, self.isa),
            "activation",
        )
        return self._call(gvar, [source], relax.TensorType((count,), "float32"))

    def gather(
        self,
        sources: list[relax.Expr],
        workload: gather.GatherWorkload,
        steps: list[Step],
        sink: Sink | None = None,
    ) -> relax.Expr:
        """Concatenation, slice or pad of blocked maps, with epilogue steps."""
        names = tuple(name for name, _ in steps)
        gvar = self._kernel(
            (workload, names),
            lambda: gather.emit_gather(workload, self.isa, names),
            "gather",
            sink=sink,
        )
        shape = (workload.batch, workload.out_channels, *workload.out_size)
        args = [*sources, *self._operands(steps, None)]
        return self._call(gvar, args, self.blocked_type(shape), sink)

    def interleave(
        self, source: relax.Expr, workload: interleave.InterleaveWorkload, steps: list[Step]
    ) -> relax.Expr:
        """Pixels of a blocked map from its channels, with epilogue steps."""
        names = tuple(name for name, _ in steps)
        gvar = self._kernel(
            (workload, names),
            lambda: interleave.emit_interleave(workload, self.isa, names),
            "interleave",
        )
        shape = (workload.batch, workload.out_channels, *workload.out_size)
        return self._call(gvar, [source, *self._operands(steps, None)], self.blocked_type(shape))

    def resize(
        self,
        source: relax.Expr,
        shape: Shape,
        tables: tuple[np.ndarray, np.ndarray],
        linear: bool,
    ) -> relax.Expr:
        """A blocked map resized; ``tables`` are those of its rows and columns."""
        n, c, *_ = shape
        out = (tables[0].shape[1], tables[1].shape[1])
        gvar = self._kernel(
            ("resize", shape, out, linear),
            lambda: resizing.emit_resize(n, c, shape[2:], out, linear, self.isa),
            "resize",
        )
        args = [source, *map(constant, tables)]
        return self._call(gvar, args, self.blocked_type((n, c, *out)))

    def layer_norm(
        self,
        source: relax.Expr,
        shape: Shape,
        epsilon: float,
        vectors: tuple[np.ndarray, np.ndarray],
    ) -> relax.Expr:
        """Normalisation over the channels of each pixel; ``vectors`` are scale and shift."""
        gvar = self._kernel(
            ("layer_norm", shape, epsilon),
            lambda: normalisation.emit_layer_norm(*shape, epsilon, self.isa),
            "layer_norm",
        )
        args = [source, *(constant(vector) for vector in vectors)]
        return self._call(gvar, args, self.blocked_type(shape))

    def _operands(self, steps: list[Step], layer: str | None) -> list[relax.Expr]:
        """The arguments that steps add to a kernel; a first bias may be a parameter."""

        def pack(vector: np.ndarray) -> np.ndarray:
            return packing.pack_channels(vector, self.isa)

        args: list[relax.Expr] = []
        for index, (name, operands) in enumerate(steps):
            if name == "bias" and index == 0:
                args.append(self._weight(layer, "bias", pack, operands[0]))
            elif name in ("bias", "affine", "prelu"):
                args += [constant(pack(vector)) for vector in operands]
            else:
                args += operands
        return args

    def _weight(
        self,
        layer: str | None,
        kind: str,
        pack: Callable[[np.ndarray], np.ndarray],
        array: np.ndarray,
        key: Any = None,
    ) -> relax.Expr:
        if self.weights is Weights.ABSENT:
            self.variables.append(relax.Var(kind, relax.TensorType(dtype="float32", ndim=-1)))
            return self.variables[-1]
        if self.weights is Weights.CONSTANTS and key is not None:
            # One constant for all calls on pieces of a batch. The array is kept: its id is the key.
            if (id(array), key) not in self._packed:
                self._packed[id(array), key] = (
                    array,
                    constant(pack(np.asarray(array, np.float32))),
                )
            return self._packed[id(array), key][1]
        packed = pack(np.asarray(array, np.float32))
        if layer is None or self.weights is Weights.CONSTANTS:
            return constant(packed)
        variable = relax.Var(f"{layer}_{kind}", relax.TensorType(packed.shape, "float32"))
        self.variables.append(variable)
        self.parameters.append(WeightParameter(layer, kind, pack))
        return variable

    def blocked_type(self, shape: Sequence[int]) -> relax.TensorType:
        """Type of the blocked form of a map of that shape (N, C, H, W)."""
        n, c, h, w = shape
        return relax.TensorType((n, -(-c // self.isa.lanes), h, w, self.isa.lanes), "float32")

    def _kernel(
        self,
        key: Any,
        make: Callable[[], tirx.PrimFunc],
        name: str,
        source: Part | Images | None = None,
        sink: Sink | None = None,
    ) -> tvm.ir.GlobalVar:
        parts = (source, sink.part if sink else None)
        key = (key, parts)
        if key not in self._kernels:
            func = make()
            for parameter, part in zip("xy", parts, strict=True):
                func = place(func, parameter, part) if part else func
            self._kernels[key] = self.rewriter.builder.add_func(func, f"lowrank_{name}")
        return self._kernels[key]

    def _call(
        self,
        gvar: tvm.ir.GlobalVar,
        args: list[relax.Expr],
        out: relax.TensorType,
        sink: Sink | None = None,
    ) -> relax.Expr:
        if sink is None:
            return self.rewriter.emit(relax.call_tir(gvar, args, out))
        shape, _ = sink.part.within([int(extent) for extent in out.shape])
        out = relax.TensorType(shape, "float32")
        if sink.written is None:
            return self.rewriter.emit(relax.call_tir(gvar, args, out))
        args = [*args, sink.written]
        return self.rewriter.emit(relax.op.call_tir_inplace(gvar, args, [len(args) - 1], out))
