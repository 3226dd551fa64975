"""Tensor-core operations on 16 x 16 x 16 tiles, as TVM's scheduler wants them described.

TVM ships such descriptions, but importing them parses every intrinsic of every target, which takes
half a minute; these are built directly, on the same built-in operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

SIDE = 16
# Where sums go: not the scope of float16 tiles, whose memory TVM would use again, and then not find
# that pointers into it have the type they are declared with.
RESULTS = "shared.dyn"
_A, _B, _SUMS = "wmma.matrix_a", "wmma.matrix_b", "wmma.accumulator"


@functools.cache
def register() -> dict[str, str]:
    """Register the operations with TVM, once; names of ``load_a``, ``load_b``, ``fill``, ...

    ``load_a`` and ``load_b`` take float16 tiles from shared memory into fragments, ``multiply``
    adds their product to float32 sums, ``store`` writes these to shared memory. Those that end in
    ``_turned`` find columns, or write results, one column after the other.
    """
    made = {
        "load_a": (_copy_description(False), _load("row_major")),
        "load_b": (_copy_description(False), _load("row_major")),
        "load_b_turned": (_copy_description(True), _load("col_major")),
        "fill": (_fill_description, _fill),
        "multiply": (_multiply_description, _multiply),
        "store": (_copy_description(False), _store("row_major")),
        "store_turned": (_copy_description(True), _store("col_major")),
    }
    scopes = {
        "load_a": [("float16", "shared"), ("float16", _A)],
        "load_b": [("float16", "shared"), ("float16", _B)],
        "fill": [("float32", _SUMS)],
        "multiply": [("float16", _A), ("float16", _B), ("float32", _SUMS)],
        "store": [("float32", _SUMS), ("float32", RESULTS)],
    }
    scopes.update(load_b_turned=scopes["load_b"], store_turned=scopes["store"])
    names = {}
    for kind, (description, operation) in made.items():
        names[kind] = f"tvm_lowrank.fragment.{kind}"
        described = _function(scopes[kind], description, strided=False)
        called = _function(scopes[kind], operation, strided=True)
        TensorIntrin.register(names[kind], described, called, override=True)
    return names


def _function(
    operands: list[tuple[str, str]], body: Callable[[list[tirx.Buffer]], None], strided: bool
) -> tirx.PrimFunc:
    """A function over tiles of given types and scopes, perhaps with unknown strides."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        handles = [T.arg(f"h{i}", T.handle()) for i in range(len(operands))]
        tiles = []
        for handle, (dtype, scope) in zip(handles, operands, strict=True):
            strides = [T.var("int32", name) for name in ("s1", "s0")] if strided else None
            tiles.append(
                T.match_buffer(
                    handle,
                    (SIDE, SIDE),
                    dtype,
                    strides=strides,
                    align=64,
                    offset_factor=SIDE,
                    scope=scope,
                )
            )
        with T.sblock("root"):
            reads = [tile[0:SIDE, 0:SIDE] for tile in tiles]
            if len(tiles) == 1:
                T.reads()
            else:
                # In the order in which the scheduler finds them in the code.
                T.reads(*(reads[-1:] + reads[:-1] if len(tiles) == 3 else reads[:1]))
            T.writes(reads[-1])
            body(tiles)
    return builder.get()


def _copy_description(turned: bool) -> Callable[[list[tirx.Buffer]], None]:
    def describe(tiles: list[tirx.Buffer]) -> None:
        source, sink = tiles
        # Of a fragment the order is that of the matrix; the other side is turned.
        loads = sink.scope() in (_A, _B)
        with T.grid(SIDE, SIDE) as (i, j), T.sblock("copy"):
            vi, vj = T.axis.remap("SS", [i, j])
            place, other = [vi, vj], [vj, vi] if turned else [vi, vj]
            if loads:
                T.buffer_store(sink, source[tuple(other)], place)
            else:
                T.buffer_store(sink, source[tuple(place)], other)

    return describe


def _fill_description(tiles: list[tirx.Buffer]) -> None:
    with T.grid(SIDE, SIDE) as (i, j), T.sblock("fill"):
        vi, vj = T.axis.remap("SS", [i, j])
        T.buffer_store(tiles[0], tirx.const(0, "float32"), [vi, vj])


def _multiply_description(tiles: list[tirx.Buffer]) -> None:
    a, b, sums = tiles
    with T.grid(SIDE, SIDE, SIDE) as (i, j, k), T.sblock("multiply"):
        vi, vj, vk = T.axis.remap("SSR", [i, j, k])
        term = a[vi, vk].astype("float32") * b[vk, vj].astype("float32")
        T.buffer_store(sums, sums[vi, vj] + term, [vi, vj])


def _load(order: str) -> Callable[[list[tirx.Buffer]], None]:
    def load(tiles: list[tirx.Buffer]) -> None:
        source, sink = tiles
        pointer = source.access_ptr("r", ptr_type="float16")
        _call("tvm_load_matrix_sync", *_fragment(sink), pointer, source.strides[0], order)

    return load


def _fill(tiles: list[tirx.Buffer]) -> None:
    _call("tvm_fill_fragment", *_fragment(tiles[0]), tirx.const(0, "float32"))


def _multiply(tiles: list[tirx.Buffer]) -> None:
    a, b, sums = ((_data(tile), _index(tile)) for tile in tiles)
    _call("tvm_mma_sync", *sums, *a, *b, *sums)


def _store(order: str) -> Callable[[list[tirx.Buffer]], None]:
    def store(tiles: list[tirx.Buffer]) -> None:
        source, sink = tiles
        pointer = sink.access_ptr("w", ptr_type="float32")
        _call("tvm_store_matrix_sync", *_fragment(source), pointer, sink.strides[0], order)

    return store


def _fragment(tile: tirx.Buffer) -> tuple[Any, ...]:
    """A fragment as operations name it: memory, extents, number."""
    return (_data(tile), SIDE, SIDE, SIDE, _index(tile))


def _data(tile: tirx.Buffer) -> Any:
    return tirx.buffer.buffer_data(tile)


def _index(tile: tirx.Buffer) -> Any:
    """The number of a fragment among those of its array."""
    width = tile.strides[0]
    row, column = tile.elem_offset // width // SIDE, tile.elem_offset % width // SIDE
    return row * (width // SIDE) + column


def _call(name: str, *arguments: Any) -> None:
    T.evaluate(tirx.call_intrin("void", f"tirx.{name}", *arguments))
