"""Spectra of recurrent blocks against numpy's, on layers of torch and of this package; and what theory makes of them."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.flow import theory

pytestmark = pytest.mark.cpu

LAYERS = {
    "RNN": (lambda: nn.RNN(3, 17), ["RNN.l0"]),
    "LSTM": (lambda: nn.LSTM(3, 17), [f"LSTM.l0.{g}" for g in "ifgo"]),
    "both directions": (
        lambda: gk.nn.GRU(3, 5, 2, bidirectional=True),
        [f"GRU.l{k}{d}.{g}" for k in range(2) for d in ("", "_reverse") for g in ("reset", "z", "n")],
    ),
    "projection": (lambda: gk.nn.LSTM(3, 17, proj_size=5), [f"LSTM.l0.{g}" for g in "ifgo"]),
    "cell": (lambda: nn.ModuleDict({"step": nn.LSTMCell(3, 5)}), [f"step.{g}" for g in "ifgo"]),
    "one unit": (lambda: gk.nn.RNN(3, 1), ["RNN.l0"]),
    "bfloat16": (lambda: nn.RNN(3, 17, dtype=torch.bfloat16), ["RNN.l0"]),
    "layer norm": (
        lambda: gk.nn.Recurrent("gru_layer_norm", 3, 5),
        [f"Recurrent.l0.{g}" for g in ("reset", "z", "n")],
    ),
    "model": (lambda: nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 4)), ["1.l0"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_eigenvalues_and_singular_values(name):
    make, names = LAYERS[name]
    module = make()
    found = gk.flow.spectrum(module)
    assert [s.name for s in found] == names
    weights = []
    for m in module.modules():
        for key in [k for k, _ in m.named_parameters(recurse=False) if k.startswith("weight_hh")]:
            w, p = (getattr(m, k, None) for k in (key, key.replace("hh", "hr")))
            G = w.shape[0] // m.hidden_size
            w = w.detach().double().numpy()
            weights += np.split(w if p is None else w @ p.detach().double().numpy(), G)
    assert len(weights) == len(found)
    for w, s in zip(weights, found):
        values = np.linalg.eigvals(w)
        assert np.allclose(np.sort_complex(values), np.sort_complex(s.eigenvalues.numpy()), atol=1e-7)
        assert np.allclose(np.linalg.svd(w, compute_uv=False), s.singular_values.numpy(), atol=1e-12)
        assert math.isclose(s.radius, np.abs(values).max(), rel_tol=1e-9) and s.norm == s.singular_values[0]
        assert s.radius <= s.norm * (1 + 1e-12) and (s.eigenvalues.abs().diff() <= 1e-12).all()
        assert s.name == (f"{s.layer}.{s.gate}" if s.gate else s.layer)


def test_radius_and_norm_are_not_the_same():
    """A matrix that only shifts: its powers vanish after two steps, a single one keeps the norm."""
    rnn = nn.RNN(1, 3)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.diag(torch.ones(2), 1))
    [s] = gk.flow.spectrum(rnn)
    assert (s.radius, s.norm) == (0, 1)


def test_as_json():
    rnn = nn.RNN(3, 4)
    [s] = gk.flow.spectrum(rnn)
    found = json.loads(json.dumps(s.to_dict(), allow_nan=False))
    assert {k: found[k] for k in ("name", "layer", "gate", "radius", "norm")} == {
        "name": "RNN.l0",
        "layer": "RNN.l0",
        "gate": "",
        "radius": s.radius,
        "norm": s.norm,
    }
    assert [complex(*v) for v in found["eigenvalues"]] == s.eigenvalues.tolist()
    assert found["singular_values"] == s.singular_values.tolist()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_weights_that_are_not_finite(value):
    """Training may have gone wrong; whoever shows the spectrum goes on."""
    gru = nn.GRU(3, 4)
    with torch.no_grad():
        gru.weight_hh_l0[5, 0] = value
    good, bad, other = gk.flow.spectrum(gru)
    assert math.isnan(bad.radius) and bad.singular_values.isnan().all() and good.radius > 0 < other.radius
    found = bad.to_dict()
    assert found["radius"] is None and found["eigenvalues"] == [[None, None]] * 4
    json.dumps(found, allow_nan=False)


def test_parametrized_weights_count_as_they_are_used():
    rnn = torch.nn.utils.parametrizations.orthogonal(nn.RNN(3, 8), "weight_hh_l0")
    [s] = gk.flow.spectrum(rnn)
    assert abs(s.radius - 1) < 1e-5 and abs(s.norm - 1) < 1e-5


def test_cells_without_a_recurrent_product_have_none():
    assert gk.flow.spectrum(gk.nn.Recurrent("indrnn", 3, 4)) == []


def test_heads_are_blocks_on_the_diagonal():
    layer = gk.nn.Recurrent("rnn_tanh", 3, 6, heads=3)
    [s] = gk.flow.spectrum(layer)
    w = layer.weight_hh_l0.detach().double()
    values = torch.linalg.eigvals(w.view(3, 2, 2)).flatten().numpy()
    assert np.allclose(np.sort_complex(values), np.sort_complex(s.eigenvalues.numpy()))


def test_what_has_no_recurrent_layer_is_refused():
    with pytest.raises(ValueError, match="no recurrent layer in Linear"):
        gk.flow.spectrum(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="expected, got list"):
        gk.flow.spectrum([nn.LSTM(3, 3)])


# ---------------------------------------------------------------- theory


def test_powers():
    assert theory.power(0.0, 0) == 0.0 and theory.power(0.0, 3) == -math.inf
    assert math.isclose(theory.power(1.1, 100), math.log10(1.1**100))
    assert math.isclose(theory.carry(2.0, 30), 30 * math.log10(1 / (1 + math.exp(-2.0))))
    assert math.isclose(10 ** theory.bound(1.0, "sigmoid", 10), 9.5367e-7, rel_tol=1e-4)


@pytest.mark.parametrize("activation", theory.ACTIVATIONS)
def test_slopes_are_those_of_the_activation(activation):
    phi = theory.ACTIVATIONS[activation]
    z = torch.linspace(-5, 5, 1000, dtype=torch.double).requires_grad_()
    y = phi.value(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    assert torch.allclose(phi.slope(y.detach()), slope) and slope.max() <= phi.greatest
    assert slope.max() > 0.999 * phi.greatest


@pytest.mark.parametrize("activation", theory.ACTIVATIONS)
@pytest.mark.parametrize("gain", (0.5, 1.0, 1.3))
@pytest.mark.parametrize("drive", (0.0, 0.3))
def test_mean_field_is_a_fixed_point(activation, gain, drive):
    q, factor = theory.mean_field(gain, activation, drive)
    phi = theory.ACTIVATIONS[activation]
    z = math.sqrt(q) * torch.randn(400_000, dtype=torch.double)
    y = phi.value(z)
    assert math.isclose(q, gain**2 * y.square().mean().item() + drive, rel_tol=0.02, abs_tol=1e-6)
    if q:
        assert math.isclose(factor, gain * phi.slope(y).square().mean().sqrt().item(), rel_tol=0.01, abs_tol=1e-3)


def test_mean_field_where_relu_grows():
    assert theory.mean_field(1.5, "relu", 0.1) == (math.inf, pytest.approx(1.5 / math.sqrt(2)))


def test_mean_field_meets_a_wide_layer():
    """Random weights, 400 units: the gradient of 20 steps as theory has it."""
    rnn = nn.RNN(400, 400, bias=False, dtype=torch.double)
    with torch.no_grad():
        rnn.weight_hh_l0.normal_(0, 1.1 / 20)
        rnn.weight_ih_l0.normal_(0, 0.5 / 20)
    found = gk.flow.compare({"rnn": rnn}, (40,), signal="h", seeds=1).curve("rnn").log10
    _, factor = theory.mean_field(1.1, "tanh", 0.25)
    assert abs((found[-21] - found[-1]) / 20 - math.log10(factor)) < 0.003
