"""Outputs and every gradient against the same written out by hand, and against torch's own layers, by the one tolerance rule."""

import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.backends import last
from gradkernels.cells.codegen import COMPILED
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case, cotangents, gradients, loop

CELLS = list(GATES)


def test_every_cell_that_is_compiled_in_is_tested():
    assert list(COMPILED) == CELLS


def check(case, dtype, backend):
    low = case.tensors(dtype)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    random = cotangents(case.loop()(*high.values()))
    truth = gradients(case.loop(), high, random)
    theirs = gradients(case.loop(), {k: v.detach().requires_grad_() for k, v in low.items()}, random)
    ours = gradients(case.call(backend), low, random)
    assert last() == backend
    assert_close_to_truth(ours, theirs, truth, name=str(case))


LAYOUTS = [
    Case(cell, T=7, B=5, I=9, H=19, layout=layout, reverse=reverse)
    for cell in CELLS
    for layout in ("dense", "packed", "lengths")
    for reverse in (False, True)
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, backend):
    check(case, torch.float32, backend)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("layout", ("dense", "lengths", "packed"))
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, layout, dtype, backend):
    check(Case(cell, T=6, B=4, I=5, H=17, layout=layout), dtype, backend)


SIZES = [
    {"T": 1, "B": 1, "I": 1, "H": 1},
    {"T": 2, "B": 1, "I": 1, "H": 1},
    {"T": 1, "B": 17, "I": 3, "H": 63},
    {"T": 3, "B": 3, "I": 127, "H": 3},
]
SIZES += [
    {"T": 9, "B": 1, "I": 17, "H": 127},
    {"T": 4, "B": 33, "I": 2, "H": 64},
    {"T": 40, "B": 2, "I": 3, "H": 16},
    {"T": 2, "B": 65, "I": 7, "H": 31},
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(cell, size, backend):
    check(Case(cell, **size), torch.float32, backend)


OPTIONS = [Case("lstm", T=5, B=3, I=4, H=9, R=r, layout=a, reverse=v) for r, a, v in ((2, "dense", False), (1, "lengths", True), (8, "packed", False), (8, "packed", True))]  # fmt: skip
OPTIONS += [Case("lstm", T=4, B=3, H=7, gates=True, R=3), Case("lstm", bias=False, R=5), Case("rnn_tanh", H=7, R=3)]
OPTIONS += [Case(cell, bias=False, layout=layout) for cell in CELLS for layout in ("dense", "lengths")]
OPTIONS += [Case(cell, gates=True, reverse=True) for cell in CELLS]
OPTIONS += [Case(cell, T=30, B=2, I=3, H=24, scale=8.0) for cell in CELLS if cell != "rnn_relu"]  # saturated gates


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case, backend):
    check(case, torch.float32, backend)


LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": lambda *a: nn.RNN(*a, nonlinearity="relu")}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("size", [(12, 4, 20, 33), (50, 2, 8, 64), (1, 1, 7, 16)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("cell", LAYERS)
def test_torch_layers(cell, size, dtype, backend):
    T, B, I, H = size
    layer = LAYERS[cell](I, H).to(place.device, dtype)
    x, S = place.randn(T, B, I, dtype=dtype), gk.cells.get(cell).S
    state = [place.randn(1, B, H, dtype=dtype) for _ in range(S)]
    random = place.randn(T, B, H, dtype=torch.double)

    def result(module, dtype, run):
        u = x.to(dtype, copy=True).requires_grad_()
        h = [v.to(dtype, copy=True).requires_grad_() for v in state]
        y, *final = run(module, u, h)
        loss = (y * random.to(dtype)).sum() + sum(v.square().sum() for v in final)
        return (y, *final), torch.autograd.grad(loss, [u, *h, *module.parameters()])

    def torch_layer(m, u, h):
        y, final = m(u, tuple(h) if S > 1 else h[0])
        return y, *(v[0] for v in (final if S > 1 else (final,)))

    def ours(m, u, h):
        w_ih, w_hh, b_ih, b_hh = m.parameters()
        kwargs = {"weight_ih": w_ih, "bias_ih": b_ih, "bias_hh": b_hh, "cell": cell, "backend": backend}
        y, final = gk.ops.recurrent(u, w_hh, [v[0] for v in h], **kwargs)
        return y, *final

    import copy

    wide = copy.deepcopy(layer).double()
    truth = result(wide, torch.double, torch_layer)
    assert_close_to_truth(result(layer, dtype, ours), result(layer, dtype, torch_layer), truth, name=cell)


@pytest.mark.parametrize("cell", CELLS)
def test_state_none_is_zeros(cell, backend):
    case = Case(cell)
    t = case.tensors(torch.float32, requires_grad=False)
    state = [torch.zeros_like(t.pop(k)) for k in [k for k in t if k.startswith("state")]]
    x, w = t.pop("x"), t.pop("weight_hh")
    a, b = (gk.ops.recurrent(x, w, s, **t, cell=cell, backend=backend) for s in (None, state))
    assert torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1]))
    packed = gk.ops.recurrent(
        x.flatten(0, 1), w, None, **t, cell=cell, backend=backend, batch_sizes=torch.full((5,), 3)
    )
    assert torch.equal(packed[0], a[0].flatten(0, 1))


@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize("cell", CELLS)
def test_one_state_or_every_state(cell, layout, backend):
    case = Case(cell, layout=layout)
    t = case.tensors(torch.float32)
    f = case.call(backend)
    with torch.no_grad():
        quiet = f(*t.values())
    recorded = f(*t.values())
    assert all(map(torch.equal, quiet, recorded))
    rest = {k: v for k, v in t.items() if k in ("weight_ih", "bias_ih", "bias_hh")}
    kwargs = {"packed": {"batch_sizes": case.batch_sizes}, "lengths": {"lengths": case.lengths}}.get(layout, {})
    state = [t[k] for k in t if k.startswith("state")]
    y, final = gk.ops.recurrent(t["x"], t["weight_hh"], state, **rest, **kwargs, cell=cell, backend=backend)
    assert torch.equal(y, recorded[0]) and all(map(torch.equal, final, recorded[len(state) :]))


@pytest.mark.parametrize("cell", CELLS)
def test_packed_and_lengths_are_the_same(cell, backend):
    case, ragged = Case(cell, T=6, B=4, layout="packed"), Case(cell, T=6, B=4, layout="lengths")
    t = case.tensors(torch.float32, requires_grad=False)
    packed = case.call(backend)(*t.values())
    S, x = len(packed) // 2, place.randn(24, 4)
    x[case.rows] = t["x"]
    y = Case(cell, T=6, B=4).call(backend, lengths=case.lengths)(x.view(6, 4, 4), *list(t.values())[1:])
    assert_close_to_truth([v.flatten(0, 1)[case.rows] for v in y[:S]], packed[:S], [v.double() for v in packed[:S]])
    assert_close_to_truth(y[S:], packed[S:], [v.double() for v in packed[S:]])
    assert ragged.lengths.tolist() != sorted(
        ragged.lengths.tolist(), reverse=True
    )  # the other tests meet unsorted rows


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("sizes", [[3, 2, 1], [3, 1, 0], [0, 0], [5, 5]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_steps_need_not_reach_every_row(cell, sizes, reverse, backend):
    """Rows of the state beyond the first step's, and steps without rows, as no PackedSequence has them."""
    case = Case(cell, T=len(sizes), B=5)
    dense, sizes = case.tensors(torch.float32), torch.tensor(sizes, dtype=torch.long)
    t = {**dense, "x": place.randn(int(sizes.sum()), 4, requires_grad=True)}
    live = (torch.arange(5) < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1).to(place.device)
    lengths = (sizes.unsqueeze(1) > torch.arange(5)).sum(0)

    def padded(*values):
        x = values[0].new_zeros(case.T * 5, 4).index_copy(0, live, values[0]).unflatten(0, (case.T, 5))
        names = dict(zip(t, (x, *values[1:])))
        weights = [names[k] for k in ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh")]
        y, final = loop(cell, *weights, None, [v for k, v in names.items() if k.startswith("state")], lengths, reverse)
        return (*(v.flatten(0, 1)[live] for v in y), *(v + 0 * sum(w.sum() for w in values) for v in final))

    def result(f, dtype):
        u = {k: v.detach().to(dtype).requires_grad_() for k, v in t.items()}
        return gradients(f, u, cotangents(padded(*u.values())))

    ours = Case(cell, T=case.T, B=5, reverse=reverse).call(backend, batch_sizes=sizes)
    assert_close_to_truth(result(ours, torch.float32), result(padded, torch.float32), result(padded, torch.double))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, shape, backend):
    case = Case(cell, T=shape[0], B=shape[1])
    t = case.tensors(torch.float32)
    out, grads = gradients(case.call(backend), t, random := cotangents(case.loop()(*t.values())))
    S = len(out) // 2
    assert out[0].shape == (*shape, 6)
    for k, v in enumerate(out[S:]):
        assert torch.equal(v, t[f"state[{k}]"]) and (v.numel() == 0 or v.data_ptr() != t[f"state[{k}]"].data_ptr())
        assert torch.equal(grads[f"state[{k}]"], random[S + k].float())
    assert all((g == 0).all() and g.shape == t[k].shape for k, g in grads.items() if not k.startswith("state"))


@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_length_zero(cell, backend):
    t = Case(cell).tensors(torch.float32)
    f = Case(cell).call(backend, lengths=torch.zeros(3, dtype=torch.long))
    out, grads = gradients(f, t, cotangents(f(*t.values())))
    S = len(out) // 2
    assert all((v == 0).all() for v in out[:S]) and all(torch.equal(v, t[f"state[{k}]"]) for k, v in enumerate(out[S:]))
    assert all((g == 0).all() for k, g in grads.items() if not k.startswith("state"))
    assert all(torch.equal(grads[f"state[{k}]"], cotangents(out)[S + k].float()) for k in range(S))


@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_beyond_a_row_does_not_matter(cell, backend):
    case = Case(cell, T=6, B=4, layout="lengths")
    t = case.tensors(torch.float32)
    bad = t["x"].detach().clone()
    bad[torch.arange(6).unsqueeze(1) >= case.lengths] = torch.nan
    random = cotangents(case.call(backend)(*t.values()))
    good = gradients(case.call(backend), t, random)
    other = gradients(case.call(backend), {**t, "x": bad.requires_grad_()}, random)
    assert all(map(torch.equal, good[0], other[0])) and all(torch.equal(good[1][k], other[1][k]) for k in t)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("where", ("x", "weight_ih", "weight_hh", "bias_hh", "state[0]"))
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_travel_as_in_the_loop(cell, where, value, backend):
    case = Case(cell, T=4, B=3, I=3, H=5)
    t = case.tensors(torch.float32)
    with torch.no_grad():
        t[where].view(-1)[t[where].numel() // 2] = value
    random = cotangents(case.loop()(*t.values()))
    ours, theirs = (gradients(f, t, random) for f in (case.call(backend), case.loop()))
    for a, b in zip((*ours[0], *ours[1].values()), (*theirs[0], *theirs[1].values())):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize("cell", ("lstm", "gru_reset_before"))
def test_non_contiguous(cell, layout, backend):
    case = Case(cell, T=4, B=3, I=5, H=6, layout=layout)
    t = case.tensors(torch.float32)
    strided = {k: v.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for k, v in t.items()}
    assert not strided["x"].is_contiguous()
    random = cotangents(case.call(backend)(*t.values()))
    a = gradients(case.call(backend), t, random)
    b = gradients(case.call(backend), strided, [c.repeat_interleave(2, -1)[..., ::2] for c in random])
    assert all(map(torch.equal, a[0], b[0])) and all(torch.equal(a[1][k], b[1][k]) for k in t)


@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_every_time(cell, layout, backend):
    case = Case(cell, T=12, B=9, I=17, H=33, layout=layout)
    t = case.tensors(torch.float32)
    random = cotangents(case.call(backend)(*t.values()))
    first = gradients(case.call(backend), t, random)
    for _ in range(3):
        again = gradients(case.call(backend), t, random)
        assert all(map(torch.equal, first[0], again[0])) and all(torch.equal(first[1][k], again[1][k]) for k in t)
