"""How fast a machine is: its peak and its bandwidth, measured once and kept in the records."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.place import SMALL, Place
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import families_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.threads import physical_cores

_REFERENCE = ConvGeometry(64, 64, 56, 56, (3, 3), padding=(1, 1, 1, 1))
# Also on record: a search that goes on from its records must predict what it predicted.
COPY = "copy of 64 MiB"
COPY_BYTES = 64 << 20
# What the kernel took that runs beside each measurement, when it first ran: times on record are of
# a machine that keeps this pace.
PACE = "pace"
# What all threads read again and again: from what no core's own cache holds to the weights of the
# largest layers of known networks. Where the cache that all share ends, and how much of it a
# machine that has tenants has, is in between, so none of it has to be known.
READING_BYTES = (8 << 20, 32 << 20, 128 << 20, 512 << 20)
# Machines whose figures differ by more than this factor do not price each other. Other work on the
# machine at hand makes it look slower too, so the factor is generous; from the lower one on it is
# said.
ANOTHER_MACHINE = 1.5
NOTABLE = 1.1


def reference(isa: Machine) -> ConvWorkload:
    """The convolution whose best kernel stands for a machine's peak."""
    return ConvWorkload(_REFERENCE, isa.block, ("bias", "relu"))


def direct_families(isa: Machine) -> tuple[str, ...]:
    """The kernel families whose time says how near to its peak a machine comes."""
    return tuple(n for n, family in families_of(isa).items() if family.algorithm == "direct")


def reading(size: int) -> str:
    """What the time of reading ``size`` bytes by all threads is on record as."""
    return f"reading of {size >> 20} MiB"


def figure_keys(isa: Machine) -> tuple[str, ...]:
    """The workloads on record that a machine's figures are made of."""
    return (COPY, *map(reading, READING_BYTES), reference(isa).key())


def roofline(
    kernel_us: float, copy_us: float, readings: Mapping[int, float] | None = None
) -> Roofline:
    """Peak and bandwidths from microseconds: of the reference kernel, of the copy, of readings.

    ``readings`` has those of some numbers of bytes.
    """
    return Roofline(
        gflops=2 * _REFERENCE.multiplications / (kernel_us * 1e3),
        gigabytes=2 * COPY_BYTES / (copy_us * 1e3),
        readings=tuple((size, size / (us * 1e3)) for size, us in sorted((readings or {}).items())),
    )


def figures(records: TuningRecords, isa: Machine, place: Place | None = None) -> Roofline | None:
    """Peak and bandwidths that the records state of a place, by default this one, or None.

    Those of reading are not on record of machines that were measured before there were any, by RPC,
    or with a GPU.
    """
    place = place or records.here
    copy = records.best(COPY, place)
    kernel = records.best(reference(isa).key(), place, direct_families(isa))
    if copy is None or kernel is None:
        return None
    found = {size: records.best(reading(size), place) for size in READING_BYTES}
    made = roofline(kernel[1], copy[1], {size: best[1] for size, best in found.items() if best})
    return replace(made, network=beyond(place.network))


def beyond(network: int) -> int:
    """Bytes that weights in networks of a size come from beyond; see `Roofline`.

    None in small ones: there they are as near as so many bytes are, which the constants fit.
    """
    return network << 20 if network > SMALL else 0


def apart(one: Roofline, other: Roofline) -> float:
    """The factor, 1 or more, by which two machines differ in peak or bandwidth, the larger one."""
    ratios = (one.gflops / other.gflops, one.gigabytes / other.gigabytes)
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def nearest(
    found: Roofline, places: Iterable[tuple[Place, Roofline]]
) -> tuple[Place, float] | None:
    """The place whose figures come nearest to these, and the factor that is left between them."""
    return min(
        ((place, apart(found, known)) for place, known in places),
        key=lambda pair: pair[1],
        default=None,
    )


def is_busy() -> bool:
    """Whether more processes want to run than there are cores for, over the last minute."""
    try:
        return os.getloadavg()[0] > 1.5 * physical_cores()
    except OSError:
        return False


def copy_microseconds() -> float:
    """Time of a copy of 64 MiB by one thread, in microseconds: the least of four."""
    source = np.ones(COPY_BYTES // 4, np.float32)
    sink = np.empty_like(source)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(sink, source)
        best = min(best, time.perf_counter() - start)
    return 1e6 * best
