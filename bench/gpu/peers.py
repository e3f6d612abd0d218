"""Other packages' recurrent kernels, where they are installed: the same weights and the same work, the input projection included.

Their names are torch's parameters', so that their gradients are compared like everybody's.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Case
from bench.providers import PEERS, Provider, layer

CELLS = {"flashrnn": ("lstm",), "torchrl": ("lstm", "gru"), "xma": ("rnn_tanh", "gru_reset_before")}


def available(case: Case) -> tuple[str, ...]:
    """Those that are installed and have such a layer: one layer, one direction, padded, without projection."""
    if case.kind != "time" or case.layers > 1 or case.bidirectional or case.proj_size or case.layout != "padded":
        return ()
    return tuple(k for k in PEERS if case.cell in CELLS[k] and importlib.util.find_spec(k) is not None)


class FlashRNN(nn.Module):
    """flashrnn: the projection by torch, batch first, heads (one here) and gates apart."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = str(dtype).removeprefix("torch.")

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # x [T, B, I]
        from flashrnn import flashrnn

        T, B, _ = x.shape
        H = self.weight_hh_l0.shape[1]
        gates = F.linear(x, self.weight_ih_l0).view(T, B, 4, 1, H).transpose(0, 1)
        bias = (self.bias_ih_l0 + self.bias_hh_l0).view(4, 1, H)
        states, last = flashrnn(gates, self.weight_hh_l0.view(4, 1, H, H), bias, function="lstm", dtype=self.name)
        return states[0, :, :, 0].transpose(0, 1), (last[0, :, :, 0].transpose(0, 1), last[1, :, :, 0].transpose(0, 1))


class TorchRL(nn.Module):
    """torchrl's Triton kernels: batch first, fp32 outside and products in the dtype of the row."""

    def __init__(self, cell: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.cell, self.dtype = cell, dtype

    def forward(self, x: Tensor) -> tuple[Tensor, object]:  # x [T, B, I]
        from torchrl.modules.tensordict_module import _rnn_triton

        T, B, _ = x.shape
        x, H = x.transpose(0, 1).float(), self.weight_hh_l0.shape[1]
        weights = [p.float() for p in (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)]
        zeros, begin = x.new_zeros(B, T, H), torch.zeros(B, T, dtype=torch.bool, device=x.device)
        if self.cell == "gru":
            y, h = _rnn_triton.gru_triton(x, zeros, *weights, begin, self.dtype)
            return y.transpose(0, 1).to(self.dtype), h.unsqueeze(0)
        y, _, h, c = _rnn_triton.lstm_triton(x, zeros, zeros, *weights, begin, self.dtype)
        return y.transpose(0, 1).to(self.dtype), (h.unsqueeze(0), c.unsqueeze(0))


class XMA(nn.Module):
    """xma's Triton kernels: batch first, states times weights, no recurrent bias."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # x [T, B, I]
        from xma import functional

        bias = self.bias_ih_l0 + self.bias_hh_l0
        gates = F.linear(x, self.weight_ih_l0, bias).transpose(0, 1).unsqueeze(2)  # [B, T, 1, G * H]
        weights = [w.t().unsqueeze(0).contiguous() for w in self.weight_hh_l0.chunk(gates.shape[3] // x.shape[2])]
        if self.cell == "rnn_tanh":
            y, h = functional.rnn(gates.contiguous(), weights[0])
        else:
            reset, update, new = (g.contiguous() for g in gates.chunk(3, 3))
            y, h = functional.gru(new, weights[2], update, weights[1], reset, weights[0])
        return y.squeeze(2).transpose(0, 1), h.transpose(0, 1)


def build(case: Case, key: str, dtype: torch.dtype) -> Provider:
    """One of them with the case's weights and input; ImportError where it is not installed."""
    like = layer(case).to(getattr(torch, case.dtype)).to(dtype).to(case.device)
    module = FlashRNN(dtype) if key == "flashrnn" else TorchRL(case.cell, dtype) if key == "torchrl" else XMA(case.cell)
    for name, p in like.named_parameters():
        module.register_parameter(name, nn.Parameter(p.detach().clone()))
    x = torch.randn(case.T, case.B, case.H, generator=torch.Generator().manual_seed(2))
    return Provider(key, module, module, x.to(getattr(torch, case.dtype)).to(dtype).to(case.device), case)
