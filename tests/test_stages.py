"""Kernels taken apart into stages, and one function that runs the stages of many."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tvm
from helpers import operators
from test_merge_calls import noise, same
from tvm import relax, tirx
from tvm_lowrank.schedules.x86 import barrier
from tvm_lowrank.schedules.x86.emitter import ALIGNMENT, Emitter
from tvm_lowrank.schedules.x86.isa import isa_of
from tvm_lowrank.schedules.x86.stages import stages_of
from tvm_lowrank.schedules.x86.subroutines import NOTES, Place, StageCall, emit_calls
from tvm_lowrank.schedules.x86.tir_pipeline import NAME

from tvm_lowrank.target import host_target

ISA = isa_of(host_target())
TASKS = Path("/proc/self/task")


def kernel(make) -> tirx.PrimFunc:
    """A kernel from one buffer of four vectors to another, of what ``make`` emits."""
    em = Emitter(ISA)
    x, y = em.argument("x", (4 * ISA.lanes,)), em.argument("y", (4 * ISA.lanes,))
    make(em, x, y)
    return em.finish()


def turned(em, x, y):
    """The vectors in reverse: what a thread writes, another reads in the next kernel."""
    with em.loop(4, "parallel") as i:
        em.store(y, em.load(x, i * ISA.lanes) + em.constant(1), (3 - i) * ISA.lanes)


def counted(em, x, y):
    """One is added to what is already in ``y``, which must happen once."""
    with em.loop(1, "parallel"):
        em.store(y, em.load(y) + em.constant(1))


def mixed(em, x, y):
    """A thread alone, then both, then one again; they share a memory."""
    shared = em.workspace(4 * ISA.lanes)
    with em.loop(4) as i:
        em.store(shared, em.load(x, i * ISA.lanes) * 2, i * ISA.lanes)
    turned(em, shared, y)
    em.store(y, em.load(y) + em.constant(1))


def handed(em, x, y):
    """A value in a register, for all threads."""
    value = em.load(x)
    with em.loop(4, "parallel") as i:
        em.store(y, value, i * ISA.lanes)


def failing(em, x, y):
    condition = tirx.LT(tirx.BufferLoad(x, [0]), tirx.const(0.0, "float32"))
    message = [tvm.ir.StringImm("not today")]
    with em.loop(2, "parallel"):
        em._emit(tirx.AssertStmt(condition, tvm.ir.StringImm("ValueError"), message))


def calling(code: str | None, *kernels: tirx.PrimFunc) -> tvm.IRModule:
    """A function that gives each kernel what the one before has written."""
    lanes, functions, calls = 4 * ISA.lanes, {}, []
    buffers = [
        tirx.decl_buffer((lanes,), "float32", name=f"t{i}", data_alignment=ALIGNMENT)
        for i in range(len(kernels) + 2)
    ]
    buffers.append(tirx.decl_buffer((NOTES,), "float32", name="notes", data_alignment=ALIGNMENT))
    for number, each in enumerate(kernels):
        found = stages_of(each)
        places = [Place(number), Place(number + 1), Place(len(kernels) + 1)]
        for index, stage in enumerate(found.stages):
            gvar = tvm.ir.GlobalVar(f"k{number}_{index}")
            functions[gvar] = stage.func
            calls.append(StageCall(gvar, stage.extent, tuple(places[i] for i in stage.arguments)))
    main = emit_calls(buffers, calls, Place(len(kernels) + 2), code)
    main = main.with_attr("global_symbol", "main")
    functions[tvm.ir.GlobalVar("main")] = main
    return tvm.IRModule(functions)


def called(*kernels: tirx.PrimFunc, own_barrier: bool = True):
    """What that function makes of the first kernel's input: all its tensors."""
    code = barrier.code_for(host_target()) if own_barrier else None
    run = tvm.tirx.build(calling(code, *kernels), host_target(), NAME)["main"]

    def result(first: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(first)]
        empty = np.zeros(first.size, np.float32)
        tensors += [tvm.runtime.tensor(empty) for _ in range(len(kernels) + 1)]
        tensors.append(tvm.runtime.tensor(np.full(NOTES, 7, np.float32)))
        run(*tensors)
        return [tensor.numpy() for tensor in tensors]

    return result


@pytest.mark.parametrize("own_barrier", [True, False])
def test_a_stage_begins_when_all_threads_are_through_with_the_one_before(own_barrier):
    run = called(*[kernel(turned)] * 41, own_barrier=own_barrier)
    x = np.arange(4 * ISA.lanes, dtype=np.float32)
    expected = x.reshape(4, -1)[::-1].ravel() + 41
    for _ in range(200):
        np.testing.assert_array_equal(run(x)[41], expected)


@pytest.mark.skipif(not TASKS.exists(), reason="no threads to be told apart")
def test_threads_that_share_a_processor_do_not_wait_for_ever():
    run = called(*[kernel(turned)] * 41)
    x = np.arange(4 * ISA.lanes, dtype=np.float32)
    expected = run(x)[41]  # starts the threads
    processors = {int(t.name): os.sched_getaffinity(int(t.name)) for t in TASKS.iterdir()}
    shared = min(set.union(*processors.values()))  # the pool has a processor for each of its own
    try:
        for thread in processors:
            os.sched_setaffinity(thread, {shared})
        for _ in range(20):
            np.testing.assert_array_equal(run(x)[41], expected)
    finally:
        for thread, before in processors.items():
            os.sched_setaffinity(thread, before)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu"}, ["pause", "lock"]),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, ["yield", "stlxr"]),
    ],
)
def test_barriers_are_part_of_the_code(target, words):
    target = tvm.target.Target(target)
    module = calling(barrier.code_for(target), *[kernel(turned)] * 3)
    text = tvm.tirx.build(module, target, NAME).inspect_source("asm")
    for word in [*words, "sched_yield"]:
        assert word in text
    assert "lowrank_come" not in text and "lowrank_all_came" not in text


@pytest.mark.parametrize("triple", ["x86_64-pc-windows-msvc", "riscv64-linux-gnu"])
def test_without_sched_yield_or_atomics_the_barriers_are_those_of_tvm(triple):
    assert barrier.code_for(tvm.target.Target({"kind": "llvm", "mtriple": triple})) is None
    module = calling(None, *[kernel(turned)] * 3)
    assert "sched_yield" not in module.script()
    assert module.script().count("barrier_when_finish") == 2  # after the last one there is none


def test_what_one_thread_does_waits_for_no_other():
    module = calling(None, *map(kernel, [counted, counted, turned, turned, counted, counted]))
    assert module.script().count("barrier_when_finish") == 3
    module = calling("code", *map(kernel, [counted, counted, turned, turned, counted, counted]))
    assert module.script().count("sched_yield") == 2  # the first barrier is TVM's
    run = called(*map(kernel, [counted, counted, turned, turned, counted, counted]))
    for _ in range(100):
        tensors = run(np.zeros(4 * ISA.lanes, np.float32))
        assert [tensor[-1] for tensor in tensors[1:7]] == [0, 0, 2, 2, 0, 0]
        assert [tensor[0] for tensor in tensors[1:7]] == [1, 1, 1, 3, 1, 1]


def test_what_is_done_once_is_not_done_by_every_thread():
    run = called(*[kernel(counted)] * 20)
    for _ in range(100):
        for tensor in run(np.zeros(4 * ISA.lanes, np.float32))[1:21]:
            assert tensor[: ISA.lanes].tolist() == [1] * ISA.lanes


def test_stages_share_memory():
    stages = stages_of(kernel(mixed))
    assert [stage.extent for stage in stages.stages] == [1, 4, 1]
    assert [stage.arguments for stage in stages.stages] == [(0, 2), (1, 2), (1,)]
    assert stages.shared == (max(4 * ISA.lanes, 256),)


def test_a_stage_that_needs_a_register_of_another_is_not_taken_apart():
    assert stages_of(kernel(handed)) is None
    builder = relax.BlockBuilder()
    kind = relax.TensorType((4 * ISA.lanes,), "float32")
    x = relax.Var("x", kind)
    names = [builder.add_func(kernel(make), "lowrank_test") for make in (turned, handed)]
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.call_tir(names[0], [x], kind))
            y = builder.emit(relax.call_tir(names[0], [y], kind))
            out = builder.emit_output(relax.call_tir(names[1], [y], kind))
        builder.emit_func_output(out)
    found = operators(same(builder.get(), noise(4 * ISA.lanes)))
    assert found == {"lowrank_calls": 1, "lowrank_test": 1}


def test_a_kernel_that_fails_fails_the_call():
    run = called(kernel(turned), kernel(failing), kernel(turned))
    with pytest.raises(RuntimeError, match="could not allocate its workspace"):
        run(np.zeros(4 * ISA.lanes, np.float32))
    x = np.full(4 * ISA.lanes, -5, np.float32)
    assert run(x)[1].tolist() == (x + 1).tolist()


def test_arguments_are_checked_as_those_of_a_kernel():
    run = called(kernel(turned), kernel(turned))
    size = 4 * ISA.lanes
    for shape, dtype in (((size + 1,), "float32"), ((1, size), "float32"), ((size,), "float64")):
        with pytest.raises(Exception, match=r"Mismatched|Invalid"):
            run(np.zeros(shape, dtype))
    run(np.zeros(size, np.float32))
