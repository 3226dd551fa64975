"""TVM's loops for operators without kernels, shared among threads."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from graph_support import RNG, Graph
from helpers import relative
from tvm import relax, s_tir
from tvm_lowrank.passes.lower import lower
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.machine import machine_of
from tvm_lowrank.schedules.x86.parallel_loops import share_loops

from tvm_lowrank.build import compile_module, network_of
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target


def functions(build, *shape):
    """What TVM makes of an operator, by name."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(build(x)))
    mod = relax.transform.LegalizeOps()(builder.get())
    return {g.name_hint: f for g, f in mod.functions_items() if g.name_hint != "main"}


def test_large_blocks_are_shared_and_small_ones_are_not():
    (large,) = functions(relax.op.exp, 4, 50, 40, 30).values()
    assert (
        share_loops(large).script().count("T.parallel(T.int64(200))") == 1
    )  # two axes are tasks enough
    (small,) = functions(relax.op.exp, 4, 5, 4, 3).values()
    assert "T.parallel" not in share_loops(small).script()


def test_sums_are_taken_by_one_thread_each():
    softmax = share_loops(functions(relax.op.nn.softmax, 200, 1000)["softmax"]).script()
    # Maximum, exponential, sum, quotient: in all of them only the rows are shared, or all values.
    assert softmax.count("T.parallel(T.int64(200))") == 4
    (total,) = functions(lambda x: relax.op.sum(x), 300, 300).values()
    assert "T.parallel" not in share_loops(total).script()


def test_what_is_scheduled_or_has_no_known_shape_stays():
    (func,) = functions(relax.op.exp, 4, 50, 40, 30).values()
    schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
    (block,) = schedule.get_child_blocks(schedule.get_sblock("root"))
    schedule.vectorize(schedule.split(schedule.get_loops(block)[-1], [None, 10])[1])
    mine = schedule.mod["main"]
    assert share_loops(mine).same_as(mine)
    n = tvm.tirx.Var("n", "int64")
    (dynamic,) = functions(relax.op.exp, n, 64, 64).values()
    assert "T.parallel" not in share_loops(dynamic).script()


def test_a_network_of_such_operators_computes_the_same():
    runtime = pytest.importorskip("onnxruntime")
    g = Graph(1, 3, 64, 64)
    x = g.op("Elu", g.conv("x", 3, 20))
    scale, shift = (g.constant(RNG.standard_normal(20)) for _ in range(2))
    x = g.conv(g.op("InstanceNormalization", x, scale, shift), 20, 16, strides=[2, 2])
    model = g.model(g.op("Softmax", x, axis=1))
    target = host_target()
    machine = machine_of(target)
    mod = lower(normalise(load_model(model)), machine, lambda w: default_schedule(w, machine))
    x = RNG.standard_normal(g.shape).astype(np.float32)
    expected = runtime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    assert relative(network_of(compile_module(mod, target))(x), expected) < 1e-5
