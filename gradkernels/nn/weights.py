"""Weights that were trained elsewhere, as the state_dict of a layer here. Functions of tensors and arrays: none of those packages is
needed.

Dims: I input features, H hidden units, G gates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# torchrecurrent's parameter of a cell -> ours, and how many rows of H numbers it has
_PER_UNIT = {"weight_ph": ("weight_c", 3), "vector_u": ("weight_h", 1)}


def keras_gru(weights: Sequence[Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Of a Keras GRU layer's `get_weights()`: kernel [I, 3H], recurrent_kernel [H, 3H], and bias, if it has one.

    Keras keeps the gates z r h, here they are r z n; its update is the same. A bias [3H] is that of ``reset_after=False``, for
    GRU(reset_after=False) or Recurrent("gru_reset_before"); [2, 3H], input and recurrent, that of ``reset_after=True``, for GRU.
    suffix: "_l0_reverse" for the backward layer of a Bidirectional, "_l1" for the second of a stack.

    RuntimeError if the shapes do not fit together.

    >>> import gradkernels as gk
    >>> kernel, recurrent, bias = torch.randn(3, 15), torch.randn(5, 15), torch.randn(15)
    >>> gru = gk.nn.GRU(3, 5, reset_after=False)
    >>> gru.load_state_dict(keras_gru([kernel, recurrent, bias]))
    <All keys matched successfully>
    """

    def order(v: Tensor) -> Tensor:
        z, r, n = v.chunk(3, -1)
        return torch.cat([r, z, n], -1)

    return _keras([order(torch.as_tensor(v)) for v in weights], 3, suffix)


def keras_lstm(weights: Sequence[Tensor], suffix: str = "_l0") -> dict[str, Tensor]:
    """Of a Keras LSTM layer's `get_weights()`: kernel [I, 4H], recurrent_kernel [H, 4H], and bias [4H], if it has one.

    Gates are i f c o on both sides; a second bias, which torch has, is zero. suffix as in `keras_gru`.

    RuntimeError if the shapes do not fit together.

    >>> import gradkernels as gk
    >>> lstm = gk.nn.LSTM(3, 5, bias=False)
    >>> lstm.load_state_dict(keras_lstm([torch.randn(3, 20), torch.randn(5, 20)]))
    <All keys matched successfully>
    """
    return _keras([torch.as_tensor(v) for v in weights], 4, suffix)


def _keras(weights: list[Tensor], G: int, suffix: str) -> dict[str, Tensor]:
    shapes = [list(v.shape) for v in weights]
    H = weights[1].shape[0] if len(weights) > 1 else 0
    wide = G * H
    bias = weights[2] if len(weights) == 3 else None
    if (
        len(weights) not in (2, 3)
        or shapes[0][1:] != [wide]
        or shapes[1] != [H, wide]
        or (bias is not None and shapes[2] not in ([wide], [2, wide]))
    ):
        raise RuntimeError(
            f"weights must be kernel [I, {G}H], recurrent_kernel [H, {G}H] and bias [{G}H] or [2, {G}H], got {shapes}"
        )
    out = {f"weight_ih{suffix}": weights[0].t().contiguous(), f"weight_hh{suffix}": weights[1].t().contiguous()}
    if bias is not None:
        both = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])
        out |= {f"bias_ih{suffix}": both[0].clone(), f"bias_hh{suffix}": both[1].clone()}
    return out


def awd_lstm(state_dict: Mapping[str, Tensor], prefix: str = "rnns.0.") -> dict[str, Tensor]:
    """Of one LSTM of an AWD-LSTM, fastai's or that of its authors, for Recurrent("lstm", ..., weight_drop=p), or LSTM.

    There the LSTM sits in a wrapper, `module`, and the recurrent weight that is trained has `_raw` in its name; the one beside it
    is what dropout left of it, and is not read. The wrapper's `weight_p` is our `weight_drop`. What is dropped between layers and
    from embeddings belongs to the model around.

    KeyError if nothing begins with prefix.

    >>> raw = {"rnns.1.weight_hh_l0_raw": torch.ones(20, 5), "rnns.1.module.weight_hh_l0": torch.zeros(20, 5)}
    >>> awd_lstm(raw, "rnns.1.")["weight_hh_l0"].sum()
    tensor(100.)
    """
    found = {k.removeprefix(prefix).removeprefix("module."): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        raise KeyError(f"no weight begins with {prefix!r}; there are {', '.join(state_dict)}")
    return {k.removesuffix("_raw"): v for k, v in sorted(found.items(), key=lambda item: item[0].endswith("_raw"))}


def torchrecurrent(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a cell or a layer of torchrecurrent, for Recurrent of the cell with the same equations.

    PeepholeLSTM is "lstm_peephole", and IndRNN with `activation_fn=torch.relu` is "indrnn"; their LSTM-shaped weights are stacked i f
    g o as here. The k-th cell of a layer becomes layer k. Other cells keep their names, and load where those are ours.

    >>> theirs = {"cells.0.weight_ih": torch.ones(5, 3), "cells.0.vector_u": torch.ones(5), "cells.0.bias_ih": torch.ones(5)}
    >>> {k: list(v.shape) for k, v in torchrecurrent(theirs).items()}
    {'weight_ih_l0': [5, 3], 'weight_h_l0': [5], 'weight_hh_l0': [5, 0], 'bias_ih_l0': [5]}
    """
    out = {}
    for key, v in state_dict.items():
        name = key.rpartition(".")[2]
        layer = re.search(r"(\d+)\.\w+$", key)
        suffix = f"_l{layer.group(1) if layer else 0}"
        ours, count = _PER_UNIT.get(name, (name, 1))
        out[f"{ours}{suffix}"] = v.view(count, -1) if count > 1 else v
        if name == "vector_u":  # a cell without a recurrent product has an empty matrix
            out[f"weight_hh{suffix}"] = v.new_empty(v.shape[0], 0)
    return out
