"""Straight-line Python from nodes: a line for what the author named or what is used twice, the rest written in place."""

from __future__ import annotations

import ast
import keyword
from collections.abc import Iterable

from .graph import COMPARES, OPERATORS, VOCABULARY, Node

# Names that generated functions keep for their arguments and results, and the words that C++ does not have as names.
_OWN = "x r s p m d a t dt v dv dx dr ds dp dd total G S P M D A Q V name shared full_like"
_CPP = """
auto bool case catch char const constexpr default delete do double enum explicit export extern false float friend goto inline
int long mutable namespace new noexcept operator private protected public register short signed sizeof static struct switch
template this throw true typedef typeid typename union unsigned using virtual void volatile wchar_t
"""
_OPERATORS = {name: kind for kind, name in OPERATORS.items() if name != "pow"}
_COMPARES = {name: kind for kind, name in COMPARES.items()}


class Printer:
    """Collects the lines of one function."""

    def __init__(self, given: dict[Node, str] | None = None, width: int = 100):
        self.given = dict(given or {})  # node -> text that is available
        self.width = width
        self.taken = {*_OWN.split(), *_CPP.split(), *keyword.kwlist, *VOCABULARY}
        self.lines: list[str] = []

    def name(self, node: Node, hint: str | None) -> str:
        """A new variable for this node."""
        text, k = hint or "u1", 1
        while text in self.taken:
            text, k = f"{hint or 'u'}{k}", k + 1
        self.taken.add(text)
        self.given[node] = text
        return text

    def tree(self, node: Node) -> ast.expr:
        if node in self.given:
            return ast.parse(self.given[node], mode="eval").body
        if node.number is not None:
            v = node.number
            return ast.parse(repr(int(v)) if v == int(v) and abs(v) < 1e6 else repr(v), mode="eval").body
        if node.op == "leaf":
            group, index = node.args
            return ast.parse(group if index is None else f"{group}[{index}]", mode="eval").body
        args = [self.tree(a) for a in node.args]
        if node.op in _OPERATORS:
            return ast.BinOp(args[0], _OPERATORS[node.op](), args[1])
        if node.op in _COMPARES:
            return ast.Compare(args[0], [_COMPARES[node.op]()], [args[1]])
        return (
            ast.UnaryOp(ast.USub(), args[0]) if node.op == "neg" else ast.Call(ast.Name(node.op, ast.Load()), args, [])
        )

    def text(self, node: Node) -> str:
        return ast.unparse(self.tree(node))

    def group(self, nodes: Iterable[Node]) -> str:
        inner = [self.text(n) for n in nodes]
        return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"

    def body(self, results: list[Node]) -> None:
        """Emit lines for everything that the results need."""
        order: list[Node] = []
        seen: set[Node] = set()

        def visit(n: Node) -> None:
            if n not in seen and n not in self.given and not n.is_leaf:
                seen.add(n)
                for a in n.inputs:
                    visit(a)
                order.append(n)

        for r in results:
            visit(r)
        order.sort(key=lambda n: n.order)
        uses: dict[Node, int] = {}
        for used in [*(a for n in order for a in n.inputs), *results]:
            uses[used] = uses.get(used, 0) + 1
        for n in order:
            # a mean is a line of its own: there the drivers that share the units of a row cut the function
            if n.name or n.op == "mean" or uses.get(n, 0) > 1 or len(self.text(n)) > self.width:
                text = self.text(n)
                self.lines.append(f"{self.name(n, n.name or n.hint)} = {text}")

    def define(self, function: str, parameters: list[str], result: str) -> str:
        lines = [*self.lines, f"return {result}"]
        return f"def {function}({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in lines)
