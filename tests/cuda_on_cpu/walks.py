"""Calls of `ops.recurrent` that a chosen variant takes on the twin, forward and backward, recorded launch by launch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gradkernels.backends import reference
from gradkernels.backends.cuda import plan
from gradkernels.backends.cuda.backward import Backward
from gradkernels.backends.cuda.forward import Forward
from gradkernels.cells import get
from tests.close import assert_close_to_truth
from tests.cuda_on_cpu.machine import Twin, in_place
from tests.cuda_on_cpu.replay import Case, capture
from tests.ops import case as ops

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Walk:
    """A call, and the sizes of the kernels that take it: those of a variant, and of its launch."""

    call: ops.Case
    number: str
    exchange: str
    C: int
    H: int
    U: int
    N: int
    WM: int
    WK: int
    KEPT: int
    SHARED: int
    team: int
    teams: int = 1

    def __str__(self) -> str:
        sizes = "-".join(map(str, (self.C, self.H, self.U, self.N, self.WM, self.WK, self.KEPT, self.SHARED)))
        return f"{self.call.cell}-{self.number}-{self.exchange}-{sizes}-{self.teams}x{self.team}"

    def variant(self, which: str, norms: bool = False):
        sizes = (self.C, self.H, self.U, self.N, self.WM, self.WK, self.KEPT, self.SHARED)
        kind, more = {"forward": (Forward, ()), "backward": (Backward, (norms,))}[which]
        variant = kind(get(self.call.cell), self.number, self.exchange, *sizes, *more)
        assert variant.fits, variant
        return variant

    def variants(self) -> list:
        return [self.variant("forward"), self.variant("backward", True)]

    def plan(self, machine, cell, number, H, B, which, norms=False):
        blocks = self.teams * self.team
        variant = None if self.exchange == "step" else self.variant(which, norms)
        return plan.Plan(self.exchange, variant, blocks, self.team, "it was asked for", (), 0.0)

    def values(self) -> dict[str, torch.Tensor]:
        return self.call.tensors(STORED[self.number], requires_grad=False)

    def run(self, backend: str, values: dict, cotangents=None) -> tuple[dict, list]:
        """What comes out by name: outputs, gradients, norms; and the cotangents that these are of."""
        leaves = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
        probe = torch.zeros(self.call.T, get(self.call.cell).S + 1, dtype=torch.double, requires_grad=True)
        out = self.call.call(backend, probe=probe)(*leaves.values())
        cotangents = ops.cotangents(out) if cotangents is None else cotangents
        given = [c.to(v.dtype) for c, v in zip(cotangents, out)]
        grads = torch.autograd.grad(out, [*leaves.values(), probe], given)
        found = {f"out[{k}]": v.detach() for k, v in enumerate(out)} | dict(zip(leaves, grads))
        return found | {"norms": grads[-1].to(out[0].dtype)}, cotangents

    def record(self, machine: Twin) -> list[Case]:
        """Its launches on that machine, after a comparison of everything that they make with the reference."""
        low = self.values()
        truth, cotangents = self.run("reference", {k: v.double() for k, v in low.items()})
        with pytest.MonkeyPatch.context() as rounding:  # after every operation, also in what is wider within
            rounding.setattr(reference, "precise", lambda v: v)
            # tf32 has the mantissa of fp16
            rough = {k: v.half() for k, v in low.items()} if self.number == "tf32" else low
            theirs, _ = self.run("reference", rough, cotangents)
        cases: list[Case] = []
        machine.watch = lambda kernel, *launch: cases.append(
            capture(kernel, *launch, f"{self} {kernel.variant.struct}")
        )
        with in_place(machine), pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "plan", self.plan)
            ours, _ = self.run("cuda", low, cotangents)
        theirs = {k: v.to(ours[k].dtype) for k, v in theirs.items()}
        assert_close_to_truth(ours, theirs, {k: v.double() for k, v in truth.items()}, name=str(self))
        return cases
