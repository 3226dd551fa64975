"""The CUDA side of a machine: its GPU if there is one, its compiler, and code without either."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from tvm_lowrank.errors import LowRankError

# What TVM's CUDA runtime wants of the driver library.
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_MACHINE_CODE = 2  # the kind of a fatbin's entry; 1 is PTX


def gpu_architecture() -> str | None:
    """The architecture of this machine's first GPU, as ``sm_90``; None without a GPU."""
    device = tvm.cuda(0)
    if not device.exist:
        return None
    return "sm_" + str(device.compute_version).replace(".", "")


def gpu_name() -> str:
    """The name of this machine's first GPU, as its driver gives it."""
    return str(tvm.cuda(0).device_name)


def prepare_compiler(target: tvm.target.Target) -> None:
    """Make sure that TVM turns CUDA source into machine code, on machines without a GPU too.

    Raises
    ------
    LowRankError
        There is no nvcc, or (without a GPU's driver) no CUDA runtime library or C compiler.
    """
    if shutil.which("nvcc") is None:
        raise LowRankError(
            f"kernels for {target.attrs.get('arch', 'cuda')} need nvcc, which is not on the PATH; "
            "install NVIDIA's CUDA toolkit (version 12 or later; no GPU is needed to compile)"
        )
    # TVM's other compiler, nvrtc, needs a further package.
    os.environ.setdefault("TVM_CUDA_COMPILE_MODE", "nvcc")
    if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        _load_runtime_without_driver()


@functools.cache
def _load_runtime_without_driver() -> None:
    """Load TVM's CUDA runtime with a stand-in for the driver library.

    Without that runtime TVM writes CUDA *source* into the library it exports, which then asks for a
    compiler where it is loaded. The runtime needs a driver to be loaded, but none to pack machine
    code; in the stand-in every call fails as it does where there is no GPU.
    """
    source = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS)
    compiler = os.environ.get("CC") or "cc"
    try:
        with tempfile.TemporaryDirectory(prefix="tvm_lowrank-") as folder:
            stub = Path(folder) / "libcuda.so.1"
            (Path(folder) / "driver.c").write_text(source)
            command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub)]
            subprocess.run([*command, f"{folder}/driver.c"], check=True, capture_output=True)
            ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
        runtime = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
        ctypes.CDLL(str(runtime))
    except (OSError, subprocess.CalledProcessError) as error:
        raise LowRankError(
            f"TVM's CUDA runtime cannot be loaded on this machine without a driver ({error}); a C "
            "compiler and the CUDA toolkit's libcudart must be installed"
        ) from error


def with_every_instruction(target: tvm.target.Target) -> tvm.target.Target:
    """The target for nvcc: of sm_90 with the instructions that no later architecture has.

    Every GPU of compute capability 9.0 has them (warpgroups' products are among them), but nvcc
    takes them only for ``sm_90a``.
    """
    fields = json.loads(str(target))
    if fields.get("arch") != "sm_90":
        return target
    host = fields.pop("host", None)
    return tvm.target.Target({**fields, "arch": "sm_90a"}, host=host)


def compile_options() -> dict[str, Any]:
    """The configuration of TVM's passes for a CUDA build: whole networks as CUDA graphs."""
    return {"relax.backend.use_cuda_graph": True}


def architectures_in(library: Path) -> Counter[str]:
    """For which architectures a shared library holds machine code, with the number of pieces.

    Reads the headers of the fat binaries in it, the form in which nvcc packs code.
    """
    data = library.read_bytes()
    found: Counter[str] = Counter()
    at = data.find(_FATBIN_MAGIC)
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        while entry + 32 <= min(end, len(data)):
            kind, _, skip, length = struct.unpack_from("<HHIQ", data, entry)
            (number,) = struct.unpack_from("<I", data, entry + 28)
            if kind == _MACHINE_CODE:
                found[f"sm_{number}"] += 1
            entry += skip + length
        at = data.find(_FATBIN_MAGIC, max(end, at + 1))
    return found
