"""Parameters, masks, delays, resets, clipping, heads and windows of ops.recurrent, against layers written out by hand."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import cotangents, gradients
from tests.ops.walk import Walk, keeps

OPTIONS = [
    {},
    {"zoneout": 0.3},
    {"zoneout": (0.1, 0.5)},
    {"recurrent_dropout": 0.4},
    {"variational": 0.4},
    {"reset": True},
    {"skip": 1},
    {"skip": 3},
    {"clip_grad": 0.5},
    {"heads": 5},
    {"zoneout": 0.2, "reset": True, "variational": 0.5},
    {"zoneout": 0.2, "skip": 2, "clip_grad": 1.0},
]


def here(v):
    return v.to(place.device)


LAYOUTS = [("dense", False), ("dense", True), ("packed", True), ("lengths", False), ("lengths", True)]


def walks(cell, options, **more):
    if options.get("heads"):
        more |= {"H": 10}
    if cell == "gru" and isinstance(options.get("zoneout"), tuple):
        options = options | {"zoneout": options["zoneout"][:1]}
    for layout, reverse in LAYOUTS if cell == "lstm" else LAYOUTS[1:4]:
        yield Walk(cell, tuple(options.items()), layout, reverse, **more)


WALKS = [w for cell in ("lstm", "gru") for options in OPTIONS[1:] for w in walks(cell, options)]
WALKS += [
    w
    for cell in ("lstm_layer_norm", "indrnn")
    for options in (OPTIONS[0], OPTIONS[1], OPTIONS[5])
    for w in walks(cell, options)
]
WALKS += [w for options in ({"heads": 2}, {"clip_grad": 0.1}, {"skip": 2}) for w in walks("lstm_layer_norm", options)]
FEW = WALKS[::7]
SEED = torch.tensor([0x1234_5678_9ABC])


@pytest.fixture(params=[place.param(at, (name, at), name) for name, at in place.places() if name != "cpu"])
def backend(request):
    """All but the C++ one, which would compile a cell for each of these: `test_compiled` has some."""
    name, where = request.param
    with place.at(where):
        yield name


@pytest.mark.parametrize("walk", WALKS, ids=str)
@pytest.mark.float64
def test_outputs_and_gradients(walk, backend):
    t = walk.tensors()
    random = cotangents(walk.by_hand(SEED)(*t.values()))
    ours = gradients(walk.call(backend, here(SEED)), t, random)
    want = gradients(walk.by_hand(SEED), walk.tensors(), random)
    assert_close_to_truth(ours, want, want, name=str(walk))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("walk", FEW, ids=str)
def test_other_dtypes(walk, dtype, backend):
    low = walk.tensors(dtype)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    random = cotangents(walk.by_hand(SEED)(*high.values()))
    truth = gradients(walk.call("reference", here(SEED)), high, random)
    theirs = gradients(walk.by_hand(SEED), walk.tensors(dtype), random)
    ours = gradients(walk.call(backend, here(SEED)), low, random)
    assert_close_to_truth(ours, theirs, truth, name=str(walk))


@pytest.mark.parametrize(
    "options", ({"zoneout": 0.2, "reset": True, "variational": 0.5}, {"skip": 2, "clip_grad": 0.5}), ids=str
)
@pytest.mark.cpu
@pytest.mark.slow
def test_compiled(options):
    """On the best backend of a CPU: cells that did not come with the package."""
    for walk in walks("lstm", options, H=17):
        low = walk.tensors(torch.float32)
        high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
        random = cotangents(walk.by_hand(SEED)(*high.values()))
        truth, theirs = (gradients(walk.by_hand(SEED), t, random) for t in (high, walk.tensors(torch.float32)))
        assert_close_to_truth(gradients(walk.call(None, SEED), low, random), theirs, truth, name=str(walk))


HEADS = [w for cell in ("lstm", "gru", "rnn_tanh") for w in walks(cell, {"heads": 3})]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("walk", HEADS, ids=str)
@pytest.mark.cpu
def test_heads_of_whole_vectors(walk, dtype):
    """Which the CPU's kernels have blocks for; threads that divide the heads never meet, and the bits are always the same."""
    walk, ours, threads = replace(walk, H=48, B=14), [], torch.get_num_threads()
    low = walk.tensors(dtype)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    random = cotangents(walk.by_hand()(*high.values()))
    truth, theirs = (gradients(walk.by_hand(), t, random) for t in (high, walk.tensors(dtype)))
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            ours.append(gradients(walk.call("cpu"), walk.tensors(dtype), random))
    finally:
        torch.set_num_threads(threads)
    assert_close_to_truth(ours[0], theirs, truth, name=str(walk))
    for out, got in ours[1:]:
        assert all(map(torch.equal, (*ours[0][0], *ours[0][1].values()), (*out, *got.values())))


@pytest.mark.cpu
def test_derivatives_of_heads_of_whole_vectors():
    walk = Walk("gru", (("heads", 2),), T=2, B=1, I=1, H=32)
    f, t = walk.call("cpu"), tuple(walk.tensors().values())
    assert gradcheck(f, t, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(f, t, fast_mode=True)


@pytest.mark.parametrize("walk", FEW, ids=str)
@pytest.mark.float64
def test_evaluation_takes_the_mean_of_every_mask(walk, backend):
    t = walk.tensors(requires_grad=False)
    want = walk.by_hand(training=False)(*t.values())
    assert_close_to_truth(walk.call(backend, training=False)(*t.values()), want, want)


SMALL = [Walk("lstm", tuple(o.items()), "lengths", True, T=4, B=2, I=2, H=2) for o in OPTIONS[1:4] + OPTIONS[5:8]]
SMALL += [Walk("gru", (("variational", 0.4),), T=3, B=2, I=2, H=2), Walk("indrnn", (), "packed", T=3, B=2, I=2, H=2)]
SMALL += [Walk("lstm_layer_norm", (), "packed", True, T=3, B=2, I=2, H=3)]
SMALL += [Walk("lstm", (("heads", 2), ("zoneout", 0.3)), T=3, B=2, I=2, H=4)]


@pytest.mark.parametrize("walk", SMALL, ids=str)
@pytest.mark.float64
def test_derivatives(walk, backend):
    f, t = walk.call(backend, here(SEED)), tuple(walk.tensors().values())
    assert gradcheck(f, t, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, t, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("walk", SMALL, ids=str)
@pytest.mark.float64
def test_vmap(walk, backend):
    t = walk.tensors(requires_grad=False)
    f, many = walk.call(backend, here(SEED)), torch.stack([t["x"], 2 * t["x"], -t["x"]])
    rest = list(t.values())[1:]
    got = torch.vmap(lambda x: f(x, *rest))(many)
    for k in range(3):
        want = f(many[k], *rest)
        assert_close_to_truth([v[k] for v in got], want, want)
    loss = lambda x, w: sum(v.square().sum() for v in f(x, w, *rest[1:]))
    got = torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(many, rest[0])
    want = [torch.func.grad(loss, (0, 1))(x, rest[0]) for x in many]
    for k in range(3):
        assert_close_to_truth([v[k] for v in got], list(want[k]), list(want[k]))


@pytest.mark.parametrize("size", (1, 2, 4, 6, 9))
@pytest.mark.parametrize(
    "walk",
    [w for o in (OPTIONS[0], OPTIONS[10], {"zoneout": 0.3, "recurrent_dropout": 0.4}) for w in walks("lstm", o)],
    ids=str,
)
@pytest.mark.float64
def test_windows_that_are_computed_again(walk, size, backend):
    """The same numbers: masks are those of the whole sequence."""
    random = cotangents(walk.call(backend, here(SEED))(*walk.tensors().values()))
    got, want = (gradients(walk.call(backend, here(SEED), recompute=k), walk.tensors(), random) for k in (size, 0))
    assert_close_to_truth(got, want, want)


def test_windows_keep_little():
    """Of T steps x and y, and the states of one in k."""
    T, B, H, k = 2000, 2, 16, 50
    x, w = torch.randn(T, B, 4 * H), torch.randn(4 * H, H, requires_grad=True)

    def kept(recompute):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v: (seen.setdefault(v.data_ptr(), v.nbytes), v)[1], lambda v: v
        ):
            gk.ops.recurrent(x, w, recompute=recompute)[0].sum()
        return sum(seen.values()) - x.nbytes - w.nbytes

    assert kept(k) == (T // k) * 2 * B * H * 4 < kept(0) / 100


@pytest.mark.parametrize(
    "walk",
    [Walk("lstm", (("zoneout", 0.2),), layout, True, T=4, B=2, I=2, H=2) for layout in ("packed", "lengths")],
    ids=str,
)
@pytest.mark.float64
def test_derivatives_through_windows(walk, backend):
    f, t = walk.call(backend, here(SEED), recompute=3), tuple(walk.tensors().values())
    assert gradcheck(f, t, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, t, fast_mode=True)


def test_sixteen_bits_through_windows():
    """Gradients of weights are summed in 32 bits."""
    walk = Walk("gru", T=200, B=2, H=16)
    low = walk.tensors(torch.bfloat16)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    random = cotangents(walk.call("reference")(*high.values()))
    truth, theirs, ours = (
        gradients(walk.call("reference", recompute=k), t, random) for t, k in ((high, 0), (low, 0), (low, 7))
    )
    assert_close_to_truth(ours, theirs, truth)


@pytest.mark.parametrize("short", (3, 5, 8))
@pytest.mark.parametrize("more", ({}, {"recompute": 4}, {"variational": 0.4}, {"heads": 2}), ids=str)
def test_probe(more, short):
    """Norms of dL/dh and dL/dc of each step, whatever is around the cell."""
    walk = Walk("lstm", tuple(more.items()), H=6)
    probe = torch.zeros(short, 3, dtype=torch.double, requires_grad=True)
    y, _, _ = walk.call("reference", SEED, probe=probe)(*walk.tensors().values())
    y.square().sum().backward()
    adjoints = [[] for _ in range(walk.T)]
    walk.by_hand(SEED, seen=adjoints)(*walk.tensors().values())[0].square().sum().backward()
    norms = [sum(g.square().sum() for g in step) for step in adjoints][-short:]
    got = probe.grad[: len(norms)]
    assert torch.allclose(got[:, 0], torch.stack(norms)) and (got[:, 2] == walk.B).all() and (got[:-1, 1] > 0).all()
    assert (probe.grad[walk.T :] == 0).all()


def test_masks_are_what_the_seed_says_and_torch_draws_it():
    walk = Walk("lstm", (("zoneout", 0.5),))
    t = list(walk.tensors(requires_grad=False).values())
    f, g = walk.call("reference"), walk.call("reference", SEED)
    a, b = f(*t), f(*t)
    assert not torch.equal(a[0], b[0])
    torch.manual_seed(3)
    a = f(*t)
    torch.manual_seed(3)
    assert torch.equal(a[0], f(*t)[0]) and torch.equal(g(*t)[0], g(*t)[0])


@pytest.mark.parametrize("p", (0.0, 1.0))
def test_the_ends_of_probabilities(p):
    walk = Walk("lstm", (("zoneout", p),))
    t = walk.tensors(requires_grad=False)
    y, h, c = walk.call("reference")(*t.values())
    if p:  # nothing ever changes
        assert torch.equal(h, t["state[0]"]) and torch.equal(c, t["state[1]"])
    else:
        assert torch.equal(y, Walk("lstm").call("reference")(*t.values())[0])
    plain = Walk("rnn_tanh", (("variational", p),)).tensors(requires_grad=False)
    y, _ = Walk("rnn_tanh", (("variational", p),)).call("reference")(*plain.values())
    u = torch.nn.functional.linear(plain["x"], plain["weight_ih"], plain["bias_ih"] + plain["bias_hh"])
    assert torch.allclose(y, torch.tanh(u)) == bool(p)


def test_weight_drop():
    walk = Walk("lstm")
    t = walk.tensors(requires_grad=False)
    torch.manual_seed(7)
    got = walk.call("reference", weight_drop=0.5)(*t.values())
    torch.manual_seed(7)
    want = walk.call("reference")(*(t | {"weight_hh": torch.nn.functional.dropout(t["weight_hh"], 0.5)}).values())
    assert torch.equal(got[0], want[0])
    same = walk.call("reference", weight_drop=0.5, training=False)(*t.values())
    assert torch.equal(same[0], walk.call("reference")(*t.values())[0])


def arguments(cell="lstm", **extra):
    """Of the operator, with an Extra that is wrong."""
    Z, c = torch.zeros, gk.cells.get(cell)
    w = Z(c.G * 5, 5) if c.recurrent else Z(5, 0)
    state = [Z(3, 5) for _ in range(c.S)]
    return (cell, Z(4, 3, c.G * 5), None, None, w, None, None, state, None, None, False, 2, None), extra


@gk.cell
def noisy(x, r, s, m):
    return m[0] * tanh(x[0] + r[0]) + m[1] * s[0]  # noqa: F821


EXTRA = {
    "no params": (arguments("lstm_peephole"), ValueError, r"takes 3 parameters per unit, params \[3, 5\]; got none"),
    "params": (arguments(params=torch.zeros(1, 5)), ValueError, "takes 0 parameters"),
    "shape": (arguments("indrnn", params=torch.zeros(2, 5)), RuntimeError, r"params must have shape \[1, 5\]"),
    "dtype": (arguments("indrnn", params=torch.zeros(1, 5).double()), ValueError, "params dtype"),
    "masks": (arguments(noise=[0.1, 1.0, 0.0]), ValueError, "has 0 masks"),
    "flags": (arguments(flags=torch.zeros(12)), ValueError, "flags are for masks of kind 2"),
    "seed": (arguments(seed=torch.zeros(2, dtype=torch.long)), ValueError, r"seed must be int64 \[1\]"),
    "skip": (arguments(skip=1), ValueError, "skip must be 0 for lstm"),
    "clip": (arguments(clip=-1.0), ValueError, "clip must not be negative"),
    "first": (arguments(first=-1), ValueError, "first must not be negative"),
}


@pytest.mark.parametrize(("given", "exception", "text"), EXTRA.values(), ids=EXTRA)
def test_operator_with_a_wrong_extra(given, exception, text):
    args, extra = given
    with pytest.raises(exception, match=text):
        torch.ops.gradkernels.recurrent_forward(*args, **extra)


def test_no_recurrent_product():
    x, p = torch.zeros(4, 3, 5), torch.ones(1, 5)
    with pytest.raises(RuntimeError, match=r"weight_hh must have shape \[5, 0\] for indrnn"):
        gk.ops.recurrent(x, torch.zeros(5, 5), params=p, cell="indrnn")
    with pytest.raises(ValueError, match="bias_hh is a part of the recurrent product, which indrnn has not"):
        gk.ops.recurrent(x, torch.zeros(5, 0), bias_hh=torch.zeros(5), params=p, cell="indrnn")


def test_masks_of_a_cell_that_reads_them_itself():
    x, w = torch.randn(9, 4, 6), torch.randn(6, 6) / 3
    call = lambda **more: gk.ops.recurrent(
        x, w, cell=noisy, noise=[(0.5, 2.0, "step"), (0.25, 1.0, "sequence")], backend="reference", **more
    )[0]
    h, want = torch.zeros(4, 6), []
    for u in x:
        h = torch.tanh(u + h @ w.t()) + 0.75 * h
        want.append(h)
    assert torch.allclose(call(training=False), torch.stack(want), atol=1e-6)
    y = call(seed=SEED)
    for b in range(4):
        keep = torch.stack([keeps(SEED, 0, 0.5, t * 4 + b, 6) for t in range(9)]) * 2.0
        h = torch.zeros(6)
        for t in range(9):
            h = keep[t] * torch.tanh(x[t, b] + w @ h) + keeps(SEED, 1, 0.25, b, 6) * h
            assert torch.allclose(y[t, b], h, atol=1e-5)
    for noise, text in (([], "has 2 masks"), ([(0.5, 1.0, "row")] * 2, "kind of a mask is 'step' or 'sequence'")):
        with pytest.raises(ValueError, match=text):
            gk.ops.recurrent(x, w, cell=noisy, noise=noise)
