"""Kernel calls merged into one function: the same numbers, in no more memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tvm
from graph_support import Graph
from helpers import factored_plan, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm_lowrank.passes.graph import constant_array, is_constant
from tvm_lowrank.passes.lower_convolutions import LowerConvolutions
from tvm_lowrank.passes.merge_calls import MergeCalls
from tvm_lowrank.passes.pipeline import normalise
from tvm_lowrank.schedules.kernels import default_schedule
from tvm_lowrank.schedules.x86.elementwise import emit_elementwise
from tvm_lowrank.schedules.x86.emitter import ALIGNMENT
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.stages import stages_of
from tvm_lowrank.schedules.x86.subroutines import NOTES
from tvm_lowrank.schedules.x86.tir_pipeline import NAME
from tvm_lowrank.schedules.x86.workspace import Lifetime, plan_offsets

import tvm_lowrank
from tvm_lowrank.build import compile_module, network_of
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target

ISA = isa_of(host_target())
SHAPE = (1, 2, 3, 5, ISA.lanes)


@st.composite
def lifetimes(draw):
    first = draw(st.integers(0, 12))
    return Lifetime(draw(st.integers(1, 3000)), first, first + draw(st.integers(0, 6)))


@given(st.lists(lifetimes(), max_size=20))
def test_what_lives_at_once_does_not_overlap(values):
    offsets, total = plan_offsets(values, ALIGNMENT)
    assert len(offsets) == len(values) and not any(offset % ALIGNMENT for offset in offsets)
    placed = list(zip(values, offsets, strict=True))
    for i, (value, offset) in enumerate(placed):
        assert offset + value.size <= total
        for other, start in placed[:i]:
            apart = offset + value.size <= start or start + other.size <= offset
            assert apart or value.last < other.first or other.last < value.first
    assert total <= sum(-(-value.size // ALIGNMENT) * ALIGNMENT for value in values)


def test_a_chain_takes_turns_in_two_places():
    sizes = [ALIGNMENT * n for n in (4, 3, 2, 1)]
    values = [Lifetime(size, step, step + 1) for step, size in enumerate(sizes)]
    assert plan_offsets(values, ALIGNMENT)[1] == sizes[0] + sizes[1]


def unmerged(mod: tvm.IRModule) -> tvm.runtime.Executable:
    return tvm.compile(mod, host_target(), tir_pipeline=NAME)


def outputs(executable, *inputs: np.ndarray) -> list[np.ndarray]:
    found = network_of(executable)(*inputs)
    return [found] if isinstance(found, np.ndarray) else list(found)


def same(mod: tvm.IRModule, *inputs: np.ndarray) -> tvm.IRModule:
    """The module merged, after its outputs were found to be those of the module itself."""
    expected = outputs(unmerged(mod), *inputs)
    executable = compile_module(mod, host_target())
    for _ in range(2):  # the workspace holds what the run before has left
        found = outputs(executable, *inputs)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    return MergeCalls(host_target())(mod)


def planned_bytes(mod: tvm.IRModule) -> int:
    """Bytes of all tensors of ``main`` by TVM's memory planner."""
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    ]
    planned = tvm.ir.transform.Sequential(passes)(mod)
    total = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal total
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            if expr.op.name == "relax.memory.alloc_storage":
                total += int(expr.args[0].values[0])
            if expr.op.name == "relax.builtin.alloc_tensor":
                total += 4 * int(np.prod([int(n) for n in expr.args[0].values]))

    relax.analysis.post_order_visit(planned["main"], visit)
    return total


def taken_apart(mod: tvm.IRModule):
    return [stages_of(func) for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]


def shared_bytes(mod: tvm.IRModule) -> int:
    """Bytes that stages of kernels share, which one call holds, and of its notes."""
    return 4 * NOTES + sum(4 * size for found in taken_apart(mod) for size in found.shared)


def lowered(graph: Graph, *outs: str) -> tvm.IRModule:
    model = graph.model(outs[0])
    for out in outs[1:]:
        model.graph.output.add().CopyFrom(model.graph.output[0])
        model.graph.output[-1].name = out
    mod = normalise(load_model(model))
    return LowerConvolutions(ISA, lambda workload: default_schedule(workload, ISA))(mod)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_residual_network_is_one_call(batch):
    g = Graph(batch, 3, 12, 12)
    x = g.op("Relu", g.conv("x", 3, 32))
    for _ in range(2):
        x = g.op("Relu", g.op("Add", g.conv(g.op("Relu", g.conv(x, 32, 32)), 32, 32), x))
    x = g.op("Flatten", g.op("GlobalAveragePool", x))
    out = g.op("Gemm", x, g.constant(noise(32, 10)))
    mod = lowered(g, out)
    merged = same(mod, noise(batch, 3, 12, 12))
    assert operators(mod)["lowrank_conv2d"] == 6
    assert operators(merged) == {"lowrank_calls": 1}
    assert planned_bytes(merged) <= planned_bytes(mod) + shared_bytes(mod)
    # The stages of a kernel that is called several times are there once.
    stages = sum(len(found.stages) for found in taken_apart(mod))
    assert len(merged.get_global_vars()) == stages + len(["main", "lowrank_calls"])


def test_branches_that_are_written_in_place():
    g = Graph(1, 3, 9, 9)
    x = g.op("Relu", g.conv("x", 3, 32))
    y = g.op("Concat", g.conv(x, 32, 32), g.conv(x, 32, 32), g.conv(x, 32, 32, 1), axis=1)
    mod = lowered(g, g.conv(g.op("Relu", g.conv(y, 96, 32)), 32, 16))
    assert "R.call_tir_inplace" in mod["main"].script()
    merged = same(mod, noise(1, 3, 9, 9))
    assert operators(merged) == {"lowrank_calls": 1}
    assert planned_bytes(merged) <= planned_bytes(mod) + shared_bytes(mod)


def test_outputs_in_the_middle_and_the_input_itself():
    g = Graph(1, 3, 9, 9)
    x = g.conv("x", 3, 16)
    y = g.op("Relu", g.conv(x, 16, 16))
    flat = g.op("Flatten", y)
    mod = lowered(g, x, flat, g.conv(y, 16, 8), "x")
    assert operators(same(mod, noise(1, 3, 9, 9)))["lowrank_calls"] == 1


def test_other_operators_stay_between_the_calls():
    g = Graph(1, 3, 9, 9)
    x = g.conv(g.op("Relu", g.conv("x", 3, 16)), 16, 16)
    x = g.op("Softmax", x, axis=2)
    x = g.conv(g.op("Relu", g.conv(x, 16, 16)), 16, 16)
    found = operators(same(lowered(g, x), noise(1, 3, 9, 9)))
    assert found["lowrank_calls"] == 2 and found["nn.softmax"] == 1
    assert not {"lowrank_conv2d", "lowrank_block", "lowrank_unblock"} & set(found)


def elementwise(steps: list[tuple[int, int]], results: list[int]) -> tvm.IRModule:
    """Kernels that each add up two of what was there before; 0 and 1 are the inputs."""
    builder = relax.BlockBuilder()
    kind = relax.TensorType(SHAPE, "float32")
    inputs = [relax.Var(name, kind) for name in "ab"]
    with builder.function("main", inputs):
        with builder.dataflow():
            values: list[relax.Expr] = list(inputs)
            for index, (left, right) in enumerate(steps):
                names = ("residual", "silu") if index % 3 else ("residual",)
                func = emit_elementwise(*SHAPE[:1], SHAPE[1] * ISA.lanes, *SHAPE[2:4], names, ISA)
                gvar = builder.add_func(func, "lowrank_elementwise")
                args = [values[left], values[right]]
                values.append(builder.emit(relax.call_tir(gvar, args, kind)))
            output = builder.emit_output(relax.Tuple([values[i] for i in results]))
        builder.emit_func_output(output)
    return relax.transform.DeadCodeElimination(["main"])(builder.get())


@st.composite
def graphs(draw):
    count = draw(st.integers(2, 9))
    steps = [
        (draw(st.integers(0, index + 1)), draw(st.integers(0, index + 1))) for index in range(count)
    ]
    results = draw(st.lists(st.integers(0, count + 1), min_size=1, max_size=3))
    return steps, results


@settings(max_examples=15, deadline=None)
@given(graphs())
def test_any_graph(graph):
    mod = elementwise(*graph)
    merged = same(mod, noise(*SHAPE), noise(*SHAPE)[:, ::-1])
    assert planned_bytes(merged) <= planned_bytes(mod) + shared_bytes(mod)


def test_one_call_stays_as_it_is():
    mod = elementwise([(0, 1)], [2])
    assert MergeCalls(host_target())(mod).same_as(mod)


def test_a_call_that_stays_alone_keeps_its_kernel():
    """Of three calls of one kernel one is apart, behind an operator of TVM's."""
    builder = relax.BlockBuilder()
    kind = relax.TensorType(SHAPE, "float32")
    x = relax.Var("x", kind)
    func = emit_elementwise(1, SHAPE[1] * ISA.lanes, *SHAPE[2:4], ("silu",), ISA)
    gvar = builder.add_func(func, "lowrank_elementwise")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.call_tir(gvar, [x], kind))
            y = builder.emit(relax.call_tir(gvar, [y], kind))
            y = builder.emit(relax.op.exp(y))
            out = builder.emit_output(relax.call_tir(gvar, [y], kind))
        builder.emit_func_output(out)
    found = operators(same(builder.get(), noise(*SHAPE)))
    assert found == {"lowrank_calls": 1, "exp": 1, "lowrank_elementwise": 1}


def test_a_constant_of_two_runs_is_there_once():
    builder = relax.BlockBuilder()
    kind = relax.TensorType(SHAPE, "float32")
    x, shared, own = relax.Var("x", kind), relax.const(noise(*SHAPE)), relax.const(noise(*SHAPE))
    func = emit_elementwise(1, SHAPE[1] * ISA.lanes, *SHAPE[2:4], ("residual",), ISA)
    gvar = builder.add_func(func, "lowrank_elementwise")
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.call_tir(gvar, [x, shared], kind))
            y = builder.emit(relax.call_tir(gvar, [y, own], kind))
            y = builder.emit(relax.op.exp(y))
            y = builder.emit(relax.call_tir(gvar, [y, shared], kind))
            out = builder.emit_output(relax.call_tir(gvar, [y, y], kind))
        builder.emit_func_output(out)
    merged = same(builder.get(), noise(*SHAPE))
    found: set[relax.Expr] = set()
    relax.analysis.post_order_visit(
        merged["main"], lambda expr: found.add(expr) if is_constant(expr) else None
    )
    assert sum(constant_array(expr).size for expr in found) == 2 * int(np.prod(SHAPE))


def test_plans_show_every_call(small):
    mod = factored_plan(small).apply(load_model(small))
    assert operators(mod)["lowrank_conv2d"] > 5 and not operators(mod)["lowrank_calls"]


def test_compile_builds_as_tune_does(small, tmp_path):
    mod = factored_plan(small).apply(load_model(small))
    path = tmp_path / "model.so"
    tvm_lowrank.compile(mod).export_library(str(path))
    x = noise(1, 3, 18, 18)
    stock = outputs(tvm.compile(mod, host_target()), x)[0]
    np.testing.assert_array_equal(tvm_lowrank.load(path)(x), stock)
    symbols = path.read_bytes()
    assert b"lowrank_calls" in symbols and b"lowrank_conv2d_stage" in symbols
    with pytest.raises(tvm_lowrank.LowRankError, match="no kernels here"):
        tvm_lowrank.compile(mod, "c")


def test_virtual_machines_of_one_library_run_side_by_side(small):
    executable = compile_module(factored_plan(small).apply(load_model(small)), host_target())
    samples = [noise(2, 1, 3, 18, 18)[i] for i in range(2)]
    expected = [outputs(executable, sample)[0] for sample in samples]
    assert not np.array_equal(*expected)
    wrong: list[int] = []

    def work(index: int) -> None:
        network = network_of(executable)
        for _ in range(50):
            if not np.array_equal(network(samples[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
