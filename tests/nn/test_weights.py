"""Weights that were trained elsewhere, against the equations that those packages publish."""

import pytest
import torch

import gradkernels as gk
from gradkernels.nn import weights
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu
X = torch.randn(5, 2, 3, dtype=torch.double)


def new(*shape):
    return torch.randn(*shape, dtype=torch.double)


def exact(got, want):
    assert_close_to_truth(got, want, want)


@pytest.mark.parametrize("bias", ("before", "after", None))
def test_keras_gru(bias):
    kernel, recurrent, b = new(3, 12), new(4, 12), {"before": new(12), "after": new(2, 12), None: None}[bias]
    given = [kernel, recurrent] if b is None else [kernel, recurrent, b]
    layer = gk.nn.GRU(3, 4, bias=b is not None, reset_after=bias == "after", dtype=torch.double)
    layer.load_state_dict(weights.keras_gru(given))
    b_in, b_rec = b if bias == "after" else (0 if b is None else b, torch.zeros(12, dtype=torch.double))
    h, want = torch.zeros(2, 4, dtype=torch.double), []
    for x in X:
        xz, xr, xh = (x @ kernel + b_in).chunk(3, 1)
        rz, rr, rh = (h @ recurrent + b_rec).chunk(3, 1)
        z, r = torch.sigmoid(xz + rz), torch.sigmoid(xr + rr)
        new_h = torch.tanh(xh + (r * rh if bias == "after" else (r * h) @ recurrent[:, 8:]))
        h = z * h + (1 - z) * new_h
        want.append(h)
    exact(layer(X)[0], torch.stack(want))


def test_keras_hands_out_arrays():
    for make, G in ((weights.keras_gru, 3), (weights.keras_lstm, 4)):
        tensors = [v[..., : 4 * G].contiguous() for v in (new(3, 16), new(4, 16), new(16))]
        got, want = make([v.numpy() for v in tensors]), make(tensors)
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_keras_lstm_in_two_directions():
    each = [[new(3, 16), new(4, 16), new(16)] for _ in range(2)]
    layer = gk.nn.LSTM(3, 4, bidirectional=True, dtype=torch.double)
    layer.load_state_dict(weights.keras_lstm(each[0]) | weights.keras_lstm(each[1], "_l0_reverse"))
    halves = []
    for (kernel, recurrent, bias), xs in zip(each, (X, X.flip(0))):
        h = c = torch.zeros(2, 4, dtype=torch.double)
        out = []
        for x in xs:
            i, f, g, o = (x @ kernel + h @ recurrent + bias).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        halves.append(torch.stack(out))
    exact(layer(X)[0], torch.cat([halves[0], halves[1].flip(0)], -1))


def test_awd_lstm():
    lstm = torch.nn.LSTM(3, 4, dtype=torch.double)
    own = lstm.state_dict()
    theirs = {f"rnns.0.module.{k}": v for k, v in own.items()} | {"rnns.0.weight_hh_l0_raw": own["weight_hh_l0"]}
    theirs["rnns.0.module.weight_hh_l0"] = torch.zeros_like(own["weight_hh_l0"])
    theirs["rnns.1.module.weight_ih_l0"] = new(16, 4)
    layer = gk.nn.Recurrent("lstm", 3, 4, weight_drop=0.5, dtype=torch.double).eval()
    layer.load_state_dict(weights.awd_lstm(theirs))
    exact(layer(X)[0], lstm(X)[0])
    with pytest.raises(KeyError, match=r"no weight begins with 'rnns.7.'"):
        weights.awd_lstm(theirs, "rnns.7.")


def test_torchrecurrent():
    shapes = {"weight_ih": (16, 3), "weight_hh": (16, 4), "bias_ih": (16,), "bias_hh": (16,), "weight_ph": (12,)}
    cell = {k: new(*shape) for k, shape in shapes.items()}
    layer = gk.nn.Recurrent("lstm_peephole", 3, 4, dtype=torch.double)
    layer.load_state_dict(weights.torchrecurrent(cell))
    h = c = torch.zeros(2, 4, dtype=torch.double)
    wi, wf, wo = cell["weight_ph"].chunk(3)
    for x in X:
        i, f, g, o = (x @ cell["weight_ih"].t() + h @ cell["weight_hh"].t() + cell["bias_ih"] + cell["bias_hh"]).chunk(
            4, 1
        )
        i, f = torch.sigmoid(i + wi * c), torch.sigmoid(f + wf * c)
        c = f * c + i * g.tanh()
        h = torch.sigmoid(o + wo * c) * c.tanh()
    exact(layer(X)[0][-1], h)
    u = {
        f"cells.{k}.{n}": new(4, *s)
        for k, w in ((0, 3), (1, 4))
        for n, s in (("weight_ih", (w,)), ("vector_u", ()), ("bias_ih", ()))
    }
    layer = gk.nn.Recurrent("indrnn", 3, 4, 2, dtype=torch.double)
    layer.load_state_dict(weights.torchrecurrent(u))
    y = X
    for k in range(2):
        h, out = torch.zeros(2, 4, dtype=torch.double), []
        for x in y:
            h = torch.relu(x @ u[f"cells.{k}.weight_ih"].t() + u[f"cells.{k}.vector_u"] * h + u[f"cells.{k}.bias_ih"])
            out.append(h)
        y = torch.stack(out)
    exact(layer(X)[0], y)


@pytest.mark.parametrize(
    "shapes", ([(3, 12)], [(3, 12), (4, 9)], [(3, 15), (4, 12)], [(3, 12), (4, 12), (3, 12)]), ids=str
)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(RuntimeError, match=r"weights must be kernel \[I, 3H\]"):
        weights.keras_gru([new(*shape) for shape in shapes])
