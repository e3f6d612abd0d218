"""Recurrent with everything that may surround a cell, SkipRNN and MultiScaleRNN."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gradkernels as gk
from gradkernels.cells import CELLS
from gradkernels.ops import _recurrent_op as op
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu
X, N = torch.randn(7, 4, 3, dtype=torch.double), torch.tensor([7, 2, 5, 1])
OPTIONS = {
    "zoneout": {"zoneout": 0.3},
    "variational": {"variational": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_drop": {"weight_drop": 0.3},
    "skip": {"skip": 2},
    "clip": {"clip_grad": 0.1},
    "heads": {"heads": 2},
    "recompute": {"recompute": 3},
    "many": {"zoneout": 0.1, "variational": 0.2, "weight_drop": 0.1, "recompute": 3},
}


def make(cell="lstm", *args, **kwargs):
    """In torch operations: compiling a cell for each of these tests would take long."""
    torch.manual_seed(1)
    return gk.nn.Recurrent(cell, 3, 6, *args, dtype=torch.double, backend="reference", **kwargs)


def exact(got, want):
    assert_close_to_truth(got, want, want)


@pytest.mark.parametrize("cell", CELLS)
def test_stack_of_every_cell(cell):
    """Two layers, two directions, by calls of the operation with the parameters by their names."""
    layer, c = make(cell, 2, bidirectional=True), CELLS[cell]
    y, states = layer(X)
    states = states if c.S > 1 else (states,)
    x, finals = X, []
    for k in range(2):
        outs = []
        for d in ("", "_reverse"):
            p = {n.removesuffix(f"_l{k}{d}"): v for n, v in layer.named_parameters() if n.endswith(f"_l{k}{d}")}
            known = {n: p.pop(n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if n in p}
            assert list(p) == [name for name, _, _ in c.params] and ("bias_hh" in known) == c.recurrent
            params = torch.cat([v.reshape(-1, 6) for v in p.values()]) if p else None
            w = known.pop("weight_hh")
            out, final = gk.ops.recurrent(x, w, **known, params=params, cell=cell, reverse=bool(d), backend="reference")
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1)
    assert torch.equal(y, x) and all(torch.equal(a, torch.stack(b)) for a, b in zip(states, zip(*finals)))
    (y.sum() + sum(h.sum() for h in states)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_modes_copies_and_state_dicts(options):
    layer = make("lstm", 2, **options)
    assert all(f"{k}={v!r}" in repr(layer) for k, v in options.items())
    torch.manual_seed(3)
    y = layer(X)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(3)
        assert torch.equal(other(X)[0], y)
    random = set(options) & {"zoneout", "variational", "recurrent_dropout", "weight_drop"}
    assert torch.equal(layer(X)[0], y) == (not random)
    plain = make("lstm", 2, heads=options.get("heads", 1), skip=options.get("skip", 0))
    plain.load_state_dict(layer.state_dict())
    layer.eval()
    assert torch.equal(layer(X)[0], layer(X)[0])
    if "zoneout" not in options:  # whose mean is not the layer without it
        exact(layer(X)[0], plain(X)[0])


def test_layers_and_directions_draw_masks_of_their_own():
    torch.manual_seed(0)
    drawn, draw = [], torch.randint
    layer = make("lstm", 2, bidirectional=True, zoneout=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
        layer(X)
    assert len({int(v) for v in drawn}) == 4


def test_layer_norm_lstm_by_torch_layer_norm():
    """The modules of torch that people use, one step after the other."""
    layer = make("lstm_layer_norm")
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    gates, recurrent, cell = (torch.nn.LayerNorm(n, dtype=torch.double) for n in (24, 24, 6))
    with torch.no_grad():
        for norm, weight, bias in (
            (gates, layer.gain_x_l0, layer.bias_l0), (recurrent, layer.gain_r_l0, None), (cell, layer.gain_c_l0, layer.bias_c_l0)
        ):  # fmt: skip
            norm.weight.copy_(weight.flatten())
            norm.bias.copy_(torch.zeros(24) if bias is None else bias.flatten())
    h = c = torch.zeros(4, 6, dtype=torch.double)
    want = []
    for x in X:
        u = gates(F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)) + recurrent(
            F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
        )
        i, f, g, o = u.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell(c).tanh()
        want.append(h)
    y, (h_n, c_n) = layer(X)
    exact([y, h_n[0], c_n[0]], [torch.stack(want), h, c])
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    own = [getattr(layer, name) for name in names]
    exact(torch.autograd.grad(y.square().sum(), own), torch.autograd.grad(torch.stack(want).square().sum(), own))


def test_resets_in_every_layout():
    layer, reset = make("lstm", 2), torch.rand(7, 4) < 0.4
    reset[0] = True
    want, _ = layer(X, reset=reset)
    pieces = []
    for b in range(4):  # every row is a list of episodes
        starts = reset[:, b].nonzero().flatten().tolist()
        pieces.append(
            None
            if len(starts) < 1
            else [layer.__class__.forward(make("lstm"), X[s:e, b]) for s, e in zip(starts, [*starts[1:], 7])]
        )
    one = make("lstm")
    exact(one(X, reset=reset)[0], torch.stack([torch.cat([y for y, _ in row]) for row in pieces], 1))
    first = make("lstm", 2, batch_first=True)
    first.load_state_dict(layer.state_dict())
    exact(first(X.transpose(0, 1), reset=reset.t())[0].transpose(0, 1), want)
    exact(layer(X[:, 1], reset=reset[:, 1])[0], want[:, 1])
    y, ends = layer(X, lengths=N, reset=reset)
    pack = lambda v: pack_padded_sequence(v, N, enforce_sorted=False)
    packed, last = layer(pack(X), reset=pack(reset.unsqueeze(2).double())._replace(data=pack(reset).data))
    exact([pad_packed_sequence(packed)[0], *last], [y, *ends])


def test_carried_states_are_truncated_backpropagation():
    layer, plain = make("lstm", 2, stateful=True), make("lstm", 2)
    first, hx = plain(X[:4])
    second, _ = plain(X[4:], tuple(h.detach() for h in hx))
    exact(layer(X[:4])[0], first)
    y, _ = layer(X[4:])
    exact(y, second)
    grads = [torch.autograd.grad(v.sum(), list(m.parameters())) for v, m in ((y, layer), (second, plain))]
    exact(*grads)
    assert "stateful=True" in repr(layer) and set(layer.state_dict()) == set(plain.state_dict())
    with pytest.raises(
        RuntimeError, match="left states of a batch of 4 behind, and now comes one of 2: call reset_state"
    ):
        layer(X[:, :2])
    with pytest.raises(RuntimeError, match="now comes a sequence without a batch: call reset_state"):
        layer(X[:, 0])
    layer.reset_state()
    exact(layer(X[:4])[0], first)


def test_skip():
    layer = gk.nn.SkipRNN("rnn_tanh", 3, 6, skip=3, dtype=torch.double, backend="reference")
    h, want = torch.zeros(4, 6, dtype=torch.double), []
    for t, x in enumerate(X):
        h = torch.tanh(
            F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0) + F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
        )
        h = h + want[t - 3] if t >= 3 else h
        want.append(h)
    exact(layer(X)[0], torch.stack(want))
    with torch.no_grad():  # a recurrence that forgets at once: what is left is the skips
        layer.weight_hh_l0.zero_()
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(layer(x)[0][6].sum(), x)
    assert [bool(v.abs().sum() > 0) for v in g] == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("lengths", (None, N), ids=("dense", "lengths"))
@pytest.mark.parametrize("periods", ((1, 2, 4), (3, 1), (2, 5, 1)), ids=str)
def test_multiscale(periods, lengths):
    """Against one step after the other with torch's own cells, all groups at once."""
    n = len(periods)
    layer = gk.nn.MultiScaleRNN("gru", 3, 6 * n, periods, dtype=torch.double, backend="reference")
    cells = []
    for group in layer.groups:
        cell = torch.nn.GRUCell(group.input_size, 6, dtype=torch.double)
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in group.state_dict().items()})
        cells.append(cell)
    h0 = torch.randn(1, 4, 6 * n, dtype=torch.double)
    order = sorted(range(n), key=lambda j: -periods[j])
    held, want = list(h0[0].chunk(n, 1)), []
    for t, x in enumerate(X):
        before, live = list(held), torch.tensor([True] * 4) if lengths is None else t < lengths
        for j in range(n):
            if t % periods[j] == 0:
                slower = [before[i] for i in order if periods[i] > periods[j]]
                new = cells[j](torch.cat([x, *slower], 1), before[j])
                held[j] = torch.where(live.unsqueeze(1), new, before[j])
        want.append(torch.cat(held, 1) * live.unsqueeze(1))
    steps = []
    for group in layer.groups:
        group.register_forward_pre_hook(lambda m, args: steps.append(args[0].shape[0]))
    y, h = layer(X, h0, lengths)
    exact([y, h[0]], [torch.stack(want), torch.cat(held, 1)])
    assert sorted(steps) == sorted(-(-7 // p) for p in periods)  # what a group skips is not computed
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_multiscale_layouts():
    layer = gk.nn.MultiScaleRNN("lstm", 3, 8, (1, 3), dtype=torch.double, backend="reference")
    y, (h, c) = layer(X)
    one, (h1, c1) = layer(X[:, 1])
    exact([one, h1, c1], [y[:, 1], h[:, 1], c[:, 1]])
    y, (h, c) = layer(X, lengths=N)
    packed, (hp, cp) = layer(pack_padded_sequence(X, N, enforce_sorted=False))
    exact([pad_packed_sequence(packed)[0], hp, cp], [y, h, c])
    layer.batch_first = True
    exact(layer(X.transpose(0, 1), lengths=N)[0].transpose(0, 1), y)
    later = layer(X[6:].transpose(0, 1), layer(X[:6].transpose(0, 1))[1])[0]  # clocks meet at 6
    exact(later[:, 0], layer(X.transpose(0, 1))[0][:, 6])


COMPILED = {**{k: OPTIONS[k] for k in ("variational", "skip", "clip", "heads", "many")}, "plain": {}}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_compiled(options):
    layer, reset = make("lstm", **options), None if options.get("skip") else torch.rand(7, 4) < 0.3
    f = torch.compile(lambda x: layer(x, reset=reset)[0], fullgraph=True, backend="aot_eager")
    outs = []
    for g in (f, lambda x: layer(x, reset=reset)[0]):
        torch.manual_seed(5)
        y = g(X)
        outs.append((y, torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    exact(*outs)


@pytest.mark.parametrize("layers", (1, 2))
def test_carried_states_in_a_graph(layers):
    layer = make("lstm", layers, stateful=True)
    want = [layer(x)[0] for x in X.split(3)]
    layer.reset_state()
    f = torch.compile(layer, backend="aot_eager")
    exact([f(x)[0] for x in X.split(3)], want)


def test_carried_states_are_the_layers_own():
    layer = make("gru", stateful=True)
    layer(X[:4])
    want = layer(X[4:])[0]
    layer.reset_state()
    _, h = layer(X[:4])
    h.detach().zero_()
    exact(layer(X[4:])[0], want)


def test_exported_with_a_cell_that_is_made_again_from_its_name():
    layer = make("lstm", zoneout=0.3, variational=0.2).eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (X,)), file)
    file.seek(0)
    op._given.clear()
    exact(torch.export.load(file).module()(X)[0], layer(X)[0])


def test_a_cell_of_ones_own_by_its_parameters():
    @gk.cell(params=[("slope", 2, 0.5), ("shift", 1, None)])
    def leaky(x, r, s, p):
        u = x[0] + r[0]
        return max(p[0] * u, p[1] * u) + p[2] * s[0]

    layer = make(leaky)
    assert layer.slope_l0.shape == (2, 6) and layer.shift_l0.shape == (6,) and (layer.slope_l0 == 0.5).all()
    assert layer.shift_l0.abs().max() < 6**-0.5 and leaky.check() < 1e-12
    y, h = layer(X)
    y.sum().backward()
    assert h.shape == (1, 4, 6) and all(p.grad.abs().sum() > 0 for p in layer.parameters())


WRONG = {
    "zoneout": ({"zoneout": 1.5}, "zoneout must be between 0 and 1, got 1.5"),
    "each state": ({"zoneout": (0.1, 0.1, 0.1)}, "zoneout must be one number or 2"),
    "both": ({"variational": 0.1, "recurrent_dropout": 0.1}, "give one of them"),
    "clip": ({"clip_grad": -1.0}, "clip_grad must not be negative"),
    "heads": ({"heads": 4}, "heads=4 need a hidden_size that they divide, got 6"),
    "heads and projection": ({"heads": 2, "proj_size": 2}, "heads=2 share a recurrent product without projection"),
    "no heads": ({"heads": 0}, "heads must be at least 1"),
    "windows": ({"recompute": 3, "skip": 2}, "recompute begins a window with the states alone"),
    "skip": ({"skip": -1}, "skip must be positive"),
    "skip and dropout": ({"skip": 2, "variational": 0.1}, "do not reach the state of some steps ago"),
    "noise": ({"noise": [(0.1, 1.0, "step")]}, "cell lstm has 0 masks"),
    "half a mask": ({"noise": [(0.1, 1.0)]}, r"\(p, high, kind\) for each mask, got \(0.1, 1.0\)"),
    "mask without a list": ({"noise": (0.1, 1.0, "step")}, r"\(p, high, kind\) for each mask, got 0.1"),
    "probability": ({"noise": [(2, 1.0, "step")]}, "p of noise must be between 0 and 1, got 2"),
}
NO_NUMBERS = {
    "zoneout": "a",
    "recurrent_dropout": None,
    "weight_drop": "0.1",
    "noise": 0.1,
    "clip_grad": "1",
    "heads": 2.0,
    "recompute": 2.5,
    "skip": "2",
}


@pytest.mark.parametrize(("option", "value"), NO_NUMBERS.items())
def test_options_that_are_no_numbers(option, value):
    with pytest.raises(TypeError, match=f"{option} must be a .*, got {value!r}"):
        make("lstm", **{option: value})


@pytest.mark.parametrize(("options", "text"), WRONG.values(), ids=WRONG)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        make("lstm", **options)


def test_other_errors():
    with pytest.raises(ValueError, match="indrnn has no recurrent product that could drop anything"):
        make("indrnn", variational=0.1)
    with pytest.raises(RuntimeError, match=r"reset must have shape \[7, 4\], got \[7, 3\]"):
        make()(X, reset=torch.zeros(7, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="reset must be bool, got torch.float32"):
        make()(X, reset=torch.zeros(7, 4))
    with pytest.raises(TypeError, match="reset must be a tensor, got list"):
        make()(X, reset=[True])
    with pytest.raises(ValueError, match="heads=2 share a recurrent product, which indrnn has not"):
        make("indrnn", heads=2)
    with pytest.raises(ValueError, match="do not reach the state of some steps ago"):
        make(skip=2)(X, reset=torch.zeros(7, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="skip must be at least 1, got 0"):
        gk.nn.SkipRNN("lstm", 3, 6, skip=0)
    for periods, text in (
        ((), "periods must be"),
        ((1, 1), "periods must be"),
        ((0, 1), "periods must be"),
        ((1, 2.5), "periods must be"),
        (4, "periods must be different positive numbers of steps, got 4"),
        ((1, 2, 4, 8), "multiple"),
    ):
        with pytest.raises(ValueError, match=text):
            gk.nn.MultiScaleRNN("lstm", 3, 6, periods)
    with pytest.raises(TypeError, match="MultiScaleRNN has no bidirectional: a group is one layer in one direction"):
        gk.nn.MultiScaleRNN("gru", 3, 8, bidirectional=True)
    layer = gk.nn.MultiScaleRNN("gru", 3, 8, dtype=torch.double)
    with pytest.raises(RuntimeError, match="Expected 3, got 2"):
        layer(X[..., :2])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        layer(X, X.new_zeros(1, 4, 6))
