"""A process that measures, so that a kernel that crashes or hangs takes nothing else with it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import IO, Any

from tvm_lowrank.errors import LowRankError

_TIMER = "tvm_lowrank.cost.timing:time_kernel"
_START = 120.0  # seconds that the import of TVM may take on a busy machine


class Worker:
    """Answers requests one at a time in a process of its own, started when first needed.

    Parameters
    ----------
    threads : int
        Threads of TVM's runtime in the process.
    timeout : float
        Seconds that a request may take before the process is killed.
    function : str
        ``module:name`` of what is called with each request, a JSON value, and returns another.
    """

    def __init__(self, threads: int, timeout: float = 60.0, function: str = _TIMER) -> None:
        self.threads = threads
        self.timeout = timeout
        self.function = function
        self.starts = 0
        self._running: list[subprocess.Popen[bytes]] = []
        # Requests of other threads wait for their turn.
        self._turn = threading.RLock()
        # What a process writes until it is ready.
        self._errors: IO[bytes] | None = None
        weakref.finalize(self, _kill, self._running)

    def ask(self, request: Any) -> Any:
        """The function's answer, or None: it raised, crashed or hung; the next request is safe.

        Raises
        ------
        LowRankError
            The process does not start at all.
        """
        with self._turn:
            self.wait()
            requests = _pipe(self._running[0].stdin)
            try:
                requests.write(json.dumps(request).encode() + b"\n")
            except BrokenPipeError:
                self.close()
                return None
            answer = self._line(self.timeout)
            if answer is None:
                self.close()
                return None
            return json.loads(answer)

    def close(self) -> None:
        """End the process, whatever it is at; another request starts a new one."""
        for process in list(self._running):
            process.kill()
        with self._turn:
            _kill(self._running)
            if self._errors is not None:
                self._errors.close()
                self._errors = None

    def start(self) -> None:
        """Begin to start the process, unless it runs; the next request waits until it is ready."""
        if self._running and self._running[0].poll() is None:
            return
        self.close()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open until the process is ready
        # A session of its own: an interrupt from the terminal is for the parent to handle.
        self._running.append(
            subprocess.Popen(
                [sys.executable, "-c", code, self.function],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "TVM_NUM_THREADS": str(self.threads)},
                start_new_session=True,
            )
        )
        self.starts += 1

    def wait(self) -> None:
        """Return once the process is ready; it is started if it does not run.

        Raises
        ------
        LowRankError
            It does not start.
        """
        if self._errors is None:
            self.start()
        if self._errors is None:
            return
        with self._errors as errors:
            self._errors = None
            if self._line(_START) is None:
                self.close()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "no message")
                raise LowRankError(
                    f"the process that measures kernels does not start ({last.strip()}); "
                    "check the installation, memory and process limits"
                )

    def _line(self, seconds: float) -> bytes | None:
        """The next line the process writes; None if it ends or takes longer than ``seconds``."""
        answers = _pipe(self._running[0].stdout)
        if not select.select([answers], [], [], seconds)[0]:
            return None
        line: bytes = answers.readline()
        return line if line.endswith(b"\n") else None


@functools.lru_cache(maxsize=1)
def shared_worker(threads: int) -> Worker:
    """The worker of this process, kept because its start takes seconds."""
    return Worker(threads)


def serve() -> None:
    """The process: a line of JSON in, a line of JSON out, until its parent is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        try:
            answer = function(json.loads(line))
        except Exception:
            answer = None
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _kill(running: list[subprocess.Popen[bytes]]) -> None:
    while running:
        process = running.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            _pipe(pipe).close()
