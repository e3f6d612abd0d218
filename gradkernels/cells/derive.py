"""A cell is its `forward`: backward, tangent and what to keep are derived here and printed as plain Python."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .differentiate import adjoints, tangents
from .graph import Graph, Node
from .printer import Printer
from .reader import Group, Products, Reader, find, scope
from .save import choose_saved


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence: sizes, and the text of its functions."""

    name: str
    G: int  # gates
    S: int  # states
    P: int  # per-unit parameters
    A: int  # values kept for backward
    split: tuple[int, ...]  # gates whose recurrent pre-activation has another adjoint than the input's
    second: tuple[int, ...]  # gates whose recurrent product is of the operand, not of s[0]: the last ones
    source: str

    def __deepcopy__(self, memo: dict) -> Cell:
        return self

    def __reduce__(self) -> tuple:  # without the compiled functions
        return Cell, (self.name, self.G, self.S, self.P, self.A, self.split, self.second, self.source)

    @functools.cached_property
    def _functions(self) -> dict[str, Callable]:
        return bind(self.source, f"<cell {self.name}>", torch_functions())

    def _function(self, name: str) -> Callable:
        if name not in self._functions:
            raise AttributeError(f"cell '{self.name}' has no {name}: every product of it is of s[0]")
        return self._functions[name]

    @property
    def forward(self) -> Callable:
        """forward(x, r, s[, p]) -> t, a"""
        return self._functions["forward"]

    @property
    def backward(self) -> Callable:
        """backward(a, s, t[, p], dt[, dv]) -> dx, dr, ds[, dp], total"""
        return self._functions["backward"]

    @property
    def tangent(self) -> Callable:
        """tangent(x, r, s[, p], dx, dr, ds[, dp]) -> t, dt"""
        return self._functions["tangent"]

    @property
    def operand(self) -> Callable:
        """operand(x, r, s[, p]) -> v"""
        return self._function("operand")

    @property
    def operand_tangent(self) -> Callable:
        """operand_tangent(x, r, s[, p], dx, dr, ds[, dp]) -> v, dv"""
        return self._function("operand_tangent")

    @property
    def second_adjoint(self) -> Callable:
        """second_adjoint(a, s, t[, p], dt) -> v, dr[second]"""
        return self._function("second_adjoint")


def bind(source: str, filename: str, namespace: dict[str, Any]) -> dict[str, Callable]:
    """Compile generated text in a namespace, so that tracebacks, inspect and Triton find its lines."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    space = dict(namespace)
    exec(compile(source, filename, "exec"), space)
    return {k: f for k, f in space.items() if isinstance(f, types.FunctionType) and f.__code__.co_filename == filename}


@functools.cache
def torch_functions() -> dict[str, Callable]:
    """The vocabulary over tensors."""
    import torch

    plain = "sigmoid tanh relu exp expm1 log log1p sqrt sin cos erf abs sign where pow full_like"
    tensor = lambda v, like: v if isinstance(v, torch.Tensor) else like.new_full((), v)
    pair = lambda f: lambda a, b: f(tensor(a, b), tensor(b, a))
    return {n: getattr(torch, n) for n in plain.split()} | {
        "min": pair(torch.minimum),
        "max": pair(torch.maximum),
        # F.softplus turns linear at 20, which is off by 2e-9
        "softplus": lambda a: torch.clamp(a, min=0) + torch.log1p(torch.exp(-torch.abs(a))),
        "mean": lambda a: a.mean(-1, keepdim=True).expand_as(a),
    }


def cell(function: Callable | None = None, *, name: str | None = None, recompute: float = 0.3) -> Any:
    """Read `forward(x, r, s[, p])` and derive the rest. `recompute`: the price of a transcendental function, in stored planes."""
    if function is None:
        return lambda f: cell(f, name=name, recompute=recompute)
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"a cell is a Python function, got {type(function).__name__}")
    node, filename = find(function)
    graph = Graph()
    reader = Reader(graph, filename, scope(function), (function,))
    a = node.args
    if len(a.args) not in (3, 4) or a.posonlyargs or a.vararg or a.kwonlyargs or a.kwarg or a.defaults:
        reader.error(node, "a cell takes (x, r, s) or (x, r, s, p)")
    x, r, s, p = Group(graph, "x"), Products(graph, "r"), Group(graph, "s"), Group(graph, "p")
    value = reader.function(node, [x, r, s, p][: len(a.args)])
    last = reader.last
    assert last is not None
    outputs = [value] if isinstance(value, Node) else list(value) if isinstance(value, tuple) else []
    if not outputs or not all(isinstance(o, Node) for o in outputs):
        reader.error(last, "a cell returns its new states: one value, or a tuple of values")
    if s.size > len(outputs):
        reader.error(last, f"s[{s.size - 1}] is read but only {len(outputs)} state{'s are' if len(outputs) > 1 else ' is'} returned")
    if r.size == 0:
        reader.error(node, "r is never read: this is no recurrent cell")
    if len(a.args) == 4 and p.size == 0:
        reader.error(node, "p is never read")
    G = max(x.size, r.size)
    for k in range(G):
        if k not in x.read | r.read and k not in r.second:
            reader.error(node, f"there are {G} gates, but neither x[{k}] nor r[{k}] is read")
    last_ones = range(G - len(r.second), G)
    for k, (where, at) in r.second.items():
        if k not in last_ones:
            where.error(at, f"products of another value than s[0] must be of the last gates, r[{k}] is one of {G}")
    return _build(name or function.__name__, graph, outputs, G, p.size, r, recompute)


def _build(name: str, graph: Graph, outputs: list[Node], G: int, P: int, r: Products, recompute: float) -> Cell:
    S, second, v = len(outputs), tuple(sorted(r.second)), r.operand
    seeds = [(o, graph.leaf("dt", k)) for k, o in enumerate(outputs)]
    if v is not None:
        seeds.append((v, graph.leaf("dv")))
    adjoint = adjoints(graph, seeds)

    def adjoint_of(group: str, k: int) -> Node:
        like = graph.leaf("s", k) if group == "s" else graph.leaf("dt", 0)
        return adjoint.get(graph.leaf(group, k)) or graph.make("full_like", like, graph.const(0))

    wanted = {group: [adjoint_of(group, k) for k in range(n)] for group, n in dict(x=G, r=G, s=S, p=P).items()}
    # total adjoints of the new states: what retain_grad on them would show
    wanted["total"] = [adjoint[o] for o in outputs]
    flat = [n for group in wanted.values() for n in group]
    saved = choose_saved([o for o in outputs if not o.is_leaf], [*flat, *([v] if v else [])], recompute)
    valued = [graph.make("full_like", graph.leaf("x", 0), o) if o.op == "const" else o for o in outputs]
    p, dp = (["p"], ["dp"]) if P else ([], [])
    values, differentials = ["x", "r", "s", *p], ["dx", "dr", "ds", *dp]

    forward = Printer()
    forward.body([*valued, *saved])
    texts = [forward.define("forward", values, f"{forward.group(valued)}, {forward.group(saved)}")]

    def from_saved(results: list[Node]) -> Printer:
        """New states are t[k], stored values have the names they had in forward."""
        printer = Printer({o: f"t[{k}]" for k, o in enumerate(outputs) if not o.is_leaf})
        if saved:
            names = [printer.name(n, forward.given.get(n) or f"{n.args[0]}{n.args[1]}") for n in saved]
            printer.lines.append(f"{', '.join(names)}{',' if len(names) == 1 else ''} = a")
        printer.body(results)
        return printer

    backward = from_saved(flat)
    groups = [backward.group(nodes) for key, nodes in wanted.items() if nodes]
    if wanted["x"] == wanted["r"]:
        backward.lines.append(f"dx = {groups[0]}")
        groups[:2] = "dx", "dx"
    texts.append(backward.define("backward", ["a", "s", "t", *p, "dt", *(["dv"] if v else [])], ", ".join(groups)))

    def moving(function: str, primal: list[Node], plain: Callable) -> None:
        rates = tangents(graph, primal)
        rates = [graph.make("full_like", graph.leaf("dx", 0), n) if n.op == "const" else n for n in rates]
        printer = Printer()
        printer.body([*primal, *rates])
        texts.append(printer.define(function, [*values, *differentials], f"{plain(printer, primal)}, {plain(printer, rates)}"))

    moving("tangent", valued, Printer.group)
    if v is not None:
        operand = Printer()
        operand.body([v])
        texts.append(operand.define("operand", values, operand.text(v)))
        moving("operand_tangent", [v], lambda printer, nodes: printer.text(nodes[0]))
        late = [wanted["r"][k] for k in second]
        again = from_saved([v, *late])
        texts.append(again.define("second_adjoint", ["a", "s", "t", *p, "dt"], f"{again.text(v)}, {again.group(late)}"))
    split = tuple(k for k in range(G) if wanted["x"][k] is not wanted["r"][k])
    return Cell(name, G, S, P, len(saved), split, second, "\n\n".join(texts))
