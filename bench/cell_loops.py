"""Cells as people write them today: torch operations for a step, and a Python loop over steps.

Dims: T steps, B batch, I input features, H units, G gates. A step takes weights, what the input contributes x [B, G*H], and the
states [B, H]; it returns the states after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cell_rows import CellRow
from gradkernels.cells import Cell

States = tuple[Tensor, ...]


class Weights(nn.Module):
    """A layer's parameters, copied, by their names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, p in layer.named_parameters():
            setattr(self, name.removesuffix("_l0"), nn.Parameter(p.detach().clone()))


def product(w: Weights, h: Tensor) -> Tensor:
    K = w.weight_hh.shape[1]
    if K == h.shape[1]:
        return F.linear(h, w.weight_hh, w.bias_hh)
    h, blocks = h.unflatten(1, (-1, K)), w.weight_hh.view(-1, h.shape[1] // K, K, K)  # [B, heads, K], [G, heads, K, K]
    return torch.einsum("bnk,gnjk->bgnj", h, blocks).flatten(1) + w.bias_hh


def norm(v: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """torch.nn.LayerNorm over the last dimension, its parameters given by gate."""
    flat = lambda p: None if p is None else p.reshape(-1)
    return F.layer_norm(v, v.shape[-1:], flat(gain), flat(bias))


# ------------------------------------------------------------ one step


def lstm(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> States:
    i, f, g, o = (x + product(w, h)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(w: Weights, x: Tensor, h: Tensor) -> States:
    (xr, xz, xn), (rr, rz, rn) = x.chunk(3, 1), product(w, h).chunk(3, 1)
    n = torch.tanh(xn + torch.sigmoid(xr + rr) * rn)
    return (n + torch.sigmoid(xz + rz) * (h - n),)


def lstm_no_forget(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> States:
    i, g, o = (x + product(w, h)).chunk(3, 1)
    c = c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_coupled(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> States:
    f, g, o = (x + product(w, h)).chunk(3, 1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_peephole(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> States:
    i, f, g, o = (x + product(w, h)).chunk(4, 1)
    i, f = torch.sigmoid(i + w.weight_c[0] * c), torch.sigmoid(f + w.weight_c[1] * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + w.weight_c[2] * c) * torch.tanh(c), c


def lstm_layer_norm(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> States:  # x with its norm, which needs no loop
    i, f, g, o = (x + norm(product(w, h), w.gain_r)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(norm(c, w.gain_c, w.bias_c)), c


def gru_layer_norm(w: Weights, x: Tensor, h: Tensor) -> States:  # x with its norms
    H, r = h.shape[1], product(w, h)
    reset, z = torch.sigmoid(x[:, : 2 * H] + norm(r[:, : 2 * H], w.gain_r[:2])).chunk(2, 1)
    n = torch.tanh(x[:, 2 * H :] + reset * norm(r[:, 2 * H :], w.gain_r[2]))
    return (n + z * (h - n),)


def slstm(w: Weights, x: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> States:
    log_i, f, z, o = (x + product(w, h)).chunk(4, 1)
    log_f = F.logsigmoid(f)
    before = torch.where(n > 0, log_f + m, -torch.inf)  # of nothing the first step keeps nothing
    m = torch.maximum(before, log_i)
    i, f = torch.exp(log_i - m), torch.exp(before - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def mgu(w: Weights, x: Tensor, h: Tensor) -> States:
    H = h.shape[1]
    f = torch.sigmoid(x[:, :H] + F.linear(h, w.weight_hh[:H], w.bias_hh[:H]))
    n = torch.tanh(x[:, H:] + F.linear(f * h, w.weight_hh[H:], w.bias_hh[H:]))
    return (h + f * (n - h),)


def indrnn(w: Weights, x: Tensor, h: Tensor) -> States:
    return (torch.relu(x + w.weight_h * h),)


def rnn_modrelu(w: Weights, x: Tensor, h: Tensor) -> States:
    z = x + product(w, h)
    return (torch.sign(z) * torch.relu(torch.abs(z) + w.bias_modulus),)


def rnn_additive(w: Weights, x: Tensor, h: Tensor) -> States:
    return (h + torch.tanh(x + product(w, h)),)


def leaky(w: Weights, x: Tensor, h: Tensor) -> States:
    return (0.9 * h + 0.1 * torch.tanh(x + product(w, h)),)


STEPS: dict[str, Callable[..., States]] = {
    f.__name__: f
    for f in (
        lstm,
        gru,
        lstm_no_forget,
        lstm_coupled,
        lstm_peephole,
        lstm_layer_norm,
        gru_layer_norm,
        slstm,
        mgu,
        indrnn,
        rnn_modrelu,
        rnn_additive,
        leaky,
    )
}


def step_of(c: Cell) -> Callable[..., States]:
    """The step above, or, of a cell that nobody has written there, the operations of its own text."""
    if c.name in STEPS:
        return STEPS[c.name]

    def step(w: Weights, x: Tensor, *s: Tensor) -> States:
        gates, H = x.chunk(c.G, 1), s[0].shape[1]
        p = [row for text, _, _ in c.params for row in getattr(w, text).reshape(-1, H)]
        values = s, *([p] if p else [])
        r = list(product(w, s[0]).chunk(c.G, 1)) if c.recurrent else [torch.zeros_like(s[0])] * c.G
        if c.second:
            v = c.operand(gates, r, *values)
            for k in c.second:
                r[k] = F.linear(v, w.weight_hh[k * H : (k + 1) * H], w.bias_hh[k * H : (k + 1) * H])
        return c.forward(gates, r, *values)[0]

    return step


# ------------------------------------------------------------ loops


class Loop(nn.Module):
    """One layer; the input's products of all steps are one, and so are its norms."""

    def __init__(self, layer: nn.Module, case: CellRow, compiled: bool) -> None:
        super().__init__()
        self.weights, self.case, cell = Weights(layer), case, case.definition()
        self.step, self.states = step_of(cell), cell.S
        self.advance = compiled_anew(self.one) if compiled else self.one

    def named_parameters(self, *args, **kwargs):
        """By the names that the layer has."""
        for name, p in self.weights.named_parameters():
            yield f"{name}_l0", p

    def one(self, x: Tensor, mask: Tensor | None, *states: Tensor) -> States:
        h, case = states[0], self.case
        found = self.step(self.weights, x, h if mask is None else h * mask, *states[1:])
        return tuple(zoned(a, b, case.zoneout, self.training) for a, b in zip(states, found)) if case.zoneout else found

    def gates(self, x: Tensor) -> Tensor:
        w, H = self.weights, self.case.H
        x = F.linear(x, w.weight_ih, w.bias_ih)
        if self.case.cell == "lstm_layer_norm":
            return norm(x, w.gain_x, w.bias)
        if self.case.cell == "gru_layer_norm":
            both = norm(x[..., : 2 * H], w.gain_x[:2], w.bias[:2])
            return torch.cat([both, norm(x[..., 2 * H :], w.gain_x[2], w.bias[2])], -1)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | States]:  # x [T, B, I]
        case = self.case
        zeros = x.new_zeros(x.shape[1], case.H)
        states = (zeros,) * self.states
        mask = F.dropout(torch.ones_like(zeros), case.variational, self.training) if case.variational else None
        outputs: list[Tensor] = []
        for gates in self.gates(x):
            states = self.advance(gates, mask, *states)
            if case.skip and len(outputs) >= case.skip:
                states = (states[0] + outputs[-case.skip], *states[1:])
            outputs.append(states[0])
        final = tuple(s.unsqueeze(0) for s in states)
        return torch.stack(outputs), final if len(final) > 1 else final[0]


def compiled_anew(step: Callable[..., States]) -> Callable[..., States]:
    """Without what was compiled for rows before: after eight forms of a function torch compiles no other."""
    torch._dynamo.reset()
    return torch.compile(step, dynamic=False)


def zoned(before: Tensor, after: Tensor, p: float, training: bool) -> Tensor:
    """Units keep their state with probability p; the mean of that where nothing is drawn."""
    if training:
        return torch.where(torch.rand_like(after) < p, before, after)
    return p * before + (1 - p) * after


class Scales(nn.Module):
    """Groups of GRU units that step every p-th step; each sees the input and what slower groups held the step before."""

    def __init__(self, layer: nn.Module, case: CellRow, compiled: bool) -> None:
        super().__init__()
        self.periods = case.periods
        self.groups = nn.ModuleList(Weights(group) for group in layer.groups)
        self.units = case.H // len(self.periods)
        self.advance = compiled_anew(gru) if compiled else gru

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            yield f"{name}_l0", p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # x [T, B, I]
        held = [x.new_zeros(x.shape[1], self.units)] * len(self.periods)
        slower = [
            [j for j in sorted(range(len(held)), key=lambda j: -self.periods[j]) if self.periods[j] > p]
            for p in self.periods
        ]
        outputs = []
        for t, row in enumerate(x):
            before = list(held)
            for k, (p, w) in enumerate(zip(self.periods, self.groups)):
                if t % p == 0:
                    seen = torch.cat([row, *(before[j] for j in slower[k])], 1)
                    (held[k],) = self.advance(w, F.linear(seen, w.weight_ih, w.bias_ih), before[k])
            outputs.append(torch.cat(held, 1))
        return torch.stack(outputs), outputs[-1].unsqueeze(0)
