"""Decompositions of convolution weights in NumPy: one file a form, one registry."""

from tvm_lowrank.decompose.cp import CP, CP3, cp, cp3, greedy_cp
from tvm_lowrank.decompose.form import Fitter, Form, Rank
from tvm_lowrank.decompose.linear_combination import LinearCombination, linear_combination
from tvm_lowrank.decompose.moments import (
    InputMoments,
    MomentAccumulator,
    PatchSampler,
    bias_correction,
    relative_error,
)
from tvm_lowrank.decompose.separable import Separable, separable
from tvm_lowrank.decompose.tucker2 import Tucker2, tucker2

# A new form is one file and one line here.
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        LinearCombination(),
        Separable(),
        Tucker2(),
        CP(),
        CP3(),
    )
}

__all__ = [
    "CP",
    "CP3",
    "FORMS",
    "Fitter",
    "Form",
    "InputMoments",
    "MomentAccumulator",
    "PatchSampler",
    "Rank",
    "bias_correction",
    "cp",
    "cp3",
    "greedy_cp",
    "linear_combination",
    "relative_error",
    "separable",
    "tucker2",
]
