"""Emits straight-line code of a constant matrix as vector instructions."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir
from tvm_lowrank.schedules.transforms.linear_code import LinearCode, Number

from .emitter import Emitter


def run(em: Emitter, code: LinearCode, values: Sequence[ir.Expr]) -> list[ir.Expr]:
    """Emit ``code`` on vectors; returns a variable for each row of its matrix."""

    def combine(
        left_factor: Number, left: ir.Expr, right_factor: Number, right: ir.Expr | None
    ) -> ir.Expr:
        return em.bind(_combine(em, left_factor, left, right_factor, right))

    return [em.constant(0) if value is None else value for value in code.apply(values, combine)]


def _combine(
    em: Emitter, left_factor: Number, left: ir.Expr, right_factor: Number, right: ir.Expr | None
) -> ir.Expr:
    """``left_factor * left + right_factor * right`` without multiplications by 1 and -1."""
    if right is None or (left_factor != 1 and abs(right_factor) == 1):
        left, left_factor, right, right_factor = right, right_factor, left, left_factor
    assert right is not None
    product = right if abs(right_factor) == 1 else right * em.constant(abs(float(right_factor)))
    if left is None or left_factor == -1:
        left = em.constant(0) if left is None else em.constant(0) - left
    elif left_factor != 1:
        left = left * em.constant(float(left_factor))
    return left - product if right_factor < 0 else left + product
