"""Ours, but by another plan than the planner's own: the key of a provider says which.

ours:backend=triton                      another backend
ours:kind=step                           a kernel for every step
ours:exchange=grid                       the best of one kind of exchange: cluster | grid
ours:exchange=cluster,C=8,N=16,WM=4      and the best of those with these sizes (fields of Variant, and `team`)
ours:forward.C=8,backward.C=16           each for one direction in time
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import providers
from bench.cases import Case


def parsed(text: str) -> dict[str, str | int]:
    """'exchange=grid,C=4' as a dictionary. ValueError for what is no such list."""
    found: dict[str, str | int] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"a pick is NAME=VALUE,..., got {text!r}")
        found[name] = int(value) if value.lstrip("-").isdigit() else value
    return found


@contextlib.contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    """The module with other values of these names, for as long as the block runs."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@functools.cache
def planned(pick: str, machine: Any, cell: Any, number: str, H: int, B: int, which: str, norms: bool = False) -> Any:
    """As plan.plan, but of what the pick leaves. RuntimeError, with what was refused and why, where that is nothing."""
    from gradkernels.backends.cuda import costs, plan

    asked = {
        name.removeprefix(f"{which}."): value
        for name, value in parsed(pick).items()
        if "." not in name or name.startswith(f"{which}.")
    }
    if asked.get("kind") == "step":
        return plan.Plan("step", None, 0, 0, "asked for", (), math.inf)
    every = plan._forms

    def forms(*args: Any) -> Iterator[Any]:
        for variant, team in every(*args):
            if all((team if k == "team" else getattr(variant, k)) == v for k, v in asked.items()):
                yield variant, team

    whatever = patched(costs, step=lambda *_: math.inf)
    with whatever, patched(plan, _forms=forms, _candidates=plan._candidates.__wrapped__):
        found = plan._plan.__wrapped__(machine, cell, number, H, B, which, norms)
    if found.kind == "step":
        raise RuntimeError(f"no plan with {pick}: {'; '.join(f'{what}: {why}' for what, why in found.refused)}")
    return found


class Picked(providers.Provider):
    """A provider that runs by the plan of its key."""

    def by_its_plan(self) -> contextlib.AbstractContextManager[None]:
        from gradkernels.backends.cuda import plan

        return patched(plan, plan=functools.partial(planned, self.key.partition(":")[2]))

    def run(self) -> None:
        with self.by_its_plan():
            super().run()

    def results(self) -> dict[str, Tensor]:
        with self.by_its_plan():
            return super().results()


def build(case: Case, key: str, dtype: torch.dtype) -> providers.Provider:
    """The provider of such a key. ValueError for a pick that is none."""
    asked = parsed(key.partition(":")[2])
    kind = providers.Provider if "backend" in asked else Picked
    made = providers.build(replace(case, backend=str(asked.get("backend", "cuda"))), "ours", dtype)
    return kind(key, made.module, made.call, made.x, case)
