"""Trained CNNs rewritten into cheaper networks for Apache TVM, and measured to be faster."""

from __future__ import annotations

from pathlib import Path

from tvm_lowrank._check import check_versions
from tvm_lowrank.threads import let_blas_rest

check_versions()
let_blas_rest()

# In a checkout the folders of `tvm_lowrank.passes` and `.schedules` stand beside this one; Python
# run from there finds this folder before any installed copy.
_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))

from tvm_lowrank.api import compile, plan, transform  # noqa: E402
from tvm_lowrank.deploy import Network, load  # noqa: E402
from tvm_lowrank.errors import LowRankError  # noqa: E402
from tvm_lowrank.layer_plan import LayerPlan  # noqa: E402
from tvm_lowrank.pipeline import LowRank  # noqa: E402
from tvm_lowrank.plan import Plan  # noqa: E402
from tvm_lowrank.target import host_target  # noqa: E402

__all__ = [
    "LayerPlan",
    "LowRank",
    "LowRankError",
    "Network",
    "Plan",
    "compile",
    "host_target",
    "load",
    "plan",
    "transform",
]
__version__ = "0.1.0"
