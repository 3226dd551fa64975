"""One loader for each runtime that networks are compared in."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Runtime:
    """A network loaded by a runtime.

    ``bind`` puts an input in place and gives the function that runs the network once on it;
    ``output`` makes an array of what that function returns. ``about`` says in words which version
    runs, in which precision and on how many threads.
    """

    bind: Callable[[np.ndarray], Callable[[], Any]]
    output: Callable[[Any], np.ndarray]
    about: str


# What lasts as long as the process, which is of one runtime.
_FOR_GOOD = ExitStack()


def load_tvm(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """A library that TVM exported, its caller kept apart from TVM's own threads."""
    import tvm

    from tvm_lowrank import load
    from tvm_lowrank.threads import apart_from_pool

    network = load(path, threads)

    def bind(x: np.ndarray) -> Callable[[], Any]:
        tensors = [network.tensor(x)]
        network.call(tensors)  # starts the pool
        _FOR_GOOD.enter_context(apart_from_pool())
        return lambda: network.call(tensors)

    used = int(tvm.get_global_func("runtime.NumThreads")())
    about = f"TVM {tvm.__version__}, f32, {used} threads, caller apart from the pool"
    return Runtime(bind, lambda y: y.numpy(), about)


def load_onnxruntime(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """ONNX Runtime's CPU provider with all its graph optimisations (its default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def bind(x: np.ndarray) -> Callable[[], Any]:
        feed = {name: x}
        return lambda: session.run(None, feed)

    used = session.get_session_options().intra_op_num_threads
    about = f"ONNX Runtime {onnxruntime.__version__}, f32, {used} threads"
    return Runtime(bind, lambda outputs: outputs[0], about)


def load_openvino(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """OpenVINO for latency, in float32."""
    return _openvino(path, shape, threads, {"INFERENCE_PRECISION_HINT": "f32"})


def load_openvino_default(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """OpenVINO for latency, in the precision that it chooses itself (bfloat16 where it is fast)."""
    return _openvino(path, shape, threads, {})


def _openvino(
    path: str, shape: tuple[int, ...], threads: int, precision: dict[str, str]
) -> Runtime:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(shape)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **precision}
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()

    def bind(x: np.ndarray) -> Callable[[], Any]:
        return lambda: request.infer([x], share_inputs=True, share_outputs=True)

    name = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    used = compiled.get_property("INFERENCE_NUM_THREADS")
    version = openvino.__version__.split("-")[0]
    about = f"OpenVINO {version}, {name}, {used} threads"
    return Runtime(bind, lambda outputs: np.array(outputs[0]), about)


def load_torch_eager(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """PyTorch, batch norm folded, in the faster of its memory formats."""
    return _torch(path, shape, threads, compiled=False)


def load_torch_compile(path: str, shape: tuple[int, ...], threads: int) -> Runtime:
    """PyTorch through ``torch.compile`` with frozen weights, in the faster memory format."""
    os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    return _torch(path, shape, threads, compiled=True)


def _torch(path: str, shape: tuple[int, ...], threads: int, compiled: bool) -> Runtime:
    import torch
    from torch_model import load_torch

    torch.set_num_threads(threads)
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    found: list[tuple[float, str, Callable[[np.ndarray], Callable[[], Any]]]] = []
    for name, memory_format in formats.items() if len(shape) == 4 else [("contiguous", None)]:
        model: Any = load_torch(path)
        if memory_format is not None:
            model = model.to(memory_format=memory_format)
        if compiled:
            model = torch.compile(model)

        def bind(
            x: np.ndarray, model: Any = model, memory_format: Any = memory_format
        ) -> Callable[[], Any]:
            tensor = torch.from_numpy(x)
            if memory_format is not None:
                tensor = tensor.contiguous(memory_format=memory_format)

            def run() -> Any:
                with torch.inference_mode(not compiled), torch.no_grad():
                    return model(tensor)

            return run

        found.append((_median(bind(np.zeros(shape, np.float32))), name, bind))
        torch.compiler.reset()
    _, name, bind = min(found, key=lambda entry: entry[0])
    about = f"PyTorch {torch.__version__}, f32, {torch.get_num_threads()} threads, {name}"
    return Runtime(bind, lambda y: y.numpy(), about)


def _median(run: Callable[[], Any], runs: int = 5) -> float:
    run()
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


LOADERS: dict[str, Callable[[str, tuple[int, ...], int], Runtime]] = {
    "tvm": load_tvm,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "openvino-default": load_openvino_default,
    "torch": load_torch_eager,
    "torch-compile": load_torch_compile,
}
