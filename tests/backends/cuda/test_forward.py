"""The forward kernel alone, in forms that plans of small layers do not take, against the loop that defines it."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradkernels.backends._extra import PLAIN
from gradkernels.backends._sequence import Steps
from gradkernels.backends._unroll import unroll
from gradkernels.backends.cuda.arguments import ForwardArgs, Team, address, addresses, extras
from gradkernels.backends.cuda.forward import Forward
from gradkernels.backends.cuda.step import walk
from gradkernels.cells import get
from tests.close import assert_close_to_truth
from tests.cuda_on_cpu.machine import SCHEDULES, Twin

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
GUARD = 256  # bytes behind what the blocks of a launch share


@dataclass(frozen=True)
class Form:
    """A variant, the layer and the launch it gets."""

    cell: str
    number: str
    exchange: str
    sizes: tuple  # C, H, U, N, WM, WK, KEPT, SHARED of the variant
    H: int
    lengths: tuple  # of the rows of the batch
    team: int
    teams: int = 1
    layout: str = "lengths"  # lengths, packed: the longest first, or dense: all the same
    reverse: bool = False
    bias: bool = True
    keep: bool = True  # sequences of all states and kept values, or the first sequence alone

    def __str__(self) -> str:
        return f"{self.cell}-{self.number}-{self.exchange}-{'-'.join(map(str, self.sizes))}"

    @property
    def variant(self) -> Forward:
        return Forward(get(self.cell), self.number, self.exchange, *self.sizes)

    @property
    def steps(self) -> Steps:
        T, B = max(self.lengths), len(self.lengths)
        lengths, x = torch.tensor(self.lengths), torch.empty(T, B, 1)
        if self.layout == "dense":
            return Steps.of(x, B, None, None, self.reverse)
        if self.layout == "lengths":
            return Steps.of(x, B, None, lengths, self.reverse)
        sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
        return Steps.of(x.new_empty(int(sizes.sum()), 1), B, sizes, None, self.reverse)


FORMS = [
    # the largest cluster; the last block has few units, rows without a step, three tiles for two teams
    Form("lstm", "bf16", "cluster", (16, 128, 8, 8, 1, 2, 1, 1), 123, (3, 0, 2, 3, 1, 3, 2, 3, 3) * 2, 16, 2),
    # a warp without units in a block whose warps never meet; the matrix streamed, alignment of one element
    Form("gru", "fp16", "cluster", (2, 64, 32, 8, 4, 1, 0, 1), 39, (4, 4, 2), 2, layout="packed", reverse=True),
    # warps run the cells of two octets for two n-tiles each
    Form("lstm", "fp32", "cluster", (3, 96, 32, 16, 2, 1, 3, 99), 90, (3,) * 17, 3, layout="dense", bias=False),
    Form("gru_reset_before", "bf16", "cluster", (4, 64, 16, 16, 1, 2, 0, 1), 57, (3, 2, 0, 3) * 4, 4, reverse=True),
    Form("rnn_sigmoid", "tf32", "cluster", (1, 24, 24, 8, 3, 1, 9, 0), 17, (4, 3) * 5, 1, keep=False),
    Form("rnn_tanh", "fp16", "cluster", (1, 16, 8, 8, 1, 1, 9, 0), 1, (2,), 1, layout="packed"),
    # clusters in a grid: fewer units than lines, the contraction of the last block empty; then warps over both sides
    Form("lstm", "fp32", "grid", (4, 128, 8, 8, 2, 2, 0, 1), 49, (3, 1, 3, 2, 3, 0, 3, 3, 1), 8),
    Form(
        "gru_reset_before", "tf32", "grid", (2, 32, 8, 16, 1, 2, 1, 0), 31, (4,) * 6 + (3,) * 12, 4, 2, "packed", True
    ),
    # more warps than cells, an odd number of groups
    Form("gru", "bf16", "grid", (1, 48, 16, 8, 1, 3, 0, 99), 41, (3,) * 9, 3, layout="dense", keep=False),
    Form("rnn_relu", "fp16", "grid", (1, 32, 8, 8, 1, 1, 1, 0), 25, (1, 3, 2), 4, reverse=True),
]


def values(form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """gates [N, G*H], w_hh [G*H, H], b_hh [G*H] or None and the state of a layer, in that dtype."""
    cell, H, steps = get(form.cell), form.H, form.steps
    r = torch.Generator().manual_seed(steps.N + H)
    random = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.double).to(dtype)
    w_hh, b_hh = 1.5 * random(cell.G * H, H) / H**0.5, 0.5 * random(cell.G * H) if form.bias else None
    return random(steps.N, cell.G * H), w_hh, b_hh, [random(steps.B, H) for _ in range(cell.S)]


def named(form: Form, seq, final, acts) -> dict:
    kept = {"acts": acts, "others": seq[1:]} if form.keep else {}
    return {"y": seq[0], "final": final, **kept}


def by_loop(form: Form, dtype: torch.dtype, of: torch.dtype) -> dict:
    """What the loop makes, in `dtype`, of values that `of` can hold, row by row; zeros where a row has no step."""
    gates, w_hh, b_hh, state = values(form, of)
    up = lambda v: None if v is None else v.to(dtype)
    cell, steps, H = get(form.cell), form.steps, form.H
    first = steps.first if steps.first is not None else torch.arange(steps.T) * steps.B
    seq = [torch.zeros(steps.N, H, dtype=dtype) for _ in state]
    acts, final = torch.zeros(steps.N, cell.A, H, dtype=dtype), [up(v).clone() for v in state]
    for b, length in enumerate(form.lengths):
        tokens = first[:length] + b
        alone = unroll(
            cell, up(gates)[tokens], up(w_hh), up(b_hh), None, [up(v)[b : b + 1] for v in state],
            [(t, 1) for t in range(length)], form.reverse,
        )  # fmt: skip
        for to, v in zip([*seq, acts], [*alone[0], alone[3]]):
            to[tokens] = v
        for to, v in zip(final, alone[1]):
            to[b] = v[0]
    return named(form, seq, final, acts)


def by_kernel(form: Form, twin: Twin, schedule) -> dict:
    cell, H, steps, dtype = get(form.cell), form.H, form.steps, STORED[form.number]
    variant, blocks = form.variant, form.team * form.teams
    gates, w_hh, b_hh, state = values(form, dtype)
    seq = [torch.zeros(steps.N, H, dtype=dtype) for _ in state]
    final = [torch.full_like(v, torch.nan) for v in state]
    acts = torch.zeros(steps.N, cell.A, H, dtype=dtype)
    arrivals = torch.zeros(form.teams, 32, dtype=torch.int32) if variant.cooperative else None
    shared = torch.full((form.teams * variant.exchange_bytes(form.team) + GUARD,), 0xFF, dtype=torch.uint8)
    wanted = seq if form.keep else [seq[0], *[None] * (cell.S - 1)]
    args = ForwardArgs(
        walk(steps, H), Team(form.team, address(arrivals), address(shared)), extras(PLAIN), address(gates), address(w_hh),
        address(b_hh),
        addresses(state), addresses(wanted), addresses(final), address(acts if form.keep and cell.A else None),
    )  # fmt: skip
    twin.schedule = schedule
    twin.kernel(variant).launch(blocks, args)
    assert (shared[-GUARD:] == 0xFF).all(), "blocks share more than exchange_bytes says"
    return named(form, seq, final, acts)


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
    truth, theirs = by_loop(form, torch.double, dtype), by_loop(form, dtype, dtype)
    if form.number == "tf32":  # which has the mantissa of fp16
        theirs = {k: _float(v) for k, v in by_loop(form, torch.half, dtype).items()}
    ours = [by_kernel(form, twin, schedule) for schedule in SCHEDULES]
    assert_close_to_truth(ours[0], theirs, truth, name=str(form))
    for other in ours[1:]:  # the same bits in every order of threads
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(other), tree_leaves(ours[0]), strict=True))


def _float(v):
    return [u.float() for u in v] if isinstance(v, list) else v.float()


def test_what_tiles_cannot_be_put_together_to():
    """Sizes that the kernel's own assertions refuse are not offered."""
    fits = Forward(get("lstm"), "bf16", "cluster", 4, 128, 32, 16, 2, 2, 1, 1)
    assert fits.fits
    for name, value in {"U": 12, "N": 12, "WM": 3, "WK": 3, "H": 96, "C": 8}.items():
        assert not replace(fits, **{name: value}).fits, name
    grid = replace(fits, exchange="grid")
    assert grid.fits and replace(grid, WM=8).fits and not replace(grid, WK=4).fits
