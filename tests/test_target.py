"""Targets and threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tvm
from tvm_lowrank.schedules.x86.isa import isa_of

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.target import host_target, parse_target, target_key
from tvm_lowrank.threads import physical_cores


@pytest.mark.parametrize(
    ("spec", "lanes"),
    [
        ("llvm:haswell", 8),
        ("llvm:znver4", 16),
        ({"kind": "llvm", "mcpu": "skylake-avx512"}, 16),
        ('{"kind": "llvm", "mcpu": "x86-64"}', 4),
    ],
)
def test_vectors_follow_the_target_and_not_this_machine(spec, lanes):
    assert isa_of(parse_target(spec)).lanes == lanes


def test_the_host_target_names_processor_and_cores():
    target = host_target()
    assert int(target.attrs["num-cores"]) == physical_cores()
    assert target_key(target).startswith("llvm-") and str(target.attrs["mcpu"])
    assert parse_target(target) is target
    assert str(parse_target(None)) == str(parse_target("llvm")) == str(target)


@pytest.mark.parametrize("spec", ["", "vax", '{"kind": "llvm"', '{"mcpu": "haswell"}', "llvm:vax"])
def test_what_is_no_target_is_refused(spec):
    with pytest.raises(LowRankError, match="target"):
        parse_target(spec)


def test_other_kinds_are_refused():
    with pytest.raises(LowRankError, match="'c' has no kernels"):
        parse_target(tvm.target.Target({"kind": "c"}))


@pytest.mark.parametrize(("before", "expected"), [(None, physical_cores()), ("1", 1)])
def test_a_process_uses_all_cores_unless_told_otherwise(before, expected):
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("TVM_NUM_THREADS", "OMP_NUM_THREADS")}
    if before:
        env["TVM_NUM_THREADS"] = before
    code = "from tvm_lowrank.threads import set_threads; print(set_threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert int(done.stdout.split()[-1]) == expected
