"""The layers of a Transformer with torch's arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradkernels.nn.attention import MultiheadAttention, flattened, nested
from gradkernels.nn.linear import applied, bare, linear
from gradkernels.nn.norm import LayerNorm, added, dropped, normed, normed_sum
from gradkernels.nn.remake import remade, remaking, rounded
from gradkernels.ops._fused import draw_seed


def _ours(layer: nn.Module, recompute: bool) -> None:
    """The parts that torch's constructor has made become ours, as :func:`gradkernels.convert` has it."""
    if recompute:
        layer.recompute = True
    for part in layer.children():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = MultiheadAttention
            if recompute:
                part.recompute = True
        elif type(part) is nn.LayerNorm:
            part.__class__ = LayerNorm


def joined(x: Tensor, sublayer: Callable[[Tensor], Tensor], norm: Any, dropout: Any, norm_first: bool) -> Tensor:
    """x + dropout(sublayer(norm(x))) or norm(x + dropout(sublayer(x)))"""
    if not bare(norm, dropout) or tuple(norm.normalized_shape) != x.shape[-1:]:
        return x + dropout(sublayer(norm(x))) if norm_first else norm(x + dropout(sublayer(x)))
    p = dropout.p if dropout.training else 0.0
    if norm_first:
        return added(sublayer(remade(partial(normed, eps=norm.eps), x, norm.weight, norm.bias)), x, p)
    return normed_sum(sublayer(x), x, norm.weight, norm.bias, p, norm.eps)


def _by_name(activation: Any) -> Any:
    """relu or gelu as a function; None for an activation of which nothing is known."""
    if type(activation) is nn.ReLU and bare(activation):
        return F.relu
    if type(activation) is nn.GELU and bare(activation):
        return partial(F.gelu, approximate=activation.approximate)
    return activation if activation in (F.relu, F.gelu) else None


def feed_forward(x: Tensor, layer: Any) -> Tensor:
    """linear2(dropout(activation(linear1(x))))"""
    first, dropout, act = layer.linear1, layer.dropout, _by_name(layer.activation)
    if act is None or not bare(first, dropout):
        return layer.linear2(dropout(layer.activation(first(x))))
    x = rounded(x)
    if layer.recompute:
        hidden = remade(act, remade(linear, x, first.weight, first.bias))
    else:
        hidden = linear(x, first.weight, first.bias)
        # the result of relu is all that its backward reads, and no more than its input
        hidden = act(hidden) if act is F.relu else remade(act, hidden)
    if dropout.training and dropout.p > 0:
        hidden = remade(partial(dropped, p=dropout.p), hidden, draw_seed(hidden))
    return applied(layer.linear2, hidden)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    r"""``torch.nn.TransformerEncoderLayer``, by the kernels of :func:`gradkernels.ops.attention` and ``residual_norm``.

    Arguments, parameters, masks and ``state_dict`` are torch's; ``torch.nn.TransformerEncoder`` takes it as it takes torch's.
    There is one path, in training and evaluation: queries that see no key give numbers and not NaN, ``is_causal`` means the same in
    both, and nested tensors can be differentiated.

    Norms, gelu and what dropout leaves are not kept for backward, but made again there. With the keyword ``recompute=True`` the
    products before attention and in the hidden layer are, too: of a layer in training its input, what attention returns and the
    sums on the residual path are then all that is kept, for a fifth more multiplications. Submodules that somebody hooks or
    replaces are called as torch calls them, and keep what they keep.

    Vaswani et al. (2017); ``norm_first`` after Xiong et al. (2020).

    Example:
        >>> import torch, gradkernels as gk
        >>> layer = gk.nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2)
        >>> encoder(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    recompute = False

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ours(self, recompute)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x, cu_seqlens = src, None
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None:
                raise AssertionError("neither src_key_padding_mask nor src_mask are supported with NestedTensor input")
            x, cu_seqlens = flattened(src)

            def attend(v):
                v = nested(v, cu_seqlens)
                return flattened(_attended(self.self_attn, v, v, None, None, False))[0]

        else:
            src_mask, src_key_padding_mask = _masks(src_mask, src_key_padding_mask, src)

            def attend(v):
                return _attended(self.self_attn, v, v, src_mask, src_key_padding_mask, is_causal)

        with remaking():
            x = joined(x, attend, self.norm1, self.dropout1, self.norm_first)
            x = joined(x, partial(feed_forward, layer=self), self.norm2, self.dropout2, self.norm_first)
        return x if cu_seqlens is None else nested(x, cu_seqlens, src.layout)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    r"""``torch.nn.TransformerDecoderLayer``, by the kernels of :func:`gradkernels.ops.attention` and ``residual_norm``.

    Arguments, parameters, masks and ``state_dict`` are torch's; ``torch.nn.TransformerDecoder`` takes it as it takes torch's. What
    is said of :class:`TransformerEncoderLayer` about what is kept for backward holds here too.

    Example:
        >>> import torch, gradkernels as gk
        >>> layer = gk.nn.TransformerDecoderLayer(16, 4, dim_feedforward=32, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), memory=torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 16])
    """

    recompute = False

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ours(self, recompute)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        of_itself = lambda v: _attended(self.self_attn, v, v, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = lambda v: _attended(
            self.multihead_attn, v, memory, memory_mask, memory_key_padding_mask, memory_is_causal
        )
        with remaking():
            x = joined(tgt, of_itself, self.norm1, self.dropout1, self.norm_first)
            x = joined(x, of_memory, self.norm2, self.dropout2, self.norm_first)
            return joined(x, partial(feed_forward, layer=self), self.norm3, self.dropout3, self.norm_first)


def _attended(attn, query, key, attn_mask, key_padding_mask, is_causal):
    return attn(
        query,
        key,
        key,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
    )[0]


def _masks(mask, padding, src):
    """Checked under the names by which an encoder's caller knows them; of two dtypes both become additive, as in torch."""
    mixed = mask is not None and padding is not None and mask.dtype != padding.dtype
    # an empty one is enough for its dtype to be checked
    part = [v if v is None or mixed else v.new_empty(0) for v in (mask, padding)]
    part[1] = F._canonical_mask(part[1], "src_key_padding_mask", F._none_or_dtype(mask), "src_mask", src.dtype)
    part[0] = F._canonical_mask(part[0], "src_mask", None, "", src.dtype, check_other=False)
    return part if mixed else (mask, padding)
