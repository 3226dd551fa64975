"""What the command lines share: the networks asked for, and one sentence when that fails."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import onnx
from zoo import NETWORKS, network_file


class BadInput(Exception):
    """What was asked for cannot be done; the message says why."""


class Parser(argparse.ArgumentParser):
    """Raises `BadInput` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise BadInput(message)


@dataclass(frozen=True)
class Case:
    """A network's file for one batch, and the shape of its input."""

    name: str
    batch: int
    path: Path
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"


def names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names of a comma-separated option; BadInput if there are none or unknown ones."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found or not set(found) <= set(known):
        raise BadInput(f"{option} {text!r}: choose among {', '.join(known)}")
    return found


def check_positive(args: argparse.Namespace, *options: str) -> None:
    """BadInput unless each option is a positive number."""
    for option in options:
        value = getattr(args, option)
        if not value > 0:
            raise BadInput(f"--{option.replace('_', '-')} is {value}; give a positive number")


def check_folder(path: Path | None) -> None:
    """BadInput unless a file can be written at ``path`` (or it is None)."""
    if path is not None and not path.resolve().parent.is_dir():
        raise BadInput(f"the folder of {path} does not exist")


def find_case(name: str, batch: int) -> Case:
    """A network of the zoo by its name, or an ONNX file by its path.

    Raises BadInput if there is none, or if it cannot be run with one input of this batch.
    """
    if batch < 1:
        raise BadInput(f"--batch is {batch}; give a positive number of samples")
    if name in NETWORKS:
        graph, _ = NETWORKS[name](batch)
        return Case(name, batch, network_file(name, batch), (batch, *graph.shapes["input"]))
    path = Path(name)
    if path.suffix != ".onnx":
        raise BadInput(f"{name!r} is no .onnx file and none of {', '.join(NETWORKS)}")
    if not path.is_file():
        raise BadInput(f"model file {path} does not exist")
    try:
        network = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise BadInput(f"{path} is not a readable ONNX file") from error
    weights = {tensor.name for tensor in network.initializer}
    inputs = [value.type.tensor_type for value in network.input if value.name not in weights]
    if len(inputs) != 1 or inputs[0].elem_type != onnx.TensorProto.FLOAT:
        raise BadInput(f"{path} does not have exactly one float32 input")
    shape = tuple(dim.dim_value or batch for dim in inputs[0].shape.dim)
    if shape[:1] != (batch,):
        raise BadInput(f"{path} has an input of fixed shape {shape}, not of batch {batch}")
    return Case(path.stem, batch, path, shape)
