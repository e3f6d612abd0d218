"""Other packages' kernels get torch's weights in their own layout: what stands in for them here computes as they document it."""

import sys
from types import ModuleType

import pytest
import torch

from bench.agreement import agree
from bench.cases import Case
from bench.gpu import peers
from bench.providers import build


def flashrnn(Wx, R, b, function, dtype):
    """Wx [B, T, G, 1, D], R [G, 1, D, D], b [G, 1, D] -> states [2, B, T, 1, D], the last of them."""
    assert function == "lstm" and dtype == str(Wx.dtype).removeprefix("torch.")
    h = c = Wx.new_zeros(Wx.shape[0], Wx.shape[-1])
    states = []
    for t in range(Wx.shape[1]):
        i, f, z, o = (Wx[:, t, g, 0] + h @ R[g, 0].t() + b[g, 0] for g in range(4))
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack((h, c)))
    found = torch.stack(states, 2).unsqueeze(3)
    return found, found[:, :, -1:]


def rows(layer, x, weights):
    """torch's layer over [B, T, I], with weights that autograd follows."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    module = layer(weights[0].shape[1], weights[1].shape[1], batch_first=True)
    return torch.func.functional_call(module, dict(zip(names, weights)), (x,))


def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype):
    assert x.dtype == torch.float32 and hidden.shape[:2] == is_init.shape == x.shape[:2] and not is_init.any()
    y, h = rows(torch.nn.GRU, x, (w_ih, w_hh, b_ih, b_hh))
    return y, h[0]


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype):
    assert cell.shape == hidden.shape and not is_init.any()
    y, (h, c) = rows(torch.nn.LSTM, x, (w_ih, w_hh, b_ih, b_hh))
    return y, torch.zeros_like(y), h[0], c[0]


def xma_rnn(x, weight):
    """x [B, T, 1, H], weight [1, H, H]: h' = tanh(h weight + x)"""
    h, found = x.new_zeros(x.shape[0], x.shape[3]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h @ weight[0] + x[:, t, 0])
        found.append(h)
    y = torch.stack(found, 1).unsqueeze(2)
    return y, y[:, -1]


def xma_gru(x, weight, forget_x, forget_weight, reset_x, reset_weight):
    h, found = x.new_zeros(x.shape[0], x.shape[3]), []
    for t in range(x.shape[1]):
        f = torch.sigmoid(h @ forget_weight[0] + forget_x[:, t, 0])
        r = torch.sigmoid(h @ reset_weight[0] + reset_x[:, t, 0])
        h = f * h + (1 - f) * torch.tanh((h * r) @ weight[0] + x[:, t, 0])
        found.append(h)
    y = torch.stack(found, 1).unsqueeze(2)
    return y, y[:, -1]


@pytest.fixture
def installed(monkeypatch):
    def module(name, **values):
        made = ModuleType(name)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, made)

    module("flashrnn", flashrnn=flashrnn)
    for name in ("torchrl", "torchrl.modules"):
        module(name)
    kernels = ModuleType("_rnn_triton")
    kernels.gru_triton, kernels.lstm_triton = gru_triton, lstm_triton
    module("torchrl.modules.tensordict_module", _rnn_triton=kernels)
    functional = ModuleType("functional")
    functional.rnn, functional.gru = xma_rnn, xma_gru
    module("xma", functional=functional)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("key, cell", [(key, cell) for key, cells in peers.CELLS.items() for cell in cells])
def test_they_compute_what_torch_does(installed, key, cell, mode):
    other = "loop" if cell == "gru_reset_before" else "torch"
    case = Case("g", cell, mode, 4, 3, 6, providers=(key, other))
    worst = agree(case)
    assert worst["error"] <= worst["allowed"]
    provider = build(case, key)
    provider.run()
    assert provider.label in ("FlashRNN", "TorchRL", "XMA")
    if mode == "training":
        assert all(p.grad is not None for p in provider.parameters.values())
