"""Attention in Triton: values and gradients by name, which places dropout drops, and what nobody sees."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

import gradkernels as gk
from gradkernels.backends import reference
from gradkernels.backends.reference.philox import limit, words
from gradkernels.backends.triton import attention, attention_blocks, attention_tiles
from gradkernels.backends.triton.attention_tiles import Tile
from tests.close import assert_close_to_truth
from tests.ops.test_attention import Case, run, written_out

# Tiles far smaller than what ships, so that there are many of them; the last one is that with loads by descriptors.
FORMS = {
    "square": Tile(16, 16, 4, 2),
    "tall": Tile(32, 16, 4, 2),
    "wide": Tile(16, 32, 4, 2),
    "WS": Tile(32, 16, 4, 2, True),
}
NUMBERS = (torch.float64, torch.float32, torch.float16)


@pytest.fixture
def form(request, monkeypatch):
    """What every kernel's tile is; descriptors are for forward alone."""
    tile = FORMS[request.param]
    plain = dataclasses.replace(tile, WS=False)
    monkeypatch.setattr(attention_tiles, "choose", lambda kernel, *_: tile if kernel == "forward" else plain)
    return request.param


each_form = pytest.mark.parametrize("form", FORMS, indirect=True)
small = pytest.mark.parametrize("form", ["square"], indirect=True)

CASES = [
    (Case(1, 1, 1, 1, 1, 1, 1), "square"),
    (Case(B=1, Tq=33, Tk=47, D=17, E=33, causal=True), "tall"),
    (Case(B=1, Hq=4, Hk=2, Tq=3, Tk=63, causal=True, layout="bthd"), "WS"),
    (Case(B=1, Hq=6, Hk=2, Tq=17, Tk=33, D=24, causal=True), "wide"),
    (Case(B=1, Hq=1, Hk=1, Tq=65, Tk=31, causal=True), "square"),  # the first queries see nothing
    (Case(B=1, Hq=1, Hk=1, Tq=63, Tk=81, window=(20, 3), D=5), "wide"),
    (Case(B=1, Hq=1, Hk=1, Tq=63, Tk=81, window=(7, None), D=8), "WS"),
    (Case(B=1, Tq=33, Tk=33, window=(None, 0), E=16, layout="bthd"), "WS"),
    (Case(B=3, Hq=3, Hk=1, Tq=9, Tk=33, hidden=True), "tall"),
    (Case(B=2, Hq=2, Hk=1, Tq=17, Tk=40, hidden=True), "WS"),
    (Case(Tq=20, Tk=19, bias=(2, 2, 20, 19)), "square"),
    (Case(Tq=20, Tk=19, bias=(20, 19), causal=True), "wide"),
    (Case(Tq=33, Tk=18, bias=(2, 1, 1, 18), window=(3, 2)), "square"),
    (Case(Tq=18, Tk=9, bias=(2, 18, 1), causal=True, slopes=(2, 2)), "square"),
    (Case(B=1, Tq=17, Tk=34, slopes=(2,), causal=True), "WS"),
]


@pytest.mark.parametrize("case, form", CASES, ids=map(str, (c for c, _ in CASES)), indirect=["form"])
def test_values_and_gradients(case, form):
    """In all kinds of numbers in turn, and in float64."""
    n = [c for c, _ in CASES].index(case)
    for dtype in {torch.float64, NUMBERS[n % 3]}:
        ours = run(lambda **t: gk.ops.attention(**t, backend="triton", return_lse=True), case, dtype)
        assert gk.backends.last() == "triton"
        peer, truth = (run(lambda **t: written_out(**t), case, d, dtype) for d in (dtype, torch.double))
        peer["out"][1] = peer["out"][1].to(ours["out"][1].dtype)
        assert_close_to_truth(ours, peer, truth, name=f"{dtype} ")


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_tiles_that_ship(dtype):
    """Whole tiles, and parts of such, without a change to what is chosen."""
    case = Case(B=1, Hq=1, Hk=1, Tq=150, Tk=131, D=40, E=64, causal=True)
    ours = run(lambda **t: gk.ops.attention(**t, backend="triton", return_lse=True), case, dtype)
    peer, truth = (run(lambda **t: written_out(**t), case, d, dtype) for d in (dtype, torch.double))
    peer["out"][1] = peer["out"][1].to(ours["out"][1].dtype)
    assert_close_to_truth(ours, peer, truth)


def against_reference(q, k, v, dtype=torch.float64, **options):
    """Values and gradients with the same seed; in less than float64 the reference in float64 is the truth."""
    found = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        t = {name: x.detach().to(dtype).to(kind).requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
        torch.manual_seed(7)
        out, lse = gk.ops.attention(**t, return_lse=True, backend=backend, **options)
        generator = torch.Generator().manual_seed(1)
        pull = [torch.randn(x.shape, generator=generator, dtype=torch.double).to(x.dtype) for x in (out, lse)]
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        found.append([out, lse, dict(zip("qkv", torch.autograd.grad((out, seen), list(t.values()), pull)))])
    found[2][1] = found[2][1].double()
    assert_close_to_truth(*found)


# ---------------------------------------------------------------- sequences one after the other


CU_Q, CU_K = [0, 3, 3, 36, 37, 50], [0, 5, 9, 42, 42, 60]
SEQUENCES = [
    ({}, "square"),
    ({"causal": True}, "WS"),
    ({"window": (9, 4), "dropout_p": 0.3}, "tall"),
    (
        {"causal": True, "alibi_slopes": torch.tensor([[0.5, 0.2]]).expand(5, 2) * torch.arange(1, 6).unsqueeze(1)},
        "wide",
    ),
    ({"causal": True, "dropout_p": 0.3}, "WS"),
]


@pytest.mark.parametrize(
    "options, form", SEQUENCES, ids=[f"{'-'.join(o) or 'all'}-{f}" for o, f in SEQUENCES], indirect=["form"]
)
def test_sequences_one_after_the_other(options, form):
    """Empty ones among them, of queries and of keys, and at the end."""
    cu = tuple(torch.tensor(c, dtype=torch.int32) for c in (CU_Q, CU_K))
    q, k, v = torch.randn(50, 2, 8), torch.randn(60, 1, 8), torch.randn(60, 1, 16)
    against_reference(q, k, v, cu_seqlens=cu, **options)


@small
@pytest.mark.parametrize("cu", [[0, 90, 20], [-5, 3, 10], [0, 0, 0], [7, 9, 12]], ids=str)
def test_sequences_that_are_none(cu, form):
    """Those on a GPU are nobody's to check: no token outside is read or written, and those of no sequence hold zeros."""
    q, k, v = (torch.randn(1, 1, 20, 8) for _ in range(3))
    cu = torch.tensor(cu, dtype=torch.int32)
    how = {"causal": False, "left": -1, "right": -1, "p": 0.0, "scale": 0.3}
    given = [q, k, v, None, None, cu, cu, None, None]
    out = attention.forward(*given, **how)
    made = attention.backward((torch.ones_like(out[0]), None), given, out, [True] * 3 + [False] * 6, **how)
    none = torch.ones(20, dtype=torch.bool)
    for start, end in zip(cu.clamp(0, 20), cu[1:].clamp(0, 20)):
        none[start:end] = False
    assert not out[0].isnan().any() and not any(t.isnan().any() for t in made[:3])
    assert (out[0][:, :, none] == 0).all() and (out[1][:, :, none] == -torch.inf).all()
    assert all((t[:, :, none] == 0).all() for t in made[:3])


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("form", ["wide", "WS"], indirect=True)
def test_dropout_drops_what_the_reference_drops(form):
    q, k, v = torch.randn(2, 4, 19, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8)
    against_reference(q, k, v, causal=True, dropout_p=0.35)


@each_form
@pytest.mark.parametrize("varlen", [False, True], ids=["batch", "sequences"])
def test_places_of_dropout(form, varlen):
    """Bit for bit, forward and backward: with scores of zero the values show the weights, and the cotangents do."""
    B, H, T, p = (1 if varlen else 2), 2, 32, 0.35
    seed = torch.tensor([0x1234_5678_9ABC_DEF0])
    q, k = torch.zeros(B, H, T, 8, dtype=torch.double), torch.zeros(B, H, T, 8, dtype=torch.double)
    eye = torch.eye(T, dtype=torch.double).expand(B, H, T, T)
    cu = torch.tensor([0, 13, T], dtype=torch.int32) if varlen else None
    how = {"causal": False, "left": -1, "right": -1, "p": p, "scale": 1.0}
    given = [q, k, eye, None, None, cu, cu, None, seed]
    out = attention.forward(*given, **how)
    _, _, dv, *_ = attention.backward((eye, None), given, out, [True] * 3 + [False] * 6, **how)
    i, h = torch.arange(T), torch.arange(H).reshape(-1, 1, 1)
    b, first = torch.arange(B).reshape(-1, 1, 1, 1), torch.where(i < 13, 0, 13)
    row = i[:, None] * H + h if varlen else (b * H + h) * T + i[:, None]
    column = i - first[:, None] if varlen else i
    seen = first[:, None] == first if varlen else torch.ones(T, T, dtype=torch.bool)
    kept = (words(seed, row, column.clamp(0)) >= limit(p)[0]) & seen
    assert 0.5 < kept.sum() / seen.expand_as(kept).sum() < 0.8
    assert torch.equal(out[0] != 0, kept.expand(B, H, T, T)) and torch.equal(dv.mT != 0, kept.expand(B, H, T, T))


@small
def test_everything_dropped(form):
    against_reference(*(torch.randn(1, 1, 18, 8) for _ in range(3)), dropout_p=1.0)


# ---------------------------------------------------------------- memory


WIDE = torch.randn(2, 20, 3, 36, dtype=torch.double)
LAYOUTS = {
    "heads-that-share-memory": (WIDE[:, :, :1, :16].expand(2, 20, 3, 16).transpose(1, 2), "WS"),
    "tokens-outermost": (WIDE[..., :16].contiguous().permute(1, 2, 0, 3).contiguous().permute(2, 1, 0, 3), "WS"),
    "unaligned": (WIDE[..., 1:17].transpose(1, 2), "square"),
    "apart": (WIDE[..., ::2][..., :16].transpose(1, 2), "square"),
}


@pytest.mark.parametrize("t, form", LAYOUTS.values(), ids=LAYOUTS, indirect=["form"])
def test_any_strides(t, form):
    how = {"causal": True, "left": -1, "right": -1, "p": 0.0, "scale": 0.3}
    given, rest, need = [t] * 3, [None] * 6, [True] * 3 + [False] * 6
    out = attention.forward(*given, *rest, **how)
    want = reference.attention.forward(*given, *rest, **how)
    assert_close_to_truth(out, want, want)
    grads = [torch.ones(1, dtype=torch.double).expand_as(o) for o in out]
    ours, theirs = (b.backward(grads, [*given, *rest], want, need, **how) for b in (attention, reference.attention))
    assert_close_to_truth(ours, theirs, theirs)


@pytest.mark.parametrize("B, Tq, Tk", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(B, Tq, Tk):
    q, k, v = (torch.randn(B, 2, t, 8, requires_grad=True) for t in (Tq, Tk, Tk))
    bias = torch.randn(2, Tq, Tk, requires_grad=True)
    out, lse = gk.ops.attention(q, k, v, bias=bias, return_lse=True, backend="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert out.shape == (B, 2, Tq, 8) and (out == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(grads, (q, k, v, bias)))


@small
def test_a_query_that_is_nan_leaves_the_others_alone(form):
    q, k, v = (torch.randn(1, 2, 35, 8) for _ in range(3))
    clean = gk.ops.attention(q, k, v, causal=True, backend="triton")
    q[:, 1, 20] = torch.nan
    out = gk.ops.attention(q, k, v, causal=True, backend="triton")
    assert out[0, 1, 20].isnan().all()
    rest = torch.ones(2, 35, dtype=torch.bool)
    rest[1, 20] = False
    assert torch.equal(out[0][rest], clean[0][rest])


@each_form
def test_large_scores(form):
    """exp2 is taken of differences alone."""
    q, k, v = (torch.randn(1, 1, 40, 16, dtype=torch.double) for _ in range(3))
    rounded = [(1e3 * q).float(), (1e3 * k).float(), v.float()]
    ours, theirs = (gk.ops.attention(*rounded, causal=True, backend=backend) for backend in ("triton", "reference"))
    truth = gk.ops.attention(*(t.double() for t in rounded), causal=True, backend="reference")
    assert_close_to_truth(ours, theirs, truth)


def test_gradcheck():
    shapes = [(1, 2, 5, 4), (1, 1, 7, 4), (1, 1, 7, 3), (2, 1, 7)]
    q, k, v, bias = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in shapes)

    def f(q, k, v, bias):
        return gk.ops.attention(q, k, v, causal=True, bias=bias, backend="triton", return_lse=True)

    assert torch.autograd.gradcheck(f, (q, k, v, bias), fast_mode=True)


def test_what_fits_into_no_shared_memory_is_refused():
    q = torch.zeros(1, 1, 3, 256, dtype=torch.double)
    with pytest.raises(RuntimeError, match="shared memory of 65536 bytes is too little for heads of 256"):
        gk.ops.attention(q, q, q, backend="triton")
    q = q[..., :64]
    assert gk.ops.attention(q, q, q, backend="triton").shape == q.shape


# ---------------------------------------------------------------- bounds


@triton.jit
def bounds(given, made, N, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first, last = tl.load(given + n), tl.load(given + N + n)
    left, right, T = tl.load(given + 2 * N + n), tl.load(given + 3 * N + n), tl.load(given + 4 * N + n)
    low, begin, end, high = attention_blocks.visible(first, last, left, right, T, BLOCK)
    tl.store(made + n, low)
    tl.store(made + N + n, begin)
    tl.store(made + 2 * N + n, end)
    tl.store(made + 3 * N + n, high)


def test_bounds():
    """No block that somebody sees is left out, none is taken for whole that is not, and none is beyond what there is."""
    N, BLOCK = 4096, 4
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: torch.randint(low, high, (N,), generator=generator, dtype=torch.int32)
    first, T = draw(-30, 40), draw(1, 40)
    given = torch.stack([first, first + draw(-1, 9), draw(0, 50), draw(0, 50), T])
    made = torch.empty(4, N, dtype=torch.int32)
    bounds[(1,)](given, made, N, N, BLOCK)
    first, last, left, right, T = given.unsqueeze(2).unbind()
    low, begin, end, high = made.unsqueeze(2).unbind()
    place = torch.arange(-40, 120)
    there = (place >= 0) & (place < T)
    anybody = there & (place >= first - left) & (place <= last + right) & (first <= last)
    everybody = there & (place >= last - left) & (place <= first + right)
    assert (anybody <= ((place >= low) & (place < high))).all()
    assert (((place >= begin) & (place < end)) <= everybody).all()
    assert (made % BLOCK == 0).all() and (low <= begin).all() and (begin <= end).all() and (end <= high).all()
    assert (((high - low) == 0) | ((low >= 0) & (high < T + BLOCK))).all()
    whole = everybody[:, 40:].unflatten(1, (-1, BLOCK)).all(2).sum(1) * BLOCK  # places of whole blocks
    whole = torch.where((first <= last).squeeze(1), whole, 0)
    assert (whole == (end - begin).squeeze(1)).all() and (whole > 0).float().mean() > 0.1
