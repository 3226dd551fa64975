"""Kernels that read or write a map as a part of a larger one: slices and concatenation in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from .emitter import ALIGNMENT

# TVM's number for functions that its fusion leaves alone: it takes an output for a whole tensor.
_OPAQUE = 8


@dataclass(frozen=True)
class Part:
    """The blocks from ``first`` on of an image's map of ``blocks`` blocks of channels."""

    first: int
    blocks: int

    def within(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Shape of the larger map, and where in it, in elements, the smaller of ``shape`` starts.

        Raises ValueError for several images, whose blocks are not one piece of memory, and for
        blocks that are not there.
        """
        images, count, *inner = shape
        if images != 1:
            raise ValueError(f"the blocks of {images} images are not one piece of memory")
        if self.first < 0 or self.first + count > self.blocks:
            raise ValueError(f"{count} blocks are not among those of {self}")
        return (1, self.blocks, *inner), self.first * math.prod(inner)


@dataclass(frozen=True)
class Images:
    """The images from ``first`` on of a batch of ``count`` images."""

    first: int
    count: int

    def within(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """As `Part.within`; ValueError for images that are not there."""
        images, *inner = shape
        if self.first < 0 or self.first + images > self.count:
            raise ValueError(f"{images} images are not among those of {self}")
        return (self.count, *inner), self.first * math.prod(inner)


def place(func: tirx.PrimFunc, name: str, part: Part | Images) -> tirx.PrimFunc:
    """The kernel with its parameter ``name`` as ``part`` of a larger map.

    ``func`` is what an `Emitter` made; the parameter, of shape ``(N, B, H, W, lanes)``, becomes a
    larger one, of which the kernel reads or writes one piece of memory and leaves the rest as it
    is, so only its start changes.

    Raises ValueError as `Part.within` and `Images.within` do.
    """
    (index,) = (i for i, parameter in enumerate(func.params) if parameter.name == name)
    shape, offset = part.within([int(extent) for extent in func.params[index].shape])
    whole = tirx.decl_buffer(shape, "float32", name=name, data_alignment=ALIGNMENT)
    flat = tirx.decl_buffer(
        (math.prod(shape),),
        "float32",
        name=f"{name}_whole",
        data_alignment=ALIGNMENT,
        scope="global",
    )
    root = func.body.block
    body = []
    for stmt in root.body.seq:
        if isinstance(stmt, tirx.DeclBuffer) and stmt.buffer.name == f"{name}_flat":
            body.append(tirx.DeclBuffer(flat, data=tirx.buffer.buffer_data(whole)))
            start = tirx.address_of(tirx.BufferLoad(flat, [offset]))
            stmt = tirx.DeclBuffer(stmt.buffer, data=start)
        body.append(stmt)
    params = list(func.params)
    params[index] = whole
    block = SBlock([], [], [], root.name_hint, tirx.SeqStmt(body))
    placed = tirx.PrimFunc(params, SBlockRealize([], True, block))
    return placed.with_attr({**func.attrs, "op_pattern": _OPAQUE})
