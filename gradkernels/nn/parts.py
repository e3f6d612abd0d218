"""The recurrent layers inside a model, of torch and of this package, one layer and direction at a time.

Whoever looks at weights or at the dynamics of a layer asks here: initialisation, spectra, Jacobians.
Dims: I inputs, H hidden units, R width of the first state (H, or the rows of weight_hr), G gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradkernels import cells
from gradkernels.nn.any_cell import Recurrent
from gradkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from gradkernels.nn.recurrent import NAMES, RNNBase
from gradkernels.ops._recurrent_taps import activations

# Of cells whose gates are not the activations that they keep.
GATES = {"lstm_layer_norm": "i f g o", "gru_layer_norm": "reset z n", "slstm": "i f z o"}


@dataclass(frozen=True)
class Part:
    """One layer and direction of a recurrent module, or a cell module, which is one of its own."""

    name: str  # in the model: "encoder.l0", "encoder.l0_reverse"; that of the module for a cell module
    module: nn.Module
    cell: cells.Cell
    suffix: str  # of its parameters: "_l0", "_l0_reverse", "" for a cell module
    layer: int = 0
    reverse: bool = False

    def get(self, name: str) -> Tensor | None:
        """weight_ih, weight_hh, bias_ih, bias_hh or weight_hr, as it is used; None where the layer has none."""
        return getattr(self.module, name + self.suffix, None)

    def set(self, name: str, value: Tensor) -> None:
        """Give a parameter other numbers; one that is parametrized keeps its parametrization."""
        full = name + self.suffix
        if parametrize.is_parametrized(self.module, full):
            setattr(self.module, full, value.to(getattr(self.module, full)))
        elif full in self.module._parameters:
            with torch.no_grad():
                self.module.get_parameter(full).copy_(value)
        else:
            raise RuntimeError(f"{self.name}: {full} is computed from other parameters and cannot be set")

    @property
    def gates(self) -> list[str]:
        """Names of the gates, in the order of their blocks; numbers, where a cell of one's own does not tell."""
        names = GATES.get(self.cell.name, "").split() or [name for name, *_ in activations(self.cell)]
        return names if len(names) == self.cell.G else [str(k) for k in range(self.cell.G)]

    @property
    def options(self) -> dict[str, Any]:
        """What surrounds the cell in a Recurrent layer."""
        return getattr(self.module, "options", {})

    def blocks(self) -> list[Tensor]:
        """G recurrent matrices [H, H] from the units before a step to a gate: W_k; W_k W_hr behind a projection; of layers with heads
        block-diagonal. Without a recurrent product there are none."""
        weight, projection = self.get("weight_hh"), self.get("weight_hr")
        if weight is None or not weight.numel():
            return []
        blocks = weight.detach().double().cpu().chunk(self.cell.G)
        if (heads := self.options.get("heads", 1)) > 1:
            return [torch.block_diag(*w.chunk(heads)) for w in blocks]
        return list(blocks) if projection is None else [w @ projection.detach().double().cpu() for w in blocks]

    def alone(self) -> Recurrent:
        """The same layer and direction as a module of its own, in float64 on the CPU, as in evaluation; it runs forward in time.

        Gradients are not clipped, whatever the layer does."""
        module, cell = self.module, self.cell
        if not isinstance(module, nn.RNNBase):
            raise TypeError(f"{self.name} is a {type(module).__name__}, a single step: it has no course in time")
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", *(text for text, *_ in cell.params))
        held = {f"{name}_l0": w.detach().double().cpu() for name in names if (w := self.get(name)) is not None}
        features, units = held["weight_ih_l0"].shape[1], held["weight_ih_l0"].shape[0] // cell.G
        options = {name: v for name, v in self.options.items() if name not in ("clip_grad", "recompute")}
        # the reference needs no compiler for a cell of one's own, and is as fast on few steps
        layer = Recurrent(
            cell,
            features,
            units,
            bias=module.bias,
            proj_size=module.proj_size,
            dtype=torch.double,
            backend="reference",
            **options,
        )
        layer.load_state_dict(held)
        return layer.eval().requires_grad_(False)


def parts(model: nn.Module) -> Iterator[Part]:
    """Every recurrent layer and direction in a model, in the order of its modules."""
    for name, module in model.named_modules():
        name = name or type(module).__name__
        cell = _cell(module)
        if cell is None:
            continue
        if not isinstance(module, nn.RNNBase):
            yield Part(name, module, cell, "")
            continue
        directions = 2 if module.bidirectional else 1
        for k, names in enumerate(module._all_weights):
            suffix = names[0].removeprefix("weight_ih")
            at = name + suffix.replace("_", ".", 1)
            yield Part(at, module, cell, suffix, k // directions, k % directions == 1)


def found(model: nn.Module) -> list[Part]:
    """The same as a list. TypeError if this is no module, ValueError if there is no recurrent layer in it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is expected, got {type(model).__name__}")
    every = list(parts(model))
    if not every:
        raise ValueError(
            f"no recurrent layer in {type(model).__name__}: neither torch's nor gradkernels' LSTM, GRU, RNN ..."
        )
    return every


def _cell(module: nn.Module) -> cells.Cell | None:
    """What a module is made of; None if it is not recurrent, or of somebody's own making."""
    if isinstance(module, RNNBase):
        return module.unlisted or cells.get(module.cell)
    if isinstance(module, nn.RNNBase):
        return cells.CELLS.get(NAMES.get(module.mode, ""))
    if isinstance(module, (nn.RNNCell, RNNCell)):
        return cells.get(f"rnn_{module.nonlinearity}")
    if isinstance(module, (nn.GRUCell, GRUCell)):
        return cells.get("gru" if getattr(module, "reset_after", True) else "gru_reset_before")
    return cells.get("lstm") if isinstance(module, (nn.LSTMCell, LSTMCell)) else None
