"""Recurrent layers written out by hand, step by step and row by row: what cells with parameters, masks, delays and resets mean.

Shares nothing with the package but the random words, which have a test of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gradkernels as gk
from gradkernels.backends.reference import philox
from tests import place

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "lstm_layer_norm": 4, "indrnn": 1}


def lstm(x, s, h, product, p):
    i, f, g, o = (x + product(h)).chunk(4, -1)
    c = torch.sigmoid(f) * s[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x, s, h, product, p):
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), product(h).chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    return ((1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * s[0],)


def rnn_tanh(x, s, h, product, p):
    return (torch.tanh(x + product(h)),)


def lstm_layer_norm(x, s, h, product, p):
    H = s[1].shape[-1]
    gain_x, gain_r, bias = (p[4 * k : 4 * k + 4].flatten() for k in range(3))
    u = F.layer_norm(x, (4 * H,), gain_x) + F.layer_norm(product(h), (4 * H,), gain_r) + bias
    i, f, g, o = u.chunk(4, -1)
    c = torch.sigmoid(f) * s[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), p[12], p[13])), c


def indrnn(x, s, h, product, p):
    return (torch.relu(x + p[0] * s[0]),)


STEPS = {f.__name__: f for f in (lstm, gru, rnn_tanh, lstm_layer_norm, indrnn)}


def keeps(seed, plane, p, row, H):
    """[H] of one mask: False where it drops."""
    word = philox.words(seed, torch.tensor([(plane << 32) + row]), torch.arange(H))
    return word.to(place.device) >= min(int(p * 2**32), 2**32 - 1)


@dataclass(frozen=True)
class Walk:
    cell: str
    options: tuple = ()  # of ops.recurrent, with their values
    layout: str = "dense"
    reverse: bool = False
    T: int = 5
    B: int = 3
    I: int = 3
    H: int = 5

    def __str__(self):
        words = [self.cell, *(f"{k}={v}" for k, v in self.options), self.layout, *["reverse"] * self.reverse]
        return "-".join(words)

    @property
    def lengths(self):
        if self.layout == "dense":
            return [self.T] * self.B
        n = torch.linspace(self.T, 1 if self.layout == "packed" else 0, self.B).round().long().tolist()
        return n if self.layout == "packed" else n[1:] + n[:1]

    @property
    def tokens(self):
        """[t][b] -> number of the token."""
        if self.layout != "packed":
            return [[t * self.B + b for b in range(self.B)] for t in range(self.T)]
        first, out = 0, []
        for t in range(self.T):
            out.append([first + b for b in range(self.B)])
            first += sum(n > t for n in self.lengths)
        return out

    @property
    def rows(self):
        live = torch.arange(self.T).unsqueeze(1) < torch.tensor(self.lengths)
        return live.flatten().nonzero().squeeze(1).to(place.device)

    def reset(self):
        """[T, B] of flags, the first step of a row among them."""
        return torch.rand(self.T, self.B, generator=torch.Generator().manual_seed(5)) < 0.35

    def tensors(self, dtype=torch.double, requires_grad=True):
        G, heads, H = GATES[self.cell], dict(self.options).get("heads", 1), self.H
        generator = torch.Generator().manual_seed(0)

        def new(*shape, scale=1.0, shift=0.0):
            v = torch.randn(*shape, generator=generator, dtype=torch.double) * scale + shift
            return v.to(place.device, dtype).requires_grad_(requires_grad)

        lead = (len(self.rows),) if self.layout == "packed" else (self.T, self.B)
        bare = self.cell == "indrnn"
        out = {"x": new(*lead, self.I), "weight_ih": new(G * H, self.I), "bias_ih": new(G * H)}
        out["weight_hh"] = new(G * H, 0 if bare else H // heads, scale=0.5)
        if not bare:
            out["bias_hh"] = new(G * H)
        if P := gk.cells.get(self.cell).P:
            out["params"] = new(P, H, scale=0.3, shift=0.5)
        states = ["state[0]", "state[1]"] if self.cell.startswith("lstm") else ["state[0]"]
        return out | {name: new(self.B, H) for name in states}

    def call(self, backend, seed=None, **more):
        names, kwargs = list(self.tensors()), {"cell": self.cell, "reverse": self.reverse, **dict(self.options), **more}
        if kwargs.get("reset"):
            kwargs["reset"] = self.reset().to(place.device)
            if self.layout == "packed":
                kwargs["reset"] = kwargs["reset"].flatten()[self.rows]
        if self.layout == "packed":
            kwargs["batch_sizes"] = torch.tensor([sum(n > t for n in self.lengths) for t in range(self.T)])
        if self.layout == "lengths":
            kwargs["lengths"] = torch.tensor(self.lengths)

        def f(*values):
            given = dict(zip(names, values))
            state = [given.pop(k) for k in names if k.startswith("state")]
            x, w = given.pop("x"), given.pop("weight_hh")
            y, final = gk.ops.recurrent(x, w, state, **given, backend=backend, seed=seed, **kwargs)
            return (y, *final)

        return f

    def by_hand(self, seed=None, training=True, seen=None):
        """The same function, every row by itself; in backward the adjoints of all h_t are put into lists, one for each step."""
        o, names, G, H = dict(self.options), list(self.tensors()), GATES[self.cell], self.H
        heads, reset, step = o.get("heads", 1), self.reset(), STEPS[self.cell]
        zone = o.get("zoneout", 0)

        dropped = o.get("variational", 0) or o.get("recurrent_dropout", 0)

        def zones(S, token):
            """What zoneout multiplies the change of each state with."""
            each = zone if isinstance(zone, tuple) else (zone,) * S
            if not training:
                return [torch.full((H,), 1 - p, dtype=torch.double) for p in each]
            return [keeps(seed, k, p, token, H) if p else torch.ones(H) for k, p in enumerate(each)]

        def mask(S, token, b):
            """What the recurrent product's state is multiplied with; that of the initial one belongs to no token."""
            if not dropped or not training:
                return torch.ones(H)
            plane, row = S * bool(zone) + bool(o.get("reset")), b if o.get("variational") else token
            plane, row = (plane + 1, b) if row is None else (plane, row)
            return keeps(seed, plane, dropped, row, H).double() / (1 - dropped)

        def f(*values):
            given = dict(zip(names, values))
            x, w, b_hh, p = given["x"], given["weight_hh"], given.get("bias_hh"), given.get("params")
            if heads > 1:  # each gate's matrix is block-diagonal
                n = H // heads
                w = torch.cat([torch.block_diag(*w[g * H : (g + 1) * H].split(n)) for g in range(G)])
            state = [given[k] for k in names if k.startswith("state")]
            S, ends, seq = len(state), [], [[None] * self.B for _ in range(self.T)]
            for b in range(self.B):
                s, past = [v[b] for v in state], []
                steps = list(range(self.lengths[b]))
                drop = mask(S, None, b)
                for t in reversed(steps) if self.reverse else steps:
                    if o.get("reset") and reset[t, b]:
                        s = [v * 0 for v in s]
                    token = self.tokens[t][b]
                    row = x[token] if self.layout == "packed" else x[t, b]
                    u = F.linear(row, given["weight_ih"], given["bias_ih"])
                    new = list(step(u, s, s[0] * drop.to(s[0]), lambda v: F.linear(v, w, b_hh), p))
                    drop = mask(S, token, b)
                    if zone:
                        new = [old + z.to(old) * (v - old) for old, v, z in zip(s, new, zones(S, token))]
                    if k := o.get("skip"):
                        past.append(new[0] + past[-k] if len(past) >= k else new[0])
                        new[0] = past[-1]
                    if (c := o.get("clip_grad")) and new[0].requires_grad:
                        new[0].register_hook(lambda g, c=c: g.clamp(-c, c))
                    if seen is not None:
                        new[0].register_hook(seen[t].append)
                    s = new
                    seq[t][b] = s[0]
                ends.append(s)
            zero = state[0].new_zeros(H)
            y = torch.stack([torch.stack([zero if v is None else v for v in r]) for r in seq])
            if self.layout == "packed":
                y = y.flatten(0, 1)[self.rows]
            y = y + w[:0].sum()  # where no product is made the gradient of nothing is nothing
            return (y, *(torch.stack([e[k] for e in ends]) for k in range(S)))

        return f
