"""A forward and a backward of a size, on zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkernels.backends import triton
from gradkernels.cells import CELLS

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


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
        cell, (T, B, H), R = CELLS[self.cell], (self.T, self.B, self.H), self.R or self.H
        zeros = lambda *shape: torch.zeros(shape, dtype=DTYPES[self.number])
        x, w, bias, w_hr = zeros(T, B, cell.G * H), zeros(cell.G * H, R), zeros(cell.G * H), zeros(R, H)
        w_hr = w_hr if self.R else None
        state = [zeros(B, R), *[zeros(B, H) for _ in range(cell.S - 1)]]
        batch_sizes = lengths = None
        if self.layout == "packed":
            batch_sizes, x = torch.full((T,), B), x.flatten(0, 1)
        if self.layout == "lengths":
            lengths = torch.full((B,), T)
        how = [batch_sizes, lengths, self.reverse]
        out = triton.forward(cell, x, None, None, w, bias, w_hr, state, *how, 2)
        S = cell.S
        saved, grads = [*out[:S], *out[2 * S :]], [torch.zeros_like(v) for v in out[: 2 * S]]
        need = [True, False, False, True, True, bool(self.R)]
        triton.backward(cell, grads, x, None, w, w_hr, saved, state, *how, need, False, self.norms)
