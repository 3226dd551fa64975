"""What the measuring processes of the tests run instead of kernels."""

from __future__ import annotations

import os
import time


def behave(request):
    """Answer, raise, crash or hang, as told."""
    if request == "raise":
        raise ValueError("no such kernel")
    if request == "crash":
        os.abort()
    if request == "hang":
        time.sleep(600)
    if request == "exit":
        os._exit(0)
    if request == "print":
        print("not an answer", flush=True)
        os.write(1, b"nor this\n")
    return {"pid": os.getpid(), "request": request}


def one_order_crashes(request):
    """A made-up time; schedules that finish rows first bring the process down."""
    if request["schedule"].get("order") == "rows":
        os.abort()
    return {
        "us": 10.0 + request["schedule"]["tile"],
        "spread": 0.2 * (request["schedule"]["tile"] == 3),
    }


class Invented:
    """A worker that runs nothing: times follow a rule that the families' own order ignores."""

    def __init__(self):
        self.asked = []

    def ask(self, request):
        """A time that grows with the vectors of a register tile."""
        self.asked.append(request)
        schedule = request["schedule"]
        return {"us": 100.0 + 50.0 * schedule["vectors"] + schedule["tile"], "spread": 0.0}
