"""Building for processors other than the one at hand."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from helpers import factored_plan, reference, relative, run
from tvm_lowrank.schedules.x86.isa import NEON, isa_of

from tvm_lowrank.build import compile_module
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import parse_target, require_runnable

AARCH64 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}


def compiled(path, target):
    plan = factored_plan(path).for_target(target)
    assert plan.rewritten and not plan.result
    return plan, compile_module(plan.apply(load_model(path)), parse_target(target))


@pytest.mark.parametrize("mcpu", ["haswell", "x86-64"])
def test_older_processors_compute_the_same(small, mcpu):
    target = parse_target(f"llvm:{mcpu}")
    try:
        require_runnable(target)
    except LowRankError as error:
        pytest.skip(str(error))
    plan = factored_plan(small)
    x = np.random.default_rng(3).standard_normal((1, 3, 18, 18)).astype(np.float32)
    expected = run(plan.factor(load_model(small)), x)
    module = plan.for_target(target).apply(load_model(small))
    assert relative(run(module, x, target=target), expected) < 1e-5
    assert relative(run(plan.dense().for_target(target).apply(load_model(small)), x, target=target),
                    reference(small, x)) < 1e-5  # fmt: skip


def test_aarch64_gets_machine_code_of_its_own(small, tmp_path):
    assert isa_of(parse_target(AARCH64)) == NEON
    _, executable = compiled(small, AARCH64)
    machines = []

    def inspect(_out, objects, **_options):
        for path in objects:
            with open(path, "rb") as file:
                header = file.read(20)
            machines.append((header[:4], int.from_bytes(header[18:20], "little")))

    executable.export_library(str(tmp_path / "model.so"), fcompile=inspect)
    assert machines and set(machines) == {(b"\x7fELF", 183)}


def test_a_target_that_cannot_run_here_is_named(tmp_path):
    with pytest.raises(LowRankError, match=r"aarch64.*for_target"):
        require_runnable(tvm.target.Target(AARCH64))
    require_runnable(parse_target("llvm"))
