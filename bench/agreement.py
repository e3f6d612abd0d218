"""No time without agreement: before a case is timed, its outputs and gradients are held against torch's and a truth in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import Case
from bench.layers import Layer
from bench.providers import build
from tests.close import allowed, error


class Disagreement(AssertionError):
    """Ours is further from the truth than the tolerance rule allows: a time of it would mean nothing."""


TOKENS = 333  # of attention, norms and convolutions there: more than one tile of everything, the last of them not full
STEPS = 48  # of a sequence on a GPU that are compared: what runs there does not depend on the number of steps


def peer(case: Case) -> str:
    """Who computes the same in torch."""
    found = next((key for key in case.providers[1:] if not key.startswith("ours")), "torch")
    return "loop" if found == "compiled" else found


def shortened(case: Case) -> Case:
    """The case itself; on a GPU with fewer steps, since the truth in float64 takes its time."""
    if isinstance(case, Layer) and case.device != "cpu":
        return replace(case, T=min(case.T, TOKENS), B=min(case.B, 2))
    if case.device == "cpu" or case.T <= STEPS:
        return case
    return replace(case, T=STEPS, tokens=case.tokens and max(STEPS, case.tokens * STEPS // case.T))


def agree(case: Case, seen: dict[Case, dict[str, object]] | None = None) -> dict[str, object]:
    """The result that came closest to what the rule allows: its name, our error, torch's, and what is allowed.

    Outputs, final states and, when training, the gradients of the input and of every parameter. Disagreement names all that are off.
    seen: what was checked before, by case; rows that differ only in what is measured of them are checked once.
    """
    case = shortened(case.exact())
    subject, other = case.providers[0], peer(case)
    key = replace(case, group="", kind="time", targets=(), providers=(subject, other))
    if seen is not None and key in seen:
        return seen[key]
    ours, theirs = build(case, subject).results(), build(case, other).results()
    truth = build(replace(case, providers=(subject, other)), other, torch.float64).results()
    if ours.keys() != theirs.keys():
        raise Disagreement(f"{sorted(ours)} against {sorted(theirs)}")
    worst: dict[str, object] = {}
    tightest, wrong = -1.0, []
    for name, x in ours.items():
        if x.shape != theirs[name].shape:
            raise Disagreement(f"{name}: shape {list(x.shape)} against {list(theirs[name].shape)}")
        got, own, most = error(x, truth[name]), error(theirs[name], truth[name]), allowed(theirs[name], truth[name])
        if not got <= most:
            wrong.append(f"{name} is off by {got:.2e}, torch by {own:.2e}, allowed {most:.2e}")
        if most > 0 and got / most > tightest:
            tightest = got / most
            worst = {"what": name, "error": got, "torch_error": own, "allowed": most}
    if wrong:
        raise Disagreement("; ".join(wrong))
    if seen is not None:
        seen[key] = worst
    return worst
