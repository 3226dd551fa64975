"""The plugin inside TVM's own machinery: a pass and a pipeline."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvm_lowrank.api import plan as make_plan
from tvm_lowrank.plan import Plan
from tvm_lowrank.target import host_target


@tvm.transform.module_pass(opt_level=0, name="LowRank")
class LowRank:
    """`tvm_lowrank.transform` as a pass for ``tvm.ir.transform.Sequential``.

    Parameters
    ----------
    plan : Plan, optional
        Replayed without searching; without it a plan is made for each module the pass meets.
    **options
        Of `tvm_lowrank.plan`, used without a plan. The target defaults to the current one
        (``with target:``), else this machine.
    """

    def __init__(self, plan: Plan | None = None, **options: Any) -> None:
        self.plan = plan
        self.options = options

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Rewrite the module."""
        if self.plan is not None:
            return self.plan.apply(mod)
        options = dict(self.options)
        options.setdefault("target", tvm.target.Target.current(allow_none=True))
        return make_plan(mod, **options).apply(mod)


@relax.register_pipeline("lowrank")
def lowrank_pipeline(plan: Plan | None = None, **options: Any) -> tvm.transform.Pass:
    """``tvm.compile(mod, target, relax_pipeline=relax.get_pipeline("lowrank", plan=plan))``.

    `LowRank`, followed by TVM's default pipeline for the current target.
    """

    @tvm.transform.module_pass(opt_level=0, name="lowrank_pipeline")
    def run(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        target = tvm.target.Target.current(allow_none=True) or host_target()
        mod = tvm.ir.transform.Sequential([LowRank(plan, **options)])(mod)
        return relax.pipeline.get_default_pipeline(target)(mod)

    return run
