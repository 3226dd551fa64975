"""Second moments of a layer's input patches: the metric in which factors are fitted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tvm_lowrank.geometry import ConvGeometry

Array = NDArray[np.float64]

CHUNK_BYTES = 64 << 20
# Damping as a share of the mean variance: D / samples within these bounds. On layers of trained
# CIFAR networks 1 D / samples lost nothing on held-out images and won up to 28 % over 0.1.
DAMPING_FLOOR = 1e-6
DAMPING_PER_SHORTAGE = 1.0
DAMPING_CEILING = 0.1
# Share of the variance below which what is lost is rounding.
ROUNDING = 1e-9
# Samples for each input below which a covariance says too little of other samples.
SCARCE = 2


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Centred second moment of the patches that a convolution reads.

    Parameters
    ----------
    covariance
        ``(D, D)`` with ``D = C X Y`` flattened in OIHW order ``(c, x, y)``; taps on zero padding
        count as zeros. ``(G, D, D)`` for a convolution of G groups, D the inputs of one.
    mean
        ``(D,)`` or ``(G, D)``, what was subtracted; `bias_correction` gives it back.
    samples
        Number of patches seen; 0 only for `identity`, which means fitting to the weights alone.

    Raises
    ------
    ValueError
        Shapes that do not agree, or ``samples=0`` with a covariance that is not the identity.
    """

    covariance: Array
    mean: Array
    samples: int
    # Of the weight that was asked for last: a layer's own, which all its approximations are
    # compared with.
    _energy: list[tuple[Array, float]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the shapes."""
        size = self.mean.shape[-1]
        if self.mean.ndim > 2 or self.covariance.shape != (*self.mean.shape, size):
            raise ValueError(
                f"covariance {self.covariance.shape} and mean {self.mean.shape} do not agree; "
                "(D, D) and (D,), or (G, D, D) and (G, D) were expected"
            )
        if self.samples == 0 and not (
            np.count_nonzero(self.covariance) == size and np.all(self.covariance.diagonal() == 1)
        ):
            raise ValueError("samples=0 is kept for the identity; give the number of patches seen")

    def energy(self, weight: Array) -> float:
        """`output_energy` of a weight, worked out once where the same array is asked for again."""
        if not self._energy or self._energy[0][0] is not weight:
            self._energy[:] = [(weight, output_energy(weight, self))]
        return self._energy[0][1]

    @classmethod
    def identity(cls, geometry: ConvGeometry) -> InputMoments:
        """Moments of white input: every form is then fitted to the weight alone."""
        size = int(np.prod(geometry.weight_shape[1:]))
        return cls(np.eye(size), np.zeros(size), 0)

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return 1 if self.mean.ndim == 1 else len(self.mean)

    def group(self, index: int) -> InputMoments:
        """The moments of one group as those of a convolution of its own."""
        return InputMoments(self.covariance[index], self.mean[index], self.samples)

    @property
    def is_identity(self) -> bool:
        """Whether these moments stand for fitting without data."""
        return self.samples == 0

    @property
    def damping(self) -> float:
        """What to add to the covariance's diagonal before it is inverted or fitted to.

        A share of the mean diagonal that grows with ``D / samples``: it keeps dead inputs harmless
        and keeps directions that were barely sampled from being given up for free.
        """
        if self.is_identity:
            return 0.0
        size = len(self.mean)
        level = float(np.trace(self.covariance)) / size
        share = max(DAMPING_FLOOR, DAMPING_PER_SHORTAGE * size / self.samples)
        return (level or 1.0) * min(share, DAMPING_CEILING)

    def shrunk(self) -> InputMoments:
        """What other samples are to be expected to have: these moments if samples are plenty.

        With fewer than ``SCARCE`` samples for each of the D inputs, directions that these samples
        happen to lack would count for nothing, both when factors are fitted and in their error. The
        covariance is then drawn towards a multiple of the identity by the oracle approximating
        shrinkage (Chen, Wiesel, Eldar and Hero 2010, equation 23).
        """
        size = self.mean.shape[-1]
        if self.is_identity or self.samples >= SCARCE * size or size == 1:
            return self
        covariance = self.covariance.reshape(-1, size, size)
        trace = np.trace(covariance, axis1=1, axis2=2)
        square, spread = np.sum(covariance**2, axis=(1, 2)), trace**2
        above = (1 - 2 / size) * square + spread
        below = (self.samples + 1 - 2 / size) * (square - spread / size)
        share = np.divide(above, below, out=np.ones_like(above), where=below > 0).clip(0, 1)
        found = (1 - share)[:, None, None] * covariance
        found[:, range(size), range(size)] += (share * trace / size)[:, None]
        return InputMoments(found.reshape(self.covariance.shape), self.mean, self.samples)

    def channel_covariance(self, channels: int, taps: int) -> Array:
        """Covariance ``(C, C)`` of the channels at one tap, averaged over the ``X Y`` taps."""
        return self.block_covariance(channels, taps)

    def column_covariance(self, channels: int, kernel: tuple[int, int]) -> Array:
        """Covariance ``(C X, C X)`` of one column of taps, averaged over the Y columns."""
        return self.block_covariance(channels * kernel[0], kernel[1])

    def block_covariance(self, width: int, shifts: int) -> Array:
        """Mean of the ``shifts`` diagonal blocks ``(width, width)``, D read as (width, shifts)."""
        if width * shifts != len(self.mean):
            raise ValueError(f"{width} x {shifts} inputs were asked for of {len(self.mean)}")
        blocks = self.covariance.reshape(width, shifts, width, shifts)
        return np.asarray(sum(blocks[:, t, :, t] for t in range(shifts)) / shifts)


def relative_error(weight: Array, approximation: Array, moments: InputMoments) -> float:
    """Share of the output's variance that is lost: ``tr(D S D') / tr(W S W')``, ``D = W - W~``.

    Both weights are OIHW. A layer whose output never varies has error 0 where the approximation's
    does not vary either, else infinity. The mean is left to `bias_correction`.
    """
    exact = np.asarray(weight, np.float64)
    lost = exact - np.asarray(approximation, np.float64).reshape(exact.shape)
    numerator, denominator = output_energy(lost, moments), moments.energy(exact)
    if denominator <= 0.0:
        return 0.0 if numerator <= 0.0 else float("inf")
    return max(numerator, 0.0) / denominator


def undamped_error(
    weight: Array, approximation: Array, moments: InputMoments, lost: float
) -> float:
    """`relative_error` from ``lost``, the same variance under the damped moments."""
    missing = np.asarray(weight, np.float64) - approximation
    lost -= moments.damping * float(np.vdot(missing, missing))
    energy = moments.energy(np.asarray(weight, np.float64))
    if energy <= 0.0:
        return relative_error(weight, approximation, moments)
    return max(lost / energy, ROUNDING)


def output_energy(weight: Array, moments: InputMoments) -> float:
    """Variance of the outputs of an OIHW weight, all together: ``tr(W S W')``."""
    flat = np.asarray(weight, np.float64).reshape(moments.groups, -1, moments.mean.shape[-1])
    return float(np.sum(flat**2 if moments.is_identity else (flat @ moments.covariance) * flat))


def bias_correction(weight: Array, approximation: Array, moments: InputMoments) -> Array:
    """What to add to the bias, ``(F,)``, so that the mean output stays: ``(W - W~) mean``."""
    lost = np.asarray(weight, np.float64) - np.asarray(approximation, np.float64)
    lost = lost.reshape(moments.groups, -1, moments.mean.shape[-1])
    return np.asarray(lost @ moments.mean.reshape(moments.groups, -1, 1)).reshape(len(weight))


class PatchSampler:
    """Draws input patches of a convolution at random output positions.

    Parameters
    ----------
    geometry
        The convolution; its batch is ignored.
    positions_per_image
        Output positions drawn from each image, without replacement (all where there are fewer).
    seed
        Which positions are drawn depends on it and on how many images came before, not on how the
        images were split into calls: two samplers of one seed draw the same.

    Raises
    ------
    ValueError
        For ``positions_per_image < 1``.
    """

    def __init__(self, geometry: ConvGeometry, positions_per_image: int = 64, seed: int = 0):
        """Start at the first image."""
        if positions_per_image < 1:
            raise ValueError(f"positions_per_image={positions_per_image}: at least 1 was expected")
        self.geometry = geometry
        self.per_image = min(positions_per_image, geometry.out_height * geometry.out_width)
        self._random = np.random.default_rng(seed)

    def sample(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patches ``(N * positions, C X Y)`` of images, in order; C is that of all groups.

        Images are ``(N, C, height, width)``, or in blocks of channels ``(N, ceil(C / lanes),
        height, width, lanes)``; ValueError where the shape is another.
        """
        g, blocks = self.geometry, np.asarray(inputs, np.float32)
        if blocks.ndim == 4:
            blocks = blocks[..., None]
        lanes = blocks.shape[-1]
        expected = (-(-g.in_channels // lanes), g.height, g.width, lanes)
        if blocks.ndim != 5 or blocks.shape[1:] != expected:
            raise ValueError(
                f"inputs {inputs.shape}: (N, {g.in_channels}, {g.height}, {g.width}) expected"
            )
        keys = self._random.random((len(blocks), g.out_height * g.out_width))
        chosen = np.sort(np.argsort(keys, axis=1, kind="stable")[:, : self.per_image], axis=1)
        places = np.divmod(chosen, g.out_width)
        rows, columns = (self._reads(axis, place) for axis, place in enumerate(places))
        image = np.arange(len(blocks))[:, None, None, None]
        # Only what is drawn is read: (N, positions, X, Y, blocks, lanes).
        picked = blocks[
            image,
            :,
            rows.clip(0, g.height - 1)[:, :, :, None],
            columns.clip(0, g.width - 1)[:, :, None, :],
        ]
        inside = (rows >= 0) & (rows < g.height)
        across = (columns >= 0) & (columns < g.width)
        picked[~(inside[:, :, :, None] & across[:, :, None, :])] = 0.0
        count = len(blocks) * self.per_image
        picked = picked.reshape(count, *g.kernel, -1)[..., : g.in_channels]
        return np.ascontiguousarray(np.moveaxis(picked, 3, 1)).reshape(count, -1)

    def _reads(self, axis: int, places: NDArray[np.intp]) -> NDArray[np.intp]:
        """Rows (axis 0) or columns that outputs at ``places`` (N, P) read: (N, P, kernel)."""
        g = self.geometry
        taps = np.arange(g.kernel[axis]) * g.dilation[axis]
        return np.asarray(places[:, :, None] * g.stride[axis] - g.padding[axis] + taps)


class MomentAccumulator:
    """Streaming `InputMoments` of one convolution from its input activations.

    Takes the parameters of `PatchSampler` and raises what it raises.
    """

    def __init__(self, geometry: ConvGeometry, positions_per_image: int = 64, seed: int = 0):
        """Start empty."""
        self.geometry = geometry
        self.samples = 0
        self._sampler = PatchSampler(geometry, positions_per_image, seed)
        size, groups = int(np.prod(geometry.weight_shape[1:])), geometry.groups
        self._shift: NDArray[np.float32] | None = None
        self._products = np.zeros((groups, size, size))
        self._sums = np.zeros((groups, size))

    def update(self, inputs: NDArray[np.float32]) -> None:
        """Add images as `PatchSampler.sample` takes them; it raises what that raises."""
        images = max(1, CHUNK_BYTES // (4 * self._sums.size * self._sampler.per_image))
        for start in range(0, len(inputs), images):
            self._add(self._sampler.sample(inputs[start : start + images]))

    def moments(self) -> InputMoments:
        """The moments so far; ValueError before the first image."""
        if self._shift is None or self.samples == 0:
            raise ValueError("no images were given to update()")
        offset = self._sums / self.samples
        outer = offset[:, :, None] * offset[:, None, :]
        covariance = self._products / self.samples - outer
        covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
        mean = self._shift.astype(np.float64) + offset
        if len(mean) == 1:
            return InputMoments(covariance[0], mean[0], self.samples)
        return InputMoments(covariance, mean, self.samples)

    def _add(self, patches: NDArray[np.float32]) -> None:
        groups = len(self._sums)
        patches = patches.reshape(len(patches), groups, -1).transpose(1, 0, 2)
        if self._shift is None:
            # Near the mean, so that single precision loses little of the variance.
            self._shift = patches.mean(axis=1, dtype=np.float64).astype(np.float32)
        patches = patches - self._shift[:, None]
        self._products += patches.transpose(0, 2, 1) @ patches
        self._sums += patches.sum(axis=1, dtype=np.float64)
        self.samples += patches.shape[1]
