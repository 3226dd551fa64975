"""How much a network's output minds errors of each layer: measured, saved and read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.metrics import divergence
from tvm_lowrank.passes.graph import constant_array, dataflow_bindings, is_constant, op_name
from tvm_lowrank.planner.candidates import Candidate
from tvm_lowrank.planner.segments import Segments

FORMAT = 1
# The error at which sensitivities are taken: small enough to be local, large enough to be seen.
_PROBE_ERROR = 0.08
# Samples; fewer, but not less than these, where the multiplications of all runs exceed the third.
_MOST, _FEWEST = 64, 16
_WORK = 2e12


def sensitivities(
    segments: Segments,
    options: Mapping[str, Sequence[Candidate]],
    inputs: np.ndarray,
    classifier: bool,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """How much the network's output moves for each unit of a layer's error, layer by layer.

    Each layer in turn is replaced by its candidate with an error near 0.08, and what follows it is
    run; the sensitivity is the divergence of the outputs over that error.

    Parameters
    ----------
    segments : Segments
    options : dict
        Layer name to its candidates, at least one of them lossy.
    inputs : np.ndarray
        Samples (n, ...), of which the first up to 64 are used, or a batch if that is more.
    classifier : bool
        See `tvm_lowrank.metrics.divergence`.
    """
    work = [layer.geometry.multiplications if layer.geometry else 0 for layer in segments.layers]
    runs = sum(
        sum(work[index:]) / segments.batch
        for index, layer in enumerate(segments.layers)
        if layer.name in options
    )
    count = int(np.clip(_WORK / max(runs, 1), _FEWEST, _MOST))
    inputs = inputs[: max(count, segments.batch)]
    state = segments.start(inputs)
    original = segments.finish(0, state)
    found: dict[str, float] = {}
    for index, layer in enumerate(segments.layers):
        if len(found) == len(options):
            break
        if layer.name in options:
            lossy = [candidate for candidate in options[layer.name] if candidate.error > 0]
            probe = min(lossy, key=lambda c: abs(np.log(c.error / _PROBE_ERROR)))
            outputs = segments.finish(index, state, (probe.weight, probe.bias))
            found[layer.name] = divergence(outputs, original, classifier) / probe.error
            report(len(found))
        state = segments.step(index, state)
    return found


def remembered(
    path: Path | None,
    mod: tvm.IRModule,
    inputs: np.ndarray,
    classifier: bool,
    wanted: Sequence[str],
    measure: Callable[[], dict[str, float]],
) -> dict[str, float]:
    """Sensitivities from a file, if it holds those of this network and data; else measured.

    Parameters
    ----------
    path : Path, optional
        Read, and written after measuring. A file of another network or other data is replaced.
    mod : tvm.IRModule
        The normalised network.
    inputs : np.ndarray
        What `measure` uses.
    wanted : sequence of str
        Layers that must be there.

    Raises
    ------
    LowRankError
        The file is damaged or cannot be written.
    """
    key = _digest(mod, inputs, classifier)
    if path is not None and path.exists():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            same = data["format"] == FORMAT and data["key"] == key
            known = {str(name): float(value) for name, value in data["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LowRankError(
                f"sensitivities {path} cannot be read ({error!r}); delete the file"
            ) from error
        if same and all(name in known for name in wanted):
            return {name: known[name] for name in wanted}
    found = measure()
    if path is not None:
        fresh = path.with_name(f".{path.name}.tmp")
        try:
            text = json.dumps({"format": FORMAT, "key": key, "layers": found}, indent=1)
            fresh.write_text(text + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise LowRankError(f"sensitivities {path} cannot be written ({error})") from error
    return found


def _digest(mod: tvm.IRModule, inputs: np.ndarray, classifier: bool) -> str:
    """Of the network's operators and constants, and of the data."""
    digest = hashlib.sha256(f"{classifier} {inputs.shape}".encode())
    digest.update(np.ascontiguousarray(inputs).data)

    def visit(expr: relax.Expr) -> None:
        if is_constant(expr):
            digest.update(np.ascontiguousarray(constant_array(expr)).data)

    for binding in dataflow_bindings(mod["main"]) or []:
        digest.update(f"{op_name(binding.value)} {binding.var.ty}".encode())
        relax.analysis.post_order_visit(binding.value, visit)
    return digest.hexdigest()
