"""The trees of the cost model as a file: versioned JSON, refused where it does not fit."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.model import AnalyticModel, features
from tvm_lowrank.errors import LowRankError
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.schedules.family import Machine
from tvm_lowrank.schedules.kernels import ALGORITHMS, FAMILIES, REDUCED, spaces
from tvm_lowrank.schedules.machine import widest
from tvm_lowrank.schedules.x86.workload import ConvWorkload

FORMAT = 1
FILE = "cost_model.json"
_PROBES = (
    ConvGeometry(64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1)),
    ConvGeometry(64, 64, 28, 28, (3, 3), padding=(1, 1, 1, 1), groups=64),
    ConvGeometry(64, 64, 1, 1, (1, 1), batch=16),
)


@functools.lru_cache(maxsize=8)
def signature(isa: Machine) -> dict[str, list[str]]:
    """The families of kernels of this version with the fields of their schedules."""
    return {family: sorted(schedule) for family, (_, schedule) in _samples(isa).items()}


def expected(isa: Machine, known: Collection[str]) -> dict[str, list[str]]:
    """What of `signature` a model must have that knows some families.

    Those that round are measured only where they are asked for, so it may lack them.
    """
    return {
        family: fields
        for family, fields in signature(isa).items()
        if family in known or FAMILIES[family].algorithm not in REDUCED
    }


def feature_names(isa: Machine, families: Collection[str]) -> frozenset[str]:
    """The features that this version makes of families; of those for a word only the name."""
    counted = AnalyticModel(Roofline(1.0, 1.0), isa, 1)
    found = [
        features(workload, schedule, counted)
        for family, (workload, schedule) in _samples(isa).items()
        if family in families
    ]
    return frozenset(_plain(name) for names in found for name in names)


@functools.lru_cache(maxsize=8)
def _samples(isa: Machine) -> dict[str, tuple[ConvWorkload, dict[str, Any]]]:
    """A kernel of each family: its workload and its schedule as JSON values."""
    found = {}
    for geometry in _PROBES:
        workload = ConvWorkload(geometry, isa.block, ("bias",))
        for family, space in spaces(workload, widest(isa), (*ALGORITHMS, *REDUCED)).items():
            found[family] = (workload, space[0].to_json())
    return found


def _plain(name: str) -> str:
    """A feature's name without the word that it stands for."""
    return name.partition("=")[0]


@dataclass
class Trees:
    """A trained model of one instruction set.

    The trees predict the logarithm of a time over what `AnalyticModel` gives for the machine; an
    offset for each place that measured calibrates them.

    Attributes
    ----------
    isa : str
    names : list of str
        Features in the order of the trees' columns.
    families : dict
        The kernels it was trained on, as `signature` gives them.
    offsets : dict
        Place as text to what is added to the logarithm predicted there.
    counts : dict
        Place as text to the rows behind its offset.
    rows, first_rows : int
        Rows trained on, and of them at the last training from scratch.
    """

    isa: str
    names: list[str]
    families: dict[str, list[str]]
    offsets: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    first_rows: int = 0
    booster: Any = None

    def check(self, isa: Machine, origin: str = "the cost model") -> None:
        """Raise LowRankError, one sentence, if it was trained for other kernels or features."""
        now = expected(isa, self.families)
        differ = sorted(
            family
            for family in {*now, *self.families}
            if now.get(family) != self.families.get(family)
        )
        if self.isa != isa.name or differ:
            what = ", ".join(differ) or self.isa
            raise LowRankError(
                f"{origin} does not fit this version's kernels ({what} differ); "
                "train it again with python -m tvm_lowrank.tune --survey"
            )
        names = feature_names(isa, self.families)
        unlike = sorted(names.symmetric_difference(map(_plain, self.names)))
        if unlike:
            raise LowRankError(
                f"{origin} does not fit this version's features ({', '.join(unlike)} differ); "
                "train it again with python -m tvm_lowrank.tune --survey"
            )

    def save(self, path: Path) -> None:
        """Write JSON; an older file is replaced only by a complete one.

        Raises
        ------
        LowRankError
            The file cannot be written.
        """
        data = {
            "format": FORMAT,
            "isa": self.isa,
            "names": self.names,
            "families": self.families,
            "offsets": {place: round(value, 5) for place, value in sorted(self.offsets.items())},
            "counts": self.counts,
            "rows": self.rows,
            "first_rows": self.first_rows,
            "trees": json.loads(bytes(self.booster.save_raw("json"))),
        }
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            scratch.write_text(json.dumps(data, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise LowRankError(f"cost model {path} cannot be written ({error})") from error

    @classmethod
    def load(cls, path: Path, isa: Machine) -> Trees:
        """Read what `save` wrote.

        Raises
        ------
        LowRankError
            The file cannot be read, or holds a model of another version or of other kernels.
        """
        import xgboost

        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, expected {FORMAT}")
            booster = xgboost.Booster()
            booster.load_model(bytearray(json.dumps(data["trees"]).encode()))
            names = ("isa", "names", "families", "offsets", "counts", "rows", "first_rows")
            made = cls(**{name: data[name] for name in names}, booster=booster)
            if booster.num_features() != len(made.names):
                raise ValueError(f"{booster.num_features()} features, {len(made.names)} names")
        except (OSError, ValueError, KeyError, TypeError, xgboost.core.XGBoostError) as error:
            raise LowRankError(
                f"cost model {path} cannot be used ({str(error).splitlines()[0]}); delete it, or "
                "train it again with python -m tvm_lowrank.tune --survey"
            ) from error
        made.check(isa, f"cost model {path}")
        return made


def find(folder: Path | None, isa: Machine) -> tuple[Trees | None, str]:
    """The trees in a folder, else those that ship with the package, and a complaint.

    A file that cannot be used is passed over, with the reason as complaint.
    """
    complaint = ""
    shipped = Path(str(files("tvm_lowrank.tuning_logs"))) / isa.name / FILE
    for path in (*([folder / FILE] if folder else []), shipped):
        if path.is_file():
            try:
                return Trees.load(path, isa), complaint
            except LowRankError as error:
                complaint = complaint or str(error)
    return None, complaint
