"""Recovery: the factored network is trained to give the original's outputs, without labels.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015). Needs the ``torch``
extra.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.extras import require_torch
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer
from tvm_lowrank.planner.allocate import Choice
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.torch_layers import FactoredConv2d
from tvm_lowrank.torch_module import RelaxModule

torch: Any = require_torch()
F: Any = torch.nn.functional

# Half as many samples a step gain less in the same time, twice as many no more.
_BATCH = 32
# Adam's step at the start of each phase; it falls to 0 along a cosine. Steps five times as large
# lead away from what was fitted.
_STEP = 6e-4
_LARGEST_GRADIENT = 1.0
# It rises from 0 during this share of a phase: what was fitted is near an optimum already.
_RISE = 0.1
# The share of the samples, and the most, that training does not see, and how often in a phase it is
# judged on them.
_HELD, _MOST_HELD = 1 / 8, 512
_LOOKS = 10
# How sure of its class the original may be on average: a higher temperature makes it so. Of inputs
# that it was trained on it may be nearly certain, and then tells little but the class.
_SURE, _HOTTEST, _HALVINGS = 0.87, 8.0, 12
# Share of the time in which every block learns from its own output alone, before the gradient of
# the network's output and of all later blocks reaches it too.
_BLOCKS = 0.1
# The original takes as long to run as the factored network to train, so of what it gives so much is
# kept, in batches and bytes, and used so many times, if there is enough for its order to vary.
_KEPT, _KEPT_BYTES, _USES, _FEWEST = 32, 2**29, 3, 4
# Chance that a sample is mixed with another: no labels are needed, so any input will do.
_MIXED = 0.5
# Images move by at most this share of their side.
_SHIFT = 1 / 8


def recover(
    mod: tvm.IRModule,
    layers: list[ConvLayer],
    choice: Choice,
    inputs: np.ndarray,
    minutes: float,
    classifier: bool,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Train a choice's layers, factored and dense, for a time.

    First block by block (blocks lie between places where a single value is alive), each to give the
    original's value at its end, given the trained network's at its start; then end to end, to give
    the original's class probabilities, or outputs where those are no classes, and still its values
    at the ends of blocks, which say more of each sample. Samples are mixed in pairs, and images
    moved and mirrored, since few are given. Of all weights on the way those are kept that come
    nearest to the original on samples that were set aside: training that does not help changes
    nothing. Layers before the block of the first factored one stay as they are.

    Parameters
    ----------
    mod : tvm.IRModule
        Normalised.
    layers : list of ConvLayer
        Of the same module, all of its convolutions.
    choice : dict
        Layer name to candidate. Layers left out are not trained.
    inputs : np.ndarray
        Samples (n, ...), without labels.
    minutes : float
        Of both phases together.
    classifier : bool
        Whether outputs are class scores.

    Returns
    -------
    Choice
        With trained factors and biases, but for forms that are no chain: those stay. The time
        decides how many steps there are, so two runs differ.

    Raises
    ------
    LowRankError
        The network has an operator that is not known to `RelaxModule`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    teacher = RelaxModule(mod, layers).eval().requires_grad_(False)
    geometries = {layer.name: layer.geometry for layer in layers}
    chains = {name: _chain(found, name, geometries[name]) for name, found in choice.items()}
    student = RelaxModule(mod, layers, chains).eval().requires_grad_(False)
    begin = _begin(student.borders, layers, choice)
    after = {layer.name for layer in layers[begin or 0 :]}
    chains = {n: chain for n, chain in chains.items() if n in after and _is_chain(choice[n])}
    for chain in chains.values():
        chain.requires_grad_(True)
    if torch.cuda.is_available():
        teacher.cuda(), student.cuda()
    held = rng.permutation(len(inputs))[: min(_MOST_HELD, int(_HELD * len(inputs)))]
    best = _Best(teacher, student, chains, inputs[held] if len(held) else inputs, classifier)
    inputs = np.delete(inputs, held, axis=0)
    trained = [p for chain in chains.values() for p in chain.parameters()]
    lessons = _lessons(teacher, inputs, trained[0].device, rng, begin)
    temperature = _temperature(best.wanted) if classifier else 1.0
    first = time.monotonic()
    share = _BLOCKS if any(border > (begin or 0) for border in student.borders) else 0.0
    for low, high, blocks in ((0.0, share, True), (share, 1.0, False)):
        span = 60.0 * minutes * (high - low)
        optimiser = torch.optim.Adam(trained, lr=_STEP)
        start, looks = time.monotonic(), 1
        while (spent := time.monotonic() - start) < span:
            for group in optimiser.param_groups:
                rise = min(1.0, spent / (_RISE * span))
                group["lr"] = _STEP * rise * 0.5 * (1 + np.cos(np.pi * spent / span))
            x, wanted, ends = next(lessons)
            given, own = student.run(x, detach=blocks, begin=begin)
            loss = _output_loss(given, wanted, classifier, temperature)
            if own:
                differences = [_difference(own[i], ends[i]) for i in own]
                loss = loss + sum(differences) / len(own)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _LARGEST_GRADIENT)
            optimiser.step()
            report(int(time.monotonic() - first), round(60 * minutes))
            if spent > looks / _LOOKS * span:
                best.look()
                looks += 1
        best.look()
        best.restore()  # the next phase goes on from there
    return choice | {
        name: replace(
            choice[name], factors=chain.factors(), bias=chain.output_bias().astype(np.float64)
        )
        for name, chain in chains.items()
    }


def _begin(borders: Sequence[int], layers: Sequence[ConvLayer], choice: Choice) -> int | None:
    """The last border before which no layer is factored; None if there is none.

    What is before it gives what the original's does, and can do little for what is behind: it is
    left as it is, and is not even run.
    """
    factored = [
        index
        for index, layer in enumerate(layers)
        if layer.name in choice and choice[layer.name].form != "dense"
    ]
    return max((b for b in borders if b <= min(factored, default=0)), default=None)


class _Best:
    """The weights that came nearest to the original on samples that training did not see."""

    def __init__(
        self, teacher: Any, student: Any, chains: dict[str, Any], held: np.ndarray, classifier: bool
    ) -> None:
        self.student, self.chains, self.classifier = student, chains, classifier
        self._batches = []
        device = next((p.device for chain in chains.values() for p in chain.parameters()), "cpu")
        for first in range(0, len(held), _BATCH):
            x = _tensor(held[first : first + _BATCH], device)
            with torch.no_grad():
                self._batches.append((x, teacher.run(x)[0]))
        self.wanted = torch.cat([wanted for _, wanted in self._batches])
        self._least, self._kept = math.inf, dict[str, Any]()
        self.look()

    def look(self) -> None:
        """Keep the weights as they are now if none before were as near."""
        with torch.no_grad():
            losses = [
                len(x) * float(_output_loss(self.student.run(x)[0], wanted, self.classifier))
                for x, wanted in self._batches
            ]
        if (loss := sum(losses)) < self._least:
            self._least = loss
            self._kept = {
                name: {key: value.clone() for key, value in chain.state_dict().items()}
                for name, chain in self.chains.items()
            }

    def restore(self) -> None:
        """Put the kept weights back."""
        for name, state in self._kept.items():
            self.chains[name].load_state_dict(state)


def _chain(candidate: Candidate, name: str, geometry: ConvGeometry | None) -> FactoredConv2d:
    """The candidate as modules, its factors of equal norm so that one step suits all."""
    if not _is_chain(candidate) and geometry is not None:
        return FactoredConv2d([geometry], [candidate.weight], candidate.bias, (), name)
    gathers: frozenset[int] = frozenset()
    if candidate.form != "dense" and geometry is not None:
        gathers = FORMS[candidate.form].gathers(geometry, candidate.rank)
    trained = [index for index in range(len(candidate.factors)) if index not in gathers]
    norms = {i: float(np.linalg.norm(candidate.factors[i])) for i in trained}
    mean = float(np.exp(np.mean(np.log(np.maximum(list(norms.values()), 1e-30)))))
    factors = [
        factor * np.float32(mean / max(norms[i], 1e-30)) if i in norms else factor
        for i, factor in enumerate(candidate.factors)
    ]
    return FactoredConv2d(candidate.stages, factors, candidate.bias, gathers, name)


def _is_chain(candidate: Candidate) -> bool:
    """Whether its stages follow each other, without branches."""
    if candidate.form == "dense" or candidate.geometry is None:
        return True
    return len(FORMS[candidate.form].branches(candidate.geometry, candidate.rank)) == 1


def _lessons(
    teacher: Any,
    inputs: np.ndarray,
    device: Any,
    rng: np.random.Generator,
    begin: int | None = None,
) -> Iterator[tuple[Any, Any, dict[int, Any]]]:
    """Batches without end, each with the original's output and its values at borders.

    With ``begin`` a batch is what that layer reads, and borders are those behind it.
    """
    while True:
        kept: list[Any] = []
        size = 0
        while len(kept) < _KEPT and size < _KEPT_BYTES:
            x = _tensor(_batch(inputs, rng), device)
            with torch.no_grad():
                wanted, ends = teacher.run(x)
            if begin is not None:
                x = ends[begin]
                ends = {border: value for border, value in ends.items() if border > begin}
            size += sum(value.nbytes for value in (x, wanted, *ends.values()))
            kept.append((x, wanted, ends))
            yield kept[-1]
        for _ in range(_USES - 1 if len(kept) >= _FEWEST else 0):
            for index in rng.permutation(len(kept)):
                yield kept[index]


def _tensor(x: np.ndarray, device: Any) -> Any:
    """Images channels last, which PyTorch's kernels for processors take a third less time for."""
    made = torch.from_numpy(np.ascontiguousarray(x)).to(device)
    return made.to(memory_format=torch.channels_last) if made.ndim == 4 else made


def _batch(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples drawn at random, changed in ways that need no label."""
    picked = inputs[rng.integers(0, len(inputs), min(_BATCH, 2 * len(inputs)))]
    if picked.ndim == 4 and picked.shape[1] == 3 and min(picked.shape[2:]) > 8:
        picked = np.stack([_moved(image, rng) for image in picked])
    others = picked[rng.permutation(len(picked))]
    share = np.where(rng.random(len(picked)) < _MIXED, rng.random(len(picked)), 1.0)
    share = share.reshape(-1, *[1] * (picked.ndim - 1)).astype(np.float32)
    return np.ascontiguousarray(share * picked + (1 - share) * others, np.float32)


def _moved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        image = image[:, :, ::-1]
    reach = [int(side * _SHIFT) for side in image.shape[1:]]
    rows, columns = (int(rng.integers(-r, r + 1)) for r in reach)
    padded = np.pad(image, ((0, 0), (reach[0],) * 2, (reach[1],) * 2), mode="edge")
    top, left = reach[0] + rows, reach[1] + columns
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def _difference(given: Any, wanted: Any) -> Any:
    """Mean squared difference over the variance of what is wanted."""
    return F.mse_loss(given, wanted) / wanted.var().clamp_min(1e-12)


def _temperature(wanted: Any) -> float:
    """The least temperature, from 1 on, at which class scores are not too sure of their class."""

    def sure(temperature: float) -> float:
        return float(scores.div(temperature).softmax(1).amax(1).mean())

    scores, low, high = _logits(wanted), 1.0, _HOTTEST
    if sure(low) <= _SURE:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sure(middle) <= _SURE else (middle, high)
    return high


def _output_loss(given: Any, wanted: Any, classifier: bool, temperature: float = 1.0) -> Any:
    """Divergence of class probabilities at a temperature, times its square, or the difference."""
    if not classifier:
        return _difference(given, wanted)
    scores, logits = (
        x.div(temperature).log_softmax(1) for x in (_logits(wanted), _logits(given, wanted))
    )
    return temperature**2 * F.kl_div(logits, scores, log_target=True, reduction="batchmean")


def _logits(outputs: Any, like: Any = None) -> Any:
    """Class scores (samples, classes), of outputs that are probabilities where ``like`` is."""
    flat = outputs.flatten(1)
    known = flat if like is None else like.flatten(1)
    if bool((known >= 0).all()) and bool((known.sum(1) - 1).abs().max() < 1e-3):
        return flat.clamp_min(1e-12).log()
    return flat
