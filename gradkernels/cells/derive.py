"""A cell is its `forward`: backward, tangent and what to keep are derived here and printed as plain Python."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from .bind import Cell
from .differentiate import adjoints, tangents
from .graph import EXTRA, THERE, Graph, Group, Node, Products, reach
from .printer import Printer
from .reader import Reader
from .save import choose_saved
from .source import find, scope

Params = Sequence[tuple[str, int, "float | None"]]  # name, how many, initial value
_TAKEN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # what layers call their own parameters


@overload
def cell(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    params: Params | None = None,
    backward: Callable[..., Any] | None = None,
    recompute: float = 0.3,
) -> Cell: ...


@overload
def cell(
    function: None = None,
    *,
    name: str | None = None,
    params: Params | None = None,
    backward: Callable[..., Any] | None = None,
    recompute: float = 0.3,
) -> Callable[[Callable[..., Any]], Cell]: ...


def cell(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    params: Params | None = None,
    backward: Callable[..., Any] | None = None,
    recompute: float = 0.3,
) -> Any:
    """A Cell from the text of its forward, `f(x, r, s)` and any of `p, m, d` after them; everything else is derived. A decorator.

    The text is read, never called: straight-line arithmetic on one unit of one row. `x[k]`, `r[k]` are the pre-activations of
    gate k of the input and of the recurrent product, `s[k]` the states before the step, `p[k]` per-unit parameters, `m[k]`
    masks drawn by whoever calls, `d[0]` the first state of some steps ago; returned are the states after the step, one value or
    a tuple. How many there are of each is inferred. `r[k](v)` is the recurrent product of v instead of `s[0]`: one v a cell,
    for its last gates. A cell that never reads r has no recurrent product. Another cell is called like a function of these.

    The language: numbers, + - * /, ** with a number, where(a < b, u, v), names, tuples, functions of one's own (read in place),
    numbers from outside (as they are when the cell is made), and without any import sigmoid tanh relu softplus silu softsign
    exp expm1 log log1p sqrt rsqrt square pow sin cos erf abs sign min max clamp mean; mean is over the units of a row.

    Args:
        function: the forward. Its text must be in a file or a notebook cell.
        name: of the cell, else the function's.
        params: what the p are to people: (name, how many, initial value) one after the other, as a layer makes parameters of
            them; an initial value of None is drawn as torch's recurrent layers draw theirs.
        backward: a derivative of one's own, where the true one is not what is wanted: a function in the same language whose
            arguments are the forward's, then t, the new states, and dt, their adjoints (and dv, that of v in `r[k](v)`); it
            returns dx, dr, ds and, where the cell has them, dp and dd, a tuple each. Forward mode stays the true derivative.
        recompute: the price of computing a transcendental function again in backward, in stored planes of B x H a step.
            What forward keeps is the cheapest choice, a minimum cut of the graph.

    Raises:
        SyntaxError: anything outside the language, at the author's own file, line and column.
        TypeError: not a Python function, a name that is no text, or params that are not (name, how many, initial value) each.
        ValueError: params are more or fewer than the p that are read, or called like a layer's own; recompute is negative.

    >>> from gradkernels.cells import cell
    >>> @cell
    ... def minimal_gated_unit(x, r, s):
    ...     f = sigmoid(x[0] + r[0])
    ...     n = tanh(x[1] + r[1](f * s[0]))
    ...     return s[0] + f * (n - s[0])
    >>> minimal_gated_unit
    Cell(name='minimal_gated_unit', G=2, S=1, P=0, A=2, split=(), second=(1,))
    >>> print(minimal_gated_unit.source.split("\\n\\n\\n")[1])
    def backward(a, s, t, dt, dv):
        f, n = a
        dn = dt[0] * f
        dx1 = dn * (1 - n * n)
        dx0 = (dt[0] * (n - s[0]) + dv * s[0]) * (f * (1 - f))
        dx = (dx0, dx1)
        return dx, dx, (dt[0] - dn + dv * f,), (dt[0],)
    """
    if not (name is None or isinstance(name, str)):
        raise TypeError(f"the name of a cell is a text, got {name!r}")
    if isinstance(recompute, str) or not recompute >= 0:
        raise ValueError(f"recompute is a price, a number that is not negative, got {recompute!r}")
    if function is None:
        return lambda f: cell(f, name=name, params=params, backward=backward, recompute=recompute)
    read = _read(_function(function))
    own = None if backward is None else _read_backward(_function(backward, "a backward"), read)
    return build(name or function.__name__, read, recompute, params, own)


def _function(f: object, what: str = "a cell") -> types.FunctionType:
    if not isinstance(f, types.FunctionType):
        raise TypeError(f"{what} is a Python function, got {type(f).__name__}")
    if f.__code__.co_flags & inspect.CO_COROUTINE:
        raise TypeError(f"{what} is a plain function, {f.__name__} is an async one")
    return f


@dataclass
class Forward:
    """A forward that was read: new states over leaves x, r, s, p, m, d, and how many there are of those."""

    graph: Graph
    outputs: list[Node]
    sizes: dict[str, int]
    second: tuple[int, ...]
    operand: Node | None
    recurrent: bool


def groups_of(graph: Graph) -> dict[str, Group]:
    return {name: (Products if name == "r" else Group)(graph, name) for name in ("x", "r", "s", *EXTRA)}


def _read(function: types.FunctionType) -> Forward:
    node, filename = find(function)
    graph = Graph()
    reader = Reader(graph, filename, scope(function), (function,))
    arguments, groups = reader.parameters(node), groups_of(graph)
    extra = arguments[3:]
    if len(arguments) < 3 or extra != [name for name in EXTRA if name in extra]:
        reader.error(node, "a cell takes (x, r, s), then any of p, m, d in this order")
    value = reader.function(node, [groups[name] for name in ("x", "r", "s", *extra)])
    outputs = [value] if isinstance(value, Node) else list(value) if isinstance(value, tuple) else []
    returned = reader.returned or node
    x, r, s = groups["x"], groups["r"], groups["s"]
    if not outputs or not all(isinstance(o, Node) and not o.is_condition for o in outputs):
        reader.error(returned, "a cell returns its new states: one value, or a tuple of values")
    if s.size > len(outputs):
        count = f"{len(outputs)} state{'s are' if len(outputs) > 1 else ' is'}"
        reader.error(returned, f"s[{s.size - 1}] is read but only {count} returned: return what each becomes")
    if r.size == 0 and s.size == 0:
        reader.error(node, "neither r nor s is read: this is no recurrent cell")
    if x.size == 0 and r.size == 0:
        reader.error(node, "neither x nor r is read: a cell has at least one gate")
    for name in extra:
        if groups[name].size == 0:
            reader.error(node, f"{name} is never read")
    if groups["d"].size > 1:
        reader.error(
            node, f"d[{groups['d'].size - 1}] is read: the first state of some steps ago is d[0], and there is no other"
        )
    G = max(x.size, r.size)
    assert isinstance(r, Products)
    for k in range(G):
        if k not in x.read | r.read | r.second.keys():
            reader.error(node, f"there are {G} gates, but neither x[{k}] nor r[{k}] is read")
    for k, (inner, at) in r.second.items():
        if k < G - len(r.second):
            inner.error(at, f"gates with a product of another value than s[0] must be the last, r[{k}] is one of {G}")
    return forward_of(graph, groups, outputs)


def _read_backward(function: types.FunctionType, f: Forward) -> dict[str, list[Node]]:
    """Adjoints by group, as an author wrote them."""
    node, filename = find(function)
    reader, leaf = Reader(f.graph, filename, scope(function), (function,)), f.graph.leaf
    sizes = {name: n for name, n in f.sizes.items() if n or name in ("x", "r")}
    given: dict[str, Any] = {name: tuple(leaf(name, k) for k in range(n)) for name, n in sizes.items()}
    given |= {"t": tuple(f.outputs), "dt": tuple(leaf("dt", k) for k in range(sizes["s"]))}
    given |= {"dv": leaf("dv")} if f.operand else {}
    if reader.parameters(node) != list(given):
        reader.error(node, f"the backward of this cell takes ({', '.join(given)})")
    value = reader.function(node, list(given.values()))
    wanted = {name: n for name, n in sizes.items() if name != "m"}
    returned = reader.returned or node
    nodes = lambda group: isinstance(group, tuple) and all(isinstance(v, Node) and not v.is_condition for v in group)
    if not (isinstance(value, tuple) and len(value) == len(wanted) and all(map(nodes, value))):
        reader.error(returned, f"a backward returns {', '.join('d' + name for name in wanted)}, a tuple each")
    for (name, n), group in zip(wanted.items(), value):
        if len(group) != n:
            reader.error(returned, f"d{name} has {n} value{'s' * (n != 1)}, {len(group)} returned")
    if f.operand and leaf("dv") in reach([value[1][k] for k in f.second]):
        reader.error(returned, f"dr[{f.second[0]}] depends on dv, which is made of it")
    return {name: list(group) for name, group in zip(wanted, value)}


def forward_of(graph: Graph, groups: dict[str, Group], outputs: list[Node]) -> Forward:
    """New states over these groups, sizes being what was read of each."""
    r = groups["r"]
    assert isinstance(r, Products)
    G = max(groups["x"].size, r.size)
    sizes = {"x": G, "r": G, "s": len(outputs)} | {name: groups[name].size for name in EXTRA}
    return Forward(graph, outputs, sizes, tuple(sorted(r.second)), r.operand, r.size > 0)


def build(
    name: str,
    f: Forward,
    recompute: float = 0.3,
    params: Params | None = None,
    own: dict[str, list[Node]] | None = None,  # the author's adjoints
) -> Cell:
    """Derive everything and print it."""
    named = _named(name, f.sizes["p"], params)
    graph, outputs, v, sizes = f.graph, f.outputs, f.operand, f.sizes
    G, S = sizes["x"], sizes["s"]
    values = ["x", "r", "s", *(g for g in EXTRA if sizes[g])]
    differentiable = [g for g in values if g != "m"]
    dt = [graph.leaf("dt", k) for k in range(S)]
    adjoint = adjoints(graph, [*zip(outputs, dt), *([(v, graph.leaf("dv"))] if v else [])])

    def adjoint_of(group: str, k: int) -> Node:
        like = graph.leaf("s", k) if group == "s" else dt[0]  # states may differ in width
        return adjoint.get(graph.leaf(group, k)) or _full(graph, like, graph.const(0))

    wanted = {group: [adjoint_of(group, k) for k in range(sizes[group])] for group in differentiable}
    if own is not None:
        wanted = {group: [_full(graph, dt[0], v) for v in nodes] for group, nodes in own.items()}
    if not f.recurrent:  # there is no r: so that drivers have one adjoint of gates to write
        wanted["r"] = wanted["x"]
    wanted["total"] = [d if o.op == "const" else adjoint[o] for o, d in zip(outputs, dt)]
    flat = [n for nodes in wanted.values() for n in nodes]
    stored = {o: f"t[{k}]" for k, o in enumerate(outputs) if o.op != "const" and o.args[0] not in THERE}
    saved = choose_saved(list(stored), [*flat, *([v] if v else [])], recompute)

    entering, after = [*values, *(f"d{g}" for g in differentiable)], ["a", "s", "t", *values[3:], "dt"]
    states = [_full(graph, graph.leaf("x", 0), o) for o in outputs]
    forward = Printer()
    forward.body([*states, *saved])
    texts = [forward.define("forward", values, f"{forward.group(states)}, {forward.group(saved)}")]

    def unpacked() -> Printer:
        """After forward: new states are t[k], kept values have the names that they had there."""
        printer = Printer(stored)
        if saved:
            leaf = lambda n: f"{n.args[0]}{n.args[1]}" if n.op == "leaf" else None
            names = [printer.name(n, forward.given.get(n) or leaf(n)) for n in saved]
            printer.lines.append(f"{', '.join(names)}{',' * (len(names) == 1)} = a")
        return printer

    backward = unpacked()
    backward.body(flat)
    results = [backward.group(nodes) for nodes in wanted.values()]
    if wanted["x"] == wanted["r"]:
        backward.lines.append(f"dx = {results[0]}")
        results[:2] = "dx", "dx"
    texts.append(backward.define("backward", [*after, *(["dv"] if v else [])], ", ".join(results)))

    def forward_mode(function: str, primal: list[Node], show: Callable[[Printer, list[Node]], str]) -> str:
        moving = [_full(graph, graph.leaf("dx", 0), n) for n in tangents(graph, primal)]
        printer = Printer()
        printer.body([*primal, *moving])
        return printer.define(function, entering, f"{show(printer, primal)}, {show(printer, moving)}")

    texts.append(forward_mode("tangent", states, Printer.group))
    if v is not None:
        operand, late = Printer(), [wanted["r"][k] for k in f.second]
        operand.body([v])
        texts.append(operand.define("operand", values, operand.text(v)))
        texts.append(forward_mode("operand_tangent", [v], lambda printer, nodes: printer.text(nodes[0])))
        again = unpacked()
        again.body([v, *late])
        texts.append(again.define("second_adjoint", after, f"{again.text(v)}, {again.group(late)}"))
    split = tuple(k for k in range(G) if wanted["x"][k] is not wanted["r"][k])
    source = "\n\n".join(texts)
    return Cell(name, G, S, sizes["p"], len(saved), split, f.second, source, sizes["m"], sizes["d"], f.recurrent, named)


def _named(name: str, P: int, params: Params | None) -> tuple[tuple[str, int, float | None], ...]:
    if params is None:
        return (("weight_p", P, None),) if P else ()
    for one in params:
        if not (isinstance(one, (tuple, list)) and len(one) == 3 and isinstance(one[0], str)):
            raise TypeError(f"params of cell {name} are (name, how many, initial value) each, got {one!r}")
    named = tuple((text, int(count), None if value is None else float(value)) for text, count, value in params)
    if sum(count for _, count, _ in named) != P or any(count < 1 for _, count, _ in named):
        raise ValueError(
            f"cell {name} reads {P} parameter{'s' * (P != 1)} p, params name {[count for _, count, _ in named]}"
        )
    texts = [text for text, _, _ in named]
    for k, text in enumerate(texts):
        if not text.isidentifier() or text in _TAKEN or text in texts[:k]:
            raise ValueError(
                f"params of cell {name}: a layer cannot have a parameter of the name {text!r}"
                + (", which is its own" if text in _TAKEN else ", which there is already" if text in texts[:k] else "")
            )
    return named


def _full(graph: Graph, like: Node, value: Node) -> Node:
    """A result must be a tensor: a number becomes one of the shape of `like`."""
    return graph.make("full_like", like, value) if value.op == "const" else value
