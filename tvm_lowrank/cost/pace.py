"""Times relative to a kernel that is always the same, on machines that others share.

Such a machine is slower than at other times, for seconds or minutes; most kernels then are slower
alike, so what one takes over what the same kernel takes right before and after varies less than its
time. Where the machine is much slower for a moment, they are not alike: that is waited for.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable

from tvm_lowrank.records import AGREEMENT

# Looks that say what is usual, and by which factor a calm machine may be slower.
_LOOKS, _CALM = 31, 1.12
# Seconds that slow moments are waited for at most, and between two looks.
_PATIENCE, _PAUSE = 0.2, 0.01
# Minima taken at most.
_TRIES = 3
_AGREEMENT = 1 + AGREEMENT


class Pacer:
    """A kernel that always is the same one: its time says how fast the machine is now.

    Parameters
    ----------
    measure : callable
        Gives the seconds that it takes.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        looks = [measure() for _ in range(_LOOKS)]
        self._seen = collections.deque(looks, maxlen=_LOOKS)

    def look(self) -> float:
        """Seconds that the kernel takes now."""
        return self._measure()

    def is_calm(self, seconds: float) -> bool:
        """Whether the kernel takes hardly longer than it did most of the time lately."""
        return seconds <= _CALM * statistics.median(self._seen)

    def settled(self, end: float) -> float:
        """Seconds that the kernel takes once that is calm, or when ``time.perf_counter`` says end.

        The first look of each call says what is usual from then on.
        """
        seconds = self.look()
        self._seen.append(seconds)
        while not self.is_calm(seconds) and time.perf_counter() < end:
            time.sleep(_PAUSE)
            seconds = self.look()
        return seconds

    def least(self, seconds: float) -> float:
        """The least seconds that the kernel takes within a time."""
        end, found = time.perf_counter() + seconds, self.look()
        while time.perf_counter() < end:
            found = min(found, self.look())
        return found


def paced(measure: Callable[[], float], pacer: Pacer) -> dict[str, float]:
    """Microseconds of what ``measure`` gives seconds of, taken until two times agree.

    Those that were taken while the pacer was slow count only if there are no others.

    Returns
    -------
    dict
        ``us``, on a machine that keeps ``pace``: the pacer's least time here. Of the times relative
        to the pacer's right before and after, ``us`` is the median, ``spread`` the share by which
        the second is above the least, and ``apart`` the last.
    """
    calm, slow, least = list[float](), list[float](), float("inf")
    end = time.perf_counter() + _PATIENCE
    before = pacer.settled(end)
    while True:
        seconds, after = measure(), pacer.look()
        near = min(before, after)
        least = min(least, near)
        (calm if pacer.is_calm(near) else slow).append(seconds / near)
        calm.sort()
        agree = len(calm) > 1 and calm[1] <= _AGREEMENT * calm[0]
        if agree or len(calm) > 2 or len(calm) + len(slow) >= _TRIES:
            break
        before = after if pacer.is_calm(after) else pacer.settled(end)
    found = calm if len(calm) > 1 else sorted([*calm, *slow])
    return {
        "us": 1e6 * least * statistics.median(calm or found),
        "pace": 1e6 * least,
        "spread": found[1] / found[0] - 1,
        "apart": found[-1] / found[0] - 1,
    }
