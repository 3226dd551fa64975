"""The CUDA source of kernels, compiled for and run on a processor by `emulated_gpu.h`."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cuda_support import launch_of, source_of
from tvm_lowrank.schedules.cuda.program import Program

COMPILER = "g++"
# Values around each array, which no kernel may touch.
_GUARD = 256


class EmulatedPrograms:
    """Programs as their GPU runs them, thread by thread.

    All kernels are compiled at once, for it is the compiler's start that takes the time.
    """

    def __init__(self, programs: list[Program], arch: str, folder: Path) -> None:
        source = source_of(programs, arch)
        kernels = source[source.index('extern "C" __global__') :]
        shared = r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];"
        kernels = re.sub(shared, r"\1 *\2 = (\1 *)gpu::dynamic_memory;", kernels)
        kernels = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", kernels)
        kernels = _asynchronous(kernels)
        self._parameters: dict[str, list[str]] = {}
        launchers = []
        for name, text in re.findall(r"(kernel\d+)_kernel\(([^)]*)\);", kernels):
            parameters = re.findall(r"(\w+)\* __restrict__ (\w+)_ptr", text)
            self._parameters[name] = [parameter for _, parameter in parameters]
            values = ", ".join(f"({kind} *)a[{i}]" for i, (kind, _) in enumerate(parameters))
            launchers.append(
                f'extern "C" int launch_{name}(const int *grid, const int *block, void **a) {{\n'
                f"  return gpu::run(grid, block, [=] {{ {name}_kernel({values}); }});\n}}\n"
            )
        header = Path(__file__).with_name("emulated_gpu.h")
        path, library = folder / "kernels.cc", folder / "kernels.so"
        path.write_text(f'#include "{header}"\n' + kernels + "\n".join(launchers))
        command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", path, "-o", library]
        subprocess.run(command, check=True)
        self._library = ctypes.CDLL(str(library))
        self._first = {}
        count = 0
        for program in programs:
            self._first[id(program)] = count
            count += len(program.stages)

    def run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of one of the programs; what no kernel writes is NaN."""
        values = {name: _guarded(array) for name, array in inputs.items()}
        for index, stage in enumerate(program.stages, self._first[id(program)]):
            shape, dtype = program.shapes[stage.writes], program.dtype(stage.writes)
            values[stage.writes] = _guarded(np.full(shape, np.nan, dtype))
            name = f"kernel{index}"
            used = (*stage.reads, stage.writes)
            given = {p.name: values[n] for p, n in zip(stage.func.params, used, strict=True)}
            pointers = [given[p][_GUARD:].ctypes.data for p in self._parameters[name]]
            threads, grid = launch_of(stage.func)
            launch = getattr(self._library, f"launch_{name}")
            three, several = ctypes.c_int * 3, ctypes.c_void_p * len(pointers)
            parted = launch(three(*grid), three(*threads), several(*pointers))
            assert not parted, f"threads of {stage.writes} part at a barrier"
        for name, array in values.items():
            assert np.isnan(array[:_GUARD]).all() and np.isnan(array[-_GUARD:]).all(), name
        return values["y"][_GUARD:-_GUARD].reshape(program.shapes["y"])


def _asynchronous(kernels: str) -> str:
    """Kernels with the names of `wgmma`'s functions put into what the emulator has for them."""
    names = (
        (r"tvm_lowrank_copy_line_\d+", "start_copy<16>"),
        (r"tvm_lowrank_copy_(\d+)", r"start_copy<\1>"),
        (r"tvm_lowrank_barriers_prepare_(\d+)_(\d+)_(\d+)", r"prepare_barriers<\1, \2, \3>"),
        (r"tvm_lowrank_send_(\d+)", r"send<\1>"),
        (r"tvm_lowrank_registers_(?:inc|dec)_\d+\(\);", ""),
        (r"tvm_lowrank_wgmma_read_(\w+?)_(\d+)_(\d+)", r"read_rows<\1, \2, \3>"),
        (r"tvm_lowrank_wgmma_(tf32|half)_(\d+)x(\d+)", r"start_product<\1, \2, \3>"),
        (
            r"tvm_lowrank_wgmma_shared_(tf32|half)_(\d+)x(\d+)x(\d+)_(\d+)",
            r"start_shared_product<\1, \2, \3, \4, \5>",
        ),
        (r"<tf32, ", "<float, "),
        (r"tvm_lowrank_(fetch|store)_channels_\d+", r"\1_channels"),
        (r"tvm_lowrank_unpack_channels_2", "unpack_channels<half>"),
        (r"tvm_lowrank_unpack_channels_4", "unpack_channels<float>"),
        (r"tvm_lowrank_wgmma_finish_\d+\(.*\)", "wait_for_products(0)"),
    )
    for pattern, name in names:
        kernels = re.sub(pattern, name, kernels)
    return kernels


def _guarded(array: np.ndarray) -> np.ndarray:
    """The values between NaN, at an address that vectors can be read from."""
    whole = np.full(array.size + 2 * _GUARD + 16, np.nan, array.dtype)
    skip = -whole.ctypes.data // array.itemsize % 16
    whole = whole[skip : skip + array.size + 2 * _GUARD]
    whole[_GUARD:-_GUARD] = array.reshape(-1)
    return whole
