"""What long commands share: an interruption that is not lost, and progress bars."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yields what raises KeyboardInterrupt once one was asked for.

    Python drops the exception when it arises in a finalizer, and TVM turns it into another when it
    arises in a callback.
    """
    asked = threading.Event()

    def interrupt(*_: object) -> None:
        asked.set()
        raise KeyboardInterrupt

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check  # signals are the main thread's
        return
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


class Bars:
    """A progress bar for each stage of the search."""

    def __init__(self, console: Console, check: Callable[[], None]) -> None:
        self.check = check
        self.progress = Progress(
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage; the place where an interruption that got lost is noticed."""
        self.check()
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total)
        self.progress.update(self.tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
