"""What a monitor has to find, from a loop over the steps in torch operations that asks every state for its gradient."""

import torch
import torch.nn.functional as F
from torch import nn

import gradkernels as gk
from tests.nn.loop import STEPS

KINDS = {
    "lstm": lambda *a, **k: gk.nn.LSTM(*a, **k),
    "gru": lambda *a, **k: gk.nn.GRU(*a, **k),
    "gru_reset_before": lambda *a, **k: gk.nn.GRU(*a, reset_after=False, **k),
    "rnn_tanh": lambda *a, **k: gk.nn.RNN(*a, **k),
    "rnn_relu": lambda *a, **k: gk.nn.RNN(*a, nonlinearity="relu", **k),
    "rnn_sigmoid": lambda *a, **k: gk.nn.RNN(*a, nonlinearity="sigmoid", **k),
}


def step(cell, x, s, w, H):
    """One step of a cell on the pre-activations of the input."""
    if cell == "gru_reset_before":
        r, z = (x[:, : 2 * H] + F.linear(s[0], w["hh"][: 2 * H], w["bhh"][: 2 * H])).sigmoid().chunk(2, 1)
        n = (x[:, 2 * H :] + F.linear(r * s[0], w["hh"][2 * H :], w["bhh"][2 * H :])).tanh()
        return ((1 - z) * n + z * s[0],)
    t = STEPS[cell][2](x, F.linear(s[0], w["hh"], w["bhh"]), s)
    return (F.linear(t[0], w["hr"]), *t[1:]) if "hr" in w else t


def unrolled(layer, x, lengths, loss, dtype=torch.double):
    """{layer name: [T, S + 1]}: norms of the gradient of every state, and of x, at every step; rows that have ended stay out.

    `loss` takes the padded outputs [T, B, ..] of the last layer.
    """
    cell, S, H = layer.cell, 2 if layer.cell == "lstm" else 1, layer.hidden_size
    T, B = x.shape[:2]
    x = x.detach().to(dtype).requires_grad_()
    found, inputs = {}, {}
    for k, names in enumerate(layer._all_weights):
        w = {
            n: getattr(layer, f"{full}").detach().to(dtype) for n, full in zip(("ih", "hh", "bih", "bhh", "hr"), names)
        }
        suffix = names[0].removeprefix("weight_ih_")
        reverse = suffix.endswith("_reverse")
        if not reverse:
            layer_input, outs = x, []
            layer_input.retain_grad()
        own = layer_input * 1  # of this direction
        own.retain_grad()
        s = [torch.zeros(B, layer.proj_size or H, dtype=dtype), torch.zeros(B, H, dtype=dtype)][:S]
        steps, y = [None] * T, [None] * T
        for t in reversed(range(T)) if reverse else range(T):
            live = (t < lengths).nonzero().squeeze(1)
            new = step(cell, F.linear(own[t][live], w["ih"], w["bih"]), [v[live] for v in s], w, H)
            for v in new:
                v.retain_grad()
            s = [v.index_copy(0, live, u) for v, u in zip(s, new)]
            y[t], steps[t] = torch.zeros_like(s[0]).index_copy(0, live, new[0]), new
        found[suffix], inputs[suffix] = steps, own
        outs.append(torch.stack(y))
        x = torch.cat(outs, -1)
    loss(x).backward()
    norm = lambda v: 0.0 if v.grad is None else v.grad.double().norm().item()
    per_step = lambda n, t: [*(norm(v) for v in found[n][t]), inputs[n].grad[t].double().norm().item()]
    return {n: torch.tensor([per_step(n, t) for t in range(T)], dtype=torch.double) for n in found}


def measured(monitor, name=None):
    """The same of a monitor's latest record, norms of the layers of the module of that name."""
    flows = monitor.history[-1].layers
    out = {}
    for layer in monitor.layers.values():
        if name is None or layer.module == name:
            signals = flows[layer.name].signals
            columns = [signals[n] for n in (*layer.states, "x") if n in signals]
            out[layer.name.rpartition(".")[2]] = torch.stack([10 ** torch.from_numpy(v).double() for v in columns], 1)
    return out


class Small(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, layer, width, classes=3):
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])
