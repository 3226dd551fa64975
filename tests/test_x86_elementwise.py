import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_lowrank.schedules.x86.elementwise import emit_activation, emit_elementwise
from tvm_lowrank.schedules.x86.workload import parse_step
from x86_support import CPUS, apply_steps, block, reference_activation, run, runnable_isa, unblock

# Largest error relative to the result, where that is not tiny (see `FLOORS`).
TOLERANCES = {
    "relu": 0,
    "clip:-1.5:6": 0,
    "clip:-inf:2": 0,
    "clip:0:inf": 0,
    "leaky_relu:0.1": 1e-7,
    "leaky_relu:1.5": 1e-7,
    "sigmoid": 3e-7,
    "silu": 4e-7,
    "hard_sigmoid": 1e-6,
    "hard_swish": 1e-6,
    "tanh": 3e-7,
    "gelu": 5e-7,
}
# Results under these are compared with these: where a function is rounded near one of its zeros,
# or, as in the far tails, its argument's own rounding or the end of float32's range.
FLOORS = {"hard_sigmoid": 0.1, "hard_swish": 0.3, "gelu": 1e-3, "silu": 1e-25}


def values():
    spread = np.concatenate([np.linspace(-1, 1, 2001), np.linspace(-20, 20, 4001)])
    tiny = np.array([0.0, 1e-30, 1e-10, 1e-6, 1e-3])
    large = np.array([40.0, 80.0, 86.0, 90.0, 1e3])
    return np.concatenate([spread, tiny, -tiny, large, -large]).astype("float32")


@pytest.mark.parametrize("name", CPUS)
def test_activations_are_accurate_from_tiny_to_large_values(name):
    isa = runnable_isa(name)
    x = values()
    x = np.resize(x, (1, isa.lanes, 1, -(-x.size // isa.lanes)))
    for step, tolerance in TOLERANCES.items():
        func = emit_elementwise(*x.shape, (step,), isa)
        y = unblock(run(func, isa, [block(x, isa.lanes)], block(x, isa.lanes).shape), isa.lanes)
        expected = reference_activation(x, *parse_step(step))
        scale = np.maximum(np.abs(expected), FLOORS.get(step, 1e-30))
        assert np.isfinite(y).all()
        assert (np.abs(y - expected) / scale).max() <= tolerance, step


@st.composite
def maps(draw):
    shape = draw(
        st.tuples(st.integers(1, 2), st.integers(1, 37), st.integers(1, 30), st.integers(1, 30))
    )
    steps = ["bias", "residual", "gate", "prelu", "affine", *TOLERANCES]
    return shape, tuple(draw(st.lists(st.sampled_from(steps), max_size=4)))


@pytest.mark.parametrize("name", CPUS)
def test_any_map_and_steps(name):
    isa = runnable_isa(name)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(maps())
    def check_one(case):
        shape, steps = case
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape).astype("float32")
        expected, operands = apply_steps(x.astype(np.float64), steps, isa, rng)
        inputs = [block(x, isa.lanes), *operands]
        y = run(emit_elementwise(*shape, steps, isa), isa, inputs, inputs[0].shape)
        error = np.abs(unblock(y, shape[1]) - expected).max()
        assert error <= 1e-6 * max(1, np.abs(expected).max()), steps

    check_one()


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize("count", [16, 17, 75, 4099, 70003])
def test_activations_of_any_number_of_values(name, count):
    isa = runnable_isa(name)
    x = np.resize(values(), count)
    for step in ("relu", "silu", "clip:-1.5:6"):
        y = run(emit_activation(count, step, isa), isa, [x], (count,))
        expected = reference_activation(x, *parse_step(step))
        assert np.abs(y - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


def test_activations_have_no_operands_and_whole_vectors():
    with pytest.raises(ValueError, match="bias is no activation"):
        emit_activation(32, "bias", runnable_isa("generic"))
    with pytest.raises(ValueError, match="fewer than 4"):
        emit_activation(3, "relu", runnable_isa("generic"))


def test_steps_that_are_unknown_or_malformed_are_refused():
    for step, message in (
        ("softplus", "softplus"),
        ("clip:0", "takes 2 numbers"),
        ("relu:1", "takes 0 numbers"),
        ("leaky_relu:x", "not a number"),
        ("leaky_relu:nan", "NaN"),
        ("leaky_relu:inf", "finite"),
        ("clip:6:0", "exceeds"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_step(step)
    with pytest.raises(ValueError, match="softplus"):
        emit_elementwise(1, 16, 2, 2, ("softplus",), runnable_isa("generic"))
