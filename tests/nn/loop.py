"""Recurrent layers as a plain loop over steps in torch operations, differentiated by torch: the definition to compare with where
torch.nn has no such layer."""

import torch
import torch.nn.functional as F
from torch import nn


def lstm(x, r, s):
    i, f, g, o = (x + r).chunk(4, -1)
    c = f.sigmoid() * s[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x, r, s):
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), r.chunk(3, -1)
    z = (xz + hz).sigmoid()
    return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * s[0],)


STEPS = {
    "lstm": (4, 2, lstm),
    "gru": (3, 1, gru),
    "rnn_tanh": (1, 1, lambda x, r, s: ((x + r).tanh(),)),
    "rnn_relu": (1, 1, lambda x, r, s: ((x + r).relu(),)),
    "rnn_sigmoid": (1, 1, lambda x, r, s: ((x + r).sigmoid(),)),
}


class Loop(nn.Module):
    """Takes the weights of `layer`, one of ours; input [T, B, I] (or batch first), every row with its own length."""

    def __init__(self, layer):
        super().__init__()
        for name in ("cell", "num_layers", "bidirectional", "batch_first", "dropout", "hidden_size", "proj_size"):
            setattr(self, name, getattr(layer, name))
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))

    def step(self, v, s, w):
        x, h = F.linear(v, w["weight_ih"], w.get("bias_ih")), s[0]
        if self.cell == "gru_reset_before":
            H, w_hh = self.hidden_size, w["weight_hh"]
            b_hh = w.get("bias_hh", w_hh.new_zeros(3 * H))
            r, z = (x[:, : 2 * H] + F.linear(h, w_hh[: 2 * H], b_hh[: 2 * H])).sigmoid().chunk(2, -1)
            n = (x[:, 2 * H :] + F.linear(r * h, w_hh[2 * H :], b_hh[2 * H :])).tanh()
            return ((1 - z) * n + z * h,)
        t = STEPS[self.cell][2](x, F.linear(h, w["weight_hh"], w.get("bias_hh")), s)
        return (F.linear(t[0], w["weight_hr"]), *t[1:]) if "weight_hr" in w else t

    def forward(self, x, hx=None, lengths=None):
        S = STEPS[self.cell][1] if self.cell in STEPS else 1
        x = x.transpose(0, 1) if self.batch_first else x
        T, B = x.shape[:2]
        lengths = (torch.full((B,), T) if lengths is None else lengths).to(x.device)
        directions, last, k = ("", "_reverse")[: 1 + self.bidirectional], [], 0
        for layer in range(self.num_layers):
            x = F.dropout(x, self.dropout, self.training) if layer and self.dropout else x
            outs = []
            for suffix in directions:
                names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
                w = {n: getattr(self, f"{n}_l{layer}{suffix}") for n in names if hasattr(self, f"{n}_l{layer}{suffix}")}
                if hx is None:
                    s = [x.new_zeros(B, (not j and self.proj_size) or self.hidden_size) for j in range(S)]
                else:
                    s = [h[k] for h in (hx if S > 1 else (hx,))]
                ys = [None] * T
                for t in reversed(range(T)) if suffix else range(T):
                    here = (t < lengths).unsqueeze(1)
                    s = [torch.where(here, new, old) for new, old in zip(self.step(x[t], s, w), s)]
                    ys[t] = torch.where(here, s[0], torch.zeros_like(s[0]))
                outs.append(torch.stack(ys))
                last.append(s)
                k += 1
            x = torch.cat(outs, -1)
        final = tuple(torch.stack(v) for v in zip(*last))
        return x.transpose(0, 1) if self.batch_first else x, final if S > 1 else final[0]
