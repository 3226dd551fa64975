"""What a search may do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_lowrank.decompose import FORMS
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.metrics import Scorer
from tvm_lowrank.schedules.kernels import ALGORITHMS, REDUCED


@dataclass(frozen=True)
class Options:
    """What a search may do; see `tvm_lowrank.plan` for the meaning of each.

    Raises
    ------
    LowRankError
        A name is unknown or a number out of its range.
    """

    max_drop: float = 1.0
    forms: tuple[str, ...] = ("dense", *FORMS)
    algorithms: tuple[str, ...] = ALGORITHMS
    exclude: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0
    trials: int = 4
    shipped_records: bool = True
    metaschedule_trials: int = 0
    exact: bool = False
    trust_model: bool = False
    max_weight_bytes: int | None = None
    metric: str | Scorer | None = None
    recover: float = 0.0

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("forms", self.forms, ("dense", *FORMS)),
            ("algorithms", self.algorithms, (*ALGORITHMS, *REDUCED)),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise LowRankError(f"{kind}={list(given)}: choose among {', '.join(known)}")
        if not self.max_drop >= 0:
            raise LowRankError(f"max_drop is {self.max_drop}; give points, 0 or more")
        if self.trials < 1:
            raise LowRankError(f"trials is {self.trials}; give 1 or more")
        if self.max_weight_bytes is not None and self.max_weight_bytes < 1:
            raise LowRankError(f"max_weight_bytes is {self.max_weight_bytes}; give 1 or more")
        if not 0 <= self.recover < math.inf:
            raise LowRankError(f"recover is {self.recover}; give minutes, 0 or more")
        if self.metaschedule_trials < 0:
            raise LowRankError(f"metaschedule_trials is {self.metaschedule_trials}; give 0 or more")

    @property
    def lossy(self) -> list[str]:
        """The allowed forms that approximate."""
        return [name for name in self.forms if name != "dense"]

    @property
    def lossless(self) -> bool:
        """Whether every convolution is to stay dense."""
        return not self.lossy
