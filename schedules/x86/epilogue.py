"""What follows a convolution on its output vectors: bias, residual, ReLU, affine, sigmoid."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, tirx

from .emitter import Emitter, Index

# exp(r) on |r| <= log(2) / 2 by its Taylor polynomial: the first term left out is 8e-9 of it.
_EXP_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
# log(2) in two parts: n * _LN2_HIGH is exact for the exponents n of float32.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4


class Epilogue:
    """The steps of a workload's epilogue, with the parameters of the kernel they read.

    Creating one adds those parameters to the function of ``em``: a vector of ``channels`` values
    for a bias, two (scale, shift) for an affine step, a map of shape ``map_shape`` for a residual.
    """

    def __init__(
        self, em: Emitter, steps: Sequence[str], channels: int, map_shape: Sequence[int]
    ) -> None:
        """Add the parameters of ``steps``, in order; ValueError for a step unknown here."""
        self._em = em
        self._steps: list[tuple[str, tuple[tirx.Buffer, ...]]] = []
        for number, step in enumerate(steps):
            buffers: tuple[tirx.Buffer, ...] = ()
            if step == "bias":
                buffers = (em.argument(f"bias{number}", (channels,)),)
            elif step == "residual":
                buffers = (em.argument(f"residual{number}", map_shape),)
            elif step == "affine":
                scale = em.argument(f"scale{number}", (channels,))
                buffers = (scale, em.argument(f"shift{number}", (channels,)))
            elif step not in ("relu", "sigmoid"):
                raise ValueError(f"unknown epilogue step {step!r}")
            self._steps.append((step, buffers))

    def apply(self, value: ir.Expr, channel: Index, position: Index) -> ir.Expr:
        """Emit the steps on one vector of output channels.

        ``channel`` is the offset of the vector among the channels, ``position`` its offset in the
        output map.
        """
        em = self._em
        for step, buffers in self._steps:
            if step == "bias":
                value = value + em.load(buffers[0], channel)
            elif step == "residual":
                value = value + em.load(buffers[0], position)
            elif step == "affine":
                value = value * em.load(buffers[0], channel) + em.load(buffers[1], channel)
            elif step == "relu":
                value = tirx.max(value, em.constant(0))
            else:
                value = sigmoid(em, em.bind(value))
        return value


def sigmoid(em: Emitter, value: ir.Expr) -> ir.Expr:
    """``1 / (1 + exp(-value))`` of a vector, within 4 ulp (LLVM would call expf lane by lane)."""
    # Beyond +-87 the result is 0 or 1 in float32 and exp(-value) would leave its range.
    x = em.bind(tirx.min(tirx.max(em.constant(0) - value, em.constant(-87)), em.constant(87)))
    exponent = em.bind(tirx.nearbyint(x * em.constant(1.4426950408889634)))
    rest = em.bind(x - exponent * em.constant(_LN2_HIGH) - exponent * em.constant(_LN2_LOW))
    power = em.constant(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        power = em.bind(power * rest + em.constant(coefficient))
    int_type, float_type = f"int32x{em.lanes}", f"float32x{em.lanes}"
    bias = tirx.Broadcast(tirx.IntImm("int32", 127), em.lanes)
    bits = (exponent.astype(int_type) + bias) * tirx.Broadcast(
        tirx.IntImm("int32", 1 << 23), em.lanes
    )
    one = em.constant(1)
    return em.bind(one / (one + power * tirx.reinterpret(float_type, bits)))
