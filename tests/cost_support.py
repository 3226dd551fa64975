"""Layers, timers and invented times that the tests of tuning, surveys and the cost model share."""

from __future__ import annotations

import json

from tuner_support import Invented
from tvm_lowrank.schedules.x86.isa import AVX512
from tvm_lowrank.schedules.x86.workload import ConvWorkload

from tvm_lowrank.cost.analytic import Roofline
from tvm_lowrank.cost.measure import KernelTimer
from tvm_lowrank.cost.model import AnalyticModel
from tvm_lowrank.geometry import ConvGeometry
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.target import parse_target

ROOFLINE = Roofline(200.0, 20.0)


def layer(channels=64, size=28, kernel=3, groups=1):
    pad = (kernel // 2,) * 4
    geometry = ConvGeometry(
        channels, channels, size, size, (kernel, kernel), padding=pad, groups=groups
    )
    return ConvWorkload(geometry, 16, ("bias", "relu"))


LAYERS = [layer(c, s, k) for c in (32, 64, 128) for s in (7, 14, 28) for k in (1, 3, 5)]
LAYERS += [layer(64, size, 3, groups=64) for size in (14, 28)]
LAYERS += [
    ConvWorkload(ConvGeometry(256, 512, 1, 1, (1, 1), batch=batch), 16, ("bias",))
    for batch in (4, 16)
]


def invented(key, schedule):
    """Times as no count knows: one kernel family is six times, single vectors twice as slow."""
    model = AnalyticModel(ROOFLINE, AVX512, 2)
    work = ConvWorkload.from_json(json.loads(key))
    factor = 6.0 if schedule["kernel"] == "winograd" else 1.0
    factor *= 2.0 if schedule.get("vectors") == 1 else 1.0
    return factor * float(model.predict(work, [schedule])[0])


class Counted:
    """A worker with invented times."""

    def __init__(self, most=10**9):
        self.asked, self.most = 0, most

    def ask(self, request):
        if self.asked >= self.most:
            raise KeyboardInterrupt
        self.asked += 1
        key = ConvWorkload.from_json(request["workload"]).key()
        return {"us": invented(key, request["schedule"]), "spread": 0.0}


def workload(channels=32, size=16, kernel=3, epilogue=("bias", "relu")):
    pad = (kernel // 2,) * 4
    geometry = ConvGeometry(channels, 64, size, size, (kernel, kernel), padding=pad)
    return ConvWorkload(geometry, 16, epilogue)


def timer(records=None, **options):
    target = parse_target("llvm:skylake-avx512")
    if records is None:
        records = TuningRecords(None, "avx512", 2)
    options = {"worker": Invented(), "algorithms": ("direct",), **options}
    return KernelTimer(target, records, **options)
