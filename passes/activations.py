"""Activations that a network spells out in several operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm_lowrank.passes.graph import constant_array, is_constant, op_name


@dataclass(frozen=True)
class Activation:
    """``scale * step(source)``, spelt out by the bindings of ``inner`` and one more."""

    step: str
    scale: float
    source: relax.Var
    inner: tuple[relax.Var, ...]
    # Times that the bindings read ``source``.
    reads: int


def find_activations(bindings: Sequence[Any], users: dict[Any, int]) -> dict[relax.Var, Activation]:
    """The variables whose value is SiLU, hard swish or GELU (by erf) of another variable.

    Known spellings, with ``k`` any number: ``x * sigmoid(x)``; ``x * (k * clip(x + 3, 0, 6))``;
    ``x * clip(x / 6 + 1 / 2, 0, 1)``; ``x * (1 + erf(x / sqrt(2)))``. Intermediate results that
    something else reads rule the pattern out.
    """
    calls = {binding.var: binding.value for binding in bindings}
    found = {}
    for var, value in calls.items():
        if op_name(value) != "multiply":
            continue
        for source, gate in (value.args, tuple(value.args)[::-1]):
            if isinstance(source, relax.Var) and isinstance(gate, relax.Var):
                match = _Matcher(calls, users).gate(source, gate)
                if match is not None:
                    found[var] = match
                    break
    return found


class _Matcher:
    def __init__(self, calls: dict[Any, Any], users: dict[Any, int]) -> None:
        self.calls = calls
        self.users = users
        self.inner: list[relax.Var] = []

    def gate(self, source: relax.Var, gate: relax.Var) -> Activation | None:
        """The activation ``source * gate``, if ``gate`` is a known function of ``source``."""
        scale, step = 1.0, None
        value = self._inner(gate)
        for operator in ("multiply", "divide"):
            number, rest = self._with_number(value, operator)
            if number and isinstance(rest, relax.Var):
                scale = number if operator == "multiply" else 1 / number
                value = self._inner(rest)
                break
        name = op_name(value)
        if name == "sigmoid" and value.args[0].same_as(source):
            step = "silu"
        elif name == "clip":
            bounds = tuple(float(bound.value) for bound in value.args[1:])
            slope, offset = self._affine_of(value.args[0], source)
            if slope is not None and bounds[1] > 0 and bounds[0] == 0:
                normal = (slope / bounds[1], offset / bounds[1])
                if _near(normal, (1 / 6, 1 / 2)):
                    step, scale = "hard_swish", scale * bounds[1]
        elif name == "add":
            one, rest = self._with_number(value, "add")
            if one is not None and isinstance(rest, relax.Var):
                erf = self._inner(rest)
                if op_name(erf) == "erf":
                    slope, offset = self._affine_of(erf.args[0], source)
                    if slope and _near((one, slope, offset), (1, math.sqrt(0.5), 0)):
                        step, scale = "gelu", 2 * scale
        if step is None:
            return None
        return Activation(step, scale, source, tuple(self.inner), 2)

    def _inner(self, var: relax.Var) -> Any:
        """What is bound to a variable that nothing else reads, or None."""
        if self.users.get(var) != 1:
            return None
        self.inner.append(var)
        return self.calls.get(var)

    def _affine_of(self, var: Any, source: relax.Var) -> tuple[float | None, float]:
        """(a, b) if ``var`` is ``a * source + b``, (None, 0) otherwise."""
        offset = 0.0
        if var.same_as(source):
            return 1.0, 0.0
        value = self._inner(var)
        number, rest = self._with_number(value, "add")
        if number is not None:
            offset = number
            if rest.same_as(source):
                return 1.0, offset
            value = self._inner(rest)
        for name in ("multiply", "divide"):
            number, rest = self._with_number(value, name)
            if number is not None and rest.same_as(source):
                return (number if name == "multiply" else 1 / number), offset
        return None, 0.0

    def _with_number(self, value: Any, name: str) -> tuple[float | None, Any]:
        """The number and the other operand of ``name``, or (None, None)."""
        if op_name(value) != name:
            return None, None
        left, right = value.args
        if is_constant(left) and name != "divide":
            left, right = right, left
        if not is_constant(right):
            return None, None
        array = constant_array(right)
        if array.size == 0 or (array != array.reshape(-1)[0]).any():
            return None, None
        return float(array.reshape(-1)[0]), left


def _near(values: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    pairs = zip(values, expected, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in pairs)
