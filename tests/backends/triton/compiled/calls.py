"""A forward and a backward of a size, on zeros."""

# ruff: noqa: F821 - functions of the cell language need no import

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkernels.backends import triton
from gradkernels.backends._extra import DRAWN, Extra
from gradkernels.cells import CELLS, cell
from gradkernels.cells.transform import masked, skip, zoneout

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@cell
def vocabulary(x, r, s):
    """What no cell of the package calls."""
    u, v = x[0] + r[0], min(x[1], r[1])
    w = expm1(-abs(u)) + log1p(abs(v)) + log(2 + u * u) + sin(u) * cos(v) + erf(u) + (2 + abs(u)) ** 1.5
    return tanh(w + max(u, v) + 0.5 * s[0])


around = (zoneout(CELLS["lstm"]), masked(CELLS["gru"]), skip(CELLS["gru"]))
KNOWN = CELLS | {c.name: c for c in (vocabulary, *around)}


@dataclass(frozen=True)
class Call:
    cell: str
    number: str  # a key of DTYPES
    H: int
    R: int = 0  # width of a projection
    B: int = 64
    T: int = 3
    layout: str = "dense"
    reverse: bool = False
    norms: bool = False

    def __str__(self):
        words = [self.cell, self.number, f"H{self.H}", f"R{self.R}" * bool(self.R), f"B{self.B}", self.layout]
        return "-".join(w for w in [*words, "reverse" * self.reverse, "norms" * self.norms] if w)

    def run(self, monkeypatch):
        monkeypatch.setattr("gradkernels.backends.triton.launch.tf32", lambda: self.number == "tf32")
        cell, (T, B, H), R = KNOWN[self.cell], (self.T, self.B, self.H), self.R or self.H
        zeros = lambda *shape: torch.zeros(shape, dtype=DTYPES[self.number])
        x, w, bias, w_hr = zeros(T, B, cell.G * H), zeros(cell.G * H, R), zeros(cell.G * H), zeros(R, H)
        w, bias = (w, bias) if cell.recurrent else (w[:, :0], None)
        extra = Extra(
            params=zeros(cell.P, H) if cell.P else None,
            seed=torch.zeros(1, dtype=torch.int64) if cell.M else None,
            noise=(0.1, 1.0, DRAWN) * cell.M,
            skip=2 * cell.D,
        )
        w_hr = w_hr if self.R else None
        state = [zeros(B, R), *[zeros(B, H) for _ in range(cell.S - 1)]]
        batch_sizes = lengths = None
        if self.layout == "packed":
            batch_sizes, x = torch.full((T,), B), x.flatten(0, 1)
        if self.layout == "lengths":
            lengths = torch.full((B,), T)
        how = [batch_sizes, lengths, self.reverse]
        out = triton.forward(cell, x, None, None, w, bias, w_hr, state, *how, 2, extra)
        S = cell.S
        saved, grads = [*out[:S], *out[2 * S :]], [torch.zeros_like(v) for v in out[: 2 * S]]
        need = [True, False, False, cell.recurrent, cell.recurrent, bool(self.R), cell.P > 0]
        triton.backward(cell, grads, x, None, w, w_hr, saved, state, *how, need, False, self.norms, extra)
