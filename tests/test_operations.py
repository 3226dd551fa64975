"""Operation counts against hand-made numbers and the paper's formulas."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_lowrank.cost import operations
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.geometry import ConvGeometry

LAYER = ConvGeometry(16, 32, 10, 12, (3, 5), padding=(1, 2, 1, 2), batch=2)


def test_counts_of_one_layer():
    assert operations.multiplications([LAYER]) == 2 * 10 * 12 * 16 * 32 * 15
    assert operations.weight_count([LAYER]) == 16 * 32 * 15
    values = 2 * 10 * 12 * (16 + 32) + 16 * 32 * 15
    assert operations.bytes_moved([LAYER]) == 4 * values
    assert operations.multiplications([]) == 0


def test_chain_counts_its_intermediate_maps_twice():
    chain = FORMS["tucker2"].stages(LAYER, (4, 32))
    pixels = 2 * 10 * 12
    assert operations.multiplications(chain) == pixels * (16 * 4 + 15 * 4 * 32)
    assert operations.weight_count(chain) == 16 * 4 + 15 * 4 * 32
    moved = pixels * (16 + 4 + 4 + 32) + operations.weight_count(chain)
    assert operations.bytes_moved(chain) == 4 * moved


def test_separable_chain_of_a_strided_layer():
    layer = ConvGeometry(16, 32, 20, 20, (3, 3), (2, 2), (1, 1, 1, 1))
    chain = FORMS["separable"].stages(layer, 8)
    # Half the rows but all the columns in the first stage.
    assert operations.multiplications(chain) == 10 * 20 * 16 * 3 * 8 + 10 * 10 * 8 * 3 * 32
    assert operations.multiplications([layer]) == 10 * 10 * 16 * 32 * 9


def test_table_1():
    # The paper's first ImageNet layer: 3 -> 96, 7 x 7, stride 2.
    assert operations.full_ops_per_pixel(3, 96, (7, 7), 2) == 7 * 7 * 3 * 96 / 4
    assert operations.separable_ops_per_pixel(3, 96, (7, 7), 10, 2) == pytest.approx(
        10 * (3 + 7 / 2 + 7 / 4 + 96 / 4)
    )


def test_table_1_equals_the_chain_of_its_four_stages():
    c, f, k, side, stride = 6, 10, 4, 24, 2
    stages = [
        ConvGeometry(c, k, side, side, (1, 1)),
        ConvGeometry(k, k, side, side, (3, 1), (stride, 1), (1, 0, 1, 0), groups=k),
        ConvGeometry(k, k, side // 2, side, (1, 5), (1, stride), (0, 2, 0, 2), groups=k),
        ConvGeometry(k, f, side // 2, side // 2, (1, 1)),
    ]
    per_pixel = operations.multiplications(stages) / side**2
    assert per_pixel == operations.separable_ops_per_pixel(c, f, (3, 5), k, stride)


def test_one_bicluster_is_table_1_and_more_cost_more_at_one_rank():
    plain = operations.separable_ops_per_pixel(48, 96, (5, 5), 8, 2)
    assert operations.biclustered_ops_per_pixel(48, 96, (5, 5), 8, (1, 1), 2) == plain
    split = operations.biclustered_ops_per_pixel(48, 96, (5, 5), 8, (2, 3), 2)
    assert split == pytest.approx(8 * 6 * (24 + 5 / 2 + 5 / 4 + 32 / 4))


def test_bicluster_chain_costs_the_formula_of_section_3_3():
    c, f, k, side, stride = 12, 20, 4, 24, 2
    layer = ConvGeometry(c, f, side, side, (3, 5), (stride, stride), (1, 2, 1, 2))
    for n, m in ((2, 2), (3, 2), (4, 5), (1, 2)):
        per_pixel = FORMS["bicluster"].multiplications(layer, (n, m, k)) / side**2
        expected = operations.biclustered_ops_per_pixel(c, f, (3, 5), k, (n, m), stride)
        assert per_pixel == expected


@pytest.mark.parametrize("name", sorted(FORMS))
def test_counter_agrees_with_the_loops_of_the_emitted_tir(name):
    layer = ConvGeometry(8, 12, 11, 10, (5, 3), (2, 2), (2, 0, 1, 1))
    if name == "svd":
        layer = ConvGeometry(8, 12, 3, 2, (3, 2))
    form = FORMS[name]
    rank = form.ranks(layer, 1)[0]
    stages, gathers = form.stages(layer, rank), form.gathers(layer, rank)
    counted = [loop_iterations(s) for i, s in enumerate(stages) if i not in gathers]
    assert sum(counted) == form.multiplications(layer, rank)


def loop_iterations(stage):
    """Iterations of the innermost statement of TVM's own conv2d, from the extents of its loops."""
    x = relax.Var("x", relax.TensorType((1, stage.in_channels, stage.height, stage.width)))
    weight = np.ones(stage.weight_shape, np.float32)
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = relax.op.nn.conv2d(
                x, relax.const(weight), stage.stride, stage.padding, stage.dilation, stage.groups
            )
            out = builder.emit_output(builder.emit(out))
        builder.emit_func_output(out)
    legal = relax.transform.LegalizeOps()(builder.get())
    counts = []
    for function in legal.functions.values():
        if isinstance(function, tvm.tirx.PrimFunc):
            schedule = tvm.s_tir.Schedule(function)
            for handle in schedule.get_child_blocks(schedule.get_sblock("root")):
                block = schedule.get(handle)
                # A reduction is the one block with an initial value: it multiplies.
                if block.init is not None:
                    counts.append(int(np.prod([int(v.dom.extent) for v in block.iter_vars])))
    (count,) = counts
    return count
