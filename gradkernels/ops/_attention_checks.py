"""What has to be true of the arguments of attention before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkernels.ops._fused_checks import check_device, check_dropout, wrong_shape

WIDEST = 256


def check_call(q, k, v, bias, slopes, dropout_p, cu_seqlens, key_mask):
    """The arguments of the public function."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    varlen = cu_seqlens is not None
    dims = 3 if varlen else 4
    if not q.dim() == k.dim() == v.dim() == dims:
        raise RuntimeError(f"q, k and v must have {dims} dimensions{' with cu_seqlens' * varlen}, got {shapes}")
    _check_heads(q, k, v)
    if not varlen and q.shape[0] != k.shape[0]:
        raise RuntimeError(f"q and k must agree in batch, got {shapes}")
    others = [("k", k), ("v", v), ("bias", bias), ("alibi_slopes", slopes), ("key_mask", key_mask)]
    if varlen:
        if bias is not None or key_mask is not None:
            raise ValueError("cu_seqlens cannot be combined with bias or key_mask: give causal, window or alibi_slopes")
        cu = cu_seqlens if isinstance(cu_seqlens, Sequence) else (cu_seqlens, cu_seqlens)
        if len(cu) != 2 or not all(isinstance(c, Tensor) and c.dim() == 1 for c in cu) or cu[0].shape != cu[1].shape:
            raise RuntimeError("cu_seqlens must be an int32 tensor [n + 1], or two of the same length")
        for c, t, name in zip(cu, (q, k), "qk"):
            _check_cu("cu_seqlens", c, t.shape[0], name)
        others += [("cu_seqlens", cu[0]), ("cu_seqlens", cu[1])]
    for name, t in others:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(t).__name__}")
        check_device(name, t, "q", q)
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if varlen:
        batch = cu[0].shape[0] - 1
    else:
        batch = q.shape[0]
        full = (batch, q.shape[1], q.shape[2], k.shape[2])
        if bias is not None:
            if bias.dtype != torch.bool and not bias.is_floating_point():
                raise TypeError(f"bias must be floating point or bool, got {bias.dtype}")
            if bias.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(bias.shape), reversed(full))):
                raise RuntimeError(f"bias must be broadcastable to {list(full)}, got {list(bias.shape)}")
        if key_mask is not None:
            if key_mask.dtype != torch.bool:
                raise TypeError(f"key_mask must be bool, True where a key can be seen, got {key_mask.dtype}")
            if key_mask.shape != (batch, k.shape[2]):
                raise RuntimeError(f"key_mask must be {[batch, k.shape[2]]}, got {list(key_mask.shape)}")
    if slopes is not None and (tuple(slopes.shape) not in ((q.shape[1],), (batch, q.shape[1]), (1, q.shape[1]))):
        raise RuntimeError(f"alibi_slopes must be {[q.shape[1]]} or {[batch, q.shape[1]]}, got {list(slopes.shape)}")


def check(q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed, causal, left, right, p, scale):
    """The arguments of the operator, which are fewer in kind than those of the public function."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {t.dtype}")
        if t.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got {list(t.shape)}")
        if t.dtype is not q.dtype:
            raise RuntimeError(f"{name} must have q's dtype {q.dtype}, got {t.dtype}")
    check_dropout(p, seed, "q", q)
    _check_heads(q, k, v)
    (B, Hq, Tq, _), Tk = q.shape, k.shape[2]
    if k.shape[0] != B:
        raise RuntimeError(f"k must have the batch of q {list(q.shape)}, got {list(k.shape)}")
    for name, t in (
        ("k", k),
        ("v", v),
        ("bias", bias),
        ("slopes", slopes),
        ("cu_q", cu_q),
        ("cu_k", cu_k),
        ("key_mask", key_mask),
    ):
        if t is not None:
            check_device(name, t, "q", q)
    sequences = B
    if cu_q is not None or cu_k is not None:
        if cu_q is None or cu_k is None or cu_q.dim() != 1 or cu_q.shape != cu_k.shape:
            got = ", ".join(
                f"{name} {None if c is None else list(c.shape)}" for name, c in (("cu_q", cu_q), ("cu_k", cu_k))
            )
            raise RuntimeError(f"cu_q and cu_k must both be [n + 1], got {got}")
        if B != 1 or bias is not None or key_mask is not None:
            raise RuntimeError(f"cu_q goes with a batch of one, without bias and key_mask, got q {list(q.shape)}")
        _check_cu("cu_q", cu_q, Tq, "q"), _check_cu("cu_k", cu_k, Tk, "k")
        sequences = cu_q.shape[0] - 1
    if bias is not None:
        if not bias.dtype.is_floating_point:
            raise TypeError(f"bias must be floating point, got {bias.dtype}")
        full = (B, Hq, Tq, Tk)
        if bias.dim() != 4 or any(n not in (1, m) for n, m in zip(bias.shape, full)):
            raise RuntimeError(f"bias must have 4 dimensions, broadcastable to {list(full)}, got {list(bias.shape)}")
    if slopes is not None:
        if not slopes.dtype.is_floating_point:
            raise TypeError(f"slopes must be floating point, got {slopes.dtype}")
        if slopes.shape not in ((1, Hq), (sequences, Hq)):
            raise RuntimeError(
                f"slopes must be [{sequences} or 1, {Hq}] beside q {list(q.shape)}, got {list(slopes.shape)}"
            )
    if key_mask is not None:
        if key_mask.dtype is not torch.bool:
            raise TypeError(f"key_mask must be bool, True where a key can be seen, got {key_mask.dtype}")
        if key_mask.shape != (B, Tk):
            wrong_shape("key_mask", key_mask, (B, Tk), "k", k)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Heads are the second dimension with sequences that lie one after the other, too."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.shape[-1] != k.shape[-1]:
        raise RuntimeError(f"q and k must have the same last dimension, got {shapes}")
    if k.shape[:-1] != v.shape[:-1]:
        raise RuntimeError(f"k and v must agree in batch, heads and tokens, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RuntimeError(f"the heads of q must be a multiple of those of k and v, got {shapes}")
    if not 1 <= q.shape[-1] <= WIDEST or not 1 <= v.shape[-1] <= WIDEST:
        raise RuntimeError(f"the last dimensions must be between 1 and {WIDEST}, got {shapes}")


def _check_cu(name: str, c: Tensor, N: int, of: str) -> None:
    """Where sequences begin; its values are looked at on the CPU alone, since nobody waits to read what is on a GPU."""
    if c.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {c.dtype}")
    if c.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if c.shape[0] == 0 or c[0] != 0 or c[-1] != N or (c.diff() < 0).any():
        raise RuntimeError(f"{name} must grow from 0 to the {N} tokens of {of}, got {c.tolist()}")
