"""The machine that is measured, in words."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from tvm_lowrank.target import host_target, target_key
from tvm_lowrank.threads import physical_cores


def processor() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> str:
    """Processor, cores and target on one line."""
    return f"{processor()}, {physical_cores()} cores, target `{target_key(host_target())}`"


def disturbance(seconds: float = 0.5) -> str | None:
    """A warning if other processes are busy while this one sleeps for ``seconds``, or None."""
    before = _busy()
    time.sleep(seconds)
    cores = (_busy() - before) / seconds
    if cores < 0.1:
        return None
    return f"other processes keep {cores:.1f} cores busy and disturb these times; trust the minima"


def _busy() -> float:
    """Seconds that all cores together have worked since the start of the system."""
    try:
        user, nice, system, _, _, irq, softirq = Path("/proc/stat").read_text().split()[1:8]
    except (OSError, ValueError):
        return 0.0
    ticks = sum(map(int, (user, nice, system, irq, softirq)))
    return ticks / os.sysconf("SC_CLK_TCK")


def cache_bytes() -> int:
    """Size of the largest cache (0 if the system does not tell)."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
