"""Multi-head attention with torch's arguments, and the whole sublayer around it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkernels.nn.linear import applied, linear
from gradkernels.nn.norm import ResidualBlock
from gradkernels.nn.remake import remade, rounded
from gradkernels.ops import attention
from gradkernels.ops._attention_checks import WIDEST


class Seen(NamedTuple):
    """What queries see of keys: arguments of :func:`gradkernels.ops.attention`."""

    causal: bool = False
    bias: Tensor | None = None  # [B or 1, H or 1, L or 1, S]
    key_mask: Tensor | None = None  # bool [B, S]
    cu_seqlens: Tensor | None = None  # int32 [n + 1]

    def beyond(self, keys: int) -> Seen:
        """The same, with further keys behind the others that everybody sees."""
        bias, mask = (v if v is None else F.pad(v, (0, keys), value=v.dtype == torch.bool) for v in self[1:3])
        return self._replace(bias=bias, key_mask=mask)


class MultiheadAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention``, by the kernels of :func:`gradkernels.ops.attention`.

    Arguments, parameters, errors and ``state_dict`` are torch's. What differs:

    * With ``need_weights=False`` no matrix of scores is made, whatever the masks and the dropout, unless a mask wants a gradient.
      With ``need_weights=True``, torch's default, and for heads wider than 256 it has to be.
    * A query that sees no key has an output of ``out_proj.bias`` and weights of zero, never NaN, in training and evaluation alike.
    * ``is_causal`` means the same in evaluation: torch's fast path ignores it. It says that ``attn_mask`` is the causal mask,
      which is then not read where there are as many keys as queries.
    * A nested tensor as ``query``, ``key`` and ``value`` (all the same) may be differentiated too.

    Vaswani et al. (2017).

    Example:
        >>> import torch, gradkernels as gk
        >>> attn = gk.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> y, _ = attn(x, x, x, need_weights=False)
        >>> y.shape, attn(x, x, x)[1].shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
    """

    recompute = False  # set by a layer around it that can make projections again in backward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask), None
        for mask, name, other in ((key_padding_mask, "key_padding_mask", attn_mask), (attn_mask, "attn_mask", None)):
            if mask is not None:
                empty = mask.new_empty(0)  # whose dtype is checked, and nothing else done
                F._canonical_mask(
                    empty, name, F._none_or_dtype(other), "attn_mask", query.dtype, check_other=other is not None
                )
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )

        def batch_first(v):
            return v.unsqueeze(0) if not batched else v if self.batch_first else v.transpose(0, 1)

        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        L, S = self._check([batch_first(v) for v in (query, key, value)], key_padding_mask, attn_mask)
        whole = need_weights or self.head_dim > WIDEST
        seen = self.seen(attn_mask, key_padding_mask, is_causal and not whole, L, S)
        q, k, v = map(batch_first, self._project(query, key, value))
        q, k, v, seen = self._more_keys(q, k, v, seen)
        if whole:
            y, weights = self._by_weights(q, k, v, seen)
        else:
            y, weights = self._out(q, k, v, seen), None
        y = y if batched and self.batch_first else y.transpose(0, 1).contiguous() if batched else y.squeeze(0)
        if not need_weights or weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

    def _check(self, inputs, key_padding_mask, attn_mask):
        """Of tensors [B, T, .], in torch's words -> numbers of queries and keys."""
        query, key, value = inputs
        (B, L, E), S = query.shape, key.shape[1]
        if self.embed_dim != E:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {E}")
        in_torchs_order = key.transpose(0, 1).shape, value.transpose(0, 1).shape
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {in_torchs_order[0]} does not match value shape {in_torchs_order[1]}")
        if key.shape[:2] != value.shape[:2]:
            raise AssertionError(
                f"key's sequence and batch dims {in_torchs_order[0][:2]} do not match value's {in_torchs_order[1][:2]}"
            )
        for name, v, wide in (("query", query, E), ("key", key, self.kdim), ("value", value, self.vdim)):
            if v.shape[0] != B or v.shape[2] != wide:
                raise RuntimeError(
                    f"{name} must have {B} sequences, as query has, and {wide} features, got shape {list(v.shape)}"
                )
        if attn_mask is not None:
            want = (L, S) if attn_mask.dim() == 2 else (B * self.num_heads, L, S)
            if attn_mask.shape != want:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {want}."
                )
        if key_padding_mask is not None and key_padding_mask.shape != (B, S):
            raise AssertionError(f"key_padding_mask must have shape {(B, S)}, got {tuple(key_padding_mask.shape)}")
        return L, S

    def seen(self, attn_mask, key_padding_mask, is_causal, L, S):
        """Torch's masks, in which True hides, as ours, in which True shows."""
        causal = is_causal and L == S and self.bias_k is None and not self.add_zero_attn
        bias = key_mask = None
        if attn_mask is not None and not causal:
            bias = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
            bias = bias[None, None] if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
            key_mask = ~key_padding_mask
        elif key_padding_mask is not None:
            padding = key_padding_mask[:, None, None, :]
            if bias is None:
                bias = padding
            elif bias.dtype == torch.bool:
                bias = padding.masked_fill(~bias, -torch.inf)
            else:
                bias = bias + padding
        return Seen(causal, bias, key_mask)

    def _project(self, query, key, value) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, [.., H * D] each, views of one tensor where one product makes them."""
        w, b, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        product = partial(remade, linear) if self.recompute else linear
        shared, packed = key is value, query is key is value
        query = rounded(query)
        if self._qkv_same_embed_dim and packed:
            return product(query, w, b).chunk(3, -1)
        key = rounded(key)
        value = key if shared else rounded(value)
        b_q, b_k, b_v = (None,) * 3 if b is None else b.chunk(3)
        if not self._qkv_same_embed_dim:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif shared:
            both = product(key, w[E:], None if b is None else b[E:])
            return product(query, w[:E], b_q), *both.chunk(2, -1)
        else:
            w_q, w_k, w_v = w.chunk(3)
        return product(query, w_q, b_q), product(key, w_k, b_k), product(value, w_v, b_v)

    def _more_keys(self, q, k, v, seen):
        """What add_bias_kv and add_zero_attn put behind the keys."""
        B, E = k.shape[0], self.embed_dim
        more_k, more_v = [], []
        if self.bias_k is not None:
            more_k, more_v = [self.bias_k.expand(B, 1, E)], [self.bias_v.expand(B, 1, E)]
        if self.add_zero_attn:
            more_k, more_v = (m + [k.new_zeros(B, 1, E)] for m in (more_k, more_v))
        if not more_k:
            return q, k, v, seen
        k, v = (torch.cat([t, *(m.to(t.dtype) for m in more)], 1) for t, more in ((k, more_k), (v, more_v)))
        return q, k, v, seen.beyond(len(more_k))

    def _heads(self, v):
        """[B, T, H * D] or tokens [N, H * D] -> [B, H, T, D] or [N, H, D]."""
        v = v.unflatten(-1, (self.num_heads, self.head_dim))
        return v.transpose(1, 2) if v.dim() == 4 else v

    def _out(self, q, k, v, seen):
        """[B, L, H * D] or [N, H * D]; what comes out of the kernel has the heads of a token side by side."""
        p = self.dropout if self.training else 0.0
        out = attention(*map(self._heads, (q, k, v)), dropout_p=p, **seen._asdict())
        out = out.transpose(1, 2) if out.dim() == 4 else out
        return applied(self.out_proj, out.flatten(-2))

    def _by_weights(self, q, k, v, seen):
        """The same with the weights [B, H, L, S], after dropout as torch returns them."""
        q, k, v = map(self._heads, (q, k, v))
        scores = q * self.head_dim**-0.5 @ k.mT
        for shown in (seen.bias, None if seen.key_mask is None else seen.key_mask[:, None, None, :]):
            if shown is not None:
                hides = shown.dtype == torch.bool
                scores = scores.masked_fill(~shown, -torch.inf) if hides else scores + shown
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        out = weights.to(v.dtype) @ v
        return applied(self.out_proj, out.transpose(1, 2).flatten(-2)), weights

    def _nested(self, query, key, value, key_padding_mask, need_weights, attn_mask):
        if (
            query is not key
            or key is not value
            or need_weights
            or key_padding_mask is not None
            or attn_mask is not None
        ):
            raise AssertionError(
                "nested tensors are for attention of a sequence to itself, with need_weights=False and without masks"
            )
        if self.bias_k is not None or self.add_zero_attn or self.head_dim > WIDEST:
            raise AssertionError(f"nested tensors need heads of at most {WIDEST}, no add_bias_kv and no add_zero_attn")
        tokens, cu_seqlens = flattened(query)
        return nested(self.of_itself(tokens, Seen(cu_seqlens=cu_seqlens)), cu_seqlens, query.layout)

    def of_itself(self, x: Tensor, seen: Seen) -> Tensor:
        """Attention of sequences to themselves, [B, T, E], or [N, E] where they lie one after the other."""
        return self._out(*self._project(x, x, x), seen)


def flattened(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of a nested tensor, [N, E], and where each sequence begins among them, int32 [n + 1]."""
    parts = x.unbind()
    ends = torch.tensor([0, *(len(v) for v in parts)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat(parts), ends.to(x.device)


def nested(tokens: Tensor, cu_seqlens: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    """What :func:`flattened` took apart."""
    return torch.nested.as_nested_tensor(list(tokens.split(cu_seqlens.diff().tolist())), layout=layout)


class AttentionBlock(ResidualBlock):
    r"""Attention of a sequence to itself on a residual path: the first half of a Transformer's layer.

    .. math::
        \text{pre:}\quad  x + \text{dropout}(\text{attn}(\text{norm}(x))) \qquad\qquad
        \text{post:}\quad \text{norm}(x + \text{dropout}(\text{attn}(x)))

    Args:
        d_model: width of a token.
        num_heads: which d_model is divided among.
        dropout: probability of dropout of attention's weights, and of what attention returns, while training.
        norm: "pre" or "post".
        causal: a token sees itself and those before it.
        bias: of the projections.
        norm_kind: "layer" or "rms".
        eps: of the norm.
        recompute: make the projections again in backward too: of what the block makes in training only the sum, the statistics of
            the norm, the logarithms and the outputs of attention and the seeds are kept. Without it the projections are, too.

    Shapes: x and the result ``[B, T, d_model]``, or ``[T, d_model]`` without a batch. ``key_padding_mask``: ``[B, T]`` or ``[T]``,
    bool, True for tokens that nobody sees, as torch has it, or floating point, added to the scores.

    Raises:
        ValueError: an unknown norm or norm_kind, dropout outside [0, 1], or heads that do not divide d_model.
        RuntimeError: shapes do not fit together.
        TypeError: a mask of another dtype.

    Example:
        >>> import torch, gradkernels as gk
        >>> block = gk.nn.AttentionBlock(16, num_heads=4, dropout=0.1, causal=True)
        >>> block(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.1,
        norm: str = "pre",
        causal: bool = False,
        bias: bool = True,
        norm_kind: str = "layer",
        eps: float = 1e-5,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model, got {num_heads} and {d_model}")
        if d_model // num_heads > WIDEST:
            raise ValueError(f"heads must be at most {WIDEST} wide, got {d_model} / {num_heads}")
        attn = MultiheadAttention(
            d_model, num_heads, dropout=dropout, bias=bias, batch_first=True, device=device, dtype=dtype
        )
        attn.recompute = recompute
        super().__init__(attn, d_model, dropout, norm, norm_kind, eps, device, dtype)
        self.causal = causal

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', causal=True' * self.causal}"

    def forward(self, input: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        if input.dim() == 2:
            mask = key_padding_mask if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            return self.forward(input.unsqueeze(0), mask).squeeze(0)
        if input.dim() != 3 or input.shape[2] != self.d_model:
            raise RuntimeError(f"input must be [B, T, {self.d_model}] or [T, {self.d_model}], got {list(input.shape)}")
        T, mask, hidden = input.shape[1], key_padding_mask, None
        if mask is not None and mask.shape != input.shape[:2]:
            raise RuntimeError(
                f"key_padding_mask must be {list(input.shape[:2])} beside input {list(input.shape)}, got {list(mask.shape)}"
            )
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"key_padding_mask must be bool or floating point, got {mask.dtype}")
        if self.causal:  # is_causal says it all: what stands for the mask is never read
            hidden = (input.new_zeros((), dtype=torch.bool) if mask is None else mask.new_zeros(())).expand(T, T)
        how = {"key_padding_mask": mask, "need_weights": False, "attn_mask": hidden, "is_causal": self.causal}
        return self._around(input, lambda x: self.sublayer(x, x, x, **how))
