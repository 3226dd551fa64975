"""Measuring on every server that registered with TVM's RPC tracker, side by side."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from tvm import rpc
from tvm.target import Target

from tvm_lowrank.cost import machine
from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.worker import Worker
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.machine import machine_of

_DEVICE = "tvm_lowrank.cost.device:serve_device"
# Seconds within which a server must be free, and within which a request must be answered.
_WAIT = 10.0
_TIMEOUT = 120.0
# A candidate that this many devices did not survive has failed.
_ATTEMPTS = 2
_READY = "ready"


@dataclass
class Device:
    """A server: its address, its machine's name and figures, and what became of its requests."""

    name: str
    machine: str
    threads: int
    worker: Worker
    figures: Roofline | None = None
    measured: int = 0
    failed: int = 0
    state: str = _READY


class Fleet:
    """The devices registered under one key; answers requests as a `Worker` does, many at once.

    Each device has a process here that compiles for it and holds its session. A device that is lost
    returns what it was at to the others; the run goes on with what is left.

    Parameters
    ----------
    tracker : str
        ``HOST:PORT`` of the tracker.
    key : str
        Of the servers.
    target : dict
        What kernels are compiled for, as JSON values.
    threads : int, optional
        Of each device's runtime; by default the least that any of them starts by itself.
    timeout : float
        Seconds that one candidate may take, compilation included.

    Raises
    ------
    LowRankError
        The tracker is not there, or has no free server of this key.
    """

    def __init__(
        self,
        tracker: str,
        key: str,
        target: dict[str, Any],
        threads: int | None = None,
        timeout: float = _TIMEOUT,
    ) -> None:
        self.target = target
        self._where = {**_address(tracker), "key": key, "wait": _WAIT}
        self._where["gpu"] = target["kind"] == "cuda"
        self._timeout = timeout
        count = _registered(tracker, key)
        self._refused: list[str] = []
        self._closed = False
        self.devices = self._join(count)
        if not self.devices:
            why = "; ".join(sorted(set(self._refused))) or "none is free"
            raise LowRankError(
                f"the tracker at {tracker} has {count} servers of key {key!r}, none of which can "
                f"be used ({why}); start some with python -m tvm.exec.rpc_server"
            )
        self.threads = threads or min(device.threads for device in self.devices)
        _side_by_side(self._look_at, self.devices)
        if not self.ready():
            states = "; ".join(f"{device.name} {device.state}" for device in self.devices)
            raise LowRankError(
                f"no device behind {tracker} runs kernels for this target ({states}); is --target "
                "theirs?"
            )
        self._tell_apart()

    def _join(self, count: int) -> list[Device]:
        """A process and a session for each of the servers that are free."""
        workers = [Worker(1, self._timeout, _DEVICE) for _ in range(count)]
        found: list[Device] = []

        def connect(worker: Worker) -> None:
            answer = _ask(worker, {"connect": self._where})
            if answer is not None and "lost" not in answer:
                names = (answer["device"], answer["machine"], answer["threads"])
                found.append(Device(*names, worker))
            else:
                self._refused += [answer["lost"]] if answer else []
                worker.close()

        _side_by_side(connect, workers)
        return sorted(found, key=lambda device: device.name)

    def _look_at(self, device: Device) -> None:
        """Set the threads of a device and measure its figures."""
        request = {"threads": self.threads, "copy": True, "target": self.target}
        copy = _ask(device.worker, request)
        isa = machine_of(Target(self.target))
        workload = machine.reference(isa)
        schedule = default_schedule(workload, isa).to_json()
        request = {"target": self.target, "workload": workload.to_json(), "schedule": schedule}
        kernel = None if copy is None or "us" not in copy else _ask(device.worker, request)
        if copy is None or kernel is None or "us" not in kernel:
            self._retire(device, kernel or copy)
        else:
            device.figures = machine.roofline(kernel["us"], copy["us"])

    def _tell_apart(self) -> None:
        """Give devices of one name that differ too much names of their own.

        Side by side, servers of one machine disturb each other; what looks different is looked at
        again alone, and the better figures count.
        """
        known: dict[str, Device] = {}
        for device in self.ready():
            first = known.setdefault(device.machine, device)
            for each in (first, device):
                if self._apart(first, device):
                    before = each.figures
                    self._look_at(each)
                    each.figures = _better(before, each.figures)
            if self._apart(first, device):
                device.machine += f" [{device.figures}]"

    def _apart(self, one: Device, other: Device) -> bool:
        if one.figures is None or other.figures is None:
            return False
        return machine.apart(one.figures, other.figures) > machine.ANOTHER_MACHINE

    @property
    def machine(self) -> str:
        """The name that most devices share: what they measure can be compared."""
        names = Counter(device.machine for device in self.ready() or self.devices)
        return min(names, key=lambda name: (-names[name], name))

    def ready(self) -> list[Device]:
        """The devices that still answer."""
        return [device for device in self.devices if device.state == _READY]

    def ask(self, request: Any) -> Any:
        """The answer of any device of the machine that most are, or None if the candidate fails."""
        return next(self.ask_all([request]))[1]

    def ask_all(self, requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Indices of requests with their answers, in the order in which those come in.

        Raises
        ------
        LowRankError
            No device is left; what was answered before is not lost.
        """
        group = [device for device in self.ready() if device.machine == self.machine]
        jobs: queue.Queue[tuple[int, int] | None] = queue.Queue()
        answers: queue.Queue[tuple[int, Any] | None] = queue.Queue()
        for index in range(len(requests)):
            jobs.put((index, 0))

        def work(device: Device | None) -> None:
            while device is not None and (job := jobs.get()) is not None:
                index, attempts = job
                answer = _ask(device.worker, requests[index])
                if answer is not None and "lost" not in answer:
                    device.measured += 1
                    device.failed += "failed" in answer
                    answers.put((index, None if "failed" in answer else answer))
                    continue
                if attempts + 1 < _ATTEMPTS:
                    jobs.put((index, attempts + 1))
                else:
                    answers.put((index, None))
                device = self._replace(device, answer)
            answers.put(None)

        threads = [threading.Thread(target=work, args=(d,), daemon=True) for d in group]
        for thread in threads:
            thread.start()
        left, working = len(requests), len(group)
        try:
            while left:
                if not working:
                    raise LowRankError(
                        "no device is left that measures; what was measured is on record, the same "
                        "command goes on from it when servers are back"
                    )
                found = answers.get()
                if found is None:
                    working -= 1
                else:
                    left -= 1
                    yield found
        finally:
            for _ in threads:
                jobs.put(None)

    def _replace(self, device: Device, answer: Any) -> Device | None:
        """The device that was lost, if its server is back, or one that was free."""
        self._retire(device, answer)
        where = {**self._where, "threads": self.threads}
        found = _ask(device.worker, {"connect": where})
        if found is None or "lost" in found or self._closed:
            device.worker.close()
            return None
        if found["device"] == device.name:
            device.state = _READY
            return device
        fresh = Device(found["device"], found["machine"], self.threads, device.worker)
        self._look_at(fresh)
        self.devices.append(fresh)
        self._tell_apart()
        if fresh.state == _READY and fresh.machine == device.machine:
            return fresh
        fresh.worker.close()
        return None

    def _retire(self, device: Device, answer: Any) -> None:
        reason = None if answer is None else answer.get("lost") or answer.get("failed")
        device.state = f"lost: {reason or 'did not answer in time, or crashed'}"
        device.worker.close()

    def copy_microseconds(self) -> float:
        """Time of a copy of 64 MiB on a device of the machine that most are."""
        answer = self.ask({"copy": True, "threads": self.threads, "target": self.target})
        return float("inf") if answer is None else float(answer["us"])

    def table(self) -> Table:
        """Which device measured how much, and what became of it."""
        made = Table(
            "device", "machine", "threads", "peak, bandwidth", "measured", "failed", "state"
        )
        for device in self.devices:
            row = (device.name, device.machine, device.threads, device.figures or "")
            counts = (device.measured, device.failed, device.state)
            made.add_row(*(escape(str(value)) for value in (*row, *counts)))
        return made

    def close(self) -> None:
        """Give all servers back, and those that still join."""
        self._closed = True
        for device in self.devices:
            device.worker.close()


def _ask(worker: Worker, request: Any) -> Any:
    """The answer of a device's process; one that does not start, or is closed, is lost."""
    try:
        return worker.ask(request)
    except LowRankError as error:
        return {"lost": str(error)}


def _better(one: Roofline | None, other: Roofline | None) -> Roofline | None:
    if one is None or other is None:
        return one or other
    return Roofline(max(one.gflops, other.gflops), max(one.gigabytes, other.gigabytes))


def _registered(tracker: str, key: str) -> int:
    """Servers that the tracker knows under a key."""
    where = _address(tracker)
    try:
        session = rpc.connect_tracker(where["host"], where["port"])
        servers = session.summary()["server_info"]
        session.close()
    except (OSError, RuntimeError) as error:
        raise LowRankError(
            f"no RPC tracker answers at {tracker} ({error}); start one with "
            "python -m tvm.exec.rpc_tracker"
        ) from error
    return sum(server["key"] == f"server:{key}" for server in servers)


def _address(tracker: str) -> dict[str, Any]:
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdigit():
        raise LowRankError(f"tracker {tracker!r} is no address; give HOST:PORT")
    return {"host": host, "port": int(port)}


def _side_by_side(function: Any, items: Sequence[Any]) -> None:
    threads = [threading.Thread(target=function, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
