"""What is the same for all units of a row by itself: a function computes it once a row, and not once a unit."""

from __future__ import annotations

import ast
from typing import Any

from .hasten import Rows, assign, is_mean, targets


class _Lift(ast.NodeTransformer):
    """Expressions of means alone become variables; a division by one of them becomes a product with its reciprocal."""

    def __init__(self, taken: set[str]) -> None:
        self.rows, self.taken = Rows(), taken
        self.known: dict[str, str] = {}  # a variable by the text of what it is
        self.out: list[ast.Assign] = []

    def add(self, statement: ast.Assign) -> None:
        self.rows.note(statement)
        self.out.append(statement)
        (target,) = statement.targets
        if isinstance(target, ast.Name) and target.id in self.rows.of_row and not is_mean(statement):
            self.known.setdefault(ast.unparse(statement.value), target.id)

    def of_means(self, node: ast.expr) -> bool:
        return self.rows.uniform(node) and self.rows.ready(node) > 0 and not isinstance(node, ast.Compare)

    def variable(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name):
            return node
        text = ast.unparse(node)
        if text not in self.known:
            name = next(n for k in range(len(self.taken) + 1) if (n := f"row{k or ''}") not in self.taken)
            self.taken.add(name)
            self.add(assign(name, node))
        return ast.Name(self.known[text], ast.Load())

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and self.of_means(node):
            return self.variable(node)
        match node:
            case ast.Call(func=func, args=args):
                return ast.Call(func, [self.visit(a) for a in args], [])
            case ast.BinOp(left=left, op=ast.Div(), right=right) if self.of_means(right):
                inverse = ast.BinOp(ast.Constant(1), ast.Div(), self.variable(right))
                return ast.BinOp(self.visit(left), ast.Mult(), self.variable(inverse))
        return self.generic_visit(node)


def lift(statements: list[ast.Assign], result: ast.stmt) -> tuple[list[ast.Assign], ast.stmt]:
    """The same statements, and the one that returns something.

    >>> f = '''
    ... u1 = mean(x * x)
    ... scale = 1 / sqrt(u1 + 1)
    ... return x / (2 * sqrt(u1 + 1)) + x * scale
    ... '''
    >>> *statements, result = ast.parse(f).body
    >>> statements, result = lift(statements, result)
    >>> print(*map(ast.unparse, [*statements, result]), sep="\\n")
    u1 = mean(x * x)
    scale = 1 / sqrt(u1 + 1)
    row = 2 * sqrt(u1 + 1)
    row1 = 1 / row
    return x * row1 + x * scale
    """
    walk = _Lift({name for s in statements for name in targets(s)})
    for s in statements:
        alone = walk.of_means(s.value) and not is_mean(s)
        walk.add(s if alone else ast.fix_missing_locations(ast.Assign(s.targets, walk.visit(s.value))))
    result = walk.visit(result)
    return walk.out, ast.fix_missing_locations(result)
