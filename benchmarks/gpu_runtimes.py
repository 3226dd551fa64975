"""Networks and convolutions on a GPU: milliseconds of single runs, by CUDA events."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Of networks and layers, with what rows say of them.
PRECISIONS = {"float32": "float32", "tf32": "TF32", "half": "float16"}
RUNS = 50
_WARM_UP = 10
# Convolutions of a CUDA graph, when one layer is timed.
_IN_A_ROW = 10


def ours(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """A library of ours, by TVM's evaluator, which records events around each run."""
    import tvm

    return _of_tvm(tvm.runtime.load_module(path), shape, "float32")


def tvm_libraries(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Stock TVM with convolutions by cuDNN and products by cuBLAS, in a TVM that was built so.

    RuntimeError names the libraries that this TVM cannot call.
    """
    require_libraries()
    from tvm import relax
    from tvm.relax.backend.cuda.cublas import partition_for_cublas
    from tvm.relax.backend.cuda.cudnn import partition_for_cudnn
    from tvm_lowrank.passes.pipeline import normalise

    from tvm_lowrank.build import compile_module
    from tvm_lowrank.frontend import load_model
    from tvm_lowrank.target import parse_target

    mod = partition_for_cublas(partition_for_cudnn(normalise(load_model(path, shape[0]))))
    executable = compile_module(relax.transform.RunCodegen()(mod), parse_target("cuda"))
    return _of_tvm(executable, shape, "float32, cuDNN and cuBLAS")


def require_libraries() -> None:
    """RuntimeError if TVM was built without cuDNN or cuBLAS."""
    import tvm  # noqa: F401  (registers what it was built with)
    import tvm_ffi

    missing = [
        label
        for label in ("cuDNN", "cuBLAS")
        if tvm_ffi.get_global_func(f"relax.ext.{label.lower()}", allow_missing=True) is None
    ]
    if missing:
        switches = ", ".join(f"USE_{label.upper()}=ON" for label in missing)
        raise RuntimeError(
            f"this TVM was built without {' and '.join(missing)}; build it from source ({switches})"
        )


def _of_tvm(library: Any, shape: tuple[int, ...], about: str) -> dict[str, Any]:
    import tvm
    from tvm.runtime import vm

    device = tvm.cuda()
    machine = vm.VirtualMachine(library, [device, tvm.cpu()])
    x = tvm.runtime.tensor(_noise(shape), device)
    output = machine["main"](x).numpy()
    machine.time_evaluator("main", device, number=1, repeat=_WARM_UP)(x)
    result = machine.time_evaluator("main", device, number=1, repeat=RUNS)(x)
    times = [1e3 * seconds for seconds in result.results]
    return _answer(times, f"TVM {tvm.__version__}, {about}", output)


def torch_variant(
    path: str, shape: tuple[int, ...], precision: str, channels_last: bool, compiled: bool
) -> dict[str, Any]:
    """PyTorch with cuDNN's own choice of algorithms by measurement.

    ``precision`` is one of `PRECISIONS`. In float16 the input is, too.
    """
    import torch
    from torch_model import load_torch

    _use(precision)
    dtype = torch.float16 if precision == "half" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = load_torch(path).cuda().to(dtype, memory_format=layout)
    if compiled:
        model = torch.compile(model, mode="max-autotune")
    x = torch.from_numpy(_noise(shape)).cuda().to(dtype, memory_format=layout)
    with torch.inference_mode():
        output = model(x).float().cpu().numpy()
        times = _events(lambda: model(x))
    parts = [f"PyTorch {torch.__version__}", PRECISIONS[precision]]
    parts += ["channels last"] * channels_last + ["torch.compile"] * compiled
    return _answer(times, ", ".join(parts), output)


def onnxruntime_cuda(path: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider, inputs and outputs on the GPU, by the clock around each run."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("this ONNX Runtime has no CUDA provider")
    session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    x = onnxruntime.OrtValue.ortvalue_from_numpy(_noise(shape), "cuda", 0)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, x)
    binding.bind_output(session.get_outputs()[0].name, "cuda")
    times = []
    for _ in range(_WARM_UP + RUNS):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append(1e3 * (time.perf_counter() - start))
    output = binding.copy_outputs_to_cpu()[0]
    return _answer(times[_WARM_UP:], f"ONNX Runtime {onnxruntime.__version__}, float32", output)


# Name to what runs it: a file of the network, or for ours the library.
VARIANTS: dict[str, Callable[[str, tuple[int, ...]], dict[str, Any]]] = {
    "tvm_lowrank": ours,
    "tvm-cudnn-cublas": tvm_libraries,
    "torch": lambda path, shape: torch_variant(path, shape, "float32", False, False),
    "torch-tf32": lambda path, shape: torch_variant(path, shape, "tf32", False, False),
    "torch-channels-last": lambda path, shape: torch_variant(path, shape, "float32", True, False),
    "torch-tf32-channels-last": lambda path, shape: torch_variant(path, shape, "tf32", True, False),
    "torch-half-channels-last": lambda path, shape: torch_variant(path, shape, "half", True, False),
    "torch-compile": lambda path, shape: torch_variant(path, shape, "float32", False, True),
    "torch-compile-tf32": lambda path, shape: torch_variant(path, shape, "tf32", False, True),
    "torch-compile-tf32-channels-last": lambda path, shape: torch_variant(
        path, shape, "tf32", True, True
    ),
    "torch-compile-half-channels-last": lambda path, shape: torch_variant(
        path, shape, "half", True, True
    ),
    "onnxruntime-cuda": onnxruntime_cuda,
}


def cudnn_layer(
    geometry: Mapping[str, Any], precision: str = "float32", channels_last: bool = False
) -> float:
    """Median microseconds of one convolution by cuDNN, without bias or activation.

    Convolutions follow each other in a CUDA graph, so PyTorch's own work is not in the time.
    """
    import torch

    _use(precision)
    dtype = torch.float16 if precision == "half" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    top, left, bottom, right = geometry["padding"]
    if (top, left) != (bottom, right):
        raise ValueError("cuDNN pads both sides alike")
    g = geometry
    x = torch.randn(g["batch"], g["in_channels"], g["height"], g["width"], device="cuda")
    x = x.to(dtype, memory_format=layout)
    shape = (g["out_channels"], g["in_channels"] // g["groups"], *g["kernel"])
    weight = torch.randn(shape, device="cuda").to(dtype, memory_format=layout)
    options = {"padding": (top, left), "groups": g["groups"]}
    options |= {"stride": tuple(g["stride"]), "dilation": tuple(g["dilation"])}
    with torch.inference_mode():
        # Algorithms are tried before the capture.
        torch.nn.functional.conv2d(x, weight, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_IN_A_ROW):
                torch.nn.functional.conv2d(x, weight, **options)
        times = _events(graph.replay)
    return 1e3 * statistics.median(times) / _IN_A_ROW


def _use(precision: str) -> None:
    import torch

    enabled = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = enabled


def _events(run: Callable[[], Any]) -> list[float]:
    """Milliseconds of single runs between two events on the current stream."""
    import torch

    for _ in range(_WARM_UP):
        run()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _answer(times: list[float], about: str, output: np.ndarray) -> dict[str, Any]:
    return {
        "median_ms": statistics.median(times),
        "minimum_ms": min(times),
        "about": about,
        "output": output.astype(float).reshape(-1)[:1000].tolist(),
    }


if __name__ == "__main__":
    # The process of one variant: its name, the file, the shape as JSON.
    print(json.dumps(VARIANTS[sys.argv[1]](sys.argv[2], tuple(json.loads(sys.argv[3])))))
