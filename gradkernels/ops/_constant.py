"""A mark for Dynamo that does not import Dynamo, which takes longer than everything of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """As torch.compiler.assume_constant_result: while a graph is made the function is called, and its result is a constant there."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
