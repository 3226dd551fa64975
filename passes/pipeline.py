"""The one place where passes are put in order."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax
from tvm_lowrank.passes.factor_convolutions import Chain, FactorConvolutions
from tvm_lowrank.passes.factor_matmuls import FactorMatmuls, Factors
from tvm_lowrank.passes.fold_affine import FoldAffine
from tvm_lowrank.passes.fold_pads import FoldPads
from tvm_lowrank.passes.raise_operators import RaiseOperators

from tvm_lowrank.layer import is_fully_connected


def normalise(mod: tvm.IRModule) -> tvm.IRModule:
    """Phase 1: one shape for every network, whatever front end it came from.

    Batch norm is decomposed and folded, expressions of constants are evaluated, pads join what
    reads them, tuples and dead code go; ``main`` is left as one dataflow block of conv2d + bias and
    plain operators.
    """
    return tvm.ir.transform.Sequential(
        [
            relax.transform.DecomposeOpsForInference("main"),
            relax.transform.CanonicalizeBindings(),
            relax.transform.FoldConstant(),
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(["main"]),
            relax.transform.ConvertToDataflow(),
            RaiseOperators(),
            FoldPads(),
            FoldAffine(),
        ]
    )(mod)


def factor(mod: tvm.IRModule, chains: Mapping[str, Chain]) -> tvm.IRModule:
    """Phase 2: a normalised module with the named layers written as chains."""
    matmuls = {
        name: Factors.of_stages(chain.weights, chain.bias)
        for name, chain in chains.items()
        if is_fully_connected(name)
    }
    convolutions = {name: chain for name, chain in chains.items() if name not in matmuls}
    mod = FactorConvolutions(convolutions)(mod)
    return FactorMatmuls(matmuls)(mod) if matmuls else mod
