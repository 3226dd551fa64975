"""What users call: ``plan``, ``transform`` and ``compile``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_lowrank.build import compile_module
from tvm_lowrank.data import Samples
from tvm_lowrank.decompose import FORMS
from tvm_lowrank.frontend import load_model
from tvm_lowrank.metrics import Scorer
from tvm_lowrank.plan import Plan
from tvm_lowrank.planner import ALGORITHMS, Options, search
from tvm_lowrank.target import parse_target


def plan(
    mod: Any,
    target: Any = None,
    data: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    max_drop: float = 1.0,
    *,
    evaluation: tuple[np.ndarray, np.ndarray | None] | None = None,
    forms: Sequence[str] | None = None,
    algorithms: Sequence[str] | None = None,
    lossless: bool = False,
    exclude: Sequence[str] = (),
    batch: int = 1,
    threads: int | None = None,
    seed: int = 0,
    trials: int = 4,
    records: str | Path | None = None,
    shipped_records: bool = True,
    exact: bool = False,
    trust_model: bool = False,
    max_weight_bytes: int | None = None,
    metric: str | Scorer | None = None,
    recover: float = 0.0,
    unlabelled: np.ndarray | None = None,
) -> Plan:
    """Find the fastest network within the accuracy budget, and measure that it is.

    Parameters
    ----------
    mod : tvm.IRModule, str, Path, onnx.ModelProto or torch.export.ExportedProgram
        The trained network.
    target : optional
        An llvm target (`tvm_lowrank.target.parse_target`); this machine's processor by default.
        Candidates are measured on this machine, so it must be able to run the target's code.
    data : np.ndarray, optional
        Preprocessed inputs (samples, ...), split into disjoint parts for fitting, choosing and
        judging. Without them noise stands in, factors are fitted to the weights alone (the plan
        says so), the budget is the relative output error, and a warning says that accuracy was not
        measured.
    labels : np.ndarray, optional
        Class indices (samples,), or what ``metric`` takes. With labels ``max_drop`` is points of
        top-1 accuracy, without it is points of disagreement with the original network.
    max_drop : float
        The budget: points (or per cent of output error without data). What the samples that state
        the accuracy cannot tell from no drop is refused: with 1,000 of them less than 0.28 points.
    evaluation : (inputs, labels), optional
        Samples that state the accuracy, instead of a part of ``data``.
    forms, algorithms : sequences of str, optional
        Restrict the search. Forms are ``dense`` and the names in `tvm_lowrank.decompose.FORMS`.
        Algorithms are those of `schedules.kernels.ALGORITHMS`, which are all allowed by default,
        and of `schedules.kernels.REDUCED`, which round the factors of their products and are
        chosen only if they are named: ``bfloat16`` for processors, ``tf32`` and ``half`` for GPUs.
    lossless : bool
        Short for ``forms=("dense",)``.
    exclude : sequence of str
        Names or patterns (``conv1*``) of layers to leave as they are.
    batch : int
        Extent of dynamic dimensions.
    threads : int, optional
        Threads of TVM's runtime; all physical cores by default.
    seed : int
        Of the data's split and of everything else that is random.
    trials : int
        Schedules measured of each kernel at most; of each family of kernels where no cost model
        ships for the instruction set.
    records : str or Path, optional
        Tuning records to read and append to.
    shipped_records : bool
        Take schedules of the records that ship with the package instead of tuning anew.
    exact : bool
        Restrict the algorithms, of dense layers and of forms, to direct convolution and what states
        an error of at most 1e-6 of the largest result. (Forms approximate by far more; together
        with ``lossless`` nothing does.)
    trust_model : bool
        Measure only the few kernels that the trained cost model picks, if it knows this machine
        (docs/tuning.md).
    max_weight_bytes : int, optional
        Bound of the weights of all convolutions as their kernels keep them; transformed weights
        are up to several times the size of the network's own.
    metric : str or callable, optional
        What ``max_drop`` counts where it is not classes: ``pitch``, ``psnr``, ``output_error``
        (`tvm_lowrank.metrics.Metric`), ``"module:function"``, or a function of outputs (samples,
        ...) and labels that gives each sample a score, higher is better.
    recover : float
        Minutes of training of factored networks on ``data`` without its labels, so that faster ones
        keep the budget; needs the ``torch`` extra. Half of the data that would judge is used for
        it, unless ``evaluation`` or ``unlabelled`` is given.
    unlabelled : np.ndarray, optional
        More preprocessed inputs (samples, ...). Factors are fitted to 512 of them, so that more of
        ``data`` is left to choose and to judge, and ``recover`` trains on all; with a few thousand
        or fewer, training soon learns those by heart. What is in ``data`` or ``evaluation`` too, to
        the last bit, is left out.

    Returns
    -------
    Plan
        Also when nothing was gained; ``plan.transformed`` and ``plan.reason`` tell.

    Raises
    ------
    LowRankError
        The model, the data, the target or an option cannot be used; the message says what to do.
    """
    if data is None:
        warnings.warn(
            "no data given: factors are fitted to the weights alone and accuracy is not measured; "
            "pass data=, and labels= where there are any",
            stacklevel=2,
        )
    chosen = ("dense",) if lossless else tuple(forms or ("dense", *FORMS))
    options = Options(
        max_drop=max_drop,
        forms=chosen,
        algorithms=tuple(algorithms or ALGORITHMS),
        exclude=tuple(exclude),
        threads=threads,
        seed=seed,
        trials=trials,
        shipped_records=shipped_records,
        exact=exact,
        trust_model=trust_model,
        max_weight_bytes=max_weight_bytes,
        metric=metric,
        recover=recover,
    )
    return search(
        load_model(mod, batch),
        target,
        None if data is None else Samples(data, labels),
        None if evaluation is None else Samples(*evaluation),
        options,
        None if records is None else Path(records),
        unlabelled=unlabelled,
    )


def transform(mod: Any, **options: Any) -> tvm.IRModule:
    """Rewrite a network into a faster one: ``plan(mod, **options).apply(mod)``.

    Takes the parameters of `plan` and raises what it raises.

    Returns
    -------
    tvm.IRModule
        Relax and TIR for `compile`, or for ``tvm.compile(mod, target)``: it needs nothing of this
        package any more.
    """
    loaded = load_model(mod, options.get("batch", 1))
    return plan(loaded, **options).apply(loaded)


def compile(mod: tvm.IRModule, target: Any = None) -> tvm.runtime.Executable:
    """Compile what `transform` or `Plan.apply` gave, as ``tune`` does.

    ``tvm.compile`` takes the same module, but then TVM's virtual machine calls every kernel by
    itself; here the kernels of a processor run in one function where they follow each other, which
    small networks gain by.

    Parameters
    ----------
    mod : tvm.IRModule
    target : optional
        What the module was planned for (`tvm_lowrank.target.parse_target`); this machine's
        processor by default.

    Returns
    -------
    tvm.runtime.Executable
        For ``relax.VirtualMachine``, or to be written by ``export_library``.

    Raises
    ------
    LowRankError
        The target is not known, or something that compiles CUDA is missing.
    """
    return compile_module(mod, parse_target(target))
