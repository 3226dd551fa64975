"""The user's data: checked, and split so that fitting, choosing and judging never share it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.passes.graph import static_shape

# More samples than this change the moments of a layer little and cost time in every pass.
FIT_SAMPLES = 512
SELECT_SAMPLES = 1536


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (samples, ...) and, if known, a class index for each."""

    inputs: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> Samples:
        """The samples at ``indices``."""
        return Samples(self.inputs[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True, eq=False)
class DataSplit:
    """Disjoint samples for fitting factors, choosing a plan and stating its accuracy.

    ``spare`` are more inputs, for recovery, which needs no labels. ``synthetic`` marks noise
    that stands for data the user did not give. Not ``alike``: those for fitting are other inputs
    than the rest, which the network may do better on, if it was trained on them.
    """

    fit: Samples
    select: Samples
    final: Samples
    synthetic: bool = False
    spare: np.ndarray | None = None
    alike: bool = True

    @property
    def unlabelled(self) -> np.ndarray:
        """Inputs (n, ...) that neither choose nor judge: those of ``fit`` and the spare ones."""
        if self.spare is None:
            return self.fit.inputs
        return np.concatenate([self.fit.inputs, self.spare])


def read_npz(path: str | Path) -> Samples:
    """Samples from a ``.npz`` file with ``inputs`` and, optionally, ``labels``.

    Raises
    ------
    LowRankError
        The file is missing, is not an npz file, or has no array ``inputs``.
    """
    path = Path(path)
    if not path.is_file():
        raise LowRankError(f"data file {path} does not exist; give an .npz file with 'inputs'")
    try:
        with np.load(path) as arrays:
            held = {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise LowRankError(
            f"{path} is not a readable .npz file ({error}); write it with numpy.savez"
        ) from error
    if "inputs" not in held:
        raise LowRankError(f"{path} holds {sorted(held)}, but no array 'inputs'; add one")
    return Samples(held["inputs"], held.get("labels"))


def input_shape(mod: tvm.IRModule) -> tuple[int, ...]:
    """Shape of the network's only input.

    Raises
    ------
    LowRankError
        The network has several inputs, or one that is not a static float32 tensor.
    """
    params = mod["main"].params
    if len(params) != 1:
        raise LowRankError(f"the network has {len(params)} inputs; only one is supported")
    shape = static_shape(params[0])
    if shape is None:
        raise LowRankError(
            f"input {params[0].name!r} has type {params[0].ty}, not float32 with a static shape"
        )
    return shape


def check_samples(
    samples: Samples, mod: tvm.IRModule, where: str = "data", class_labels: bool = True
) -> Samples:
    """The samples as float32, after checking them against the network.

    Without ``class_labels`` labels may be any numbers, one for each sample.

    Raises
    ------
    LowRankError
        Shape, number of labels, label type or finiteness is wrong; the message names which.
    """
    shape = input_shape(mod)
    inputs, labels = np.asarray(samples.inputs), samples.labels
    if inputs.shape[1:] != shape[1:] or inputs.ndim != len(shape):
        raise LowRankError(
            f"{where} 'inputs' has shape {inputs.shape}, but the network takes samples of shape "
            f"{shape[1:]}: give an array of shape (samples, {', '.join(map(str, shape[1:]))})"
        )
    if inputs.dtype.kind not in "fiu":
        raise LowRankError(f"{where} 'inputs' has dtype {inputs.dtype}; give numbers")
    inputs = inputs.astype(np.float32, copy=False)
    if not np.isfinite(inputs).all():
        raise LowRankError(f"{where} 'inputs' holds NaN or infinite values; clean the data")
    if len(inputs) < 4:
        raise LowRankError(f"{where} has {len(inputs)} samples; at least 4 are needed")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(inputs),):
            raise LowRankError(
                f"{where} 'labels' has shape {labels.shape} for {len(inputs)} inputs; "
                f"give one class index a sample, shape ({len(inputs)},)"
            )
        if not class_labels and labels.dtype.kind not in "fiu":
            raise LowRankError(f"{where} 'labels' has dtype {labels.dtype}; give numbers")
        if class_labels and labels.dtype.kind not in "iu":
            raise LowRankError(f"{where} 'labels' has dtype {labels.dtype}; give class indices")
    return Samples(inputs, labels)


def split(
    mod: tvm.IRModule,
    data: Samples | None,
    final: Samples | None = None,
    seed: int = 0,
    class_labels: bool = True,
    spare: bool = False,
    unlabelled: np.ndarray | None = None,
) -> DataSplit:
    """Checked data, shuffled under the seed and split into three disjoint parts.

    A third of ``data``, at most 512 samples, fits factors; a third, at most 1,536, chooses among
    plans; the rest states the accuracy. With ``final`` given, that states it and ``data`` is halved
    between the other two. Without data the parts are synthetic noise. ``unlabelled`` inputs fit in
    place of ``data`` where they are at least as many, which leaves more of that to choose and to
    judge; of them what is in ``data`` or ``final`` too is left out, and what does not fit is for
    recovery. Without them, ``spare`` keeps half of what is left of ``data`` for that (all of it,
    with ``final``).
    """
    rng = np.random.default_rng(seed)
    if data is None:
        shape = (96, *input_shape(mod)[1:])
        inputs = rng.standard_normal(shape, np.float32)
        parts = (Samples(inputs[:48]), Samples(inputs[48:72]), Samples(inputs[72:]))
        return DataSplit(*parts, synthetic=True)
    data = check_samples(data, mod, class_labels=class_labels)
    order = rng.permutation(len(data))
    others = int(final is None)  # the parts of ``data`` beside those that fit and choose
    share = len(data) // (2 + others)
    fit, select = min(FIT_SAMPLES, share), min(SELECT_SAMPLES, share)
    fitted, more = data.take(order[:fit]), None
    if unlabelled is not None:
        more = check_samples(Samples(unlabelled), mod, "unlabelled data").inputs
        more = _without(more, data.inputs, *([] if final is None else [final.inputs]))
        if len(more) >= fit:
            drawn = rng.permutation(len(more))
            fitted, more = Samples(more[drawn[:FIT_SAMPLES]]), more[drawn[FIT_SAMPLES:]]
            fit, select = 0, min(FIT_SAMPLES + SELECT_SAMPLES, len(data) // (1 + others))
    rest = order[fit + select :]
    if spare and unlabelled is None:
        kept = len(rest) // 2 if final is None else len(rest)
        more, rest = data.inputs[rest[:kept]], rest[kept:]
    if final is None:
        final = data.take(np.sort(rest))
    else:
        final = check_samples(final, mod, "evaluation data", class_labels)
    return DataSplit(
        fitted,
        data.take(order[fit : fit + select]),
        final,
        spare=more,
        alike=fit > 0,
    )


def _without(inputs: np.ndarray, *known: np.ndarray) -> np.ndarray:
    """The inputs that are not, to the last bit, among the known ones."""
    seen = {_digest(x) for part in known for x in np.asarray(part)}
    new = [_digest(x) not in seen for x in inputs]
    return inputs if all(new) else inputs[new]


def _digest(x: np.ndarray) -> bytes:
    return hashlib.sha256(np.asarray(x, np.float32).tobytes()).digest()
