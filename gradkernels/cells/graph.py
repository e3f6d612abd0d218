"""The language of cells: its functions with their derivatives, and the graph that a cell becomes.

One table of rules serves both modes, because the Jacobian of an elementwise function is diagonal: `rule(g)` is the adjoint
of an argument when g is the adjoint of the result, and the tangent of the result when g is the tangent of the argument.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable
from typing import Any

# function(arguments): the contribution of each argument, in the language itself; y is the result. None: no derivative.
_RULES = {
    "add(a, b)": ("g", "g"),
    "sub(a, b)": ("g", "-g"),
    "mul(a, b)": ("g * b", "g * a"),
    "div(a, b)": ("g / b", "-(g / b) * y"),
    "neg(a)": ("-g",),
    "pow(a, n)": ("g * (n * a ** (n - 1))", None),
    "sigmoid(a)": ("g * (y * (1 - y))",),
    "tanh(a)": ("g * (1 - y * y)",),
    "relu(a)": ("where(y <= 0, 0, g)",),  # a NaN passes the gradient on, as in torch
    "exp(a)": ("g * y",),
    "expm1(a)": ("g * (y + 1)",),
    "log(a)": ("g / a",),
    "log1p(a)": ("g / (1 + a)",),
    "sqrt(a)": ("g / (2 * y)",),
    "sin(a)": ("g * cos(a)",),
    "cos(a)": ("-g * sin(a)",),
    "erf(a)": ("g * (1.1283791670955126 * exp(-(a * a)))",),  # 2 / sqrt(pi)
    "softplus(a)": ("g * sigmoid(a)",),
    "abs(a)": ("g * sign(a)",),
    "sign(a)": (None,),
    # equal arguments share the gradient, and both get it where one is NaN, as in torch
    "min(a, b)": ("where(a > b, 0, where(a >= b, 0.5 * g, g))", "where(a < b, 0, where(a <= b, 0.5 * g, g))"),
    "max(a, b)": ("where(a < b, 0, where(a <= b, 0.5 * g, g))", "where(a > b, 0, where(a >= b, 0.5 * g, g))"),
    "where(c, a, b)": (None, "where(c, g, 0)", "where(c, 0, g)"),
    "lt(a, b)": (None, None),
    "gt(a, b)": (None, None),
    "le(a, b)": (None, None),
    "ge(a, b)": (None, None),
    "mean(a)": ("mean(g)",),  # over the units of a row: its own adjoint
    "full_like(a, n)": (None, None),  # a number where a value is wanted, of the shape of a
}
# Written in terms of the others.
_MACROS = {
    "square(a)": "a * a",
    "rsqrt(a)": "1 / sqrt(a)",
    "silu(a)": "a * sigmoid(a)",
    "softsign(a)": "a / (1 + abs(a))",
    "clamp(a, lo, hi)": "where(a < lo, lo, where(a > hi, hi, a))",  # at a bound the gradient passes, as in torch
}


def _signatures(table: dict) -> dict[str, tuple[list[str], Any]]:
    """{"mul(a, b)": rules} -> {"mul": (["a", "b"], rules)}"""
    split = {head: head.rstrip(")").split("(") for head in table}
    return {split[head][0]: (split[head][1].split(", "), body) for head, body in table.items()}


RULES = _signatures(_RULES)
MACROS = _signatures(_MACROS)
OPERATORS: dict[type, str] = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow"}
COMPARES: dict[type, str] = {ast.Lt: "lt", ast.Gt: "gt", ast.LtE: "le", ast.GtE: "ge"}
CONDITIONS = set(COMPARES.values())
_HIDDEN = {*OPERATORS.values(), *CONDITIONS, "neg", "full_like"} - {"pow"}  # not reached by name
VOCABULARY = sorted((set(RULES) - _HIDDEN) | set(MACROS))
COSTLY = set(RULES) - _HIDDEN - {"relu", "abs", "sign", "min", "max", "where"}

# What a function does to numbers, so that a constant expression is one number in the printed text.
NUMBERS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "pow": math.pow,
    "sigmoid": lambda a: 0.5 * (1 + math.tanh(0.5 * a)),
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
    "exp": math.exp,
    "expm1": math.expm1,
    "log": math.log,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "erf": math.erf,
    "softplus": lambda a: max(a, 0.0) + math.log1p(math.exp(-abs(a))),
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "min": min,
    "max": max,
    "mean": lambda a: a,
    "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "ge": lambda a, b: a >= b,
}


EXTRA = ("p", "m", "d")  # groups that a cell may have beside x, r and s, in the order of arguments
THERE = ("s", *EXTRA)  # groups that are at hand in backward without being kept


class Node:
    """An operation on other nodes, a number ("const"), or a value from outside ("leaf": group and index)."""

    __slots__ = ("args", "hint", "name", "op", "order")

    def __init__(self, op: str, args: tuple, order: int):
        self.op, self.args, self.order = op, args, order
        self.name: str | None = None  # what the author called it
        self.hint: str | None = None  # what we would call it

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})"

    @property
    def is_leaf(self) -> bool:
        return self.op in ("const", "leaf")

    @property
    def is_condition(self) -> bool:
        return self.op in CONDITIONS

    @property
    def number(self) -> float | None:
        return self.args[0] if self.op == "const" else None

    @property
    def inputs(self) -> list[Node]:
        return [a for a in self.args if isinstance(a, Node)]


class Graph:
    """Nodes made once: equal expressions are the same node."""

    def __init__(self) -> None:
        self.table: dict[tuple, Node] = {}

    def make(self, op: str, *args: Any) -> Node:
        key = tuple(a.order if isinstance(a, Node) else a for a in args)
        key = (op, *(sorted(key) if op in ("add", "mul") else key))
        if key not in self.table:
            self.table[key] = Node(op, args, len(self.table))
        return self.table[key]

    def leaf(self, group: str, index: int | None = None) -> Node:
        return self.make("leaf", group, index)

    def const(self, value: float) -> Node:
        if not math.isfinite(value):
            raise ArithmeticError(f"a number of a cell must be finite, this is {value}")
        return self.make("const", float(value))

    def call(self, op: str, *args: Node) -> Node:
        """`make` with the identities that keep derived code short. ArithmeticError or ValueError: numbers that have no result."""
        v = [a.number for a in args]
        if op in NUMBERS and None not in v:
            return self.const(NUMBERS[op](*v))
        match op, args, v:
            case "neg", [a], _ if a.op == "neg":
                return a.args[0]
            case "add", [a, b], [0, _]:
                return b
            case (("add" | "sub"), [a, b], [_, 0]):
                return a
            case "add", [a, b], _ if b.op == "neg":
                return self.call("sub", a, b.args[0])
            case "sub", [a, b], _ if b.op == "neg":
                return self.call("add", a, b.args[0])
            case "sub", [a, b], [0, _]:
                return self.call("neg", b)
            case "mul", [a, b], [1, _]:
                return b
            case (("mul" | "div" | "pow"), [a, b], [_, 1]):
                return a
            case "mul", [a, b], [-1, _]:
                return self.call("neg", b)
            case "mul", [a, b], _ if a.op == "neg":
                return self.call("neg", self.call("mul", a.args[0], b))
            case "mul", [a, b], _ if b.op == "neg":
                return self.call("neg", self.call("mul", a, b.args[0]))
            case "pow", [a, b], [_, 0]:
                return self.const(1)
            # products are cheaper than a call, and exact
            case "pow", [a, b], [_, n] if n is not None and n == int(n) and 2 <= n <= 8:
                half = self.call("pow", a, self.const(n // 2))
                square = self.make("mul", half, half)
                return square if n % 2 == 0 else self.make("mul", square, a)
            case "where", [_, a, b], [c, _, _] if c is not None:
                return a if c else b
            # torch would choose a dtype of its own for two numbers
            case "where", [c, a, b], [_, m, n] if m is not None and n is not None:
                like = next(u for u in c.args if u.op != "const")
                return self.make("where", c, self.make("full_like", like, a), b)
        return self.make(op, *args)


class Group:
    """x, r, s, p, m or d: leaves made when they are read, so that sizes are inferred."""

    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name
        self.read: set[int] = set()

    @property
    def size(self) -> int:
        return max(self.read, default=-1) + 1

    def __getitem__(self, k: int) -> Node:
        self.read.add(k)
        return self.graph.leaf(self.name, k)


class Products(Group):
    """r: `r[k]` is the product of s[0]; `r[k](v)` is the product of another value, the operand, of which a cell has one."""

    def __init__(self, graph: Graph, name: str):
        super().__init__(graph, name)
        self.operand: Node | None = None
        self.second: dict[int, Any] = {}  # gate -> where it was written

    @property
    def size(self) -> int:
        return max([*self.read, *self.second], default=-1) + 1


def reach(nodes: Iterable[Node]) -> list[Node]:
    """Every node that these need, in the order in which they were made: arguments before results."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            todo += n.inputs
    return sorted(seen, key=lambda n: n.order)
