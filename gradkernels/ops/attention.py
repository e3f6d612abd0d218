"""Exact attention in memory proportional to its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkernels.backends.reference.attention import definition
from gradkernels.ops._attention_checks import check, check_call
from gradkernels.ops._fused import Fused, draw_seed


def _made(q, k, v, *others, **options):
    computed = torch.float64 if q.dtype == torch.float64 else torch.float32
    return ((*q.shape[:3], v.shape[3]), q.dtype), (q.shape[:3], computed)


def _fake(*tensors, **options):
    """Heads of a query lie side by side."""
    ((B, Hq, Tq, E), dtype), (rows, computed) = _made(*tensors, **options)
    q = tensors[0]
    return q.new_empty(B, Tq, Hq, E, dtype=dtype).transpose(1, 2), q.new_empty(rows, dtype=computed)


def _fold(N, dims, tensors, options):
    """The mapped dimension joins the batch, where nothing counts the batch's sequences."""
    q, k, v, bias, slopes, cu_q, _, key_mask, seed = tensors
    if cu_q is not None or seed is not None or slopes is not None and slopes.shape[-2] > 1 or dims[4] is not None:
        return None

    def fold(t, d):
        return t if t is None else (t.unsqueeze(0).expand(N, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)

    B = q.shape[0 if dims[0] is None or dims[0] > 0 else 1]
    if bias is not None:
        bias = bias.unsqueeze(0).expand(N, *bias.shape) if dims[3] is None else bias.movedim(dims[3], 0)
        bias = bias.expand(N, B, *bias.shape[2:]).flatten(0, 1)
    folded = (*(fold(t, d) for t, d in zip((q, k, v), dims)), bias, slopes, None, None, fold(key_mask, dims[7]), None)
    return folded, lambda outputs: (tuple(o.unflatten(0, (N, B)) for o in outputs), (0, 0))


fused = Fused(
    "attention",
    ("q", "k", "v", "bias?", "slopes?", "cu_q?", "cu_k?", "key_mask?", "seed?"),
    {"causal": "bool", "left": "int", "right": "int", "p": "float", "scale": "float"},
    ("out", "lse"),
    (),
    check,
    _made,
    definition,
    _fake,
    fold=_fold,
    like=torch.empty_like,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
    *,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention, exact, without the matrix of scores in memory.

    .. math::
        \text{out}_i = \sum_j \text{dropout}\!\left(\frac{e^{s_{ij}}}{\sum_l e^{s_{il}}}\right) v_j, \qquad
        s_{ij} = \text{scale} \cdot q_i \cdot k_j + \text{bias}_{ij} - \text{slope} \cdot |i + T_k - T_q - j|

    over the keys j that query i sees. A query that sees none has an output of zeros, and gradients of zero.

    Args:
        q: ``[B, Hq, Tq, D]``, floating point, D at most 256. With ``cu_seqlens``: ``[N, Hq, D]``.
        k, v: ``[B, Hk, Tk, D]`` and ``[B, Hk, Tk, E]``, Hq a multiple of Hk: head h of the queries reads head
            ``h // (Hq // Hk)``. With ``cu_seqlens``: ``[M, Hk, D]`` and ``[M, Hk, E]``.
        causal: query i sees the keys ``j <= i + Tk - Tq``: the last query stands beside the last key.
        bias: floating point, added to the scores, or bool, True where a query sees a key; broadcastable to ``[B, Hq, Tq, Tk]``.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: what a score loses per step of distance (Press, Smith and Lewis, 2022). No gradient.
        window: how many keys a query sees to the left of its own place and to the right, None for all; one number is the
            left alone, with nothing to the right.
        dropout_p: probability with which a weight is dropped; the mask is made of a seed and of places, and never stored.
        cu_seqlens: int32 ``[n + 1]``, where each of n sequences begins among the N tokens, and N; two such tensors where
            queries and keys differ.
        scale: of the scores; ``1 / sqrt(D)`` when None.
        backend: "triton", "cpu" or "reference"; None takes the best that can run.
        key_mask: bool ``[B, Tk]``, True for keys that can be seen.
        return_lse: return the logarithm of the sum of exp of the scores too.

    Returns:
        out ``[B, Hq, Tq, E]`` (``[N, Hq, E]``) in q's dtype, and with ``return_lse`` also lse ``[B, Hq, Tq]`` (``[Hq, N]``) in float32
        (float64 for float64), -inf for a query that sees nothing.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or ``backend`` cannot run this call.
        ValueError: dropout_p outside [0, 1], a negative window, ``cu_seqlens`` together with a bias or a mask, an unknown backend.
        TypeError: an argument that is no tensor, or of a dtype that makes no sense.

    Derivatives of any order, forward mode and ``torch.func`` pass through; the gradients have the same bits in every run.
    16-bit tensors are multiplied as they are and summed in float32.

    The algorithm is that of Dao, Fu, Ermon, Rudra and Ré (2022).

    Example:
        >>> import torch, gradkernels as gk
        >>> q, k, v = (torch.randn(2, 4, 10, 16) for _ in range(3))
        >>> out = gk.ops.attention(q, k, v, causal=True)
        >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(out, want, atol=1e-6)
        True
    """
    if torch._C._is_any_autocast_enabled() and isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    check_call(q, k, v, bias, alibi_slopes, dropout_p, cu_seqlens, key_mask)
    left, right = _window(window)
    cu_q, cu_k = cu_seqlens if isinstance(cu_seqlens, Sequence) else (cu_seqlens, cu_seqlens)
    if cu_q is not None:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    if bias is not None:
        bias, key_mask = _mask(bias, key_mask, q.shape[0], k.shape[2])
    slopes = None if alibi_slopes is None else torch.atleast_2d(alibi_slopes.detach())
    seed = draw_seed(q) if dropout_p > 0 else None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    how = {"causal": causal, "left": left, "right": right, "p": dropout_p, "scale": scale}
    out, lse = fused((q, k, v, bias, slopes, cu_q, cu_k, key_mask, seed), how, backend)
    if cu_q is not None:
        out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _window(window):
    """(left, right), -1 where there is no bound."""
    if window is None:
        return -1, -1
    left, right = (window, 0) if isinstance(window, int) else window
    for side, n in (("left", left), ("right", right)):
        if n is not None and n < 0:
            raise ValueError(f"window must not be negative, got {n} to the {side}")
    return -1 if left is None else left, -1 if right is None else right


def _mask(bias, key_mask, B, Tk):
    """A bias of four dimensions; a bool mask becomes one, or, where it speaks of keys alone, a key mask."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    if bias.dtype != torch.bool:
        return bias, key_mask
    if key_mask is None and bias.shape[1:3] == (1, 1):
        return None, bias[:, 0, 0].expand(B, Tk)
    return torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, -torch.inf), key_mask
