"""The built library: loaded by this package, and by TVM's runtime alone in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers import factored_plan, relative, run
from tvm import relax

import tvm_lowrank
from tvm_lowrank.build import compile_module, export, network_of
from tvm_lowrank.frontend import load_model
from tvm_lowrank.target import host_target

BARE = """
    import os, sys
    sys.modules["tvm_lowrank"] = None  # any import of the plugin fails
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    os.environ["TVM_NUM_THREADS"] = "2"
    import numpy as np
    import tvm
    from tvm.runtime import vm
    machine = vm.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
    x = tvm.runtime.tensor(np.load(sys.argv[2]))
    np.save(sys.argv[3], machine["main"](x).numpy())
    assert "tvm.relax" not in sys.modules, "the compiler was imported"
"""


@pytest.fixture(scope="module")
def library(small, tmp_path_factory):
    plan = factored_plan(small)
    folder = tmp_path_factory.mktemp("library")
    executable = compile_module(plan.apply(load_model(small)), host_target())
    return export(executable, folder / "model.so")


@pytest.fixture(scope="module")
def sample():
    return np.random.default_rng(5).standard_normal((1, 3, 18, 18)).astype(np.float32)


def test_load_runs_the_library(library, sample, small):
    network = tvm_lowrank.load(library)
    first, second = network(sample), network(sample)
    assert first.shape == (1, 10) and np.array_equal(first, second)
    assert relative(first, run(factored_plan(small).factor(load_model(small)), sample)) < 1e-5


def test_any_array_will_do_and_none_is_shared(library, sample):
    network = tvm_lowrank.load(library)
    expected = network(sample)
    turned = np.ascontiguousarray(sample[..., ::-1])[..., ::-1]
    shifted = np.empty(sample.size + 1, np.float32)[1:].reshape(sample.shape)
    shifted[...] = sample
    for array in (sample.astype(np.float64), turned, shifted, sample.tolist()):
        found = network(array)
        assert found.flags.writeable and np.array_equal(found, expected)
        found[...] = np.nan
    assert np.array_equal(network(sample), expected)


def test_outputs_of_every_type():
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            found = [
                relax.op.argmax(x, axis=1),
                relax.op.greater(x, relax.const(0.0)),
                relax.op.sum(x),
                relax.op.astype(x, "float16"),
                relax.const(np.arange(3.0)),
            ]
            out = builder.emit_output(relax.Tuple([builder.emit(each) for each in found]))
        builder.emit_func_output(out)
    network = network_of(compile_module(builder.get(), host_target()))
    array = np.array([[1, -2, 3], [-4, 5, 0]], np.float32)
    for _ in range(2):
        classes, positive, total, halves, constant = network(array)
        assert classes.tolist() == [2, 1] and classes.dtype == np.int64
        assert positive.dtype == bool and np.array_equal(positive, array > 0)
        assert total.shape == () and total == 3
        assert halves.dtype == np.float16 and np.array_equal(halves, array)
        assert constant.tolist() == [0, 1, 2]
        constant[...] = 9  # a copy


def test_the_bare_runtime_gives_the_same_numbers(library, sample, tmp_path):
    np.save(tmp_path / "x.npy", sample)
    program = tmp_path / "bare.py"
    program.write_text(textwrap.dedent(BARE))
    done = subprocess.run(
        [sys.executable, program, library, tmp_path / "x.npy", tmp_path / "y.npy"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), tvm_lowrank.load(library)(sample))


def test_what_is_no_library_is_refused(tmp_path):
    with pytest.raises(tvm_lowrank.LowRankError, match="does not exist"):
        tvm_lowrank.load(tmp_path / "none.so")
    (tmp_path / "bad.so").write_bytes(b"not a library")
    with pytest.raises(tvm_lowrank.LowRankError, match="not a library"):
        tvm_lowrank.load(tmp_path / "bad.so")


def test_a_library_is_replaced_only_by_a_complete_one(tmp_path):
    class Broken:
        def export_library(self, path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise RuntimeError("linker failed")

    path = tmp_path / "model.so"
    path.write_bytes(b"old")
    with pytest.raises(tvm_lowrank.LowRankError, match="C compiler"):
        export(Broken(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
