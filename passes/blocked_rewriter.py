"""A rewriter whose values wait in blocks, and that writes their kernels when they are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np
import tvm
from tvm import relax
from tvm_lowrank.passes.blocked import (
    HWC,
    NCHW,
    NHWC,
    BlockedTensor,
    Elementwise,
    Gather,
    Interleave,
    Pending,
    of_map,
    of_plain,
)
from tvm_lowrank.passes.graph import Rewriter, constant_array, static_shape
from tvm_lowrank.passes.kernel_calls import (
    Convolution,
    KernelCalls,
    Sink,
    Source,
    Step,
    Weights,
)
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86.chain import MOST_STAGES, ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.gather import ChannelRun, GatherWorkload
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.placement import Images, Part
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.geometry import ConvGeometry

# Inputs of so few channels are read from NCHW as they are: blocking would mostly copy zeros.
PLAIN_CHANNELS = 4


def waits_in_blocks(shape: tuple[int, ...] | None) -> TypeGuard[tuple[int, ...]]:
    """Whether a tensor of this shape is kept in blocks between two parts of a network."""
    return shape is not None and len(shape) == 4 and shape[1] > PLAIN_CHANNELS


Fuse = Callable[[ChainWorkload], "FusedSchedule | None"]


class BlockedRewriter(Rewriter):
    """A `Rewriter` whose values may be `BlockedTensor`s.

    An operation stays pending until something else than an operator that joins it reads its
    result; the methods here find it, open it for further steps, and write its kernel once its
    blocks or its plain form are asked for.

    Parameters
    ----------
    mod : IRModule
        Its ``main`` is written anew.
    isa, choose, fuse
        See `LowerConvolutions`.
    weights : Weights
        What becomes of the weights.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        isa: VectorISA,
        choose: Callable[[ConvWorkload], Schedule],
        weights: Weights,
        fuse: Fuse | None,
    ) -> None:
        super().__init__(mod)
        self.fuse = fuse
        self.calls = KernelCalls(self, isa, choose, weights)
        self._arrays: dict[relax.Expr, np.ndarray] = {}
        self._params: list[relax.Var] = list(self.func.params)

    def take_blocks(self) -> None:
        """Take the maps among the parameters in blocks."""
        for index, param in enumerate(self.func.params):
            shape = static_shape(param)
            if waits_in_blocks(shape):
                taken = relax.Var(param.name, self.calls.blocked_type(shape))
                self._params[index] = taken
                self.values[param] = of_map(shape, blocked=taken)

    def params(self) -> Sequence[relax.Var]:
        """See `Rewriter.params`."""
        return self._params

    def at_border(self, expr: relax.Expr) -> relax.Expr:
        """A value as another part of the network takes it: maps in blocks."""
        shape = static_shape(expr)
        if not waits_in_blocks(shape):
            return self.substitute(expr)
        tensor = self.tensor(expr)
        if tensor.view != NCHW:
            tensor = of_map(shape, plain=self.resolve(tensor))
        return self.blocked(tensor)

    def array_of(self, weight: relax.Expr) -> np.ndarray:
        """The value of a constant, the same array each time."""
        if weight not in self._arrays:
            self._arrays[weight] = constant_array(weight)
        return self._arrays[weight]

    def stack(self, sources: Sequence[BlockedTensor], owned: Sequence[bool]) -> relax.Expr:
        """Pieces of a batch one after the other, those that nothing else reads written there."""
        images, written, first = sum(source.map[0] for source in sources), None, 0
        for source, alone in zip(sources, owned, strict=True):
            sink = Sink(Images(first, images), written)
            pending = source.pending
            if alone and pending and isinstance(pending.operation, (Convolution, Elementwise)):
                written = self._write(pending, sink)
            else:
                written = self.calls.elementwise(self.blocked(source), source.map, [], sink)
            first += source.map[0]
        assert written is not None
        return written

    def in_block(self, geometry: ConvGeometry, data: BlockedTensor) -> int:
        """1 if a convolution reads ``data`` plain, else the channels of a block."""
        flat = len(data.shape) == 2
        few = geometry.in_channels <= PLAIN_CHANNELS and geometry.groups == 1
        is_plain = data.plain is not None or data.piece is not None
        return 1 if is_plain and (few or flat) else self.calls.isa.lanes

    def refuses(self, geometry: ConvGeometry, in_block: int) -> bool:
        """Whether no kernel takes a convolution whose input has such blocks."""
        try:
            workload = ConvWorkload(geometry, in_block)
        except ValueError:
            return True
        return bool(kernels.refuse(workload, self.calls.isa))

    def tensor(self, expr: relax.Expr) -> BlockedTensor:
        """The value of ``expr`` as a tensor with layouts; a new one is plain."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor):
            return value
        tensor = of_plain(static_shape(expr) or (), self.substitute(expr))
        if isinstance(expr, relax.Var):
            self.values[expr] = tensor
        return tensor

    def blocked_map(self, expr: relax.Expr) -> BlockedTensor | None:
        """The value of ``expr`` if it is a map in blocks, seen as it is."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor) and value.is_blocked and value.view == NCHW:
            return value
        return None

    def pending(self, expr: relax.Expr) -> Pending | None:
        """The pending operation behind ``expr``, if nothing else reads its result."""
        value = self.values.get(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, BlockedTensor) and self.users[expr] == 1:
            return value.pending
        return None

    def takes_steps(self, expr: relax.Expr) -> bool:
        """Whether ``expr`` is made by a pending kernel that an epilogue step may join."""
        pending = self.pending(expr)
        if pending is None:
            return False
        operation = pending.operation
        return not isinstance(operation, Gather) or operation.workload.keeps_map

    def is_product(self, expr: relax.Expr) -> bool:
        """Whether ``expr`` is made by a pending convolution that nothing else reads."""
        pending = self.pending(expr)
        return pending is not None and isinstance(pending.operation, Convolution)

    def copied(self, tensor: BlockedTensor) -> tuple[list[BlockedTensor], GatherWorkload]:
        """Tensors, and the copy that makes ``tensor`` of them: of itself if it is no pending copy.

        A copy that is not made yet may be read past, however many read it; its sources then have
        one reader more.
        """
        if tensor.pending and isinstance(tensor.pending.operation, Gather):
            tensor.pending.operation.owned = frozenset()
        return _copy_of(tensor)

    def opened(self, expr: relax.Expr) -> BlockedTensor:
        """A tensor like ``expr``'s whose pending operation takes further steps."""
        tensor = self.values[expr]
        pending = self.pending(expr)
        if pending is None or not self.takes_steps(expr):
            sources, copy = self.copied(tensor)
            if sources[0] is not tensor and copy.keeps_map:
                pending = Pending(sources, Gather(copy))
            else:
                pending = Pending([of_map(tensor.map, blocked=self.blocked(tensor))], Elementwise())
        return BlockedTensor(tensor.shape, tensor.map, tensor.view, pending=pending)

    def blocked(self, tensor: BlockedTensor) -> relax.Expr:
        """The blocks of ``tensor``: its pending kernel is written, or its plain form converted."""
        if tensor.pending is not None:
            tensor.blocked = self._write(tensor.pending)
            tensor.pending = None
        if tensor.blocked is None:
            plain = self._plain_of(tensor)
            if self._is_one_layout(tensor):
                lanes = self.calls.isa.lanes
                shape = (tensor.map[0], tensor.channels // lanes, 1, 1, lanes)
                tensor.blocked = self.emit(relax.op.reshape(plain, shape))
            else:
                if tensor.shape != tensor.map:
                    plain = self.emit(relax.op.reshape(plain, tensor.map))
                tensor.blocked = self.calls.block(plain, tensor.map)
        return tensor.blocked

    def _is_one_layout(self, tensor: BlockedTensor) -> bool:
        """Whether plain and blocked form have the same bytes: whole blocks of a single pixel."""
        return tensor.map[2:] == (1, 1) and tensor.channels % self.calls.isa.lanes == 0

    def resolve(self, value: Any) -> relax.Expr:
        """The plain form of a value, converted from its blocks where it has none."""
        if not isinstance(value, BlockedTensor):
            return value
        if self._plain_of(value) is None and self._is_one_layout(value):
            value.plain = self.emit(relax.op.reshape(self.blocked(value), value.shape))
        if value.plain is None:
            plain = self.calls.unblock(self.blocked(value), value.map)
            if value.view == NHWC or (value.view == HWC and value.map[2:] != (1, 1)):
                plain = self.emit(relax.op.permute_dims(plain, [0, 2, 3, 1]))
            if static_shape(plain) != value.shape:
                plain = self.emit(relax.op.reshape(plain, value.shape))
            value.plain = plain
        return value.plain

    def _plain_of(self, tensor: BlockedTensor) -> relax.Expr | None:
        """The plain form of a tensor that has one; a piece of a batch is cut out for it."""
        if tensor.plain is None and tensor.piece is not None:
            batch, images = tensor.piece
            ends = [images.first], [images.first + tensor.map[0]]
            tensor.plain = self.emit(relax.op.strided_slice(batch, [0], *ends))
        return tensor.plain

    def _write(self, pending: Pending, sink: Sink | None = None) -> relax.Expr:
        operation, sources = pending.operation, pending.sources
        if isinstance(operation, Gather):
            in_place = self._joins_in_place(operation, sources)
            if any(in_place):
                return self._join_in_place(sources, in_place)
            gathered = [self.blocked(source) for source in sources]
            return self.calls.gather(gathered, operation.workload, operation.steps)
        (data,) = sources
        if isinstance(operation, Interleave):
            blocks = self.blocked(data)
            return self.calls.interleave(blocks, operation.workload, operation.steps)
        if isinstance(operation, Elementwise):
            return self.calls.elementwise(self.blocked(data), data.map, operation.steps, sink)
        in_block = self.in_block(operation.geometry, data)
        if in_block > 1:
            fused = self._write_chain(pending, sink)
            if fused is not None:
                return fused
            return self.calls.convolve(self._source(data), in_block, operation, sink)
        if data.piece is not None and data.plain is None:
            return self.calls.convolve(Source(*data.piece), 1, operation, sink)
        plain = data.plain
        if data.shape != data.map:
            plain = self.emit(relax.op.reshape(plain, data.map))
        return self.calls.convolve(Source(plain), 1, operation, sink)

    def _joins_in_place(self, gather: Gather, sources: Sequence[BlockedTensor]) -> list[bool]:
        """Of each source of a concatenation, whether its kernel can write it where it belongs."""
        copy, lanes = gather.workload, self.calls.isa.lanes
        whole = tuple(ChannelRun(i, 0, source.channels) for i, source in enumerate(sources))
        possible = (
            copy.batch == 1
            and copy.keeps_map
            and copy.runs == whole
            and not gather.steps
            and all(source.channels % lanes == 0 for source in sources[:-1])
        )
        return [
            possible
            and number in gather.owned
            and source.pending is not None
            and isinstance(source.pending.operation, (Convolution, Elementwise))
            for number, source in enumerate(sources)
        ]

    def _join_in_place(
        self, sources: Sequence[BlockedTensor], in_place: Sequence[bool]
    ) -> relax.Expr:
        """A concatenation with some sources written where they belong, runs of others copied."""
        lanes = self.calls.isa.lanes
        total = sum(-(-source.channels // lanes) for source in sources)
        written: relax.Expr | None = None
        first = 0
        pairs = zip(in_place, sources, strict=True)
        for is_written, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            members = [source for _, source in group]
            for part in [[member] for member in members] if is_written else [members]:
                sink = Sink(Part(first, total), written)
                write = self._write_pending if is_written else self._copy_parts
                written = write(part, sink)
                first += sum(-(-source.channels // lanes) for source in part)
        assert written is not None
        return written

    def _write_pending(self, sources: Sequence[BlockedTensor], sink: Sink) -> relax.Expr:
        (tensor,) = sources
        assert tensor.pending is not None
        return self._write(tensor.pending, sink)

    def _copy_parts(self, sources: Sequence[BlockedTensor], sink: Sink) -> relax.Expr:
        """A concatenation by a copy."""
        n, _, h, w = sources[0].map
        copy = GatherWorkload.concatenation(n, tuple(s.channels for s in sources), h, w)
        return self.calls.gather([self.blocked(source) for source in sources], copy, [], sink)

    def _source(self, tensor: BlockedTensor) -> Source:
        """What a kernel reads: whole blocks of channels are read where they are, not copied."""
        (first, *others), copy = _copy_of(tensor)
        lanes = self.calls.isa.lanes
        (run, *runs) = copy.runs
        stop = run.first + run.count
        if (
            first is tensor
            or others
            or runs
            or run.source < 0
            or copy.batch != 1
            or not copy.keeps_map
            or run.first % lanes
            or (stop % lanes and stop != first.channels)
        ):
            return Source(self.blocked(tensor))
        return Source(self.blocked(first), Part(run.first // lanes, -(-first.channels // lanes)))

    def _write_chain(self, pending: Pending, sink: Sink | None) -> relax.Expr | None:
        """One kernel for a convolution and those before it, if ``fuse`` wants one."""
        if self.fuse is None:
            return None
        run = [pending]
        while len(run) < MOST_STAGES and run[0].before is not None:
            if self.in_block(run[0].before.operation.geometry, run[0].before.sources[0]) == 1:
                break
            run.insert(0, run[0].before)
        for start in range(len(run) - 1):
            links = run[start:]
            try:
                workload = ChainWorkload(
                    tuple(link.operation.workload(self.calls.isa.lanes) for link in links)
                )
            except ValueError:
                continue  # a residual is added in the middle
            if not workload.is_promising():
                continue
            schedule = self.fuse(workload)
            if schedule is None:
                return None
            links = links[-len(schedule.stages) :]
            source = self._source(links[0].sources[0])
            workload = workload.last(len(links))
            convs = [link.operation for link in links]
            return self.calls.convolve_chain(source, convs, workload, schedule, sink)
        return None

    def extra_params(self) -> Sequence[relax.Var]:
        """The weights that are parameters."""
        return self.calls.variables


def _copy_of(tensor: BlockedTensor) -> tuple[list[BlockedTensor], GatherWorkload]:
    """Sources and workload of a pending copy without steps, else those of a copy of ``tensor``."""
    operation = tensor.pending.operation if tensor.pending else None
    if tensor.pending and isinstance(operation, Gather) and not operation.steps:
        return tensor.pending.sources, operation.workload
    n, c, h, w = tensor.map
    return [tensor], GatherWorkload.concatenation(n, (c,), h, w)


def steps_of(tensor: BlockedTensor) -> list[Step]:
    """The epilogue steps of a tensor whose pending kernel takes some."""
    assert tensor.pending is not None
    return tensor.pending.operation.steps
