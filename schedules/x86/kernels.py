"""The families of x86 convolution kernels."""

from __future__ import annotations

import functools

from tvm_lowrank.schedules.family import KernelFamily

from . import (
    bfloat16,
    bfloat16_schedule,
    convolution,
    dense,
    depthwise,
    fft,
    fft_schedule,
    fft_space,
    packing,
    space,
    winograd,
    winograd_schedule,
    winograd_space,
)
from .accuracy import bfloat16_error, direct_error
from .bfloat16_schedule import Bfloat16Schedule
from .dense import Bfloat16DenseSchedule, DenseSchedule
from .depthwise import DepthwiseSchedule
from .fft_schedule import FFTSchedule
from .winograd_schedule import WinogradSchedule
from .workload import ConvSchedule

FAMILIES: dict[str, KernelFamily] = {
    ConvSchedule.kernel: KernelFamily(
        "direct",
        convolution.refuse,
        convolution.space,
        convolution.emit,
        packing.pack_weights,
        ConvSchedule.from_json,
        direct_error,
        effort=space.effort,
    ),
    DenseSchedule.kernel: KernelFamily(
        "direct",
        dense.refuse,
        dense.space,
        dense.emit,
        dense.pack,
        DenseSchedule.from_json,
        direct_error,
        effort=dense.effort,
    ),
    DepthwiseSchedule.kernel: KernelFamily(
        "direct",
        depthwise.refuse,
        depthwise.space,
        depthwise.emit,
        depthwise.pack,
        DepthwiseSchedule.from_json,
        direct_error,
        effort=depthwise.effort,
    ),
    WinogradSchedule.kernel: KernelFamily(
        "winograd",
        winograd_schedule.refuse,
        winograd_space.space,
        winograd.emit,
        winograd.pack,
        WinogradSchedule.from_json,
        winograd_schedule.error_bound,
        effort=winograd_space.effort,
    ),
    FFTSchedule.kernel: KernelFamily(
        "fft",
        fft_schedule.refuse,
        fft_space.space,
        fft.emit,
        fft.pack,
        FFTSchedule.from_json,
        fft_schedule.error_bound,
        effort=fft_space.effort,
    ),
    Bfloat16Schedule.kernel: KernelFamily(
        "bfloat16",
        bfloat16_schedule.refuse,
        bfloat16_schedule.space,
        bfloat16.emit,
        bfloat16.pack,
        Bfloat16Schedule.from_json,
        bfloat16_error,
        effort=bfloat16_schedule.effort,
    ),
    Bfloat16DenseSchedule.kernel: KernelFamily(
        "bfloat16",
        functools.partial(dense.refuse, kind=Bfloat16DenseSchedule),
        functools.partial(dense.space, kind=Bfloat16DenseSchedule),
        dense.emit,
        dense.pack,
        Bfloat16DenseSchedule.from_json,
        bfloat16_error,
        effort=dense.effort,
    ),
}
