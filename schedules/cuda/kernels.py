"""The families of CUDA convolution kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from tvm_lowrank.schedules.family import KernelFamily
from tvm_lowrank.schedules.x86.accuracy import direct_error

from . import channels_last, dense, depthwise, direct, fft, tensor, tf32, warpgroup, winograd
from .channels_last import LastHalfSchedule, LastSchedule, LastTF32Schedule
from .dense import DenseSchedule
from .depthwise import DepthwiseSchedule
from .direct import DirectSchedule
from .fft import FFTSchedule
from .tensor import TensorSchedule
from .tf32 import TF32Schedule
from .warpgroup import WarpgroupHalfSchedule, WarpgroupSchedule, WarpgroupTF32Schedule
from .winograd import WinogradSchedule


def _family(
    algorithm: str, module: ModuleType, schedule: Any, error_bound: Callable[..., float]
) -> KernelFamily:
    """The family whose functions a module has under the names of `KernelFamily`."""
    return KernelFamily(
        algorithm,
        module.refuse,
        module.space,
        module.emit,
        module.pack,
        schedule.from_json,
        error_bound,
        module.predict,
    )


def _warpgroups(algorithm: str, schedule: type[WarpgroupSchedule]) -> KernelFamily:
    """The family of one type of factors."""
    family = _family(algorithm, warpgroup, schedule, tensor.error_bound)
    return replace(family, space=functools.partial(warpgroup.space, schedule))


def _last(algorithm: str, schedule: type[LastSchedule]) -> KernelFamily:
    """The family of one kind of maps with channels last."""
    family = _family(algorithm, channels_last, schedule, channels_last.error_bound)
    return replace(family, space=functools.partial(channels_last.space, schedule))


# Of one algorithm the more special first: where nothing is known, the first that can is taken.
FAMILIES: dict[str, KernelFamily] = {
    DenseSchedule.kernel: _family("direct", dense, DenseSchedule, direct_error),
    DirectSchedule.kernel: _family("direct", direct, DirectSchedule, direct_error),
    DepthwiseSchedule.kernel: _family("direct", depthwise, DepthwiseSchedule, direct_error),
    WinogradSchedule.kernel: _family("winograd", winograd, WinogradSchedule, winograd.error_bound),
    FFTSchedule.kernel: _family("fft", fft, FFTSchedule, fft.error_bound),
    TensorSchedule.kernel: _family("half", tensor, TensorSchedule, tensor.error_bound),
    TF32Schedule.kernel: _family("tf32", tf32, TF32Schedule, tensor.error_bound),
    WarpgroupHalfSchedule.kernel: _warpgroups("half", WarpgroupHalfSchedule),
    WarpgroupTF32Schedule.kernel: _warpgroups("tf32", WarpgroupTF32Schedule),
    LastHalfSchedule.kernel: _last("half", LastHalfSchedule),
    LastTF32Schedule.kernel: _last("tf32", LastTF32Schedule),
}
