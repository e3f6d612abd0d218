"""From the text of a straight-line function to a graph. Anything else is a SyntaxError at the author's own line and column."""

from __future__ import annotations

import ast
import difflib
import functools
import types
from typing import Any, NoReturn

from .bind import Cell
from .graph import COMPARES, MACROS, OPERATORS, RULES, VOCABULARY, Graph, Group, Node, Products, reach
from .inline import inline
from .source import Known, fail, find, meaning, scope

_NAMES = {  # what people call them
    ast.If: "a branch",
    ast.IfExp: "a branch",
    ast.Match: "a branch",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.ListComp: "a loop",
    ast.SetComp: "a loop",
    ast.DictComp: "a loop",
    ast.GeneratorExp: "a loop",
    ast.BoolOp: "'and' or 'or'",
    ast.Return: "an empty return",
    ast.Assert: "an assertion",
    ast.Constant: "a constant that is no number",
    ast.FunctionDef: "a function inside a function",
    ast.Lambda: "a function inside a function",
    ast.NamedExpr: "':='",
    ast.Expr: "a line that gives nothing a name",
}
_HINTS = {  # what to do instead
    "a branch": "; use where(condition, a, b)",
    "a loop": "; write out what it would repeat",
    "a line that gives nothing a name": ": the text is read, never run",
}
_TARGETS = "only names and tuples of names can be assigned"


class Reader:
    """Reads one function; helpers that it calls are read in place by readers of their own."""

    def __init__(self, graph: Graph, filename: str = "<rule>", outer: dict | None = None, calls: tuple = ()):
        self.graph, self.filename, self.outer, self.calls = graph, filename, outer or {}, calls
        self.env: dict[str, Any] = {}
        self.returned: ast.AST | None = None  # what is returned, once read

    def error(self, node: ast.AST, message: str) -> NoReturn:
        fail(self.filename, node, message)

    def refuse(self, node: ast.AST) -> NoReturn:
        what = _NAMES.get(type(node), f"'{type(node).__name__.lower()}'")
        self.error(node, f"a cell is straight-line arithmetic: {what} is not allowed{_HINTS.get(what, '')}")

    def parameters(self, node: ast.FunctionDef | ast.Lambda) -> list[str]:
        a = node.args
        if a.vararg or a.kwonlyargs or a.kwarg or a.defaults:
            self.error(node, "functions of a cell have plain positional parameters, without defaults")
        return [p.arg for p in (*a.posonlyargs, *a.args)]

    # -- statements

    def function(self, node: ast.FunctionDef | ast.Lambda, arguments: list) -> Any:
        self.env = dict(zip(self.parameters(node), arguments))
        if isinstance(node, ast.Lambda):
            self.returned = node.body
            return self.value(node.body)
        for k, statement in enumerate(node.body):
            match statement:
                case ast.Expr(value=ast.Constant(value=str())) if k == 0:  # docstring
                    pass
                case ast.Assign(targets=targets, value=value):
                    result = self.value(value)
                    for target in targets:
                        self.assign(target, result)
                case ast.AnnAssign(target=target, value=value) if value:
                    self.assign(target, self.value(value))
                case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                    before = ast.copy_location(ast.Name(name, ast.Load()), target)
                    self.assign(target, self.binary(statement, op, self.scalar(before), self.scalar(value)))
                case ast.AugAssign(target=target):
                    self.error(target, _TARGETS)
                case ast.Return(value=value) if value:
                    self.returned = value
                    return self.value(value)
                case _:
                    self.refuse(statement)
        self.error(node, "a cell must return its new states")

    def assign(self, target: ast.AST, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                if isinstance(value, Node) and not value.is_leaf and value.name is None:
                    value.name = name
                self.env[name] = value
            case ast.Tuple(elts=elts) | ast.List(elts=elts) if not isinstance(value, Node):
                if isinstance(value, Group):
                    value = [self.item(target, value, k) for k in range(len(elts))]
                if len(elts) != len(value):
                    self.error(target, f"{len(elts)} names for {len(value)} values")
                for e, v in zip(elts, value):
                    self.assign(e, v)
            case _:
                self.error(target, _TARGETS)

    # -- expressions

    def scalar(self, node: ast.AST) -> Node:
        value = self.value(node)
        if not isinstance(value, Node):
            self.error(node, "a single value is wanted here, not a group of them; index it, as in x[0]")
        if value.is_condition:
            self.error(node, "a comparison is the condition of where(condition, a, b) and nothing else")
        return value

    def value(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=(int() | float()) as number) if not isinstance(number, bool):
                return self.constant(node, number)
            case ast.Name(id=name):
                return self.env[name] if name in self.env else self.foreign(node, self.resolve(node, name))
            case ast.Attribute() if _root(node) in self.env:
                self.error(node, "a value has no attributes: it is a number to a cell, of one unit of one row")
            case ast.Attribute():
                return self.foreign(node, self.attribute(node))
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return tuple(self.value(e) for e in elts)
            case ast.Subscript(value=group, slice=index):
                values, k = self.value(group), self.index(index)
                if isinstance(values, Node):
                    self.error(node, "a value cannot be indexed: a cell sees one unit of one row at a time")
                return self.item(node, values, k)
            case ast.UnaryOp(op=ast.USub(), operand=a):
                return self.apply(node, "neg", self.scalar(a))
            case ast.UnaryOp(op=ast.UAdd(), operand=a):
                return self.scalar(a)
            case ast.BinOp(left=a, op=op, right=b):
                return self.binary(node, op, self.scalar(a), self.scalar(b))
            case ast.Call(func=f, args=args, keywords=keywords):
                return self.call(node, f, args, keywords)
            case ast.Compare(left=a, ops=[op], comparators=[b]) if type(op) in COMPARES:
                return self.graph.call(COMPARES[type(op)], self.scalar(a), self.scalar(b))
            case ast.Compare():
                self.error(node, "a condition is one comparison: a < b, a <= b, a > b or a >= b")
        self.refuse(node)

    def item(self, node: ast.AST, values: Any, k: int) -> Any:
        if isinstance(values, Products) and k in values.second:
            self.error(node, f"r[{k}] is the product of another value elsewhere; it can be only one of the two")
        if not isinstance(values, Group) and k >= len(values):
            self.error(node, f"index {k} in a tuple of {len(values)}")
        return values[k]

    def condition(self, node: ast.AST) -> Node:
        value = self.value(node)
        if not isinstance(value, Node) or not (value.is_condition or value.op == "const"):
            self.error(node, "a condition is one comparison: a < b, a <= b, a > b or a >= b")
        return value

    def index(self, node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int() as k) if not isinstance(k, bool):
                return k
            case ast.Name() if isinstance(number := self.value(node), Node) and number.op == "const":
                k = int(number.args[0])
                if k == number.args[0] and k >= 0:
                    return k
            case ast.UnaryOp(op=ast.USub()):
                self.error(node, "an index counts from 0: how many values there are is inferred from the largest one")
        self.error(node, "an index must be a plain number")

    def constant(self, node: ast.AST, number: float) -> Node:
        try:
            return self.graph.const(number)
        except (ArithmeticError, ValueError) as e:
            self.error(node, str(e))

    def apply(self, node: ast.AST, op: str, *args: Node) -> Node:
        try:
            return self.graph.call(op, *args)
        except (ArithmeticError, ValueError) as e:
            self.error(node, f"this has no finite value: {e}")

    def binary(self, node: ast.AST, op: ast.AST, a: Node, b: Node) -> Node:
        if type(op) not in OPERATORS:
            self.error(node, f"operator {type(op).__name__} is not elementwise arithmetic; a cell has + - * / **")
        if isinstance(op, ast.Pow) and b.op != "const":
            self.error(node, "a power must be a number; write exp(b * log(a))")
        return self.apply(node, OPERATORS[type(op)], a, b)

    # -- calls

    def call(self, node: ast.Call, f: ast.AST, args: list, keywords: list) -> Any:
        if keywords or any(isinstance(a, ast.Starred) for a in args):
            self.error(node, "functions of a cell take plain positional arguments")
        target: Any
        match f:
            case ast.Subscript(value=ast.Name(id=name), slice=index) if isinstance(self.env.get(name), Products):
                return self.product(node, self.env[name], self.index(index), args)
            case ast.Name(id=name) if name not in self.env:
                target = self.resolve(f, name)
            case ast.Attribute() if _root(f) not in (None, *self.env):
                target = self.attribute(f)
            case ast.Attribute():
                self.error(
                    node,
                    f"methods are not allowed on a value, a number of one unit; functions of a cell are {', '.join(VOCABULARY)}",
                )
            case _ if _root(f) in self.env:
                self.error(node, f"{ast.unparse(f)} is a value and no function; only r[k](v) is called like one")
            case _:
                self.error(
                    f, f"a function of a cell is called by a name: give {ast.unparse(f)} one, outside of the cell"
                )
        if isinstance(target, Known):
            return self.known(node, target, args)
        if isinstance(target, Cell):
            return self.cell(node, target, [self.value(a) for a in args])
        if isinstance(target, types.FunctionType):  # the author's own helper: read in place
            return self.helper(node, target, [self.value(a) for a in args])
        self.error(
            f,
            f"{ast.unparse(f)} is no function of a cell, which sees one unit at a time; those are {', '.join(VOCABULARY)}",
        )

    def known(self, node: ast.Call, name: str, args: list) -> Node:
        wanted = (RULES.get(name) or MACROS[name])[0]
        if len(args) != len(wanted):
            self.error(node, f"{name}({', '.join(wanted)}) takes {_count(wanted)}, {len(args)} given")
        if name == "where":
            return self.apply(node, name, self.condition(args[0]), self.scalar(args[1]), self.scalar(args[2]))
        values = [self.scalar(a) for a in args]
        if name == "pow":
            return self.binary(node, ast.Pow(), *values)
        if name in MACROS:
            return self.text(MACROS[name][1], dict(zip(wanted, values)), node)
        return self.apply(node, name, *values)

    def helper(self, node: ast.Call, function: types.FunctionType, values: list) -> Any:
        if function in self.calls:
            self.error(node, f"{function.__name__} calls itself")
        body, filename = find(function)
        inner = Reader(self.graph, filename, scope(function), (*self.calls, function))
        wanted = inner.parameters(body)
        if len(wanted) != len(values):
            self.error(node, f"{function.__name__}({', '.join(wanted)}) takes {_count(wanted)}, {len(values)} given")
        return inner.function(body, values)

    def cell(self, node: ast.Call, cell: Cell, values: list) -> tuple[Node, ...]:
        """Another cell's step on groups or tuples of this one's values -> its new states."""
        wanted = ["x", "r", "s", *cell.extra]
        if len(values) != len(wanted):
            self.error(node, f"{cell.name}({', '.join(wanted)}) takes {_count(wanted)}, {len(values)} given")
        sizes = [cell.G, cell.G, cell.S, *(getattr(cell, name.upper()) for name in cell.extra)]
        for name, value, size in zip(wanted, values, sizes):
            if isinstance(value, Node) or (isinstance(value, tuple) and len(value) != size):
                self.error(node, f"{cell.name} takes {size} value{'s' * (size != 1)} {name}")
        x, r, s, *extra = values
        if not isinstance(r, Products):
            self.error(node, f"the recurrent products of {cell.name} are r itself")
        take = lambda group, size: [group[k] for k in range(size)]
        return inline(cell, self, take(x, cell.G), r, take(s, cell.S), [*map(take, extra, sizes[3:])], node)

    def product(self, node: ast.Call, r: Products, k: int, args: list) -> Node:
        """r[k](v)"""
        if len(args) != 1:
            self.error(node, f"r[{k}](v) is the product of one value, {len(args)} given")
        v = self.scalar(args[0])
        if v is self.graph.leaf("s", 0):  # that is r[k] itself
            return self.value(node.func)
        if v.op == "const":
            self.error(node, f"r[{k}](v) is the product of a value, not of a number")
        return self.take_product(node, r, k, v)

    def take_product(self, node: ast.AST, r: Products, k: int, v: Node) -> Node:
        for gate in (*r.second, k):
            if self.graph.leaf(r.name, gate) in reach([v]):
                self.error(node, f"r[{k}](v) needs a v that does not depend on r[{gate}], a product of v itself")
        if r.operand not in (None, v):
            self.error(node, "a cell has one operand: another product was taken of another value")
        if k in r.read:
            self.error(node, f"r[{k}] is the product of s[0] elsewhere; it can be only one of the two")
        r.operand = v
        r.second.setdefault(k, (self, node))
        return self.graph.leaf(r.name, k)

    def text(self, text: str, env: dict, at: ast.AST | None = None) -> Node:
        """An expression of ours, such as a rule, over nodes; an error in it is reported where the author called for it."""
        inner = _Inner(self.graph, self, at) if at else Reader(self.graph)
        inner.env = env
        return inner.scalar(_parse(text))

    # -- names

    def attribute(self, node: ast.Attribute) -> Any:
        match node.value:
            case ast.Name(id=name):
                value = self.resolve(node, name)
            case ast.Attribute():
                value = self.attribute(node.value)
            case _:
                self.refuse(node)
        value = getattr(value, node.attr, None)
        if value is None:
            self.error(node, f"unknown name '{ast.unparse(node)}'")
        return meaning(value)

    def resolve(self, node: ast.AST, name: str) -> Any:
        """The author's own binding, else the vocabulary."""
        if name in self.outer:
            return meaning(self.outer[name])
        if name in VOCABULARY:
            return Known(name)
        names = [*VOCABULARY, *self.env, *(k for k in self.outer if not k.startswith("_"))]
        near = difflib.get_close_matches(name, names, 1, 0.75)
        hint = f"did you mean {near[0]}? F" if near else "f"
        self.error(node, f"unknown name '{name}'; {hint}unctions of a cell are {', '.join(VOCABULARY)}")

    def foreign(self, node: ast.AST, value: Any) -> Any:
        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
        if number(value):
            return self.constant(node, value)
        if isinstance(value, tuple) and all(map(number, value)):
            return tuple(self.constant(node, v) for v in value)
        what = "function" if isinstance(value, Known) else type(value).__name__
        hint = "; a number for each unit is a parameter, p[k]" if what in ("Tensor", "Parameter", "ndarray") else ""
        self.error(
            node, f"'{ast.unparse(node)}' is a {what}; a cell can use numbers and call functions from outside{hint}"
        )


class _Inner(Reader):
    """Reads a text of ours and reports errors in it where the author caused them."""

    def __init__(self, graph: Graph, author: Reader, at: ast.AST):
        super().__init__(graph)
        self.author, self.at = author, at

    def error(self, node: ast.AST, message: str) -> NoReturn:
        self.author.error(self.at, message)


@functools.cache
def _parse(text: str) -> ast.AST:
    return ast.parse(text, mode="eval").body


def _root(node: ast.AST) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _count(parameters: list[str]) -> str:
    return "1 argument" if len(parameters) == 1 else f"{len(parameters)} arguments"
