"""Cells with parameters, masks, delayed states, means or no recurrent product, and clipping: against the reference in float64,
with the same masks bit for bit."""

import itertools

import pytest
import torch

from gradkernels.backends import reference, triton
from gradkernels.backends._extra import DRAWN, FIXED, GIVEN, Extra
from gradkernels.cells import CELLS
from gradkernels.cells.transform import masked, resets, skip, zoneout
from tests.close import assert_close_to_truth
from tests.ops.case import GATES

MORE = [c for name, c in CELLS.items() if name not in GATES]
AROUND = [zoneout(CELLS["lstm"]), masked(CELLS["gru_reset_before"]), resets(CELLS["lstm"]), skip(CELLS["gru"])]
AROUND += [skip(zoneout(CELLS["rnn_tanh"])), masked(zoneout(CELLS["lstm_peephole"])), zoneout(CELLS["indrnn"])]
LAYOUTS = [(layout, reverse) for layout in ("dense", "packed", "lengths") for reverse in (False, True)]
CASES = [(c, *LAYOUTS[k % 6]) for k, c in enumerate((*MORE, *AROUND))]
CASES += [(c, layout, reverse) for c in (AROUND[1], AROUND[4]) for layout, reverse in LAYOUTS]


def make(cell, layout, reverse, T=5, B=3, H=6, dtype=torch.float64, drawn=True):
    """(arguments of forward before `keep`, extra)"""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    lengths = torch.linspace(T, 1 if layout == "packed" else 0, B).round().long()
    batch_sizes = (torch.arange(T).unsqueeze(1) < lengths).sum(1) if layout == "packed" else None
    lead = (int(batch_sizes.sum()),) if layout == "packed" else (T, B)
    N, R = lead[0] if layout == "packed" else T * B, H if cell.recurrent else 0
    w, b = new(cell.G * H, R) / H**0.5, new(cell.G * H) if cell.recurrent else None
    state = [new(B, H) for _ in range(cell.S)]
    kinds = itertools.cycle([(0.4, 1.0, DRAWN), (0.3, 1 / 0.7, FIXED), (0.5, 2.0, DRAWN)])
    noise = [next(kinds) for _ in range(cell.M)]
    if cell.name.startswith("resets"):
        noise[-1] = (0.0, 1.0, GIVEN)
    extra = Extra(
        params=new(cell.P, H) if cell.P else None,
        seed=torch.tensor([-(2**60) - 12345]) if drawn and cell.M else None,
        noise=tuple(v for plane in noise for v in plane),
        flags=(torch.rand(N, generator=g) < 0.7).to(dtype) if cell.name.startswith("resets") else None,
        skip=2 if cell.D else 0,
        clip=0.3,
        first=7,
    )
    given = [new(*lead, cell.G * H), None, None, w, b, None, state, batch_sizes]
    return [cell, *given, lengths.roll(1) if layout == "lengths" else None, reverse], extra


def run(module, given, extra):
    """Saved values, then parts of the gradients, gradients of the states, norms."""
    cell, x, w_ih, _, w, _, w_hr, state, *how = given
    out = module.forward(*given, 2, extra)
    saved, grads = [*out[: cell.S], *out[2 * cell.S :]], [torch.cos(v) for v in out[: 2 * cell.S]]
    need = [True, False, False, cell.recurrent, False, False, cell.P > 0]
    parts = module.backward(cell, grads, x, w_ih, w, w_hr, saved, state, *how, need, True, True, extra)
    return out, parts, module.backward(cell, grads, x, w_ih, w, w_hr, saved, state, *how, need, False, False, extra)


@pytest.mark.parametrize("cell, layout, reverse", CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_against_the_reference(cell, layout, reverse, kind):
    given, extra = make(cell, layout, reverse)
    theirs = run(reference, given, extra)
    assert_close_to_truth(run(triton, given, extra), theirs, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("cell", [CELLS["lstm_layer_norm"], AROUND[4], CELLS["indrnn"]], ids=lambda c: c.name)
def test_rounded(cell, dtype, kind):
    """More rows and units than a tile, units that are not a multiple of anything."""
    given, extra = make(cell, "lengths", False, T=4, B=18, H=67, dtype=dtype)
    wide = lambda v: (
        [wide(u) for u in v]
        if isinstance(v, list)
        else v.double()
        if torch.is_tensor(v) and v.is_floating_point()
        else v
    )
    truth = run(reference, wide(given), extra._replace(params=wide(extra.params)))
    assert_close_to_truth(run(triton, given, extra), run(reference, given, extra), truth)


def test_masks_without_a_seed_are_their_means(kind):
    given, extra = make(AROUND[0], "dense", False, drawn=False)
    theirs = run(reference, given, extra)
    assert_close_to_truth(run(triton, given, extra), theirs, theirs)


def test_no_mask_with_probability_zero(kind):
    given, extra = make(AROUND[0], "dense", False)
    without = extra._replace(noise=(0.0, 1.0, DRAWN) * 2)
    ours, plain = run(triton, given, without), run(triton, [CELLS["lstm"], *given[1:]], Extra(clip=extra.clip))
    assert_close_to_truth(ours[0][:4], plain[0][:4], plain[0][:4])
