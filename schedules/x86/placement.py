"""Kernels that read or write a map as a part of a larger one: slices and concatenation in place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

# TVM's number for functions that its fusion leaves alone: it takes an output for a whole tensor.
_OPAQUE = 8


@dataclass(frozen=True)
class Part:
    """The blocks from ``first`` on of a map of ``blocks`` blocks of channels."""

    first: int
    blocks: int


def place(func: tirx.PrimFunc, name: str, part: Part) -> tirx.PrimFunc:
    """The kernel with its parameter ``name`` as ``part`` of a larger map.

    ``func`` is what an `Emitter` made; the parameter, of shape ``(1, B, H, W, lanes)``, becomes one
    of shape ``(1, part.blocks, H, W, lanes)``, of which the kernel reads or writes B blocks and
    leaves the others as they are. The blocks of one image are one piece of memory, so only its
    start changes.

    Raises ValueError for several images, and for blocks that are not there.
    """
    (index,) = (i for i, parameter in enumerate(func.params) if parameter.name == name)
    images, count, *inner = (int(extent) for extent in func.params[index].shape)
    if images != 1:
        raise ValueError(f"the blocks of {images} images are not one piece of memory")
    if part.first < 0 or part.first + count > part.blocks:
        raise ValueError(f"{count} blocks are not among those of {part}")
    shape = (1, part.blocks, *inner)
    whole = tirx.decl_buffer(shape, "float32", name=name, data_alignment=64)
    flat = tirx.decl_buffer(
        (math.prod(shape),), "float32", name=f"{name}_whole", data_alignment=64, scope="global"
    )
    root = func.body.block
    body = []
    for stmt in root.body.seq:
        if isinstance(stmt, tirx.DeclBuffer) and stmt.buffer.name == f"{name}_flat":
            body.append(tirx.DeclBuffer(flat, data=tirx.buffer.buffer_data(whole)))
            start = tirx.address_of(tirx.BufferLoad(flat, [part.first * math.prod(inner)]))
            stmt = tirx.DeclBuffer(stmt.buffer, data=start)
        body.append(stmt)
    params = list(func.params)
    params[index] = whole
    block = SBlock([], [], [], root.name_hint, tirx.SeqStmt(body))
    placed = tirx.PrimFunc(params, SBlockRealize([], True, block))
    return placed.with_attr({**func.attrs, "op_pattern": _OPAQUE})
