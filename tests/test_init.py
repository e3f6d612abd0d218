"""gk.init: what the weights are afterwards, on every kind of layer, and what a step of the layer makes of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gradkernels as gk
from gradkernels.nn.parts import parts

pytestmark = pytest.mark.cpu


@gk.cell
def leaky(x, r, s):
    """Closed, its gate keeps the state."""
    a = sigmoid(x[1] + r[1])  # noqa: F821
    return s[0] + a * (tanh(x[0] + r[0]) - s[0])  # noqa: F821


LAYERS = {
    "torch LSTM": lambda: nn.LSTM(3, 17, 2, bidirectional=True),
    "torch LSTM projected": lambda: nn.LSTM(3, 17, proj_size=5),
    "torch GRU": lambda: nn.GRU(3, 17),
    "torch RNN": lambda: nn.RNN(3, 17, bias=False),
    "torch LSTMCell": lambda: nn.LSTMCell(3, 17),
    "torch GRUCell": lambda: nn.GRUCell(3, 17),
    "torch RNNCell": lambda: nn.RNNCell(3, 17, nonlinearity="relu"),
    "LSTM": lambda: gk.nn.LSTM(3, 17, 2),
    "LSTM projected": lambda: gk.nn.LSTM(3, 17, 2, proj_size=5, bidirectional=True),
    "GRU reset before": lambda: gk.nn.GRU(3, 17, reset_after=False),
    "RNN sigmoid": lambda: gk.nn.RNN(3, 17, nonlinearity="sigmoid"),
    "LSTMCell": lambda: gk.nn.LSTMCell(3, 17),
    "GRUCell reset before": lambda: gk.nn.GRUCell(3, 17, reset_after=False),
    "RNNCell": lambda: gk.nn.RNNCell(3, 17),
    "own cell": lambda: gk.nn.Recurrent(leaky, 3, 17),
    "one unit": lambda: nn.LSTM(3, 1),
    "bfloat16": lambda: nn.GRU(3, 17, dtype=torch.bfloat16),
    "float64": lambda: nn.GRU(3, 17, dtype=torch.float64),
    "model": lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.GRU(3, 17), nn.RNN(3, 4))}),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param]()


def blocks(module):
    """Every recurrent block [H, H], and the relative precision that it is stored with."""
    return [(w, torch.finfo(part.get("weight_hh").dtype).eps) for part in parts(module) for w in part.blocks()]


def singular_values(module):
    return [(torch.linalg.svdvals(w), 8 * eps * len(w)) for w, eps in blocks(module)]


def test_orthogonal(layer):
    before = {name: (p, p.detach().clone()) for name, p in layer.named_parameters()}
    assert gk.init.orthogonal_(layer, gain=1.5) is layer
    for values, eps in singular_values(layer):
        rank = layer.proj_size if getattr(layer, "proj_size", 0) else len(values)
        assert (values[:rank] - 1.5).abs().max() < 1.5 * eps and values[rank:].abs().sum() < eps
    for name, p in layer.named_parameters():
        assert p is before[name][0] and p.requires_grad and p.grad is None
        assert torch.equal(p, before[name][1]) == ("weight_h" not in name and "weight_r" not in name), name


def test_orthogonal_matrices_are_uniform():
    """Haar's measure: the trace of a matrix [H, H] has mean 0 and variance 1; the signs of a plain QR would make it negative."""
    traces = [gk.init.orthogonal_(nn.RNN(1, 3)).weight_hh_l0.trace().item() for _ in range(200)]
    assert abs(torch.tensor(traces).mean()) < 0.3 and 0.7 < torch.tensor(traces).var() < 1.3


def test_identity(layer):
    gk.init.identity_(layer, scale=0.5)
    for part in parts(layer):
        for w in part.get("weight_hh").chunk(part.cell.G):
            assert torch.equal(w, 0.5 * torch.eye(*w.shape, dtype=w.dtype))
        for name in ("bias_ih", "bias_hh"):
            assert part.get(name) is None or not part.get(name).any()


def test_identity_hands_a_state_on():
    rnn = gk.init.identity_(gk.nn.RNN(3, 17, nonlinearity="relu"))
    h = torch.rand(1, 2, 17)
    _, after = rnn(torch.zeros(63, 2, 3), h)
    assert torch.equal(after, h)


@pytest.mark.parametrize("value", (0.0, 0.3, 2.0))
def test_spectral_norm(layer, value):
    shapes = [w.clone() for w, _ in blocks(layer)]
    gk.init.spectral_norm_(layer, value)
    for (values, eps), before, (after, _) in zip(singular_values(layer), shapes, blocks(layer)):
        assert abs(values[0] - value) <= max(value, 1.0) * eps
        assert (after - before * value / torch.linalg.matrix_norm(before, 2)).abs().max() <= max(value, 1.0) * eps


KEEPERS = [name for name in LAYERS if "RNN" not in name]


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("value", (-1.0, 0.0, 3.0))
def test_forget_bias(name, value):
    """The second of the gates here, whatever the cell."""
    module = LAYERS[name]()
    old = copy.deepcopy(module)
    assert gk.init.forget_bias_(module, value) is module
    for part, was in zip(parts(module), parts(old)):
        wanted = {"bias_ih": -value if part.cell is leaky else value, "bias_hh": 0.0}
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            gates = zip(part.get(key).chunk(part.cell.G), was.get(key).chunk(part.cell.G))
            for k, (new, before) in enumerate(gates):
                if k == 1 and key in wanted and part.cell.G > 1:
                    assert (new == wanted[key]).all()
                else:
                    assert torch.equal(new, before)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", leaky], ids=str)
def test_a_state_is_kept_as_the_bias_says(cell):
    """By running the layer: nothing comes in, every bias but this one is zero."""
    layer = gk.nn.Recurrent(cell, 3, 5, dtype=torch.double, backend="reference")
    for p in layer.parameters():
        nn.init.zeros_(p)
    gk.init.forget_bias_(layer, 2.0)
    start = torch.ones(1, 1, 5, dtype=torch.double)
    hx = (torch.zeros_like(start), start) if cell == "lstm" else start
    _, after = layer(torch.zeros(10, 1, 3, dtype=torch.double), hx)
    after = after[1] if cell == "lstm" else after
    assert torch.allclose(after, torch.sigmoid(start * 2.0) ** 10)


@pytest.mark.parametrize("name", KEEPERS)
def test_chrono(name):
    module = gk.init.chrono_(LAYERS[name](), 50)
    for part in parts(module):
        if "rnn" in part.cell.name:
            continue
        gates = (part.get("bias_ih").detach() + part.get("bias_hh").detach()).double().chunk(part.cell.G)
        keep = -gates[1] if part.cell is leaky else gates[1]
        steps = 1 / (1 - keep.sigmoid())
        assert (steps > 1.99).all() and (steps < 50.2).all()
        if part.cell.name == "lstm":
            assert torch.equal(gates[0], -gates[1])
    if name in ("LSTM", "torch LSTM"):  # all of the range is used
        assert steps.max() > 30 and steps.min() < 20


def test_numbers_come_from_the_generator_that_is_given():
    state = torch.get_rng_state()
    draw = lambda seed: gk.init.chrono_(
        gk.init.orthogonal_(copy.deepcopy(lstm), generator=torch.Generator().manual_seed(seed)),
        30,
        torch.Generator().manual_seed(seed),
    ).state_dict()
    lstm = nn.LSTM(3, 5)
    torch.set_rng_state(state)
    first, same, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["weight_hh_l0"], other["weight_hh_l0"])
    assert not torch.equal(first["bias_ih_l0"], other["bias_ih_l0"])
    assert torch.equal(torch.get_rng_state(), state)


def test_parametrized_weights_keep_their_parametrization():
    gru = parametrizations.weight_norm(nn.GRU(3, 5), "weight_hh_l0")
    gk.init.orthogonal_(gru, 0.7)
    assert torch.nn.utils.parametrize.is_parametrized(gru, "weight_hh_l0")
    for w in gru.weight_hh_l0.chunk(3):
        assert torch.allclose(torch.linalg.svdvals(w), torch.full((5,), 0.7), atol=1e-5)


def test_weights_that_are_computed_are_refused():
    gru = prune.l1_unstructured(nn.GRU(3, 5), "weight_hh_l0", 2)
    with pytest.raises(RuntimeError, match=r"GRU\.l0: weight_hh_l0 is computed from other parameters"):
        gk.init.orthogonal_(gru)


def test_shared_layers_are_set_once():
    gru = nn.GRU(3, 5)
    model = nn.ModuleList([gru, gru])
    assert [part.name for part in parts(model)] == ["0.l0"]
    gk.init.spectral_norm_(model, 0.5)
    assert all(abs(v[0] - 0.5) < 1e-5 for v, _ in singular_values(model))


FUNCTIONS = {
    "orthogonal_": gk.init.orthogonal_,
    "identity_": gk.init.identity_,
    "spectral_norm_": lambda m: gk.init.spectral_norm_(m, 1.0),
    "forget_bias_": gk.init.forget_bias_,
    "chrono_": lambda m: gk.init.chrono_(m, 10),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_has_no_recurrent_layer_is_refused(function):
    with pytest.raises(ValueError, match="no recurrent layer in Linear"):
        function(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module is expected, got Tensor"):
        function(torch.ones(3, 3))


@pytest.mark.parametrize("function", [FUNCTIONS["forget_bias_"], FUNCTIONS["chrono_"]], ids=["forget_bias_", "chrono_"])
def test_a_gate_is_needed_and_a_bias(function):
    with pytest.raises(ValueError, match="no layer in RNN has a gate that keeps its state"):
        function(nn.RNN(3, 5))
    with pytest.raises(ValueError, match=r"LSTM\.l0 has no biases"):
        function(nn.LSTM(3, 5, bias=False))
    model = nn.ModuleList([nn.LSTM(3, 5), nn.GRUCell(3, 5, bias=False)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1 has no biases"):
        function(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # nothing is half done


@pytest.mark.parametrize("value", (-1.0, float("nan"), float("inf")))
def test_a_norm_has_to_be_one(value):
    with pytest.raises(ValueError, match="value must be a norm"):
        gk.init.spectral_norm_(nn.GRU(3, 5), value)


@pytest.mark.parametrize("weight", (0.0, float("nan")))
def test_what_cannot_be_scaled_is_named(weight):
    gru = nn.GRU(3, 5)
    with torch.no_grad():
        gru.weight_hh_l0[5:10] = weight
    before = gru.weight_hh_l0.detach().clone()
    with pytest.raises(ValueError, match=r"GRU\.l0: the block of gate z has norm"):
        gk.init.spectral_norm_(gru, 1.0)
    assert torch.equal(gru.weight_hh_l0.nan_to_num(7), before.nan_to_num(7))


def test_chrono_needs_two_steps():
    with pytest.raises(ValueError, match=r"longest must be at least 2 steps, got 1\.5"):
        gk.init.chrono_(nn.LSTM(3, 5), 1.5)
    with pytest.raises(ValueError, match="longest must be finite, got inf"):
        gk.init.chrono_(nn.LSTM(3, 5), float("inf"))


# The gate that keeps a state, the sign of the bias that makes it, the gate that writes; None: no gate does.
ROLES = {
    "lstm": (("x", 1), 1, ("x", 0)),
    "gru": (("x", 1), 1, None),
    "gru_reset_before": (("x", 1), 1, None),
    "lstm_coupled": (("x", 0), 1, None),
    "lstm_peephole": (("x", 1), 1, ("x", 0)),
    "lstm_layer_norm": (("p", 9), 1, ("p", 8)),
    "gru_layer_norm": (("p", 7), 1, None),
    "slstm": (("x", 1), 1, ("x", 0)),
    "mgu": (("x", 0), -1, None),
}
UNGATED = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm_no_forget", "indrnn", "rnn_modrelu", "rnn_additive")


@pytest.mark.parametrize("cell", [*ROLES, *UNGATED])
def test_gates_of_every_cell_are_found(cell):
    layer = gk.nn.Recurrent(cell, 3, 5)
    if cell in UNGATED:
        with pytest.raises(ValueError, match="no layer in Recurrent has a gate"):
            gk.init.forget_bias_(layer)
        return
    keep, sign, write = ROLES[cell]
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    gk.init.chrono_(layer, 20)
    [part] = parts(layer)

    def row(gate):
        if gate[0] == "x":
            return sum(part.get(name).detach() for name in ("bias_ih", "bias_hh")).view(-1, 5)[gate[1]]
        return torch.cat([part.get(name).detach().view(-1, 5) for name, *_ in part.cell.params])[gate[1]]

    assert ((sign * row(keep)).sigmoid() >= 0.5).all() and ((sign * row(keep)).sigmoid() <= 1 - 1 / 20).all()
    assert write is None or torch.equal(row(write), -row(keep))
    changed = sum(int((p != before[name]).sum()) for name, p in layer.named_parameters())
    assert changed == 5 * (1 + (keep[0] == "x")) * (1 if write is None else 2)


def test_heads_have_blocks_of_their_own():
    layer = gk.nn.Recurrent("gru", 3, 6, heads=2)
    for init, value in ((lambda m: gk.init.orthogonal_(m, 0.5), 0.5), (lambda m: gk.init.identity_(m, 2.0), 2.0)):
        for values, eps in singular_values(init(layer)):
            assert len(values) == 6 and (values - value).abs().max() < eps * 2
    nn.init.normal_(layer.weight_hh_l0)
    gk.init.spectral_norm_(layer, 0.9)
    assert all(abs(values[0] - 0.9) < eps for values, eps in singular_values(layer))
