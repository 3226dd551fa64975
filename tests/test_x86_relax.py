import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_lowrank.schedules.x86 import convolution, layout
from tvm_lowrank.schedules.x86.pooling import PoolWorkload, emit_pool
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import CPUS, TOLERANCE, Case, relative_error, runnable_isa, target, unblock

from tvm_lowrank.geometry import ConvGeometry


@pytest.mark.parametrize("name", CPUS)
def test_kernels_in_a_relax_function_compiled_by_the_stock_pipeline(name):
    """NCHW in; block, convolution with residual, pooling, unblock, a stock operator; NCHW out."""
    isa = runnable_isa(name)
    geometry = ConvGeometry(20, 20, 8, 8, (3, 3), padding=(1, 1, 1, 1), batch=2)
    workload = ConvWorkload(geometry, isa.lanes, ("bias", "residual", "relu"))
    schedule = convolution.space(workload, isa)[0]
    case = Case(workload, schedule, isa)
    residual = unblock(case.inputs[3], 20)
    pool = PoolWorkload("max", 2, 20, 8, 8, (2, 2), (2, 2))
    blocks = -(-20 // isa.lanes)

    bb = relax.BlockBuilder()
    conv = bb.add_func(convolution.emit(workload, schedule, isa), "conv")
    to_blocks = bb.add_func(layout.emit_block(2, 20, 8, 8, isa), "block")
    pooling = bb.add_func(emit_pool(pool, isa), "pool")
    from_blocks = bb.add_func(layout.emit_unblock(2, 20, 4, 4, isa), "unblock")
    x = relax.Var("x", relax.TensorType((2, 20, 8, 8), "float32"))
    r = relax.Var("r", relax.TensorType((2, 20, 8, 8), "float32"))
    with bb.function("main", [x, r]):
        with bb.dataflow():

            def call(gvar, args, shape):
                return bb.emit(relax.call_tir(gvar, args, relax.TensorType(shape, "float32")))

            maps = (2, blocks, 8, 8, isa.lanes)
            blocked = call(to_blocks, [x], maps)
            skip = call(to_blocks, [bb.emit(relax.op.multiply(r, relax.const(1.0)))], maps)
            weights, bias = (relax.const(array) for array in case.inputs[1:3])
            y = call(conv, [blocked, weights, bias, skip], maps)
            y = call(pooling, [y], (2, blocks, 4, 4, isa.lanes))
            y = call(from_blocks, [y], (2, 20, 4, 4))
            out = bb.emit_output(relax.op.nn.relu(relax.op.add(y, relax.const(1.0))))
        bb.emit_func_output(out)
    executable = tvm.compile(bb.get(), target=target(name))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(case.x), tvm.runtime.tensor(np.array(residual)))
    expected = case.expected.reshape(2, 20, 4, 2, 4, 2).max(axis=(3, 5)) + 1
    assert relative_error(result.numpy(), expected) < TOLERANCE
