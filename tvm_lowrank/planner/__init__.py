"""The search for the fastest network inside the accuracy budget; `search` runs its steps in order.

`candidates` says what each layer may become, `calibrate` what the data says about layers, `trial`
tries weights without compiling, `allocate` picks one candidate a layer, `refit` fits those again in
sequence, `curve` walks from slow and exact to fast and approximate, `verify` judges libraries.
"""

from tvm_lowrank.planner.options import Options
from tvm_lowrank.planner.search import search
from tvm_lowrank.schedules.kernels import ALGORITHMS

__all__ = ["ALGORITHMS", "Options", "search"]
