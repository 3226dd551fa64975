"""The planner's decision: printable, JSON both ways, replayable."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.decompose.form import Branch
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.layer import ConvLayer, collect_layers
from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.passes.factor_convolutions import Chain
from tvm_lowrank.passes.lower import lower
from tvm_lowrank.passes.pipeline import factor, normalise
from tvm_lowrank.schedules.kernels import (
    REDUCED,
    Schedule,
    algorithm_of,
    default_schedule,
    has_kernel,
    schedule_from_json,
)
from tvm_lowrank.schedules.machine import machine_of, widest
from tvm_lowrank.schedules.x86.chain import ChainWorkload, FusedSchedule
from tvm_lowrank.schedules.x86.workload import ConvWorkload
from tvm_lowrank.target import parse_target

FORMAT = 4


@dataclass(frozen=True)
class Plan:
    """Which form each layer takes, with which factors and schedules, and what that measured.

    Attributes
    ----------
    target : dict
        The target as JSON values.
    threads, seed, max_drop, metric
        What the search ran with; ``metric`` names the unit of ``max_drop``.
    layers : tuple of LayerPlan
    schedules : tuple of (workload, schedule)
        Measured best schedules, both as JSON dictionaries.
    fused : tuple of (workload, schedule)
        The same for chains of convolutions of which all, or the last few, are one kernel.
    factors : dict
        Layer name to (stage weights, bias); what `save` writes beside the JSON.
    curve : tuple of dict
        Every choice that was tried on the selection samples, slowest first: ``microseconds`` of its
        convolutions (``dense_us`` with no form changed), ``drop``, its ``interval``, ``agreement``,
        how many layers are ``rewritten``, and whether it was ``refitted`` or ``recovered``.
    result : dict
        Accuracy, latency and size before and after, measured on built libraries.
    transformed : bool
        False when the network stays as it is; ``reason`` then says why.
    """

    target: dict[str, Any]
    threads: int
    seed: int
    max_drop: float
    metric: str
    layers: tuple[LayerPlan, ...]
    schedules: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    fused: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    factors: dict[str, tuple[tuple[np.ndarray, ...], np.ndarray]] = field(
        default_factory=dict, compare=False, repr=False
    )
    result: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, Any], ...] = ()
    transformed: bool = True
    reason: str | None = None

    # -- replay --------------------------------------------------------------------------------

    def apply(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The network rewritten and lowered to the plan's kernels, without any search.

        Parameters
        ----------
        mod : tvm.IRModule
            The network the plan was made for (also with other weights of the layers it neither
            factors nor refits).

        Returns
        -------
        tvm.IRModule
            Relax and TIR that ``tvm.compile(mod, target)`` builds with TVM's stock pipeline.

        Raises
        ------
        LowRankError
            The network's layers are not those of the plan, or the plan was read from JSON
            without its factors.
        """
        return self.lower(self.factor(mod))

    def factor(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The network normalised and rewritten, in plain Relax, with no kernel of ours yet."""
        normalised = normalise(mod)
        self.check(collect_layers(normalised))
        return factor(normalised, self.chains())

    def check(self, layers: Sequence[ConvLayer]) -> None:
        """LowRankError unless the layers are those of the plan, in order and geometry."""
        mine, theirs = len(self.layers), len(layers)
        if mine != theirs:
            raise LowRankError(
                f"the plan is for a network of {mine} layers, this one has "
                f"{theirs}; make a plan for this network"
            )
        for plan, layer in zip(self.layers, layers, strict=True):
            if plan.geometry != layer.geometry:
                raise LowRankError(
                    f"{plan.name} is {layer.geometry} in this network but {plan.geometry} in the "
                    "plan; make a plan for this network"
                )

    def chains(self) -> dict[str, Chain]:
        """The rewritten layers as chains for `passes.pipeline.factor`."""
        chains = {}
        for layer in self.layers:
            if (layer.form == "dense" and not layer.refitted) or not self.transformed:
                continue
            if layer.name not in self.factors:
                raise LowRankError(
                    f"the plan has no factors for {layer.name}; read it with Plan.load, with the "
                    ".npz file that was saved beside the JSON"
                )
            weights, bias = self.factors[layer.name]
            assert layer.geometry is not None
            branches: tuple[Branch, ...] = ()
            if layer.form != "dense":
                branches = FORMS[layer.form].branches(layer.geometry, layer.rank)
            chains[layer.name] = Chain(layer.stages, tuple(weights), bias, branches)
        return chains

    def rounding(self) -> list[str]:
        """The algorithms among those of its kernels that round."""
        used = {algorithm_of(schedule_from_json(schedule)) for _, schedule in self.schedules}
        used |= {*self.fused_algorithms().values()}
        return [name for name in REDUCED if name in used]

    def fused_algorithms(self) -> dict[ConvGeometry, str]:
        """The algorithm of each convolution that shares a kernel with others."""
        return {
            stage.geometry: algorithm_of(schedule_from_json(tiles))
            for pair in self.fused
            for stage, tiles in _stages(*pair)
        }

    @property
    def kernel_weight_bytes(self) -> int:
        """Bytes of the weights of its layers, as its kernels keep them."""
        return sum(layer.weight_bytes or 0 for layer in self.layers)

    def lower(self, mod: tvm.IRModule) -> tvm.IRModule:
        """A normalised (and possibly factored) module lowered with the plan's schedules."""
        machine = machine_of(parse_target(self.target))
        return lower(mod, machine, self.scheduler(), self.fuser())

    def scheduler(self) -> Callable[[ConvWorkload], Schedule]:
        """Picks the plan's schedule for a workload, whatever its epilogue, or the default."""
        machine = machine_of(parse_target(self.target))
        known = {}
        for workload_json, schedule in self.schedules:
            workload = ConvWorkload.from_json(workload_json)
            known[workload.geometry, workload.in_block] = schedule_from_json(schedule)

        def pick(workload: ConvWorkload) -> Schedule:
            found = known.get((workload.geometry, workload.in_block))
            return found if found is not None else default_schedule(workload, machine)

        return pick

    def fuser(self) -> Callable[[ChainWorkload], FusedSchedule | None]:
        """Gives the plan's schedule for the last stages of a chain, or None."""
        return {
            ChainWorkload.from_json(workload): FusedSchedule.from_json(schedule)
            for workload, schedule in self.fused
        }.get

    def for_target(self, target: Any) -> Plan:
        """The same decision for another target, to build what this machine cannot run.

        Forms, ranks and factors stay; schedules stay if the target has the same vectors, and the
        instructions that they need, else its kernels take their defaults; measured times and
        results are dropped.

        Raises
        ------
        LowRankError
            As `tvm_lowrank.target.parse_target`.
        """
        parsed = parse_target(target)
        machine = machine_of(parsed)
        same = widest(machine) == widest(machine_of(parse_target(self.target)))
        kept = tuple(
            (workload, schedule)
            for workload, schedule in self.schedules
            if same and has_kernel(ConvWorkload.from_json(workload), schedule, machine)
        )
        fused = tuple(
            pair
            for pair in self.fused
            if same and all(has_kernel(stage, tiles, machine) for stage, tiles in _stages(*pair))
        )
        return replace(
            self,
            target=dict(json.loads(str(parsed))),
            schedules=kept,
            fused=fused,
            layers=tuple(
                replace(
                    layer, dense_us=None, predicted_us=None, measured_us=None, weight_bytes=None
                )
                for layer in self.layers
            ),
            result={},
            curve=(),
        )

    def dense(self) -> Plan:
        """The plan that leaves every layer dense, with the same kernels: the baseline."""
        layers = tuple(
            replace(
                layer,
                form="dense",
                rank=0,
                stages=(),
                algorithms=(),
                error=0.0,
                weight_bytes=None,
                refitted=False,
                fitted=None,
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, factors={})

    # -- files ---------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The decision as text, without the factors."""
        data = {
            "format": FORMAT,
            "target": self.target,
            "threads": self.threads,
            "seed": self.seed,
            "max_drop": self.max_drop,
            "metric": self.metric,
            "transformed": self.transformed,
            "reason": self.reason,
            "result": self.result,
            "curve": list(self.curve),
            "layers": [layer.to_json() for layer in self.layers],
            "schedules": [list(pair) for pair in self.schedules],
            "fused": [list(pair) for pair in self.fused],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from `to_json`'s text; it has no factors (see `load`).

        Raises
        ------
        LowRankError
            The text is not a plan of this format.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format version")
            layers = tuple(LayerPlan.from_json(layer) for layer in data.pop("layers"))
            schedules, fused = (
                tuple((pair[0], pair[1]) for pair in data.pop(name))
                for name in ("schedules", "fused")
            )
            curve = tuple(data.pop("curve", ()))
            return cls(layers=layers, schedules=schedules, fused=fused, curve=curve, **data)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise LowRankError(
                f"the plan is damaged or of another version ({error!r}); make it again with tune"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON) and, beside it, the factors as ``.npz``; each is replaced whole."""
        path = Path(path)
        arrays = {}
        for name, (weights, bias) in self.factors.items():
            arrays[f"{name}/bias"] = bias
            arrays.update({f"{name}/{index}": weight for index, weight in enumerate(weights)})
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        blob = buffer.getvalue()
        text = json.loads(self.to_json())
        text["factors_sha256"] = hashlib.sha256(blob).hexdigest()
        try:
            _replace(path.with_suffix(".npz"), blob)
            _replace(path, json.dumps(text, indent=1).encode())
        except OSError as error:
            raise LowRankError(f"plan {path} cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and its factors.

        Raises
        ------
        LowRankError
            A file is missing or damaged, or the factors are not those of the plan.
        """
        path = Path(path)
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            blob = path.with_suffix(".npz").read_bytes()
        except (OSError, ValueError) as error:
            raise LowRankError(
                f"plan {path} or its .npz cannot be read ({error}); make it again with tune"
            ) from error
        expected = text.pop("factors_sha256", None) if isinstance(text, dict) else None
        plan = cls.from_json(json.dumps(text))
        if hashlib.sha256(blob).hexdigest() != expected:
            raise LowRankError(
                f"{path.with_suffix('.npz')} is not the file that belongs to {path}; "
                "copy both from one tune run"
            )
        with np.load(io.BytesIO(blob)) as arrays:
            factors = {
                layer.name: (
                    tuple(arrays[f"{layer.name}/{i}"] for i in range(len(layer.stages))),
                    arrays[f"{layer.name}/bias"],
                )
                for layer in plan.layers
                if f"{layer.name}/bias" in arrays.files
            }
        return replace(plan, factors=factors)

    @property
    def rewritten(self) -> Sequence[LayerPlan]:
        """The layers that do not stay dense."""
        return [layer for layer in self.layers if layer.form != "dense"]


def _stages(
    workload: dict[str, Any], schedule: dict[str, Any]
) -> list[tuple[ConvWorkload, dict[str, Any]]]:
    """The convolutions of a chain that share a kernel, its last ones, each with its tiles."""
    tiles = schedule["stages"]
    stages = map(ConvWorkload.from_json, workload["stages"][-len(tiles) :])
    return list(zip(stages, tiles, strict=True))


def _replace(path: Path, blob: bytes) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(blob)
    os.replace(fresh, path)
