"""What could replace a layer: every form at its useful ranks, fitted, priced and measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.guide import MARGIN
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.operations import FLOAT32_BYTES
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.decompose.form import Fitter, Rank
from tvm_lowrank.decompose.moments import InputMoments, bias_correction
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer

# A layer that loses more of its output's variance than this is of no use to any network.
_WORST_ERROR = 0.6
# Predicted times are good to about this factor; what is predicted slower is not measured.
_PREDICTED_GAIN = 0.95
_MEASURED_GAIN = 0.97
# Forms that save memory need not gain time, but may not lose any.
_NO_LOSS = 1.0
# Layers that read more inputs an output are fitted to their weights alone: their second moments
# would take gigabytes.
WIDEST = 8192
# Every form is fitted once, near this share of the dense layer's predicted time; only those that do
# best there are fitted at their other ranks.
_PROBE_TIME = 0.5
_FORMS_FITTED = 3
# Layers whose outputs read more inputs take these forms alone, where one can be faster: fitting the
# others takes minutes there.
_WIDE = 2048
_QUICKLY_FITTED = ("separable", "linear_combination", "tucker2", "svd")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to compute a layer.

    ``error`` is the share of the layer's output variance that is lost on the data (0 for dense);
    ``bias`` is corrected so that the mean output stays. ``factors`` hold an OIHW weight a stage.
    ``fitted`` tells to what: "data", or "weights" alone. ``memory_us`` is the time to read the
    weights once, for layers whose objective is memory.
    """

    form: str
    rank: Rank
    stages: tuple[ConvGeometry, ...]
    factors: tuple[np.ndarray, ...]
    bias: np.ndarray
    error: float
    predicted_us: float
    measured_us: float = math.inf
    fitted: str = "data"
    memory_us: float | None = None
    geometry: ConvGeometry | None = None
    extra_us: float = 0.0

    @property
    def cost_us(self) -> float:
        """What the choice among candidates minimises, in microseconds."""
        return self.measured_us if self.memory_us is None else self.memory_us

    @property
    def weight_count(self) -> int:
        """Weights that all stages keep."""
        return sum(stage.weight_count for stage in self.stages)

    @property
    def weight(self) -> np.ndarray:
        """The dense OIHW weight that the factors stand for."""
        if self.form == "dense":
            return self.factors[0]
        whole = FORMS[self.form].reconstruct(self.factors, self.geometry)
        return np.asarray(whole, np.float32)

    @property
    def multiplications(self) -> int:
        """Multiplications of all stages by the direct algorithm."""
        return sum(stage.multiplications for stage in self.stages)


def forms_for(layer: ConvLayer, forms: Sequence[str]) -> list[str]:
    """The forms among ``forms`` that are meant for a layer's kind, "dense" left out."""
    kind = layer.fully_connected
    return [name for name in forms if name != "dense" and FORMS[name].keeps_memory == kind]


def propose(
    layer: ConvLayer,
    moments: InputMoments,
    forms: Sequence[str],
    roofline: Roofline,
    timer: KernelTimer,
    limit: int = 8,
    algorithms: Mapping[str, float] | None = None,
) -> tuple[list[Candidate], str | None]:
    """The best few candidates by predicted time and error, not measured yet.

    ``algorithms`` says how many times as long as predicted each takes for the dense layer; its
    candidates are expected to do alike.

    Returns
    -------
    candidates : list of Candidate
        At most ``limit``, fastest first: the front of predicted time against error.
    reason : str or None
        Why there is none.
    """
    geometry, weight = layer.geometry, layer.weight
    assert geometry is not None
    exact = weight.astype(np.float64)
    algorithms = algorithms or dict.fromkeys(timer.usable.algorithms, 1.0)
    dense_us = roofline.microseconds([geometry], timer.isa.lanes, algorithms)
    names = forms_for(layer, forms)
    refusals = [f"{name}: {text}" for name in names if (text := FORMS[name].refuse(geometry))]
    plausible: dict[str, list[_Priced]] = {}
    for name in sorted(names, key=lambda name: name not in _QUICKLY_FITTED):
        if plausible and name not in _QUICKLY_FITTED and weight[0].size > _WIDE:
            break
        gain = _NO_LOSS if FORMS[name].keeps_memory else _PREDICTED_GAIN
        priced = []
        for rank, stages, moved in _chains(name, geometry, timer.isa.lanes):
            extra = FLOAT32_BYTES * moved / (1e3 * roofline.gigabytes)
            predicted = roofline.microseconds(stages, timer.isa.lanes, algorithms) + extra
            if predicted < gain * dense_us:
                priced.append(_Priced(rank, stages, predicted, extra))
        if priced:
            plausible[name] = sorted(priced, key=lambda p: p.microseconds)
    fits = {
        name: _Fit(
            layer, exact, moments, FORMS[name].fitter(exact, geometry, moments, refine=False), name
        )
        for name in plausible
    }
    probes: dict[str, Candidate] = {}
    for name, priced in plausible.items():
        within = [p for p in priced if p.microseconds <= _PROBE_TIME * dense_us]
        probes[name] = fits[name].candidate(within[-1] if within else priced[0])
    tried = list(probes.values())
    for name in _most_promising(probes, _FORMS_FITTED):
        done = probes[name].rank
        # The largest first: what it needs of the moments, the others need a part of.
        rest = [p for p in reversed(plausible[name]) if p.rank != done]
        tried += [fits[name].candidate(p) for p in rest]
    found = [candidate for candidate in tried if candidate.error <= _WORST_ERROR]
    if found:
        return _thin(_front(found, lambda candidate: candidate.predicted_us), limit), None
    if len(refusals) == len(names):
        return [], "; ".join(refusals) or "no form is allowed"
    return [], "no form is predicted faster at a useful error"


@functools.lru_cache(maxsize=256)
def _chains(
    name: str, geometry: ConvGeometry, lanes: int
) -> tuple[tuple[Rank, tuple[ConvGeometry, ...], int], ...]:
    """The useful ranks of a form, none where it is refused, with stages and values moved beside.

    Kept, since many layers of a network are alike.
    """
    form = FORMS[name]
    return tuple(
        (rank, tuple(form.stages(geometry, rank)), form.values_moved(geometry, rank))
        for rank in form.ranks(geometry, lanes)
    )


@dataclass(frozen=True, eq=False)
class _Priced:
    """A rank, its stages, and its predicted microseconds; ``extra`` of those beside the stages."""

    rank: Rank
    stages: tuple[ConvGeometry, ...]
    microseconds: float
    extra: float


@dataclass(frozen=True, eq=False)
class _Fit:
    """Makes candidates of one form for one layer."""

    layer: ConvLayer
    exact: np.ndarray
    moments: InputMoments
    fitter: Fitter
    form: str

    def candidate(self, priced: _Priced) -> Candidate:
        exact, geometry = self.exact, self.layer.geometry
        assert geometry is not None
        factors, whole, error = FORMS[self.form].fit(
            self.fitter, priced.rank, exact, geometry, self.moments
        )
        return Candidate(
            self.form,
            priced.rank,
            priced.stages,
            tuple(np.asarray(factor, np.float32) for factor in factors),
            self.layer.bias + bias_correction(exact, whole, self.moments),
            error,
            priced.microseconds,
            fitted="weights" if self.moments.is_identity else "data",
            geometry=geometry,
            extra_us=priced.extra,
        )


def _most_promising(probes: dict[str, Candidate], count: int) -> list[str]:
    """The forms whose probes lose least for the time they take.

    Errors fall about geometrically with time, so the product of both compares probes whose times
    are not quite the same.
    """
    return sorted(probes, key=lambda name: probes[name].error * probes[name].predicted_us)[:count]


def confirm(
    candidates: Sequence[Candidate], dense: Candidate, timer: KernelTimer
) -> list[Candidate]:
    """The candidates that are measured faster than the dense layer, on the front, fastest first.

    Where the cost model is trusted or guides, what it predicts far behind the dense layer, or
    behind another candidate of no larger error, is not measured.
    """
    if timer.is_trusted():
        times = [timer.predict(candidate.stages) for candidate in candidates]
        candidates = _worth_measuring(candidates, times, dense)
    elif timer.guide is not None:
        times = [timer.expected(c.stages) + c.extra_us for c in candidates]
        candidates = _worth_measuring(candidates, times, dense)
    timer.measure_all((w for c in candidates for w in timer.workloads(c.stages)), brief=True)
    faster: list[Candidate] = []
    # The least errors first: what loses more has to be faster than these.
    for candidate in sorted(candidates, key=lambda c: c.error):
        limit = min([_MEASURED_GAIN * dense.measured_us, *(c.measured_us for c in faster)])
        us = timer.within(candidate.stages, limit - candidate.extra_us) + candidate.extra_us
        if us < limit:
            faster.append(replace(candidate, measured_us=us))
    return _front(faster, lambda candidate: candidate.measured_us)


def confirm_memory(
    candidates: Sequence[Candidate], dense: Candidate, timer: KernelTimer, gigabytes: float
) -> list[Candidate]:
    """Candidates that keep fewer weights than the dense layer, none slower, and that layer itself.

    The front of weights kept against error, fewest weights first. Their ``memory_us`` is the time
    to read the weights at ``gigabytes`` a second: what memory is worth beside other layers' time.
    """

    limit = _NO_LOSS * dense.measured_us

    def priced(candidate: Candidate) -> Candidate:
        microseconds = FLOAT32_BYTES * candidate.weight_count / (1e3 * gigabytes)
        return replace(candidate, memory_us=microseconds)

    measured = [
        priced(replace(c, measured_us=timer.within(c.stages, limit) + c.extra_us))
        for c in candidates
        if c.weight_count < dense.weight_count
    ]
    kept = [c for c in measured if c.measured_us <= limit]
    return [*_front(kept, lambda candidate: candidate.cost_us), priced(dense)]


def _worth_measuring(
    candidates: Sequence[Candidate], times: Sequence[float], dense: Candidate
) -> list[Candidate]:
    """Those that predicted times put neither behind the dense layer nor behind another."""
    return [
        one
        for one, us in zip(candidates, times, strict=True)
        if us < MARGIN * dense.measured_us
        and not any(
            other.error <= one.error and MARGIN * less < us
            for other, less in zip(candidates, times, strict=True)
        )
    ]


def _front(candidates: Sequence[Candidate], time: Callable[[Candidate], float]) -> list[Candidate]:
    """Those that no other beats in both time and error, fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.error, time(c))):
        if not front or time(candidate) < time(front[-1]):
            front.append(candidate)
    return front[::-1]


def _thin(front: list[Candidate], limit: int) -> list[Candidate]:
    """At most ``limit`` of a front, evenly spread."""
    if len(front) <= limit:
        return front
    picks = np.unique(np.linspace(0, len(front) - 1, limit).round().astype(int))
    return [front[index] for index in picks]
