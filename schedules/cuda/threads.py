"""Loops bound to blocks and threads, or left as loops so that a processor can run the kernel."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from .arch import CudaArch


class ThreadSchedule:
    """A TVM schedule of one kernel, whose bindings and memory scopes can be left out.

    With ``arch.loops`` every block and thread is an iteration of a plain loop. Index arithmetic,
    tiles, borders and sums stay what they are on the GPU. What the threads of a block do together
    (a copy to shared memory) is then a nest over all threads inside the loops over threads around
    it, so each iteration finds the whole of it done, which is what a barrier ensures on the GPU.
    """

    def __init__(self, func: tirx.PrimFunc, arch: CudaArch) -> None:
        self.tir = s_tir.Schedule(func)
        self._loops = arch.loops

    def bind(self, loop: Any, axis: str) -> None:
        """Run a loop's iterations as blocks, threads or virtual threads."""
        if not self._loops:
            self.tir.bind(loop, axis)

    def scope(self, name: str) -> str:
        """The name of a memory scope."""
        return "global" if self._loops else name

    def spread(self, block: Any, loops: Any, shape: tuple[int, int], vector: int) -> None:
        """Share the iterations of adjacent loops out among (y, x) threads, ``vector`` at a time."""
        fused = self.tir.fuse(*loops)
        _, y, x, lanes = self.tir.split(fused, [None, *shape, vector])
        self.bind(y, "threadIdx.y")
        self.bind(x, "threadIdx.x")
        if vector > 1:
            self.tir.vectorize(lanes)

    def pipeline(self, loop: Any, copies: list[Any]) -> None:
        """Fetch what the next iteration of ``loop`` needs while this one computes.

        ``copies`` fill shared memory; each goes by way of registers, which are loaded before and
        stored after the arithmetic that follows the copies in the loop.
        """
        if self._loops:
            return
        for copy in copies:
            self.tir.annotate(copy, "tirx.manifest_shared_memory_local_stage", 1)
        count = len(copies)
        loads, stores = range(count), range(count + 1, 2 * count + 1)
        order = [place for pair in zip(loads, stores, strict=True) for place in pair]
        self.tir.annotate(loop, "software_pipeline_stage", [0] * (2 * count) + [1])
        self.tir.annotate(loop, "software_pipeline_order", [*order, count])

    def unroll(self, block: Any, count: int) -> None:
        """Unroll the ``count`` innermost loops around a block."""
        for loop in self.tir.get_loops(block)[-count:]:
            self.tir.unroll(loop)

    def write_out(self, loop: Any) -> None:
        """Unroll a loop and those in it in the text, where nvcc would take more registers."""
        if not self._loops:
            self.tir.annotate(loop, "pragma_unroll_explicit", 1)

    def finish(self) -> tirx.PrimFunc:
        """The kernel, private and marked as scheduled, which fusion leaves alone."""
        if not self._loops:
            # Loops are unrolled by nvcc, which takes a third of the time that TVM's text of the
            # unrolled code takes it.
            outermost = self.tir.get_loops(
                self.tir.get_child_blocks(self.tir.get_sblock("root"))[0]
            )
            self.tir.annotate(outermost[0], "pragma_unroll_explicit", 0)
        attrs = {"tirx.is_scheduled": True, "op_pattern": 8}
        return self.tir.mod["main"].without_attr("global_symbol").with_attr(attrs)
