"""What the tests of decompositions share: layers, moments, ranks and a reference convolution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_lowrank.decompose import InputMoments
from tvm_lowrank.geometry import ConvGeometry


def conv(inputs, weight, geometry):
    """Reference convolution in float64, tap by tap."""
    g = geometry
    top, left, bottom, right = g.padding
    padded = np.pad(inputs, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros((len(inputs), g.out_channels, g.out_height, g.out_width))
    dense = ungrouped(weight, g.groups)
    for x in range(g.kernel[0]):
        for y in range(g.kernel[1]):
            r, c = x * g.dilation[0], y * g.dilation[1]
            rows = padded[:, :, r : r + (g.out_height - 1) * g.stride[0] + 1 : g.stride[0]]
            seen = rows[..., c : c + (g.out_width - 1) * g.stride[1] + 1 : g.stride[1]]
            out += np.einsum("fc,nchw->nfhw", dense[:, :, x, y], seen)
    return out


def ungrouped(weight, groups):
    """The block-diagonal weight ``(F, C, X, Y)`` of a grouped one."""
    f, c = weight.shape[:2]
    dense = np.zeros((f, c * groups, *weight.shape[2:]))
    for group in range(groups):
        rows = slice(group * f // groups, (group + 1) * f // groups)
        dense[rows, group * c : (group + 1) * c] = weight[rows]
    return dense


def run_chain(inputs, stages, factors):
    """The chain, stage by stage, checking that the shapes agree."""
    assert [s.weight_shape for s in stages] == [w.shape for w in factors]
    for stage, factor in zip(stages, factors, strict=True):
        assert inputs.shape[1:] == (stage.in_channels, stage.height, stage.width)
        inputs = conv(inputs, factor, stage)
    return inputs


def run_form(inputs, form, geometry, rank, factors):
    """All branches of a form, summed."""
    stages, factors, total = form.stages(geometry, rank), list(factors), 0
    assert [s.weight_shape for s in stages] == [w.shape for w in factors]
    for branch in form.branches(geometry, rank):
        top, left, bottom, right = branch.crop
        data = inputs[:, :, top : geometry.height - bottom, left : geometry.width - right]
        data = run_chain(data, stages[: branch.stages], factors[: branch.stages])
        stages, factors = stages[branch.stages :], factors[branch.stages :]
        (u, v), (n, _, high, wide) = branch.shuffle, data.shape
        data = data.reshape(n, -1, u, v, high, wide).transpose(0, 1, 4, 2, 5, 3)
        data = data.reshape(n, -1, high * u, wide * v)
        total = total + data[:, :, : geometry.out_height, : geometry.out_width]
    assert not stages
    return total


def phase_kernels(form, factors, geometry):
    """Those of each group, one after the other."""
    groups = geometry.groups
    part = replace(
        geometry,
        in_channels=geometry.in_channels // groups,
        out_channels=geometry.out_channels // groups,
        groups=1,
    )
    parts = zip(*(np.split(factor, groups) for factor in factors), strict=True)
    return np.concatenate([form.phase_kernels(own, part) for own in parts], axis=2)


def expected_of(inputs, form, geometry, factors):
    """The dense convolution with the weight that the factors stand for, phase by phase."""
    if form.name != "multiresolution":
        return conv(inputs, form.reconstruct(factors, geometry), geometry)
    kernels = phase_kernels(form, factors, geometry)
    out = np.zeros((len(inputs), geometry.out_channels, geometry.out_height, geometry.out_width))
    (u, v) = kernels.shape[:2]
    for p in range(u):
        for q in range(v):
            out[:, :, p::u, q::v] = conv(inputs, kernels[p, q], geometry)[:, :, p::u, q::v]
    return out


def correlated_moments(size, seed=0, samples=100_000, decay=0.8):
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(size, size)))[0]
    spectrum = np.arange(1, size + 1) ** -decay
    return InputMoments((basis * spectrum) @ basis.T, random.normal(size=size), samples)


EXAMPLES = {
    "svd": ConvGeometry(24, 17, 1, 1, (1, 1)),
    "multiresolution": ConvGeometry(2, 3, 12, 11, (7, 7), padding=(3, 3, 3, 3)),
}


def example(name="", seed=3):
    """A layer that a form can replace, 3x3 of 8 -> 10 channels for most: with its moments."""
    geometry = EXAMPLES.get(name) or ConvGeometry(8, 10, 9, 9, (3, 3), padding=(1, 1, 1, 1))
    weight = np.random.default_rng(seed).normal(size=geometry.weight_shape)
    return geometry, weight, correlated_moments(weight[0].size)
