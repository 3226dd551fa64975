"""What a family of convolution kernels is, whatever machine it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from .effort import Effort
from .x86.workload import ConvWorkload


class Machine(Protocol):
    """What kernels are built for: `x86.isa.VectorISA` or `cuda.arch.CudaArch`.

    ``name`` marks its tuning records, ``lanes`` is what ranks are rounded to, ``block`` the number
    of channels in a block of the maps between kernels (1 for plain NCHW).
    """

    @property
    def name(self) -> str:
        """Short name, as in tuning records."""
        ...

    @property
    def lanes(self) -> int:
        """Multiple of channels that kernels compute without waste."""
        ...

    @property
    def block(self) -> int:
        """Channels in a block of a map."""
        ...


class Schedule(Protocol):
    """The tunable choices of one family: a frozen dataclass that is JSON too.

    ``kernel`` is the name of its family in `kernels.FAMILIES`.
    """

    kernel: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values, with ``kernel`` among them."""
        ...


@dataclass(frozen=True)
class KernelFamily:
    """One way to compute convolutions on one kind of machine.

    - ``algorithm``: the name users know (``direct``, ``winograd``, ``fft``);
    - ``refuse(workload, machine)``: why it cannot compute the workload, or None;
    - ``space(workload, machine)``: its legal schedules, most promising first; not empty unless
      refused;
    - ``emit(workload, schedule, machine)``: for x86 the kernel, with parameters x, packed weights,
      the buffers of the epilogue's steps, y; for CUDA a `cuda.program.Program` of kernels;
    - ``pack(weight, workload, schedule, machine)``: the OIHW float32 weight as the kernel reads it;
    - ``read(json)``: the inverse of the schedule's ``to_json``;
    - ``error_bound(workload, schedule)``: the stated max|error| / max|result| without an epilogue,
      for standard-normal data;
    - ``predict(workload, schedule, machine)``: microseconds by a model, for machines that have one;
    - ``effort(workload, schedule, machine)``: what it asks of core and memory, where it is counted.
    """

    algorithm: str
    refuse: Callable[[ConvWorkload, Any], str | None]
    space: Callable[[ConvWorkload, Any], list[Any]]
    emit: Callable[[ConvWorkload, Any, Any], Any]
    pack: Callable[[np.ndarray, ConvWorkload, Any, Any], np.ndarray]
    read: Callable[[Mapping[str, Any]], Any]
    error_bound: Callable[[ConvWorkload, Any], float]
    predict: Callable[[ConvWorkload, Any, Any], float] | None = None
    effort: Callable[[ConvWorkload, Any, Any], Effort] | None = None
