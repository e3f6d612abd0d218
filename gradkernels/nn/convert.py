"""Swapping torch's layers for ours and back, by changing the class of the object.

The object stays itself, so whatever refers to it still does: hooks and their handles, optimizers, tied weights, lists, DDP and
FSDP wrappers. Both sides have the same parameters and attributes; only torch's own list of the weights is dropped and made again.
"""

from __future__ import annotations

import sys

from torch import nn

from gradkernels.nn.any_cell import Recurrent
from gradkernels.nn.attention import AttentionBlock, MultiheadAttention
from gradkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from gradkernels.nn.norm import LayerNorm
from gradkernels.nn.recurrent import GRU, LSTM, RNN
from gradkernels.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from gradkernels.notices import warn

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}
WITHOUT_TWIN = (Recurrent, AttentionBlock)
TABLES = {"gradkernels": TWINS, "torch": {ours: theirs for theirs, ours in TWINS.items()}}


def convert(model: nn.Module, to: str = "gradkernels") -> nn.Module:
    """Change every layer that has a twin into it, in place, and return the model: LSTM, GRU, RNN and their cells, LayerNorm,
    MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer.

    Weights, hooks, mode, names and identity are kept; the model may itself be the layer. Subclasses written by others are left as
    they are, and so are layers that torch has no twin of (`to="torch"`), with all that is in them: one warning names them.

    TypeError if model is not a module, ValueError if `to` is neither "gradkernels" nor "torch".

    >>> import torch, gradkernels as gk
    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
    >>> gk.convert(model)[0].__class__ is gk.nn.LSTM
    True
    >>> gk.convert(model, to="torch")[0].__class__ is torch.nn.LSTM
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if to not in TABLES:
        raise ValueError(f"to must be 'gradkernels' or 'torch', got {to!r}")
    table, left = TABLES[to], []
    inside: tuple[str, ...] = ()
    families, done = ((*table, *WITHOUT_TWIN), ()) if to == "torch" else (tuple(table), tuple(table.values()))
    for name, module in model.named_modules():
        if not isinstance(module, families) or isinstance(module, done) or name.startswith(inside):
            continue
        target = _class_for(type(module), table) if to == "gradkernels" or _torch_has(module) else None
        if target is None:
            left.append(f"{name or 'the model itself'} ({type(module).__name__})")
            if to == "torch":  # ours call their parts in ways that torch's do not have
                inside += (f"{name}." if name else "",)
            continue
        for key in ("probes", "backend", "recompute", "_flat_weights", "_flat_weight_refs"):  # what only one side has
            module.__dict__.pop(key, None)
        module.__class__ = target
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    if left:
        why = "subclasses of torch layers" if to == "gradkernels" else "layers without a twin in torch"
        warn(f"convert left {why} as they are: {', '.join(left)}")
    return model


def _torch_has(module: nn.Module) -> bool:
    """Whether torch's layer of the same name computes the same."""
    return (
        not isinstance(module, WITHOUT_TWIN)
        and getattr(module, "nonlinearity", None) != "sigmoid"
        and getattr(module, "reset_after", True)
    )


def _class_for(cls: type, table: dict[type[nn.Module], type[nn.Module]]) -> type | None:
    """The class to become, or None. A class that torch made for one module (parametrizations, FSDP) is made again on the twin."""
    if cls in table:
        return table[cls]
    made = cls.__module__.startswith("torch.") and not hasattr(sys.modules[cls.__module__], cls.__name__)
    bases = [_class_for(base, table) for base in cls.__bases__] if made else []
    if not any(bases):
        return None
    space = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    old, new = next((o, n) for o, n in zip(cls.__bases__, bases) if n is not None)
    return type(
        cls.__name__.replace(old.__name__, new.__name__), tuple(n or o for o, n in zip(cls.__bases__, bases)), space
    )
