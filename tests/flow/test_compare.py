"""Comparisons: every norm against torch's own layers step by step, and the shape of what the literature says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.flow import experiments

pytestmark = pytest.mark.cpu


def loop(make, length, seed, batch, inputs, scale=1.0):
    """log10 norms of dL/dx_t and of dL/dh_t, dL/dc_t, from torch's cell in a loop with retain_grad."""
    torch.manual_seed(seed)
    layer = make().double()
    x = scale * torch.randn(length, batch, inputs, dtype=torch.double)
    v = torch.randn(batch, layer.hidden_size, dtype=torch.double)
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[type(layer)](inputs, layer.hidden_size)
    cell.double().load_state_dict({k.removesuffix("_l0"): w for k, w in layer.state_dict().items()})
    x.requires_grad_()
    state, steps = None, []
    for t in range(length):
        state = cell(x[t], state)
        steps.append(state if isinstance(state, tuple) else (state,))
        for h in steps[-1]:
            h.retain_grad()
    steps[-1][0].backward(v / torch.linalg.vector_norm(v, dim=-1, keepdim=True))
    rms = lambda g: 0.5 * torch.log10(g.square().sum(-1).mean()).item()
    found = {"x": [rms(g) for g in x.grad]}
    for k, name in enumerate(("h", "c")[: len(steps[0])]):
        found[name] = [rms(s[k].grad if s[k].grad is not None else torch.zeros(1)) for s in steps]
    return {name: np.array(v) for name, v in found.items()}


@pytest.mark.parametrize("kind", (nn.RNN, nn.LSTM, nn.GRU), ids=lambda c: c.__name__)
@pytest.mark.parametrize("length", (1, 3, 63))
def test_norms_are_those_of_a_loop(kind, length):
    make = lambda: kind(3, 17)
    found = gk.flow.compare({"it": make}, (length,), batch=4, seeds=1, scale=0.5)
    for signal, wanted in loop(make, length, 0, 4, 3, 0.5).items():
        c = found.curve("it", length, signal)
        assert np.allclose(c.log10, wanted, atol=1e-6) and np.array_equal(c.low, c.high), signal
        assert len(c.log10) == length


def test_far_below_float32():
    c = gk.flow.compare({"it": lambda: nn.RNN(3, 5)}, (200,), signal="h", seeds=1, batch=2).curve("it")
    assert np.allclose(c.log10, loop(lambda: nn.RNN(3, 5), 200, 0, 2, 3)["h"], atol=1e-6) and c.log10[0] < -50
    rnn = gk.init.orthogonal_(gk.nn.RNN(3, 5, nonlinearity="sigmoid"))
    s = gk.flow.compare({"it": rnn}, (200,), signal="h", seeds=1, batch=2).curve("it")
    assert -150 < s.log10[0] < 199 * math.log10(0.25) and np.isfinite(s.log10).all()


def test_median_and_range_of_seeds():
    make = lambda: nn.GRU(3, 5)
    found = gk.flow.compare({"it": make}, (10,), batch=2, seeds=3).curve("it")
    rows = np.stack([loop(make, 10, seed, 2, 3)["x"] for seed in range(3)])
    for got, wanted in ((found.log10, np.median(rows, 0)), (found.low, rows.min(0)), (found.high, rows.max(0))):
        assert np.allclose(got, wanted, atol=1e-6)


def test_the_same_numbers_again_and_nothing_is_touched():
    lstm = nn.LSTM(3, 5, dropout=0.5, num_layers=2)
    lstm.weight_ih_l0.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in lstm.named_parameters()}
    state = torch.get_rng_state()
    first, second = (gk.flow.compare({"it": lstm}, (10,), seeds=2).to_dict() for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert type(lstm) is nn.LSTM and lstm.training and not lstm.weight_ih_l0.requires_grad
    for n, p in lstm.named_parameters():
        assert p.grad is None and p.dtype == torch.float32 and torch.equal(p, before[n])
    shared = gk.nn.GRU(3, 5)
    gk.flow.compare({"it": lambda: shared}, (5,))
    assert shared.probes is None and shared.weight_hh_l0.dtype == torch.float32 and shared.weight_hh_l0.grad is None


def test_a_watched_model_can_be_compared():
    model = nn.Sequential(gk.nn.LSTM(3, 5))
    x = torch.randn(7, 2, 3)
    with gk.flow.watch(model) as monitor:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x)[0].sum().backward()
        optimizer.step()
        seen = monitor.log10_norms()
        gk.flow.compare({"it": model}, (5,), seeds=1)
        assert np.array_equal(monitor.log10_norms(), seen)


class Last(nn.Module):
    """One output per row, from the sum over time."""

    batch_first = True
    input_size = 3

    def forward(self, x):
        return x.sum(1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)
        self.out = nn.Linear(5, 2)

    @property
    def batch_first(self):
        return self.rnn.batch_first

    def forward(self, x):
        return self.out(self.rnn(x)[0]), "more"


def test_models_of_other_shapes():
    found = gk.flow.compare({"sum": Last(), "tokens": Tokens()}, (6,), batch=4)
    assert np.allclose(found.curve("sum").log10, 0) and found.horizon("sum") == 5  # each step reaches the loss by 1
    assert np.isfinite(found.curve("tokens", 6, "h").log10).all()
    assert found.models == ["sum", "tokens"] and found.horizons() == {m: found.horizon(m) for m in found.models}


class Characters(nn.Module):
    """Symbols to logits, with an embedding in front of the layer."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(11, 3)
        self.rnn = nn.GRU(3, 5, batch_first=batch_first)
        self.head = nn.Linear(5, 11)

    def forward(self, symbols):
        assert symbols.dtype == torch.long
        return self.head(self.rnn(self.embedding(symbols))[0])


@pytest.mark.parametrize("batch_first", (False, True))
def test_of_symbols_x_is_what_the_embedding_makes_of_them(batch_first):
    found = gk.flow.compare({"it": lambda: Characters(batch_first)}, (9,), batch=4, seeds=1)
    torch.manual_seed(0)
    model = Characters(batch_first).double()
    symbols = torch.randint(11, (9, 4))
    model.embedding.register_forward_hook(lambda module, args, y: (model.__dict__.update(x=y), y.retain_grad())[1])
    y = model(symbols.t() if batch_first else symbols)
    y = y[:, -1] if batch_first else y[-1]
    v = torch.randn(y.shape, dtype=y.dtype)
    y.backward(v / v.norm(dim=-1, keepdim=True))
    wanted = 0.5 * model.x.grad.square().sum(-1).mean(0 if batch_first else 1).log10()
    assert np.allclose(found.curve("it").log10, wanted, atol=1e-6) and len(wanted) == 9
    assert {c.signal for c in found.curves} == {"x", "h"}
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().log10()  # the embedding's are among them
    assert found.parameters["it", 9] == pytest.approx(total.item(), abs=1e-6)


def test_an_embedding_that_is_not_what_reads_the_input():
    class Positions(nn.Module):
        """Vectors and, registered before anything else, an embedding of the steps."""

        def __init__(self):
            super().__init__()
            self.positions, self.rnn = nn.Embedding(50, 3), nn.RNN(3, 5)

        def forward(self, x):
            return self.rnn(x + self.positions(torch.arange(len(x)))[:, None])[0]

    vectors = gk.flow.compare({"it": Positions(), "other": nn.RNN(3, 5)}, (6,), input_size=3, seeds=1)
    assert np.isfinite(vectors.curve("it").log10).all()
    idle = nn.Sequential(nn.Embedding(50, 3), nn.RNN(3, 5))
    idle.forward = lambda symbols: idle[1](idle[0].weight[symbols])
    with pytest.raises(TypeError, match="it: Sequential begins with an Embedding and does not call it"):
        gk.flow.compare({"it": idle}, (6,))


def test_as_json_and_table(tmp_path):
    with torch.no_grad():
        dead = nn.RNN(3, 5, nonlinearity="relu")
        dead.bias_ih_l0.fill_(-100)
    found = gk.flow.compare({"rnn": nn.RNN(3, 5), "dead": dead}, (5, 20), seeds=2, title="two")
    path = found.save(tmp_path / "found.json")
    written = json.loads(path.read_text())
    assert written == found.to_dict() and written["format"] == 1 and written["lengths"] == [5, 20]
    rnn, none = written["models"]
    assert rnn["name"] == "rnn" and [run["length"] for run in rnn["runs"]] == [5, 20]
    run = rnn["runs"][1]
    assert run["signals"]["x"]["log10"] == found.curve("rnn").log10.tolist() and set(run["signals"]) == {"x", "h"}
    assert run["horizon"] == found.horizon("rnn") and run["ratio"] == found.curve("rnn").ratio
    assert none["runs"][0]["signals"]["x"]["log10"] == [None] * 5
    assert none["runs"][0]["horizon"] is None and none["runs"][0]["parameters"] is None
    lines = str(found).splitlines()
    assert lines[0] == "two" and lines[1].split() == ["T=5", "T=20", "horizon"] and lines[3].split()[-1] == "none"
    with pytest.raises(OSError):
        found.save(tmp_path)


def test_figure(tmp_path):
    found = experiments.spectral_norms((0.8, 1.2), 6, seeds=2)
    figure = found.plot(tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    [panel] = figure.axes
    drawn = [line.get_ydata() for line in panel.lines]
    for c in found.curves:
        assert any(np.array_equal(v, c.log10) for v in drawn) == (c.signal == "h")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*found.models, "bound", "radius", "mean field"] and panel.get_ylabel().endswith("h$_t$‖")
    assert len(gk.flow.compare({"a": nn.RNN(2, 3)}, (3, 5)).plot().axes) == 2


WRONG = [
    ({"models": {}}, ValueError, "there is no model to compare"),
    ({"models": nn.GRU(3, 5)}, TypeError, "models must be a mapping from names to modules, got GRU"),
    ({"lengths": 10}, TypeError, "lengths must be several, got 10"),
    ({"lengths": ()}, ValueError, "a length must be at least 1"),
    ({"lengths": (5, 0)}, ValueError, "a length must be at least 1, got 0"),
    ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
    ({"seeds": 0}, ValueError, "seeds must be at least 1, got 0"),
    ({"models": {"it": 3}}, TypeError, "it: a module or a function that makes one is expected, got int"),
    ({"models": {"it": lambda: 3}}, TypeError, "it: a module or a function that makes one is expected, got int"),
    ({"models": {"it": nn.Linear(3, 3)}}, ValueError, "it: Linear has no input_size; give it to compare"),
    (
        {"models": {"it": nn.Identity()}, "input_size": 3, "signal": "h"},
        ValueError,
        "signal must be one that it has, x, got 'h'",
    ),
    (
        {"models": {"it": nn.Flatten(0)}, "input_size": 3},
        TypeError,
        r"it: Flatten must return outputs .* got shape \[24\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(change, error, text):
    given = {"models": {"it": nn.GRU(3, 5)}, "lengths": (2,), "batch": 4} | change
    with pytest.raises(error, match=text):
        gk.flow.compare(given.pop("models"), given.pop("lengths"), **given)


def test_unknown_curves_are_named():
    found = gk.flow.compare({"it": nn.GRU(3, 5)}, (2,), seeds=1)
    with pytest.raises(KeyError, match="no x of 'that' over 2 steps; models are it"):
        found.horizon("that")


# ---------------------------------------------------------------- experiments


def test_architectures():
    """An RNN forgets within ten steps, gates as torch makes them soon after; chrono, attention and convolution reach 200."""
    found = experiments.architectures(lengths=(10, 200), seeds=1, batch=2)
    assert found.models == list(experiments.ARCHITECTURES) and found.lengths == [10, 200]
    ratio = {m: found.curve(m).ratio for m in found.models}
    assert ratio["RNN"] < -55 and -50 < ratio["LSTM"] < -35 and -50 < ratio["GRU"] < -35
    assert -20 < ratio["LSTM, forget bias 1"] < -14
    assert found.horizon("RNN") < found.horizon("LSTM") < found.horizon("LSTM, forget bias 1") < 40
    assert found.horizon("RNN, skip 8") == found.horizon("RNN, four time scales") == 199
    for name in ("LSTM, chrono", "RNN, attention readout", "Transformer", "dilated convolution"):
        assert ratio[name] > -4 and found.horizon(name) > 150, name
    # and what is seen of it in a parameter's gradient is nothing
    for name in ("RNN", "LSTM", "GRU"):
        assert abs(found.parameters[name, 200] - found.parameters[name, 10]) < 0.3


def test_spectral_norms():
    """0.8, 1.0 and 1.2 over 50 steps: s^49 for orthogonal weights at rest, radius^49 at random, mean field when driven."""
    found = experiments.spectral_norms()
    assert len(found.models) == len(found.lines) == 9
    for line in found.lines:
        c = found.curve(line.model)
        assert c.log10[-1] == pytest.approx(0, abs=1e-9) and line.log10[-1] == 0
        assert abs(c.log10[0] - line.log10[0]) < {"bound": 0.02, "radius": 1.0, "mean field": 0.5}[line.name], (
            line.model
        )
    for v in (0.8, 1.0, 1.2):
        assert found.curve(f"orthogonal {v:g}").ratio == pytest.approx(49 * math.log10(v), abs=0.02)
        assert found.curve(f"random {v:g}").ratio < found.curve(f"driven {v:g}").ratio < -2


def test_activations():
    found = experiments.activations()
    assert found.models == ["tanh", "sigmoid", "relu"]
    for line in found.lines:
        measured = found.curve(line.model)
        if line.name == "bound":  # of every seed
            assert (measured.high <= line.log10 + 1e-6).all()
        else:
            assert abs(measured.log10[0] - line.log10[0]) < 0.5
    assert found.curve("sigmoid").ratio < -29.5 < found.curve("relu").ratio < found.curve("tanh").ratio


def test_initialisations_of_simple_layers_go_as_mean_field_theory_says():
    names = [
        "RNN",
        "RNN, spectral_norm_ 1",
        "RNN, orthogonal_",
        "RNN, orthogonal_ 1.3",
        "RNN relu",
        "RNN relu, identity_",
    ]
    found = experiments.initialisations(names, batch=2)
    assert [line.model for line in found.lines] == names[:-1]
    for line in found.lines:
        assert found.curve(line.model).log10[0] == pytest.approx(line.log10[0], rel=0.1), line.model
    assert found.curve("RNN relu, identity_").ratio > -1


@pytest.mark.slow
def test_readme_shows_what_is_measured():
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert f"```text\n{gk.flow.compare()}\n```" in readme.read_text()
