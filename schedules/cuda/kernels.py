"""The families of CUDA convolution kernels."""

from __future__ import annotations

from typing import Any

from tvm_lowrank.schedules.family import KernelFamily
from tvm_lowrank.schedules.x86.accuracy import stated_error
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from . import dense, depthwise, direct, fft, tensor, tf32, winograd
from .dense import DenseSchedule
from .depthwise import DepthwiseSchedule
from .direct import DirectSchedule
from .fft import FFTSchedule
from .tensor import TensorSchedule
from .tf32 import TF32Schedule
from .winograd import WinogradSchedule


def _direct_error(workload: ConvWorkload, schedule: Any) -> float:
    _, channels, rows, columns = workload.geometry.weight_shape
    return stated_error(channels * rows * columns)


# Of one algorithm the more special first: where nothing is known, the first that can is taken.
FAMILIES: dict[str, KernelFamily] = {
    DenseSchedule.kernel: KernelFamily(
        "direct",
        dense.refuse,
        dense.space,
        dense.emit,
        dense.pack,
        DenseSchedule.from_json,
        _direct_error,
        dense.predict,
    ),
    DirectSchedule.kernel: KernelFamily(
        "direct",
        direct.refuse,
        direct.space,
        direct.emit,
        direct.pack,
        DirectSchedule.from_json,
        _direct_error,
        direct.predict,
    ),
    DepthwiseSchedule.kernel: KernelFamily(
        "direct",
        depthwise.refuse,
        depthwise.space,
        depthwise.emit,
        depthwise.pack,
        DepthwiseSchedule.from_json,
        _direct_error,
        depthwise.predict,
    ),
    WinogradSchedule.kernel: KernelFamily(
        "winograd",
        winograd.refuse,
        winograd.space,
        winograd.emit,
        winograd.pack,
        WinogradSchedule.from_json,
        winograd.error_bound,
        winograd.predict,
    ),
    FFTSchedule.kernel: KernelFamily(
        "fft",
        fft.refuse,
        fft.space,
        fft.emit,
        fft.pack,
        FFTSchedule.from_json,
        fft.error_bound,
        fft.predict,
    ),
    TensorSchedule.kernel: KernelFamily(
        "half",
        tensor.refuse,
        tensor.space,
        tensor.emit,
        tensor.pack,
        TensorSchedule.from_json,
        tensor.error_bound,
        tensor.predict,
    ),
    TF32Schedule.kernel: KernelFamily(
        "tf32",
        tf32.refuse,
        tf32.space,
        tf32.emit,
        tf32.pack,
        TF32Schedule.from_json,
        tensor.error_bound,
        tf32.predict,
    ),
}
