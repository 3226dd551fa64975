"""Reading a trained network: an ONNX file, an exported PyTorch program or a Relax module."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

from tvm_lowrank.errors import LowRankError
from tvm_lowrank.passes.graph import constant_array, is_constant


def load_model(model: Any, batch: int = 1) -> tvm.IRModule:
    """Import a trained network as a Relax module with its weights as constants.

    Parameters
    ----------
    model : str, Path, onnx.ModelProto, torch.export.ExportedProgram or tvm.IRModule
        A path is read by its suffix: ``.onnx``, or ``.pt2`` for a saved exported program (which
        needs the ``torch`` extra).
    batch : int
        Extent given to dynamic dimensions.

    Returns
    -------
    tvm.IRModule
        With a function ``main`` whose parameters are the network's inputs.

    Raises
    ------
    LowRankError
        The file is missing, damaged, or holds operators that TVM does not import; a weight is
        NaN or infinite; an IRModule has no ``main``.
    """
    if batch < 1:
        raise LowRankError(f"batch is {batch}; give a positive number of samples")
    if isinstance(model, tvm.IRModule):
        mod = model
    elif isinstance(model, onnx.ModelProto):
        mod = _from_onnx(model, batch, "the ONNX model")
    elif isinstance(model, str | Path):
        mod = _from_path(Path(model), batch)
    else:
        mod = _from_exported(model)
    if "main" not in [gvar.name_hint for gvar in mod.get_global_vars()]:
        raise LowRankError("the module has no function 'main'; name the network's function so")
    mod = _bind_dynamic(mod, batch)
    _refuse_bad_constants(mod)
    return mod


def _from_path(path: Path, batch: int) -> tvm.IRModule:
    if not path.is_file():
        raise LowRankError(f"model file {path} does not exist; give an .onnx or a .pt2 file")
    if path.suffix == ".pt2":
        try:
            import torch
        except ImportError as error:
            raise LowRankError(
                f"{path} is a PyTorch program; install the extra: pip install tvm-lowrank[torch]"
            ) from error
        try:
            program = torch.export.load(path)
        except Exception as error:
            raise LowRankError(
                f"{path} is not a readable exported program ({_first_line(error)}); "
                "write it again with torch.export.save"
            ) from error
        return _from_exported(program)
    if path.suffix != ".onnx":
        raise LowRankError(f"{path} has an unknown suffix; give an .onnx or a .pt2 file")
    try:
        proto = onnx.load(str(path))
        onnx.checker.check_model(proto)
    except Exception as error:
        raise LowRankError(
            f"{path} is not a valid ONNX file ({_first_line(error)}); export or copy it again"
        ) from error
    return _from_onnx(proto, batch, str(path))


def _from_onnx(proto: onnx.ModelProto, batch: int, where: str) -> tvm.IRModule:
    import onnxslim
    from tvm.relax.frontend.onnx import from_onnx

    weights = {tensor.name for tensor in proto.graph.initializer}
    shapes = {
        value.name: [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.input
        if value.name not in weights
    }
    quiet = logging.getLogger("tvm")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        # Pads and shapes that an exporter computes from constants must be constants for TVM.
        simple = onnxslim.slim(proto)
        _refuse_uneven_scales(simple, where)
        return from_onnx(simple, shape_dict=shapes, keep_params_in_input=False)
    except LowRankError:
        raise
    except Exception as error:
        raise LowRankError(
            f"{where} cannot be imported by TVM ({_first_line(error)}); "
            "replace the operator it names or export with another opset"
        ) from error
    finally:
        quiet.setLevel(level)


def _refuse_uneven_scales(model: onnx.ModelProto, where: str) -> None:
    """Raise for what is resized by a factor to no whole number of pixels.

    TVM keeps the sizes alone, of which another factor follows than the one that is given.
    """
    resizing = [node for node in model.graph.node if node.op_type in ("Resize", "Upsample")]
    if not resizing:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
    }
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in resizing:
        corners = any(attribute.s == b"align_corners" for attribute in node.attribute)
        given = [onnx.numpy_helper.to_array(tensors[x]) for x in node.input[1:3] if x in tensors]
        for scales in (array for array in given if array.size == 4 and not corners):
            sizes = shapes.get(node.input[0], [])
            _refuse_scales(node.name or node.op_type, sizes[2:], list(scales[2:]), where)


def _refuse_uneven_factors(program: Any) -> None:
    """The same of an exported program's interpolation by a factor."""
    for node in program.graph_module.graph.nodes:
        scales = node.args[-1] if node.name.startswith("upsample_") else None
        known = getattr(node.args[0], "meta", {}).get("val") if scales is not None else None
        corners = any(argument is True for argument in node.args)
        if isinstance(scales, list | tuple) and known is not None and not corners:
            _refuse_scales(node.name, list(known.shape)[2:], list(scales), "the exported program")


def _refuse_scales(name: str, sizes: list[int], scales: list[float], where: str) -> None:
    for size, scale in zip(sizes, scales, strict=False):
        if abs(size * scale - round(size * scale)) > 1e-3:
            raise LowRankError(
                f"{where}: {name} makes {size} pixels {scale:g} times as many, no whole number, "
                "and TVM would take another factor; export it with the size that it makes"
            )


def _from_exported(program: Any) -> tvm.IRModule:
    if not hasattr(program, "graph_module"):
        raise LowRankError(
            f"a {type(program).__name__} is not a model; give an ONNX file or model, "
            "a torch.export.ExportedProgram or a tvm.IRModule"
        )
    from tvm.relax.frontend.torch import from_exported_program

    _refuse_uneven_factors(program)
    try:
        return from_exported_program(program, unwrap_unit_return_tuple=True)
    except Exception as error:
        raise LowRankError(
            f"the exported program cannot be imported by TVM ({_first_line(error)}); "
            "replace the operator it names"
        ) from error


def _bind_dynamic(mod: tvm.IRModule, batch: int) -> tvm.IRModule:
    symbols = {
        extent.name: batch
        for param in mod["main"].params
        if isinstance(param.ty, relax.TensorType) and param.ty.shape is not None
        for extent in param.ty.shape
        if hasattr(extent, "name")
    }
    return relax.transform.BindSymbolicVars(symbols, "main")(mod) if symbols else mod


def _refuse_bad_constants(mod: tvm.IRModule) -> None:
    arrays: list[np.ndarray] = []

    def visit(expr: Any) -> None:
        if is_constant(expr):
            arrays.append(constant_array(expr))

    relax.analysis.post_order_visit(mod["main"], visit)
    for index, data in enumerate(arrays, start=1):
        # A single infinity is a bound (of a clip, a mask, a maximum) and no weight.
        if (
            data.dtype.kind == "f"
            and not (np.isfinite(data) | (data.size == 1) & np.isinf(data)).all()
        ):
            raise LowRankError(
                f"weight number {index} of the model, shape {data.shape}, holds NaN or infinite "
                "values; the network is damaged or was saved after training diverged"
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
