"""The machine that is measured, in words."""

from __future__ import annotations

import os
import platform
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


def disturbance() -> str | None:
    """A warning if other processes keep the machine busy, or None."""
    load = os.getloadavg()[0]
    if load < 0.5:
        return None
    return f"the load average is {load:.1f}: other processes disturb these times"


def cache_bytes() -> int:
    """Size of the largest cache (0 if the system does not tell)."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)
