"""Decompositions of convolution weights in NumPy: one file a form, one registry."""

from tvm_lowrank.decompose.bicluster import Bicluster, BiclusterSeparable, bicluster_cp
from tvm_lowrank.decompose.channels import bicluster
from tvm_lowrank.decompose.clustering import k_subspaces
from tvm_lowrank.decompose.cp import CP, CP3, cp, cp3, greedy_cp
from tvm_lowrank.decompose.form import Branch, Fitter, Form, Rank
from tvm_lowrank.decompose.grouped import Grouped
from tvm_lowrank.decompose.linear_combination import LinearCombination, linear_combination
from tvm_lowrank.decompose.moments import (
    InputMoments,
    MomentAccumulator,
    PatchSampler,
    bias_correction,
    relative_error,
)
from tvm_lowrank.decompose.monochromatic import (
    Monochromatic,
    MonochromaticSeparable,
    monochromatic,
)
from tvm_lowrank.decompose.multiresolution import MultiResolution, multiresolution
from tvm_lowrank.decompose.separable import Separable, separable
from tvm_lowrank.decompose.shared_factor import SharedFactor, shared_factor
from tvm_lowrank.decompose.svd import SVD, svd
from tvm_lowrank.decompose.tensor_train import TensorTrain, partition, tensor_train
from tvm_lowrank.decompose.tucker2 import Tucker2, tucker2

# A new form is one file and one line here.
FORMS: dict[str, Form] = {
    form.name: Grouped(form)
    for form in (
        LinearCombination(),
        Separable(),
        Tucker2(),
        CP(),
        CP3(),
        TensorTrain(),
        Monochromatic(),
        MonochromaticSeparable(),
        Bicluster(),
        BiclusterSeparable(),
        SharedFactor(),
        MultiResolution(),
        SVD(),
    )
}

__all__ = [
    "CP",
    "CP3",
    "FORMS",
    "SVD",
    "Bicluster",
    "Branch",
    "Fitter",
    "Form",
    "InputMoments",
    "MomentAccumulator",
    "MultiResolution",
    "PatchSampler",
    "Rank",
    "bias_correction",
    "bicluster",
    "bicluster_cp",
    "cp",
    "cp3",
    "greedy_cp",
    "k_subspaces",
    "linear_combination",
    "monochromatic",
    "multiresolution",
    "partition",
    "relative_error",
    "separable",
    "shared_factor",
    "svd",
    "tensor_train",
    "tucker2",
]
