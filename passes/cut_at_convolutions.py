"""Cut a network before each layer that plans name, into pieces that run one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm_lowrank.passes.graph import Rewriter, dataflow_bindings, is_constant, op_name

from tvm_lowrank.layer import fully_connected_products


@dataclass(frozen=True)
class Piece:
    """A part of a network as a module of its own.

    Attributes
    ----------
    mod : tvm.IRModule
        ``main`` takes the values of ``takes`` and returns a tuple of those of ``gives`` (of the
        last piece: what the network returns).
    takes, gives : tuple of str
        Names of the values that are alive before and after it; every piece gives what the next
        one takes.
    source : str or None
        Name of the layer's input; None for the piece before the first layer.
    shortcut : str or None
        Of the value, known before this piece, that alone is added to the layer's output
        (bias included), and nothing else reads that output.
    """

    mod: tvm.IRModule
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    source: str | None
    shortcut: str | None


def cut_at_convolutions(mod: tvm.IRModule) -> list[Piece]:
    """The pieces of a normalised module's ``main``: what comes before the first layer, then one for
    each layer of `collect_layers` with all that follows it up to the next.

    The first piece may have nothing to do. Empty for a ``main`` that is not plain dataflow.
    """
    func = mod["main"]
    bindings = dataflow_bindings(func)
    if bindings is None:
        return []
    products = fully_connected_products(mod)
    starts = [
        index
        for index, binding in enumerate(bindings)
        if op_name(binding.value) == "nn.conv2d" or binding.var in products
    ]
    bounds = [0, *starts, len(bindings)]
    # From the end: what is read at or after each place.
    alive: list[dict[Any, None]] = [{} for _ in bounds]
    needed = dict.fromkeys(relax.analysis.free_vars(func.body.body))
    place = len(bindings)
    for index in reversed(range(len(bounds))):
        while place > bounds[index]:
            place -= 1
            needed.pop(bindings[place].var, None)
            needed |= dict.fromkeys(relax.analysis.free_vars(bindings[place].value))
        alive[index] = dict(needed)
    names: dict[Any, str] = {}
    for var in [*func.params, *(binding.var for binding in bindings)]:
        names[var] = f"v{len(names)}"
    pieces = []
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        last = index == len(bounds) - 2
        takes, gives = list(alive[index]), [] if last else list(alive[index + 1])
        writer = _Piece(mod, bindings[begin:end], takes, None if last else gives)
        source = shortcut = None
        if index > 0:
            source = names[bindings[begin].value.args[0]]
            other = _added_to(writer, bindings[begin:], set(takes))
            shortcut = None if other is None else names[other]
        pieces.append(
            Piece(
                writer.run(),
                tuple(names[var] for var in takes),
                tuple(names[var] for var in gives),
                source,
                shortcut,
            )
        )
    return pieces


class _Piece(Rewriter):
    """Some bindings as a function of what they read; the last piece has no ``gives``."""

    def __init__(
        self,
        mod: tvm.IRModule,
        bindings: Sequence[Any],
        takes: Sequence[relax.Var],
        gives: Sequence[relax.Var] | None,
    ) -> None:
        super().__init__(mod)
        self.bindings = list(bindings)
        self.takes, self.gives = takes, gives

    def result(self) -> relax.Expr:
        if self.gives is None:
            return super().result()
        return relax.Tuple([self.substitute(var) for var in self.gives])

    def run(self) -> tvm.IRModule:
        params = [relax.Var(f"in{index}", var.ty) for index, var in enumerate(self.takes)]
        self.values.update(zip(self.takes, params, strict=True))
        with self.builder.function("main"):
            with self.builder.dataflow():
                for binding in self.bindings or []:
                    self.values[binding.var] = self.rewrite(binding.var, binding.value)
                result = self.builder.emit_output(self.result())
            self.builder.emit_func_output(result, params)
        return relax.transform.DeadCodeElimination(["main"])(self.builder.get())


def _added_to(writer: Rewriter, bindings: Sequence[Any], known: set[Any]) -> Any | None:
    """The known value that is added to the first binding's output, if nothing else reads that."""
    value = bindings[0].var
    for binding in bindings[1:]:
        call = binding.value
        if not any(var.same_as(value) for var in relax.analysis.free_vars(call)):
            continue
        if writer.users.get(value) != 1 or op_name(call) != "add":
            return None
        others = [arg for arg in call.args if not arg.same_as(value)]
        if len(others) != 1:
            return None
        if not is_constant(others[0]):
            same = str(others[0].ty) == str(value.ty)
            return others[0] if same and others[0] in known else None
        value = binding.var
    return None
