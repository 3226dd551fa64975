"""Kernels that read or write a part of a larger map."""

from __future__ import annotations

import numpy as np
import pytest
from tvm_lowrank.schedules.kernels import emit, pack_weights, spaces
from tvm_lowrank.schedules.x86.elementwise import emit_elementwise
from tvm_lowrank.schedules.x86.placement import Part, place
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from x86_support import CPUS, block, run, runnable_isa

from tvm_lowrank.geometry import ConvGeometry


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_of_some_blocks_into_some_blocks(name, size):
    isa = runnable_isa(name)
    lanes, pad = isa.lanes, size // 2
    geometry = ConvGeometry(2 * lanes, 3 * lanes, 5, 7, (size, size), padding=(pad,) * 4)
    workload = ConvWorkload(geometry, lanes, ("silu",))
    rng = np.random.default_rng(size)
    weight = rng.standard_normal(geometry.weight_shape).astype("float32")
    whole = block(rng.standard_normal((1, 5 * lanes, 5, 7)).astype("float32"), lanes)
    for schedules in spaces(workload, isa).values():
        func = emit(workload, schedules[0], isa)
        packed = pack_weights(weight, workload, schedules[0], isa)
        expected = run(func, isa, [whole[:, 2:4], packed], (1, 3, 5, 7, lanes))
        placed = place(place(func, "x", Part(2, 5)), "y", Part(1, 6))
        y = run(placed, isa, [whole, packed], (1, 6, 5, 7, lanes))
        np.testing.assert_array_equal(y[:, 1:4], expected)
        assert np.isnan(y[:, :1]).all() and np.isnan(y[:, 4:]).all()


def test_what_is_no_one_piece_of_memory_is_refused():
    isa = runnable_isa("generic")
    with pytest.raises(ValueError, match="not one piece"):
        place(emit_elementwise(2, 4, 3, 3, ("relu",), isa), "y", Part(0, 2))
    with pytest.raises(ValueError, match="not among"):
        place(emit_elementwise(1, 8, 3, 3, ("relu",), isa), "y", Part(1, 2))
