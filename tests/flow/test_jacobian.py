"""Products of step Jacobians and Lyapunov exponents against autograd through torch's own layers."""

import json
import math

import pytest
import torch
from torch import nn

import gradkernels as gk
from gradkernels.flow import theory
from gradkernels.nn.parts import parts

pytestmark = pytest.mark.cpu


def truth(layer, x, t0, t1, hx=None):
    """By autograd through torch's own layer or ours, [n, n] of the first row."""
    layer = layer.double()
    _, state = layer(x[: t0 + 1, :1].double(), hx)
    state = state if isinstance(state, tuple) else (state,)
    if t1 == t0:
        n = sum(h.shape[-1] for h in state)
        return torch.eye(n, dtype=torch.double)

    def onwards(*state):
        _, after = layer(x[t0 + 1 : t1 + 1, :1].double(), state if len(state) > 1 else state[0])
        return torch.cat([h.flatten() for h in (after if isinstance(after, tuple) else (after,))])

    found = torch.autograd.functional.jacobian(onwards, tuple(h.detach() for h in state))
    return torch.cat([v.flatten(1) for v in found], 1)


def agree(found, wanted, tolerance=1e-11):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max(), (found - wanted).abs().max()


TORCH = {
    "RNN": lambda: nn.RNN(3, 7),
    "RNN relu": lambda: nn.RNN(3, 7, nonlinearity="relu"),
    "LSTM": lambda: nn.LSTM(3, 7),
    "LSTM projected": lambda: nn.LSTM(3, 7, proj_size=2),
    "GRU": lambda: nn.GRU(3, 7),
    "one unit": lambda: nn.LSTM(3, 1),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(("t0", "t1"), ((0, 16), (4, 5), (9, 9)))
def test_against_torch(name, t0, t1):
    layer, x = TORCH[name](), torch.randn(17, 3, 3)
    found = gk.flow.jacobian(layer, x, t0, t1)
    wanted = truth(layer, x, t0, t1)
    agree(found.matrix[0], wanted)
    values = torch.linalg.svdvals(wanted)
    seen = values > 1e-10 * values[0]
    assert torch.allclose(found.log10_singular_values[0, seen], values[seen].log10(), atol=1e-4)
    assert found.steps == t1 - t0 and found.log10_norms.shape == (t1 - t0, 3)
    assert (found.log10_norm <= found.log10_product_of_norms + 1e-12).all()


@pytest.mark.parametrize("cell", gk.cells.CELLS)
def test_every_cell(cell):
    """By autograd through the reference backend."""
    layer = gk.nn.Recurrent(cell, 3, 5, backend="reference")
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.7)
    x = torch.randn(9, 2, 3)
    found = gk.flow.jacobian(layer, x, 2, 7)
    agree(found.matrix[0], truth(layer, x, 2, 7))
    assert (found.log10_bound is None) == (cell not in ("rnn_tanh", "rnn_relu", "rnn_sigmoid"))


@pytest.mark.parametrize(
    "options",
    ({"zoneout": (0.3, 0.1)}, {"heads": 5}, {"recurrent_dropout": 0.5, "weight_drop": 0.5}, {"variational": 0.5}),
    ids=str,
)
def test_layers_with_options_are_taken_as_in_evaluation(options):
    layer = gk.nn.Recurrent("lstm", 3, 5, backend="reference", **options)
    x = torch.randn(9, 2, 3)
    found = gk.flow.jacobian(layer, x, 2, 7)
    assert layer.training
    agree(found.matrix[0], truth(layer.eval(), x, 2, 7))


def test_clipping_is_not_part_of_it():
    plain = gk.nn.Recurrent("gru", 3, 5, backend="reference")
    clipped = gk.nn.Recurrent("gru", 3, 5, backend="reference", clip_grad=1e-3)
    clipped.load_state_dict(plain.state_dict())
    x = torch.randn(9, 2, 3)
    assert torch.equal(gk.flow.jacobian(clipped, x, 2, 7).matrix, gk.flow.jacobian(plain, x, 2, 7).matrix)


def test_initial_states_count():
    layer, x = nn.LSTM(3, 5), torch.randn(6, 1, 3)
    hx = torch.randn(1, 1, 5), torch.randn(1, 1, 5)
    found = gk.flow.jacobian(layer, x, 0, 5, hx=hx)
    wanted = truth(layer, x, 0, 5, tuple(h.double() for h in hx))
    agree(found.matrix[0], wanted)
    assert not torch.allclose(found.matrix, gk.flow.jacobian(layer, x, 0, 5).matrix, rtol=1e-3)


def test_layouts():
    """Unbatched and with the batch first: the same numbers."""
    gru, x = nn.GRU(3, 5), torch.randn(6, 2, 3)
    want = gk.flow.jacobian(gru, x, 1, 4)
    alone = gk.flow.jacobian(gru, x[:, 1], 1, 4)
    assert torch.allclose(alone.matrix, want.matrix[1]) and torch.allclose(alone.log10_norms, want.log10_norms[:, 1])
    assert alone.log10_norm.shape == ()
    first = nn.GRU(3, 5, batch_first=True)
    first.load_state_dict(gru.state_dict())
    assert torch.equal(gk.flow.jacobian(first, x.transpose(0, 1), 1, 4).matrix, want.matrix)
    hx = torch.randn(1, 2, 5)
    agree(
        gk.flow.jacobian(gru, x[:, 1], 1, 4, hx=hx[:, 1]).matrix, gk.flow.jacobian(gru, x, 1, 4, hx=hx).matrix[1], 1e-9
    )


@pytest.mark.parametrize("k", (None, 2))
def test_upper_layers_and_the_reverse_direction(k):
    gru = nn.GRU(3, 5, 2, bidirectional=True, dropout=0.5).double()
    x = torch.randn(8, 2, 3, dtype=torch.double)
    below = nn.GRU(3, 5, bidirectional=True).double()
    below.load_state_dict({n: p for n, p in gru.state_dict().items() if "l0" in n})
    y = below(x)[0].detach()
    alone = nn.GRU(10, 5).double()
    names = {n: p for n, p in gru.state_dict().items() if n.endswith("l1_reverse")}
    alone.load_state_dict({n.replace("l1_reverse", "l0"): p for n, p in names.items()})
    wanted = truth(alone, y.flip(0), 1, 5)  # which the reverse direction sees as steps 6 and 2
    found = gk.flow.jacobian(gru, x, 6, 2, layer=1, reverse=True, k=k)
    if k is None:
        agree(found.matrix[0], wanted)
    values = torch.linalg.svdvals(wanted)[: k or 5].log10()
    assert torch.allclose(found.log10_singular_values[0], values, atol=1e-5)


# ---------------------------------------------------------------- leading singular values


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("steps", (1, 12))
def test_krylov_finds_what_the_matrix_has(name, steps):
    layer, x = TORCH[name](), torch.randn(17, 3, 3)
    k = 1 if name == "one unit" else 3
    exact, found = gk.flow.jacobian(layer, x, 3, 3 + steps), gk.flow.jacobian(layer, x, 3, 3 + steps, k=k)
    assert found.matrix is None and found.log10_norms is None and found.log10_product_of_norms is None
    assert torch.allclose(found.log10_singular_values, exact.log10_singular_values[:, :k], atol=1e-5)
    assert found.log10_bound == exact.log10_bound


def test_krylov_finds_values_that_occur_many_times():
    rnn = gk.init.orthogonal_(nn.RNN(3, 63, bias=False), 0.9)
    found = gk.flow.jacobian(rnn, torch.zeros(8, 2, 3), 0, 7, k=5)
    assert torch.allclose(found.log10_singular_values, torch.full((2, 5), 7 * math.log10(0.9)).double(), atol=1e-6)


def test_wide_layers_need_no_matrix():
    found = gk.flow.jacobian(nn.LSTM(8, 300), torch.randn(12, 8), 1, 11)
    assert found.matrix is None and found.log10_singular_values.shape == (8,)
    assert (found.log10_singular_values.diff() <= 0).all() and found.log10_norm > -10


# ---------------------------------------------------------------- what the numbers mean


def test_norms_far_below_float64_are_seen():
    """A sigmoid's slope is 1/4 at most: 800 steps are 1e-482 and less."""
    rnn = gk.init.orthogonal_(gk.nn.RNN(2, 3, nonlinearity="sigmoid"))
    for k in (None, 1):
        found = gk.flow.jacobian(rnn, torch.zeros(801, 2), 0, 800, k=k)
        assert -600 < found.log10_norm < found.log10_bound < -481
        assert found.matrix is None or not found.matrix.any()


def test_bounds_are_in_order():
    rnn, x = nn.RNN(3, 17), torch.randn(40, 4, 3)
    found = gk.flow.jacobian(rnn, x, 0, 39)
    assert (found.log10_norm < found.log10_product_of_norms).all()
    assert (found.log10_product_of_norms < found.log10_bound).all()
    [s] = gk.flow.spectrum(rnn)
    assert found.radius == pytest.approx(s.radius) and found.norm == pytest.approx(s.norm)
    assert found.log10_bound == pytest.approx(theory.bound(s.norm, "tanh", 39))
    y, _ = rnn(x)
    assert found.mean_slope == pytest.approx((1 - y[1:] ** 2).mean().item(), rel=1e-5)


def test_at_rest_powers_of_the_matrix_are_left():
    """The 2-D exercise: at h = 0 the Jacobian of a step is W_hh."""
    rnn = nn.RNN(1, 2, bias=False)
    found = gk.flow.jacobian(rnn, torch.zeros(9, 1), 2, 7)
    assert torch.allclose(found.matrix, torch.linalg.matrix_power(rnn.weight_hh_l0.detach().double(), 5))
    assert found.mean_slope == 1


def test_units_that_are_dead_pass_nothing_on():
    rnn = nn.RNN(3, 5, nonlinearity="relu")
    with torch.no_grad():
        rnn.bias_ih_l0.fill_(-100.0)
    for k in (None, 2):
        found = gk.flow.jacobian(rnn, torch.randn(6, 3), 1, 4, k=k)
        assert (found.log10_singular_values == -math.inf).all() and found.mean_slope == 0
        assert found.to_dict()["log10_singular_values"] == [None] * len(found.log10_singular_values)


def test_as_json():
    for k in (None, 2):
        found = gk.flow.jacobian(nn.RNN(3, 5), torch.randn(6, 2, 3), 1, 4, k=k)
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert written["steps"] == 3 and written["log10_bound"] == found.log10_bound
        assert torch.tensor(written["log10_singular_values"]).shape == (2, k or 5)
        assert (written["log10_norms"] is None) == (k is not None)


def test_the_module_is_left_alone():
    lstm = gk.nn.LSTM(3, 5, dropout=0.5, num_layers=2)
    before = {n: p.detach().clone() for n, p in lstm.named_parameters()}
    x = torch.randn(6, 2, 3, requires_grad=True)
    gk.flow.jacobian(lstm, x, 1, 4, layer=1)
    gk.flow.lyapunov(lstm, x, 2)
    assert lstm.training and x.grad is None
    for n, p in lstm.named_parameters():
        assert p.grad is None and p.dtype == torch.float32 and torch.equal(p, before[n])


WRONG = [
    ({"t1": 6}, ValueError, r"t0 and t1 must be steps from 0 to 5 with t0 <= t1, got t0=1 and t1=6"),
    ({"t0": -1}, ValueError, r"got t0=-1 and t1=4"),
    ({"t0": 5}, ValueError, r"t0 <= t1, got t0=5 and t1=4"),
    ({"layer": 2}, ValueError, r"layer must be from 0 to 1, got 2"),
    ({"reverse": True}, ValueError, r"GRU is not bidirectional"),
    ({"k": 0}, ValueError, r"k must be from 1 to 5, the values of state, got 0"),
    ({"k": 6}, ValueError, r"k must be from 1 to 5"),
    ({"x": torch.randn(6, 2, 4)}, ValueError, r"x must be \[T, B, 3\] or \[T, 3\], got \[6, 2, 4\]"),
    ({"x": torch.randn(6)}, ValueError, r"x must be \[T, B, 3\]"),
    ({"x": torch.randn(0, 2, 3)}, ValueError, r"x has no steps or rows: \[0, 2, 3\]"),
    ({"x": torch.full((6, 2, 3), math.nan)}, ValueError, r"x is not finite"),
    ({"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
    ({"module": nn.Linear(3, 3)}, TypeError, r"module must be an LSTM, GRU, RNN or Recurrent, got Linear"),
    ({"module": nn.Sequential(nn.GRU(3, 5))}, TypeError, r"got Sequential"),
    ({"module": nn.GRUCell(3, 5)}, TypeError, r"got GRUCell"),
    ({"module": gk.nn.SkipRNN("gru", 3, 5, skip=2)}, TypeError, r"SkipRNN adds an output of some steps ago"),
    ({"module": None}, TypeError, r"module must be a recurrent layer, got NoneType"),
    (
        {"hx": torch.zeros(1, 2, 5)},
        ValueError,
        r"hx must be 1 of \[2, 2, \.\.\] beside x \[6, 2, 3\], got \[\[1, 2, 5\]\]",
    ),
    ({"hx": torch.zeros(2, 3, 5)}, ValueError, r"hx must be"),
    ({"hx": (torch.zeros(2, 2, 5),) * 2}, ValueError, r"hx must be 1 of \[2, 2, \.\.\]"),
    ({"hx": torch.zeros(2, 2, 4)}, RuntimeError, r"size"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[text for *_, text in WRONG])
def test_wrong_arguments(change, error, text):
    given = {"module": nn.GRU(3, 5, 2), "x": torch.randn(6, 2, 3), "t0": 1, "t1": 4} | change
    with pytest.raises(error, match=text):
        gk.flow.jacobian(given.pop("module"), given.pop("x"), given.pop("t0"), given.pop("t1"), **given)


def test_weights_that_are_not_finite():
    gru = nn.GRU(3, 5)
    with torch.no_grad():
        gru.weight_hh_l0[0, 0] = math.inf
    with pytest.raises(ValueError, match="a weight is not finite"):
        gk.flow.jacobian(gru, torch.randn(6, 3), 1, 4)


# ---------------------------------------------------------------- Lyapunov exponents


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "one unit"])
def test_all_exponents_add_up_to_the_determinant(name):
    layer, x = TORCH[name](), torch.randn(30, 2, 3)
    found = gk.flow.lyapunov(layer, x, k=sum(part.cell.S * part.module.hidden_size for part in parts(layer)), skip=5)
    steps = [gk.flow.jacobian(layer, x, t - 1, t).matrix for t in range(5, 30)]
    wanted = torch.stack([torch.linalg.slogdet(J).logabsdet for J in steps]).mean(0)
    assert torch.allclose(found.exponents.sum(-1), wanted, rtol=1e-9)
    assert found.per_step.shape == (25, 2, found.exponents.shape[1])
    assert torch.allclose(found.per_step.mean(0), found.exponents)


def test_leading_exponents_are_rates_of_singular_values():
    layer, x = nn.GRU(3, 7), torch.randn(160, 3)
    found = gk.flow.lyapunov(layer, x, k=3, skip=60)
    rates = gk.flow.jacobian(layer, x, 59, 159).log10_singular_values[:1] / 100
    assert torch.allclose(found.decades[:1], rates, atol=0.02)
    assert (found.exponents.diff() <= 0).all()
    assert found.horizon() == pytest.approx(math.log(1e-3) / found.exponents[0].item())


def test_exponents_far_apart_are_seen():
    """A diagonal matrix: one exponent per entry, though after 60 steps they are 180 decades apart."""
    rnn = nn.RNN(1, 3, bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([1e-3, 0.5, 0.9])))
    found = gk.flow.lyapunov(rnn, torch.zeros(60, 1), 3, skip=20)
    assert torch.allclose(found.exponents.exp(), torch.tensor([0.9, 0.5, 1e-3]).double(), rtol=1e-6)
    assert found.error.shape == (3,) and (found.error < 1e-6).all()


def test_chaos_is_above_zero():
    """Sompolinsky, Crisanti and Sommers (1988): random weights of gain g > 1 are chaotic without input, g < 1 die out."""
    found = []
    for gain in (0.8, 3.0):
        rnn = nn.RNN(1, 100, bias=False)
        with torch.no_grad():
            rnn.weight_hh_l0.normal_(0, gain / 10)
        hx = torch.randn(1, 100)
        found.append(gk.flow.lyapunov(rnn, torch.zeros(150, 1), 1, hx=hx))
    dies, chaotic = found
    assert dies.exponents[0] < -0.1 and chaotic.exponents[0] > 0.1
    assert dies.horizon() < 70 and chaotic.horizon() == math.inf


def test_lyapunov_as_json_and_errors():
    gru, x = nn.GRU(3, 5), torch.randn(6, 2, 3)
    found = gk.flow.lyapunov(gru, x, 2)
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["exponents"] == found.exponents.tolist() and written["error"] == [[None, None]] * 2
    assert gk.flow.lyapunov(gru, x[:, 0]).exponents.shape == (5,)
    with pytest.raises(ValueError, match=r"k must be from 1 to 5, the values of state, got 6"):
        gk.flow.lyapunov(gru, x, 6)
    with pytest.raises(ValueError, match=r"skip must leave at least one of 6 steps, got 6"):
        gk.flow.lyapunov(gru, x, skip=6)
    with pytest.raises(TypeError, match="got Linear"):
        gk.flow.lyapunov(nn.Linear(3, 3), x)
