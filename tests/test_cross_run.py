"""AArch64 kernels run by an emulator, where a cross compiler and qemu-user are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm_lowrank.schedules.kernels import emit, spaces
from tvm_lowrank.schedules.x86.gather import GatherWorkload, emit_gather
from tvm_lowrank.schedules.x86.isa import NEON
from tvm_lowrank.schedules.x86.pooling import PoolWorkload, emit_pool
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import TOLERANCE, Case, block, relative_error, unblock

from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.target import parse_target

TARGET = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed")


def emulate(func: tvm.tirx.PrimFunc, inputs: list[np.ndarray], out_shape, folder: Path):
    """The kernel's result, its output NaN before."""
    module = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    program = folder / "program"

    def link(_out: str, objects: list[str], **_options: object) -> None:
        source = Path(__file__).with_name("emulated_kernel.c")
        flags = ["-static", "-O1", "-w", f"-I{tvm_ffi.libinfo.find_include_path()}"]
        dlpack = tvm_ffi.libinfo.find_dlpack_include_path()
        command = [COMPILER, *flags, f"-I{dlpack}", source, *objects, "-lm", "-o", program]
        subprocess.run(command, check=True)

    compiled = tvm.compile(module, target=parse_target(TARGET))
    compiled.export_library(str(folder / "kernel.so"), fcompile=link)
    tensors = [*inputs, np.full(out_shape, np.nan)]
    data = np.int64(len(tensors)).tobytes()
    for tensor in tensors:
        data += np.int64([tensor.ndim, *tensor.shape]).tobytes()
        data += np.ascontiguousarray(tensor, np.float32).tobytes()
    done = subprocess.run([EMULATOR, program], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.float32).reshape(out_shape)


CONVOLUTIONS = [
    ConvWorkload(ConvGeometry(10, 20, 9, 7, (3, 3), padding=(1, 1, 1, 1)), 4, ("bias", "silu")),
    ConvWorkload(ConvGeometry(3, 9, 12, 11, (5, 4), stride=(2, 3)), 1, ("affine", "gelu")),
    ConvWorkload(ConvGeometry(24, 16, 6, 5, (1, 1), batch=2), 4, ("residual", "relu")),
    ConvWorkload(ConvGeometry(12, 12, 8, 9, (3, 3), groups=12), 4, ("hard_swish",)),
]


@pytest.mark.parametrize("workload", CONVOLUTIONS)
def test_convolutions(workload, tmp_path):
    for schedules in spaces(workload, NEON).values():
        case = Case(workload, schedules[0], NEON)
        func = emit(workload, schedules[0], NEON)
        y = unblock(emulate(func, case.inputs, case.out_shape, tmp_path), case.expected.shape[1])
        assert relative_error(y, case.expected) < TOLERANCE


def test_pooling_and_copies(tmp_path):
    x = np.random.default_rng(0).standard_normal((1, 12, 6, 8)).astype("float32")
    pooled = emulate(
        emit_pool(PoolWorkload("max", 1, 12, 6, 8, (2, 2), (2, 2)), NEON),
        [block(x, 4)], (1, 3, 3, 4, 4), tmp_path,
    )  # fmt: skip
    np.testing.assert_array_equal(
        unblock(pooled, 12), x.reshape(1, 12, 3, 2, 4, 2).max(axis=(3, 5))
    )
    joined = emulate(
        emit_gather(GatherWorkload.concatenation(1, (12, 12), 6, 8), NEON, ("relu",)),
        [block(x, 4), block(-x, 4)], (1, 6, 6, 8, 4), tmp_path,
    )  # fmt: skip
    np.testing.assert_array_equal(unblock(joined, 24), np.maximum(np.concatenate([x, -x], 1), 0))
