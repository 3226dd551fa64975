"""The short way of the kernels through TVM: the same numbers, and checks where asked for."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm_lowrank.schedules.kernels import emit, spaces
from tvm_lowrank.schedules.x86 import tir_pipeline
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.build import compile_module
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.target import host_target


def kernels() -> dict[str, tirx.PrimFunc]:
    """The first kernel of each family for a layer that all of them can compute."""
    isa = isa_of(host_target())
    lanes = isa.lanes
    geometry = ConvGeometry(lanes, 2 * lanes, 9, 7, (3, 3), (1, 1), (1, 1, 1, 1))
    workload = ConvWorkload(geometry, lanes, ("bias", "relu"))
    return {
        family: emit(workload, space[0], isa)
        for family, space in spaces(workload, isa, ("direct", "winograd", "fft")).items()
        if space
    }


def module(func: tirx.PrimFunc, name: str = "main") -> tvm.IRModule:
    return tvm.IRModule({name: func.with_attr("global_symbol", name)})


def arguments(func: tirx.PrimFunc) -> list[tvm.runtime.Tensor]:
    rng = np.random.default_rng(0)
    return [
        tvm.runtime.tensor(
            rng.standard_normal([int(n) for n in parameter.shape]).astype(np.float32)
        )
        for parameter in func.params
    ]


@pytest.mark.parametrize("family", sorted(kernels()))
def test_gives_what_the_default_pipeline_gives(family):
    func, target = kernels()[family], host_target()
    found = []
    for build in (tvm.compile, compile_module):
        tensors = arguments(func)
        build(module(func), target=target).jit()["main"](*tensors)
        found.append(tensors[-1].numpy())
    # Both contract products and sums as they like: a few units in the last place of the largest.
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max()


def test_other_functions_take_the_default_pipeline():
    """A function with blocks, beside a kernel: the short pipeline alone could not lower it."""
    x = te.placeholder((6, 5), "float32", "x")
    k = te.reduce_axis((0, 5), "k")
    total = te.create_prim_func([x, te.compute((6,), lambda i: te.sum(x[i, k], k), "y")])
    func = kernels()["direct"]
    both = module(func, "kernel")
    both.update(module(total, "total"))
    built = compile_module(both, host_target()).jit()
    values, sums = np.arange(30, dtype=np.float32).reshape(6, 5), tvm.runtime.empty((6,), "float32")
    built["total"](tvm.runtime.tensor(values), sums)
    assert np.array_equal(sums.numpy(), values.sum(1))
    tensors = arguments(func)
    built["kernel"](*tensors)
    assert np.isfinite(tensors[-1].numpy()).all()


def test_most_passes_are_left_out():
    """None that looks for regions of buffers runs, which took half of the time."""
    seen: list[str] = []

    @tvm.ir.instrument.pass_instrument
    class Names:
        def run_before_pass(self, _mod: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
            seen.append(info.name)

    with tvm.transform.PassContext(instruments=[Names()]):
        tvm.tirx.build(module(kernels()["direct"]), host_target(), tir_pipeline.NAME)
    assert any("FlattenBuffer" in name for name in seen)
    assert not [name for name in seen if "CompactBufferAllocation" in name]


def test_libraries_check_arguments_and_what_stays_in_the_process_need_not():
    func = kernels()["direct"]
    tensors = arguments(func)
    wrong = tvm.runtime.tensor(np.zeros([3, *tensors[0].shape[1:]], np.float32))
    checked = compile_module(module(func), host_target()).jit()["main"]
    with pytest.raises(Exception, match=r"Mismatched|Invalid"):
        checked(wrong, *tensors[1:])
    compile_module(module(func), host_target(), checks=False).jit()["main"](wrong, *tensors[1:])
