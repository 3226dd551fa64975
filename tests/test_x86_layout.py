import numpy as np
import pytest
from tvm_lowrank.schedules.x86.layout import emit_block, emit_unblock
from x86_support import CPUS, block, run, runnable_isa

# Fewer pixels than lanes, a multiple of them, neither; channels below, at and above the lanes.
SHAPES = [(2, 3, 1, 1), (1, 37, 3, 1), (2, 16, 4, 4), (3, 20, 5, 7), (1, 33, 9, 11)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CPUS)
def test_block_and_unblock(name, shape):
    isa = runnable_isa(name)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    blocked = block(x, isa.lanes)
    assert np.array_equal(run(emit_block(*shape, isa), isa, [x], blocked.shape), blocked)
    assert np.array_equal(run(emit_unblock(*shape, isa), isa, [blocked], shape), x)
