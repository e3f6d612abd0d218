"""Attention by csrc/cpu/attention.h: blocks of queries against blocks of keys, memory in proportion to the arguments.

Results are the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends import cpu, reference
from gradkernels.backends.reference import philox


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return cpu.why_not(None, dtype, device)


def _rows(v: Tensor) -> Tensor:
    """Any strides do as long as the values of a row lie side by side."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _side_by_side(like: Tensor, B: int, H: int, T: int, D: int) -> Tensor:
    """[B, H, T, D] in which the heads of a token lie side by side."""
    return cpu.empty(like, B, T, H, D).transpose(1, 2)


class _Call:
    """Sizes and addresses that both directions begin with."""

    def __init__(self, q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, lse, causal, left, right, p, scale) -> None:
        self.kept = q, k, v = tuple(map(_rows, (q, k, v)))
        B, Hq, Tq, D = q.shape
        Hk, Tk, E = k.shape[1], k.shape[2], v.shape[3]
        computed = reference.precise(q[:0]).dtype
        shape = B, Hq, Tq, Tk
        strides: Sequence[int] = (0, 0, 0, 0)
        if bias is not None:
            bias = bias.to(computed)
            bias = bias if bias.stride(-1) == 1 or bias.shape[-1] == 1 else bias.contiguous()
            strides = tuple(0 if n == 1 and m != 1 else s for n, m, s in zip(bias.shape, shape, bias.stride()))
        if slopes is not None:
            slopes = slopes.to(computed).contiguous()
        per_sequence = 0 if slopes is None or slopes.shape[0] == 1 else Hq
        n = B if cu_q is None else cu_q.shape[0] - 1
        cu = [c if c is None else c.to("cpu", torch.int32).contiguous() for c in (cu_q, cu_k)]
        mask = key_mask if key_mask is None else key_mask.contiguous()
        self.sizes = [n, Hq, Hk, Tq, Tk, D, E, left, right, *strides, per_sequence]
        self.sizes += [s for t in (q, k, v) for s in t.stride()[:3]]
        self.kept = (*cu, q, k, v, bias, slopes, mask, lse.contiguous())
        self.options = causal, scale, *philox.number(seed, p), torch.get_num_threads()
        self.storage = cpu.STORAGE[q.dtype]

    def __call__(self, kernel: Any, *more: Any, heads: int) -> None:
        """The first `heads` of the further tensors are heads of rows."""
        sizes = self.sizes + [s for t in more[:heads] for s in t.stride()[:3]]
        kernel(self.storage, sizes, cpu.addresses([*self.kept, *more]), *self.options)


def forward(
    q: Tensor,  # [B, Hq, Tq, D]
    k: Tensor,  # [B, Hk, Tk, D]
    v: Tensor,  # [B, Hk, Tk, E]
    bias: Tensor | None,  # [B or 1, Hq or 1, Tq or 1, Tk or 1]
    slopes: Tensor | None,  # [B or 1, Hq]
    cu_q: Tensor | None,  # int32 [n + 1]
    cu_k: Tensor | None,  # int32 [n + 1]
    key_mask: Tensor | None,  # bool [B, Tk]
    seed: Tensor | None,  # int64 [1]
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, E], lse [B, Hq, Tq])"""
    B, Hq, Tq, _ = q.shape
    out = _side_by_side(q, B, Hq, Tq, v.shape[3])
    lse = q.new_empty(B, Hq, Tq, dtype=reference.precise(q[:0]).dtype)
    if lse.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    call = _Call(q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, lse, **options)
    call(cpu.build().attention_forward, out, heads=1)
    return out, lse


def backward(
    grads: Sequence[Any],  # of the results; None is zero
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    **options: Any,
) -> list[Tensor | None]:
    """The gradients of the tensors that are needed; those of q, k and v are made together."""
    (dout, dlse), (q, k, v, bias, *rest), (out, lse) = grads, tensors, outputs
    made = [torch.empty_like(t) for t in (q, k, v)]
    dscores = q.new_zeros(*q.shape[:3], k.shape[2]) if need[3] else None
    if lse.numel() == 0 or k.shape[2] == 0:
        made = [t.zero_() for t in made]
    else:
        dout = torch.zeros_like(out) if dout is None else _rows(dout)
        rows = [_rows(t) for t in made]
        slopes, cu_q, cu_k, key_mask, seed = rest
        call = _Call(q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, lse, **options)
        dlse = dlse if dlse is None else dlse.contiguous()
        call(cpu.build().attention_backward, _rows(out), dout, *rows, dlse, dscores, heads=5)
        made = [t if t is r else t.copy_(r) for t, r in zip(made, rows)]
    got = [t if wanted else None for t, wanted in zip(made, need)]
    return [*got, dscores if dscores is None else dscores.sum_to_size(bias.shape).to(bias.dtype), *[None] * len(rest)]
