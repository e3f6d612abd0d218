"""Attention in torch operations, scores and all: the definition, on any device, differentiable to any order.

Dims: B sequences, Hq heads of queries, Hk of keys and values, Tq queries, Tk keys, D width of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends.reference import no_autocast, precise
from gradkernels.backends.reference.philox import factors


def why_not(*_: Any, **__: Any) -> None:
    """The definition runs everywhere."""


def visible(Tq: int, Tk: int, causal: bool, left: int, right: int, device: torch.device) -> Tensor | None:
    """Which keys a query sees, bool ``[Tq, Tk]``, the last query standing beside the last key; None: all of them."""
    if not causal and left < 0 and right < 0:
        return None
    here = torch.arange(Tq, device=device).unsqueeze(1) + (Tk - Tq)
    key = torch.arange(Tk, device=device)
    seen = key <= here if causal else torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (key >= here - left)
    if right >= 0:
        seen = seen & (key <= here + right)
    return seen


def _one(q, k, v, bias, slopes, key_mask, seed, rows, causal, left, right, p, scale):
    """(out, lse) of a dense batch; rows [B, Hq, Tq, 1] count the queries for dropout."""
    Tq, Tk, group = q.shape[2], k.shape[2], q.shape[1] // max(k.shape[1], 1)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + precise(bias)
    if slopes is not None:
        here = torch.arange(Tq, device=q.device).unsqueeze(1) + (Tk - Tq)
        distance = (here - torch.arange(Tk, device=q.device)).abs()
        scores = scores - slopes.to(scores.dtype).reshape(-1, slopes.shape[-1], 1, 1) * distance
    seen = visible(Tq, Tk, causal, left, right, q.device)
    if key_mask is not None:
        shown = key_mask[:, None, None, :]
        seen = shown if seen is None else seen & shown
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if Tk == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + v.sum()), q.new_full(q.shape[:3], -torch.inf)
    most = scores.detach().amax(-1, keepdim=True)
    most = torch.where(most == -torch.inf, 0.0, most)
    e = (scores - most).exp()
    total = e.sum(-1, keepdim=True)
    none = total == 0
    whole = total.masked_fill(none, 1.0)
    weights = e / whole
    if seed is not None:
        weights = weights * factors(seed, p, rows, torch.arange(Tk, device=q.device), weights.dtype)
    lse = torch.where(none, -torch.inf, whole.log() + most)
    return weights @ v, lse.squeeze(-1)


def definition(
    q: Tensor,  # [B, Hq, Tq, D]
    k: Tensor,  # [B, Hk, Tk, D]
    v: Tensor,  # [B, Hk, Tk, E]
    bias: Tensor | None,  # [B or 1, Hq or 1, Tq or 1, Tk or 1]
    slopes: Tensor | None,  # [B or 1, Hq]
    cu_q: Tensor | None,  # int32 [n + 1] where sequences begin that lie one after the other; B is then 1
    cu_k: Tensor | None,  # int32 [n + 1]
    key_mask: Tensor | None,  # bool [B, Tk]
    seed: Tensor | None,  # int64 [1]
    causal: bool,
    left: int,
    right: int,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, E], lse [B, Hq, Tq])"""
    dtype, (B, Hq, Tq, _) = q.dtype, q.shape
    q, k, v = map(precise, (q, k, v))
    how = causal, left, right, p, scale
    with no_autocast(q.device):
        if cu_q is None:
            rows = torch.arange(B * Hq * Tq, device=q.device).reshape(B, Hq, Tq, 1)
            out, lse = _one(q, k, v, bias, slopes, key_mask, seed, rows, *how)
        else:
            token = torch.arange(Tq, device=q.device).unsqueeze(0)
            rows = (token * Hq + torch.arange(Hq, device=q.device).unsqueeze(1))[None, :, :, None]
            assert cu_k is not None  # one comes with the other
            parts, q_ends, k_ends = [], cu_q.tolist(), cu_k.tolist()
            for s in range(len(q_ends) - 1):
                a, b = slice(*q_ends[s : s + 2]), slice(*k_ends[s : s + 2])
                own = slopes if slopes is None or slopes.shape[0] == 1 else slopes[s : s + 1]
                parts.append(_one(q[:, :, a], k[:, :, b], v[:, :, b], None, own, None, seed, rows[:, :, a], *how))
            out, lse = (torch.cat(u, 2) for u in zip(*parts))
    return out.to(dtype), lse


def forward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), out laid out so that heads of a query lie side by side."""
    out, lse = definition(*arguments, **options)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def backward(
    grads: Sequence[Any],  # of the results; None is zero
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    **options: Any,
) -> list[Tensor | None]:
    """The gradients of the tensors that are needed, by autograd through the definition."""
    places = [k for k, wanted in enumerate(need) if wanted]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        given: list[Any] = list(tensors)
        for k, v in zip(places, values):
            given[k] = v
        return definition(*given, **options)

    out, pull = torch.func.vjp(run, *[tensors[k] for k in places])
    full = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(out, grads))
    got: list[Tensor | None] = [None] * len(tensors)
    for k, g in zip(places, pull(full)):
        like = torch.empty_like(tensors[k])
        got[k] = like.copy_(g)
    return got
