"""What a plan says of one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm_lowrank.decompose.form import Rank
from tvm_lowrank.geometry import ConvGeometry


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution or fully connected layer.

    ``dense_us`` and ``measured_us`` are the measured times of the layer's kernels before and after,
    ``error`` the share of its output variance lost on the data; ``reason`` says why a layer is left
    as it is. ``algorithms`` has one entry a stage; ``weight_bytes`` are those of all
    stages' weights as their kernels keep them, padded and transformed. ``refitted`` marks a dense
    layer whose weights make up for errors of the layers before it. ``fitted`` says what the factors
    were fitted to: "data", or "weights" alone; None for a dense layer.
    """

    name: str
    geometry: ConvGeometry | None
    form: str = "dense"
    rank: Rank = 0
    stages: tuple[ConvGeometry, ...] = ()
    algorithms: tuple[str, ...] = ()
    error: float = 0.0
    dense_us: float | None = None
    predicted_us: float | None = None
    measured_us: float | None = None
    weight_bytes: int | None = None
    fitted: str | None = None
    reason: str | None = None
    refitted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = asdict(self)
        data["geometry"] = self.geometry.to_json() if self.geometry else None
        data["stages"] = [stage.to_json() for stage in self.stages]
        data["rank"] = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        data["algorithms"] = list(self.algorithms)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerPlan:
        """Inverse of `to_json`."""
        data = dict(data)
        geometry, rank = data["geometry"], data["rank"]
        data["geometry"] = ConvGeometry.from_json(geometry) if geometry else None
        data["stages"] = tuple(ConvGeometry.from_json(stage) for stage in data["stages"])
        data["rank"] = tuple(rank) if isinstance(rank, list) else rank
        data["algorithms"] = tuple(data["algorithms"])
        return cls(**data)
