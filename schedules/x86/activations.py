"""Activation functions of float32 vectors as straight-line code, without calls of libm.

Errors are against float64, for every finite input: LLVM would call libm lane by lane otherwise.
"""

from __future__ import annotations

from tvm import ir, tirx

from .emitter import Emitter

# (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2 by its Taylor polynomial, highest power first; the
# first term left out is 8e-9 of exp(r).
_EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)
# log(2) in two parts: n * _LN2_HIGH is exact for the exponents n of float32.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# Arguments of exp beyond which a result, or its inverse, would leave the range of float32.
_EXP_RANGE = 87.0
# Phi(-u) exp(u^2 / 2), with Phi the normal distribution function, as a polynomial in
# t = 1 / (1 + _TAIL_SCALE u), highest power first: a minimax fit on 0 <= u <= 14, within 2e-8.
_TAIL_SCALE = 0.36
_TAIL_COEFFICIENTS = (
    0.01806205522,
    -0.1261107049,
    0.359566855,
    -0.5101472616,
    0.3408804137,
    -0.124370694,
    0.1393482361,
    0.1141959023,
    0.1450632358,
    0.1435082338,
    3.726284146e-06,
)
_TAIL_END = 13.0


def clip(em: Emitter, value: ir.Expr, low: float, high: float) -> ir.Expr:
    """``min(max(value, low), high)``; either bound may be infinite."""
    if low != float("-inf"):
        value = tirx.max(value, em.constant(low))
    if high != float("inf"):
        value = tirx.min(value, em.constant(high))
    return value


def leaky_relu(em: Emitter, value: ir.Expr, alpha: float) -> ir.Expr:
    """``value`` where it is positive, ``alpha * value`` elsewhere."""
    x = em.bind(value)
    zero = em.constant(0)
    return tirx.max(x, zero) + em.constant(alpha) * tirx.min(x, zero)


def sigmoid(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``1 / (1 + exp(-value))``, within 4 ulp down to values of -87, where it stays 1.6e-38."""
    rest, scale = _exp_parts(em, em.bind(em.constant(0) - value))
    one = em.constant(1)
    return em.bind(one / (one + (scale + scale * rest)))


def silu(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``value * sigmoid(value)``, with the error of `sigmoid`."""
    x = em.bind(value)
    return x * sigmoid(em, x)


def hard_sigmoid(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``clip(value / 6 + 1 / 2, 0, 1)``."""
    return clip(em, value * em.constant(1 / 6) + em.constant(0.5), 0.0, 1.0)


def hard_swish(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``value * clip(value + 3, 0, 6) / 6``."""
    x = em.bind(value)
    return x * (clip(em, x + em.constant(3), 0.0, 6.0) * em.constant(1 / 6))


def tanh(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``(exp(2 value) - 1) / (exp(2 value) + 1)``, within 4 ulp."""
    # exp(y) - 1 = 2^n (exp(r) - 1) + (2^n - 1) keeps the digits that exp(y) loses near zero.
    rest, scale = _exp_parts(em, clip(em, value + value, -40.0, 40.0))
    less_one = em.bind(scale * rest + (scale - em.constant(1)))
    return em.bind(less_one / (less_one + em.constant(2)))


def gelu(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``value * Phi(value)`` with the exact Phi, by way of erf.

    The error is at most 5e-7 of the result, or of 1e-3 where the result is smaller than that.
    """
    # Phi(x) of a negative x is itself the small quantity, so no digits cancel as in 1 + erf(x).
    x = em.bind(value)
    zero, one = em.constant(0), em.constant(1)
    u = em.bind(tirx.min(tirx.max(x, zero - x), em.constant(_TAIL_END)))
    t = em.bind(one / (one + u * em.constant(_TAIL_SCALE)))
    tail = em.constant(_TAIL_COEFFICIENTS[0])
    for coefficient in _TAIL_COEFFICIENTS[1:]:
        tail = em.bind(tail * t + em.constant(coefficient))
    rest, scale = _exp_parts(em, u * u * em.constant(-0.5))
    return em.bind(tirx.max(x, zero) - u * tail * (scale + scale * rest))


def _exp_parts(em: Emitter, value: ir.Expr) -> tuple[ir.Expr, ir.Expr]:
    """``exp(r) - 1`` and ``2^n`` of ``value = n log(2) + r``, cut off beyond `_EXP_RANGE`."""
    x = em.bind(clip(em, value, -_EXP_RANGE, _EXP_RANGE))
    exponent = em.bind(tirx.nearbyint(x * em.constant(1.4426950408889634)))
    r = em.bind(x - exponent * em.constant(_LN2_HIGH) - exponent * em.constant(_LN2_LOW))
    series = em.constant(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        series = em.bind(series * r + em.constant(coefficient))
    int_type, float_type = f"int32x{em.lanes}", f"float32x{em.lanes}"
    bias = tirx.Broadcast(tirx.IntImm("int32", 127), em.lanes)
    one_up = tirx.Broadcast(tirx.IntImm("int32", 1 << 23), em.lanes)
    bits = (exponent.astype(int_type) + bias) * one_up
    rest = em.bind(r + r * r * series)
    return rest, em.bind(tirx.reinterpret(float_type, bits))
