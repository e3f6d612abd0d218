"""From the tensors of a walk to one launch: asks the planner, prepares what the blocks of a team share, hands over addresses.

Launches are asynchronous and tensors made here may be gone before the kernel runs: torch's allocator hands their memory only to
work that is queued behind it on the same stream.

Dims: T steps, B batch, N tokens, H hidden units, R width of the first state, G gates, S states, A kept values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradkernels.backends import _sequence
from gradkernels.backends._extra import Extra
from gradkernels.cells import Cell

from . import driver, plan, step
from .arguments import BackwardArgs, ForwardArgs, Team, address, addresses, extras

if TYPE_CHECKING:
    from .plan import Plan
    from .variant import Variant

NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COUNTERS = 32  # of a team in Team.arrivals: a cache line of its own


def number(dtype: torch.dtype) -> str:
    """The number type of platform.cuh in which products of this dtype are made now."""
    return "tf32" if dtype is torch.float32 and _sequence.tf32() else NUMBERS[dtype]


def _team(chosen: Plan, variant: Variant, like: Tensor) -> tuple[Team, list[Tensor]]:
    """What the blocks of a launch are told of one another, and the memory that it points to."""
    teams, bytes = chosen.blocks // chosen.team, variant.exchange_bytes(chosen.team)
    arrivals = like.new_zeros(teams, COUNTERS, dtype=torch.int32) if variant.cooperative else None
    exchange = like.new_empty(teams * bytes, dtype=torch.uint8) if bytes else None
    return Team(chosen.team, address(arrivals), address(exchange)), [v for v in (arrivals, exchange) if v is not None]


def _named(e: RuntimeError, chosen: Plan) -> RuntimeError:
    """The same error, saying which plan met it."""
    return type(e)(f"{e}\nThe plan was: {chosen.why}")


def forward(
    sizes: Tensor | None,  # [T] on the CPU: rows of each step in time; None: B, or only the device knows
    cell: Cell,
    gates: Tensor,  # [N, G*H]
    w_hh: Tensor,  # [G*H, R]
    b_hh: Tensor | None,  # [G*H]
    w_hr: Tensor | None,  # [R, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: _sequence.Steps,
    seq: Sequence[Tensor | None],  # S of [N, R], [N, H] ..
    final: Sequence[Tensor],  # S of [B, R], [B, H] ..
    raw: Tensor | None,  # [N, H]
    acts: Tensor | None,  # [N, A, H]
    extra: Extra,
) -> None:
    machine, kind = driver.machine(gates.device), number(gates.dtype)
    H = w_hh.shape[0] // cell.G
    chosen = plan.plan(machine, cell, kind, H, steps.B, "forward")
    try:
        if chosen.variant is None or w_hr is not None:
            known = None if sizes is None else sizes.tolist()
            step.forward(
                machine, kind, cell, gates, w_hh, b_hh, w_hr, state, steps, known, seq, final, raw, acts, extra
            )
            return
        team, shared = _team(chosen, chosen.variant, gates)
        args = ForwardArgs(
            step.walk(steps, H), team, extras(extra), address(gates), address(w_hh), address(b_hh), addresses(state), addresses(seq),
            addresses(final), address(acts),
        )  # fmt: skip
        machine.kernel(chosen.variant).launch(chosen.blocks, args)
        del shared  # until here it had to stay
    except RuntimeError as e:
        raise _named(e, chosen) from e


def backward(
    sizes: Tensor | None,  # as for forward
    cell: Cell,
    grads: Sequence[Tensor | None],  # S of [N, ..], S of [B, ..]; None is zero
    w_hh: Tensor,  # [G*H, R]
    w_hr: Tensor | None,  # [R, H]
    seq: Sequence[Tensor],  # S of [N, R], [N, H] ..
    raw: Tensor | None,  # [N, H]
    acts: Tensor,  # [N, A, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ..
    steps: _sequence.Steps,
    dgates: Tensor,  # [N, G*H]
    dr: Tensor,  # [N, G*H], the same tensor where no gate is split
    operand: Tensor | None,  # [N, H]
    dproj: Tensor | None,  # [N, R]
    dstate: Sequence[Tensor],  # S of [B, R], [B, H] ..
    norms: Tensor | None,  # float64 [T, S]
    dparams: Tensor | None,  # [N, P*H]
    extra: Extra,
) -> None:
    machine, kind = driver.machine(dgates.device), number(dgates.dtype)
    H = w_hh.shape[0] // cell.G
    chosen = plan.plan(machine, cell, kind, H, steps.B, "backward", norms=norms is not None)
    try:
        if chosen.variant is None or w_hr is not None:
            known = None if sizes is None else sizes.tolist()
            step.backward(
                machine, kind, cell, grads, w_hh, w_hr, seq, raw, acts, state, steps, known, dgates, dr, operand, dproj, dstate, norms,
                dparams, extra,
            )  # fmt: skip
            return
        team, shared = _team(chosen, chosen.variant, dgates)
        parts = None if norms is None else norms.new_zeros(steps.T, chosen.blocks, cell.S)
        args = BackwardArgs(
            step.walk(steps, H), team, extras(extra), address(w_hh), address(acts), addresses(seq), addresses(state), addresses(grads[: cell.S]),
            addresses(grads[cell.S :]), address(dgates), address(dr if cell.split else None), address(operand), addresses(dstate),
            address(parts), address(dparams),
        )  # fmt: skip
        machine.kernel(chosen.variant).launch(chosen.blocks, args)
        if parts is not None:
            torch.sum(parts, 1, out=norms)
        del shared
    except RuntimeError as e:
        raise _named(e, chosen) from e
