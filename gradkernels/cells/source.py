"""The text of a function, and what the names in it mean."""

from __future__ import annotations

import ast
import builtins
import functools
import linecache
import math
import types
from typing import Any, NoReturn

from .graph import VOCABULARY


def fail(filename: str, node: ast.AST, message: str) -> NoReturn:
    """SyntaxError at this node. Its columns count characters where ast counts bytes."""
    place: Any = node  # every node that gets here has a position
    line = linecache.getline(filename, place.lineno)
    column = lambda offset: len(line.encode()[:offset].decode(errors="ignore")) + 1
    end = column(place.end_col_offset) if place.end_lineno == place.lineno else len(line)
    raise SyntaxError(message, (filename, place.lineno, column(place.col_offset), line, place.lineno, end))


class Known(str):
    """The name of a function of the language."""

    __slots__ = ()


def meaning(value: Any) -> Any:
    """Known, where this is a function that the author imported from somewhere else; else the thing itself."""
    try:
        name = _known_functions().get(value)
    except TypeError:  # unhashable
        return value
    return Known(name) if name else value


@functools.cache
def _known_functions() -> dict[Any, str]:
    """Functions that the author may have imported, by identity."""
    import torch
    import torch.nn.functional as F

    known: dict[Any, str] = {getattr(builtins, n): n for n in ("abs", "min", "max", "pow")}
    for n in VOCABULARY:
        for module in (torch, F, math):
            if callable(getattr(module, n, None)):
                known[getattr(module, n)] = n
    known |= {torch.minimum: "min", torch.maximum: "max", math.fabs: "abs"}
    del known[torch.mean]  # reduces over everything: not the mean over units
    return known


def scope(function: types.FunctionType) -> dict[str, Any]:
    """What the names of a function mean: its closure over its globals."""
    names = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not assigned yet: an unknown name if it is used
            names.pop(name, None)
    return names


def find(function: types.FunctionType) -> tuple[ast.FunctionDef | ast.Lambda, str]:
    """The syntax tree of a function with its file's own line numbers, and the file; lambdas on one line by their column."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    first = code.co_firstlineno

    def refuse(message: str) -> NoReturn:
        raise SyntaxError(message, (code.co_filename, first, 1, lines[first - 1] if len(lines) >= first else ""))

    if not lines:
        refuse(f"'{code.co_name}' has no source text: a cell must come from a file or a notebook cell")
    found: list[ast.FunctionDef | ast.Lambda] = []
    for node in ast.walk(ast.parse("".join(lines), code.co_filename)):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            if first in (node.lineno, *(d.lineno for d in node.decorator_list)):
                found.append(node)
        elif isinstance(node, ast.Lambda) and (code.co_name, first) == ("<lambda>", node.lineno):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            if names == list(code.co_varnames[: code.co_argcount]) and _inside(code, node.body):
                found.append(node)
    if not found:
        refuse(f"'{code.co_name}' was not found on this line: has the file changed since it was read?")
    if len(found) > 1 and not hasattr(code, "co_positions"):
        refuse("lambdas on one line cannot be told apart before Python 3.11; give each a line of its own")
    return found[-1], code.co_filename  # the innermost


def _inside(code: types.CodeType, body: Any) -> bool:
    """Whether the first instruction of this code lies in this expression."""
    if not hasattr(code, "co_positions"):
        return True
    for line, end_line, column, end_column in code.co_positions():
        if None not in (line, column) and line == end_line and column != end_column:
            return (body.lineno, body.col_offset) <= (line, column) <= (body.end_lineno, body.end_col_offset)
    return True
