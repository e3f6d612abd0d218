"""Recurrent calls as data, and the same calls written out by hand as the definition to compare with.

The loop here shares nothing with the package: formulas as in torch's documentation, a mask for rows that have ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import gradkernels as gk
from tests import place

GATES = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1}
NAMES = ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")


def lstm(x, s, product):
    i, f, g, o = (x + product(s[0])).chunk(4, 1)
    c = torch.sigmoid(f) * s[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x, s, product):
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), product(s[0]).chunk(3, 1)
    z = torch.sigmoid(xz + hz)
    return ((1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * s[0],)


def gru_reset_before(x, s, product):
    xr, xz, xn = x.chunk(3, 1)
    H = s[0].shape[1]
    hr, hz = product(s[0], slice(0, 2 * H)).chunk(2, 1)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + product(torch.sigmoid(xr + hr) * s[0], slice(2 * H, None)))
    return ((1 - z) * n + z * s[0],)


def plain_rnn(function):
    return lambda x, s, product: (function(x + product(s[0])),)


STEPS = {
    "lstm": lstm,
    "gru": gru,
    "gru_reset_before": gru_reset_before,
    "rnn_tanh": plain_rnn(torch.tanh),
    "rnn_relu": plain_rnn(torch.relu),
    "rnn_sigmoid": plain_rnn(torch.sigmoid),
}


def loop(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, lengths, reverse):
    """x [T, B, I] -> state sequences, final states."""
    T, sequences, s = x.shape[0], [[None] * x.shape[0] for _ in state], tuple(state)
    lengths = lengths.to(x.device)

    def product(v, rows=slice(None)):
        return F.linear(v, w_hh[rows], None if b_hh is None else b_hh[rows])

    for t in reversed(range(T)) if reverse else range(T):
        gates = x[t] if w_ih is None else F.linear(x[t], w_ih, b_ih)
        new = STEPS[cell](gates, s, product)
        if w_hr is not None:
            new = (F.linear(new[0], w_hr), *new[1:])
        live = (t < lengths).unsqueeze(1)
        s = tuple(torch.where(live, v, u) for v, u in zip(new, s))
        for k, v in enumerate(s):
            sequences[k][t] = torch.where(live, v, torch.zeros_like(v))
    return [torch.stack(v) if T else x.new_zeros(0, *u.shape) for v, u in zip(sequences, state)], list(s)


@dataclass(frozen=True)
class Case:
    cell: str
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 6
    R: int = 0  # width of a projection
    layout: str = "dense"  # or "packed", or "lengths": ragged, the longest row first or not
    reverse: bool = False
    bias: bool = True
    gates: bool = False  # x is the gates already
    scale: float = 1.0  # of the weights, relative to torch's initialisation

    def __str__(self):
        words = [self.cell, self.layout, f"T{self.T}B{self.B}I{self.I}H{self.H}", f"R{self.R}" if self.R else ""]
        words += [k for k in ("reverse", "gates") if getattr(self, k)] + ["no-bias"] * (not self.bias)
        return "-".join([*(w for w in words if w), *([f"x{self.scale:g}"] if self.scale != 1 else [])])

    @property
    def lengths(self):
        """Steps of each row, in the order in which the layout wants its rows; on the CPU."""
        if self.layout == "dense":
            return torch.full((self.B,), self.T)
        n = torch.linspace(self.T, 0 if self.layout == "lengths" else 1, self.B).round().long()
        return n if self.layout == "packed" else n.roll(1)  # the shortest first, then the longest

    @property
    def batch_sizes(self):
        return (torch.arange(self.T).unsqueeze(1) < self.lengths).sum(1)

    @property
    def rows(self):
        """Where packed rows are in a padded batch, [N] of T*B."""
        return (torch.arange(self.T).unsqueeze(1) < self.lengths).flatten().nonzero().squeeze(1).to(place.device)

    @property
    def names(self):
        """Of the tensors of this case, in order."""
        no = {k for k in NAMES if self.gates and k.endswith("_ih") or not self.bias and k.startswith("bias")}
        no |= set() if self.R else {"weight_hr"}
        states = ["state[0]", "state[1]"] if self.cell == "lstm" else ["state[0]"]
        return [k for k in (*NAMES, *states) if k not in no]

    def tensors(self, dtype=torch.double, requires_grad=True, seed=0):
        """x, weights and states by name; those that the case has not are missing."""
        G, R, generator = GATES[self.cell], self.R or self.H, torch.Generator().manual_seed(seed)

        def new(*shape, bound=None):
            v = torch.randn(*shape, generator=generator, dtype=torch.double)
            v = v if bound is None else (torch.rand(*shape, generator=generator, dtype=torch.double) * 2 - 1) * bound
            return v.to(place.device, dtype).requires_grad_(requires_grad)

        bound, I = self.scale * self.H**-0.5, G * self.H if self.gates else self.I
        out = {"x": new(self.T, self.B, I) if self.layout != "packed" else new(int(self.batch_sizes.sum()), I)}
        if not self.gates:
            out["weight_ih"] = new(G * self.H, self.I, bound=bound)
            if self.bias:
                out["bias_ih"] = new(G * self.H, bound=bound)
        out["weight_hh"] = new(G * self.H, R, bound=bound)
        if self.bias:
            out["bias_hh"] = new(G * self.H, bound=bound)
        if self.R:
            out["weight_hr"] = new(R, self.H, bound=bound)
        out["state[0]"] = new(self.B, R)
        if self.cell == "lstm":
            out["state[1]"] = new(self.B, self.H)
        assert list(out) == self.names
        return out

    def call(self, backend, **options):
        """A function of the tensors of `tensors()`, by position -> (*state sequences, *final states)."""
        names, kwargs = self.names, {"cell": self.cell, "reverse": self.reverse, **options}
        if self.layout == "packed":
            kwargs["batch_sizes"] = self.batch_sizes
        if self.layout == "lengths":
            kwargs["lengths"] = self.lengths.to(place.device)

        def f(*values):
            given = dict(zip(names, values))
            state = [given.pop(k) for k in names if k.startswith("state")]
            x, w = given.pop("x"), given.pop("weight_hh")
            y, final = gk.ops.recurrent(x, w, state, **given, every_state=True, backend=backend, **kwargs)
            return (*y, *final)

        return f

    def loop(self):
        """The same function, written out."""
        names, N = self.names, self.T * self.B

        def f(*values):
            given = dict(zip(names, values))
            state = [given[k] for k in names if k.startswith("state")]
            x = given["x"]
            if self.layout == "packed":
                padded = x.new_zeros(N, x.shape[1]).index_copy(0, self.rows, x)
                x = padded.unflatten(0, (self.T, self.B))
            weights = (given.get(k) for k in NAMES[1:])
            sequences, final = loop(self.cell, x, *weights, state, self.lengths, self.reverse)
            if self.layout == "packed":
                sequences = [v.flatten(0, 1)[self.rows] for v in sequences]
            return (*sequences, *final)

        return f


def gradients(function, tensors, cotangents):
    """(outputs, gradients by name) for cotangents in float64, cast to the dtype of each output."""
    out = function(*tensors.values())
    got = torch.autograd.grad(out, list(tensors.values()), [c.to(v.dtype) for c, v in zip(cotangents, out)])
    return out, dict(zip(tensors, got))


def cotangents(outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=generator, dtype=torch.double).to(v.device) for v in outputs]


# One of everything, small: for tests that are expensive by themselves.
SMALL = [Case(cell, T=3, B=2, I=2, H=2) for cell in GATES]
SMALL += [Case(cell, T=3, B=2, I=2, H=2, reverse=True) for cell in ("lstm", "gru_reset_before")]
SMALL += [Case(cell, T=3, B=3, I=2, H=2, layout="lengths", reverse=r) for cell, r in (("lstm", True), ("gru", False))]
SMALL += [Case(cell, T=3, B=3, I=2, H=2, layout="packed", reverse=r) for cell, r in (("gru", True), ("lstm", False))]
SMALL += [Case("lstm", T=3, B=2, I=2, H=3, R=2), Case("lstm", T=3, B=3, I=2, H=3, R=2, layout="lengths", reverse=True)]
SMALL += [
    Case("gru_reset_before", T=3, B=3, I=2, H=2, layout="packed", bias=False),
    Case("gru", T=3, B=2, H=2, gates=True),
]
