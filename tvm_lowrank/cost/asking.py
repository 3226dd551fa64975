"""What a timer asks of whatever measures for it: a process here, a GPU, or servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import tvm

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.fleet import Fleet
from tvm_lowrank.cost.worker import Worker, shared_worker
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.place import SMALL
from tvm_lowrank.schedules.cuda.arch import CudaArch
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import Schedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload


class Asker:
    """Puts what is to be measured into words that `timing.time_kernel` understands.

    Parameters
    ----------
    target : tvm.target.Target
    isa : Machine
    threads : int
        Of the runtime where kernels run.
    network : int
        MiB of weights that come in between two runs of a kernel; see `place`.
    worker : Worker or Fleet, optional
        Runs them; by default the one that this process shares.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        isa: Machine,
        threads: int,
        network: int = SMALL,
        worker: Worker | Fleet | None = None,
    ) -> None:
        self.isa, self.threads, self.network, self.worker = isa, threads, network, worker
        self._target = json.loads(str(target))

    @property
    def fleet(self) -> Fleet | None:
        """The servers that measure side by side, if it is these."""
        return self.worker if isinstance(self.worker, Fleet) else None

    @property
    def takes_turns(self) -> bool:
        """Whether schedules can run in turns: not on servers or a GPU."""
        return self.fleet is None and not isinstance(self.isa, CudaArch)

    def one(self, workload: Any, schedule: Any) -> Any:
        """The answer for a schedule; None if it does not run."""
        return self._ask(self._kernel(workload, schedule))

    def prepare(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Have kernels compiled that will be asked for, side by side on all cores."""
        self._ask({"target": self._target, "prepare": [self._kernel(*pair) for pair in pairs]})

    def side_by_side(self, pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, Any]]:
        """The answers of a fleet as they come, each with its index."""
        assert self.fleet is not None
        return self.fleet.ask_all([self._kernel(*pair) for pair in pairs])

    def in_turns(self, workload: ConvWorkload, schedules: Sequence[Schedule]) -> list[float] | None:
        """Microseconds of schedules that run in turns; None if they do not."""
        request = self._kernel(workload, schedules[0])
        del request["schedule"]
        answer = self._ask({**request, "rivals": [schedule.to_json() for schedule in schedules]})
        return None if answer is None else [float(us) for us in answer["us"]]

    def pace(self, seconds: float) -> float | None:
        """The least microseconds, for some seconds, of the kernel that runs beside each one.

        See `pace`. None if it does not run.
        """
        answer = self._ask({"target": self._target, "pace": seconds})
        return None if answer is None else float(answer["us"])

    def reading(self, size: int) -> Any:
        """The answer for reading ``size`` bytes; None by RPC, on GPUs and on failure.

        In the process that measures: the threads are those of TVM's runtime, bound as there.
        """
        if not self.takes_turns:
            return None
        return shared_worker(self.threads).ask({"target": self._target, "reading": size})

    def copy(self) -> float:
        """Microseconds now of a copy of 64 MiB where kernels are measured.

        Raises
        ------
        LowRankError
            A GPU runs no kernels.
        """
        if self.fleet is not None:
            return self.fleet.copy_microseconds()
        if not isinstance(self.isa, CudaArch):
            return machine.copy_microseconds()
        request = {"target": self._target, "copy": machine.COPY_BYTES}
        answer = shared_worker(self.threads).ask(request)
        if answer is None:
            raise LowRankError("the GPU runs no kernel of TVM's; check its driver")
        return float(answer["us"])

    def _ask(self, request: dict[str, Any]) -> Any:
        return (self.worker or shared_worker(self.threads)).ask(request)

    def _kernel(self, workload: Any, schedule: Any) -> dict[str, Any]:
        return {
            "target": self._target,
            "network": self.network,
            "workload": workload.to_json(),
            "schedule": schedule.to_json(),
        }
