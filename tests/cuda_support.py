"""What the tests of the CUDA kernels share: running them as loops, and what nvcc makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm_lowrank.schedules import kernels
from tvm_lowrank.schedules.cuda.arch import ARCHITECTURES
from tvm_lowrank.schedules.cuda.channels_last import LastHalfSchedule, LastTF32Schedule
from tvm_lowrank.schedules.cuda.program import Program
from tvm_lowrank.schedules.cuda.warpgroup import WarpgroupHalfSchedule, WarpgroupTF32Schedule
from tvm_lowrank.schedules.family import Schedule
from tvm_lowrank.schedules.x86.isa import VectorISA
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import apply_steps, reference_convolution

from tvm_lowrank.build import compile_module

SM80, SM90 = ARCHITECTURES["sm_80"], ARCHITECTURES["sm_90"]
# Families of sm_90 alone.
LAST = {LastTF32Schedule.kernel, LastHalfSchedule.kernel}
HOPPER = {WarpgroupTF32Schedule.kernel, WarpgroupHalfSchedule.kernel, *LAST}
LOOPS = replace(SM90, loops=True)
_PLAIN = VectorISA("plain", 1, 1)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def run_on_host(program: Program, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run a program whose kernels are loops."""
    return run_program(program, inputs, tvm.target.Target("llvm"), tvm.cpu())


def run_program(program: Program, inputs: dict[str, np.ndarray], target, device) -> np.ndarray:
    """Compile and run the kernels in order; what none of them writes stays NaN."""
    functions = {
        f"stage{index}": stage.func.with_attr("global_symbol", f"stage{index}")
        for index, stage in enumerate(program.stages)
    }
    library = compile_module(tvm.IRModule(functions), target).jit()
    values = {name: tvm.runtime.tensor(array, device) for name, array in inputs.items()}
    for index, stage in enumerate(program.stages):
        shape, dtype = program.shapes[stage.writes], program.dtype(stage.writes)
        values[stage.writes] = tvm.runtime.tensor(np.full(shape, np.nan, dtype), device)
        library[f"stage{index}"](*(values[n] for n in stage.reads), values[stage.writes])
    return values["y"].numpy()


class Case:
    """Random data for a workload, a program of loops that computes it, and the float64 result."""

    def __init__(self, workload: ConvWorkload, schedule: Schedule) -> None:
        g = workload.geometry
        self.workload, self.schedule = workload, schedule
        rng = np.random.default_rng(0)
        x = rng.standard_normal((g.batch, g.in_channels, g.height, g.width)).astype("float32")
        weight = rng.standard_normal(g.weight_shape).astype("float32")
        self.program = kernels.emit(workload, schedule, LOOPS)
        y = reference_convolution(x, weight, g)
        self.expected, operands = apply_steps(y, workload.epilogue, _PLAIN, rng)
        packed = kernels.pack_weights(weight, workload, schedule, LOOPS)
        self.inputs = {"x": x, "weights": packed}
        for name, operand in zip(self.program.operands, operands, strict=True):
            self.inputs[name] = operand.reshape(self.program.shapes[name])


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel."""

    registers: int
    shared: int
    spills: int
    stack: int


def source_of(programs: list[Program], arch: str) -> str:
    """CUDA source of all kernels."""
    functions = {}
    for program in programs:
        for stage in program.stages:
            name = f"kernel{len(functions)}"
            functions[name] = stage.func.with_attr("global_symbol", name)
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    # Where TVM's CUDA runtime is loaded it would compile the source, which is done once, below.
    name = "tvm_callback_cuda_compile"
    compiler = tvm_ffi.get_global_func(name)
    tvm_ffi.register_global_func(name, lambda _: b"\x7fELF", override=True)
    try:
        library = tvm.compile(tvm.IRModule(functions), target=target)
    finally:
        tvm_ffi.register_global_func(name, compiler, override=True)
    library = library.mod if hasattr(library, "mod") else library
    return library.imports[0].inspect_source()


def launch_of(func: tvm.tirx.PrimFunc) -> tuple[list[int], list[int]]:
    """Extents (x, y, z) of a kernel's blocks and of its grid, from the loops bound to them."""
    axes = [f"{kind}.{axis}" for kind in ("threadIdx", "blockIdx") for axis in "xyz"]
    extents = dict.fromkeys(axes, 1)
    bound = re.findall(r'T\.thread_binding\((\d+), thread="(\w+\.\w)"', func.script())
    extents.update((axis, int(extent)) for extent, axis in bound)
    return [extents[axis] for axis in axes[:3]], [extents[axis] for axis in axes[3:]]


def resources_of(
    source: str, archs: Sequence[str], folder: Path
) -> dict[str, dict[str, Resources]]:
    """Compile CUDA source to machine code; what ptxas reports of each kernel, by architecture.

    nvcc runs as TVM runs it, but once for all architectures, from intermediate code of the first.
    """
    (folder / "kernels.cu").write_text(source)
    virtual = archs[0].replace("sm_", "compute_")
    command = ["nvcc", "-fatbin", "-O3", "--use_fast_math", "-Xptxas", "-v", "-w"]
    for arch in archs:
        command += ["-gencode", f"arch={virtual},code={arch}"]
    command += ["-o", str(folder / "kernels.fatbin"), str(folder / "kernels.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, done.stderr
    pattern = (
        r"entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    found: dict[str, dict[str, Resources]] = {arch: {} for arch in archs}
    matches = re.findall(pattern, done.stderr, re.S)
    for name, arch, stack, stores, loads, registers, rest in matches:
        shared = re.search(r"(\d+) bytes smem", rest)
        found[arch][name] = Resources(
            int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack)
        )
    return found
