"""The backward kernel alone, in forms that plans of small layers do not take, against the loop that defines it."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from gradkernels.backends._extra import PLAIN
from gradkernels.backends._sequence import Steps
from gradkernels.backends._unroll import unroll, unroll_backward
from gradkernels.backends.cuda.arguments import BackwardArgs, Team, address, addresses, extras
from gradkernels.backends.cuda.backward import Backward
from gradkernels.backends.cuda.step import walk
from gradkernels.cells import get
from tests.close import assert_close_to_truth
from tests.cuda_on_cpu.machine import SCHEDULES, Twin

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
GUARD = 256  # bytes behind what the blocks of a launch share


@dataclass(frozen=True)
class Form:
    """A variant, the layer and the launch it gets; `given`: whether sequences, final states have gradients."""

    cell: str
    number: str
    exchange: str
    sizes: tuple  # C, H, U, N, WM, WK, KEPT, SHARED of the variant
    H: int
    rows: tuple  # of each step in time
    team: int
    teams: int = 1
    reverse: bool = False
    given: tuple = (True, True)
    norms: bool = True

    def __str__(self) -> str:
        return f"{self.cell}-{self.number}-{self.exchange}-{'-'.join(map(str, self.sizes))}"

    @property
    def variant(self) -> Backward:
        return Backward(get(self.cell), self.number, self.exchange, *self.sizes, self.norms)


FORMS = [
    # the largest cluster; warps that have different numbers of octets, the last one none of a pair
    Form("lstm", "bf16", "cluster", (16, 128, 8, 8, 3, 1, 1, 1), 123, (9, 9, 4), 16),
    # warps split the contraction too, and their sums meet before they are pushed
    Form("gru", "fp16", "cluster", (4, 64, 16, 24, 2, 2, 1, 0), 57, (20, 17, 17, 1), 4, 2, reverse=True),
    Form("gru_reset_before", "fp32", "cluster", (2, 48, 24, 16, 1, 4, 0, 1), 48, (13, 13), 2, given=(True, False)),
    # an octet of a block and an odd number of them of a warp; three tiles one after the other
    Form("rnn_relu", "tf32", "cluster", (1, 24, 24, 8, 1, 1, 9, 0), 17, (20, 20, 19), 1, given=(False, True)),
    # clusters in a grid: a team of fewer blocks than the variant has senders for, the whole matrix streamed, odd H
    Form("lstm", "fp32", "grid", (4, 96, 8, 16, 1, 2, 0, 0), 49, (17, 17, 3), 8, norms=False),
    Form("gru_reset_before", "bf16", "grid", (2, 32, 8, 32, 2, 2, 0, 1), 31, (33, 20, 9), 4, 2, reverse=True),
    # warps share what they fetch, and only some of them have cells to run
    Form("gru", "bf16", "grid", (1, 48, 16, 8, 2, 3, 2, 99), 41, (8, 8, 8, 5), 3, given=(False, False)),
    # gradients too many to be told word by word: published behind meetings
    Form("lstm", "tf32", "grid", (1, 128, 32, 16, 1, 4, 1, 1), 101, (21, 16, 16), 4),
    Form("gru_reset_before", "fp32", "grid", (2, 128, 16, 40, 2, 1, 0, 1), 120, (41, 8), 8, reverse=True),
    Form("rnn_tanh", "fp16", "grid", (1, 8, 8, 8, 1, 1, 9, 0), 1, (1,), 1),
]


def saved(form: Form, dtype: torch.dtype):
    """grads, w_hh [G*H, H], seq, acts, state of a layer in that dtype: rows of all steps one after the other."""
    cell, H, B, N = get(form.cell), form.H, form.rows[0], sum(form.rows)
    r = torch.Generator().manual_seed(N + H)
    random = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.double)
    w_hh, b_hh = 1.5 * random(cell.G * H, H) / H**0.5, 0.5 * random(cell.G * H)
    state = [random(B, H) for _ in range(cell.S)]
    seq, _, _, acts = unroll(cell, random(N, cell.G * H), w_hh, b_hh, None, state, steps_of(form), form.reverse)
    some = lambda there, *shape: random(*shape) if there else None
    grads = [some(form.given[0], N, H) for _ in seq] + [some(form.given[1], B, H) for _ in seq]
    low = lambda v: None if v is None else v.to(dtype)
    return [low(g) for g in grads], low(w_hh), [low(v) for v in seq], low(acts), [low(v) for v in state]


def steps_of(form: Form) -> list[tuple[int, int]]:
    return [(sum(form.rows[:t]), n) for t, n in enumerate(form.rows)]


def named(*values) -> dict:
    names = ("dgates", "dr", "operand", "dstate", "norms")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def by_loop(form: Form, dtype: torch.dtype, of: torch.dtype, norms_as: torch.dtype) -> dict:
    """What the loop makes, in `dtype`, of values that `of` can hold."""
    up = lambda v: None if v is None else v.to(dtype)
    grads, w_hh, seq, acts, state = saved(form, of)
    tensors = [up(g) for g in grads], up(w_hh), None, [up(v) for v in seq], None, up(acts), [up(v) for v in state]
    cell = get(form.cell)
    dgates, dr, operand, _, _, dstate, norms = unroll_backward(cell, *tensors, steps_of(form), form.reverse, form.norms)
    return named(
        dgates, dr if cell.split else None, operand, dstate, norms[:, :-1].to(norms_as) if form.norms else None
    )


def by_kernel(form: Form, twin: Twin, schedule) -> dict:
    cell, H, T, N, dtype = get(form.cell), form.H, len(form.rows), sum(form.rows), STORED[form.number]
    variant, blocks = form.variant, form.team * form.teams
    grads, w_hh, seq, acts, state = saved(form, dtype)
    nan = lambda *shape: torch.full(shape, torch.nan, dtype=dtype)
    dgates, dr = nan(N, cell.G * H), nan(N, cell.G * H) if cell.split else None
    operand, dstate = nan(N, H) if cell.second else None, [torch.full_like(v, torch.nan) for v in state]
    rows = torch.tensor(form.rows, dtype=torch.int32)
    first = torch.tensor([o for o, _ in steps_of(form)], dtype=torch.int32)
    arrivals = torch.zeros(form.teams, 32, dtype=torch.int32) if variant.cooperative else None
    shared = torch.full((form.teams * variant.exchange_bytes(form.team) + GUARD,), 0xFF, dtype=torch.uint8)
    norms = torch.zeros(T, blocks, cell.S, dtype=torch.double) if form.norms else None
    args = BackwardArgs(
        walk(Steps(T, form.rows[0], N, form.reverse, rows, first, None), H),
        Team(form.team, address(arrivals), address(shared)),
        extras(PLAIN),
        address(w_hh), address(acts), addresses(seq), addresses(state), addresses(grads[: cell.S]), addresses(grads[cell.S :]),
        address(dgates), address(dr), address(operand), addresses(dstate), address(norms), None,
    )  # fmt: skip
    twin.schedule = schedule
    twin.kernel(variant).launch(blocks, args)
    assert (shared[-GUARD:] == 0xFF).all(), "blocks share more than exchange_bytes says"
    return named(dgates, dr, operand, dstate, norms.sum(1).to(dtype) if form.norms else None)


@pytest.fixture(scope="module")
def twin():
    twin = Twin()
    twin.compile(form.variant for form in FORMS)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_as_the_loop(form, twin):
    assert form.variant.fits
    dtype = STORED[form.number]
    truth = by_loop(form, torch.double, dtype, torch.double)
    theirs = by_loop(form, dtype, dtype, dtype)
    if form.number == "tf32":  # which has the mantissa of fp16
        theirs = tree_map(torch.Tensor.float, by_loop(form, torch.half, dtype, torch.float))
    ours = [by_kernel(form, twin, schedule) for schedule in SCHEDULES]
    assert_close_to_truth(ours[0], theirs, truth, name=str(form))
    for other in ours[1:]:  # the same bits in every order of threads
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(other), tree_leaves(ours[0]), strict=True))
