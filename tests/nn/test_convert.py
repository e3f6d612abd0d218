"""convert changes classes in place: what refers to a module must not notice, and the way back leaves no trace."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gradkernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LSTM(3, 5, num_layers=2, bidirectional=True)
        self.b = nn.Sequential(nn.Linear(10, 3), nn.Identity())
        self.c = nn.ModuleList([nn.GRU(3, 3), nn.RNN(3, 3, nonlinearity="relu")])
        self.shared, self.d, self.listed = self.c[0], nn.ModuleDict({"z": self.c[1]}), [self.a]
        self.cells = nn.ModuleList([nn.LSTMCell(3, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)])

    def forward(self, x):
        y = self.c[0](self.b(self.a(x)[0]))[0]
        y = self.d["z"](self.shared(y)[0])[0]
        h = self.cells[0](y[-1])[0]
        return self.cells[2](y[0], self.cells[1](y[1], h))


class Doubled(nn.LSTM):
    """Somebody's own layer."""

    def forward(self, x, hx=None):
        return super().forward(2 * x, hx)


def close(a, b):
    torch.testing.assert_close(a, b)


def snapshot(module):
    """Everything a module holds, by identity where it has one."""
    return {
        name: {k: [id(v) for v in held] if k == "_flat_weights" else copy.copy(held) for k, held in m.__dict__.items()}
        for name, m in module.named_modules()
    }


def same_snapshot(module, before):
    after = snapshot(module)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].keys() == before[name].keys(), name
        for key, value in before[name].items():
            if key == "_parameters":
                assert [(k, id(v)) for k, v in value.items()] == [(k, id(v)) for k, v in after[name][key].items()]
            elif key == "_flat_weight_refs":
                assert [r() for r in value] == [r() for r in after[name][key]] or all(
                    r() is s() for r, s in zip(value, after[name][key], strict=True)
                )
            else:
                assert after[name][key] == value, (name, key)


def types(module):
    return [type(m) for m in module.modules()]


def test_nested_shared_listed_with_an_optimizer_made_before():
    m = Net()
    y, before, kinds = m(X), snapshot(m), types(m)
    ids, names = [id(p) for p in m.parameters()], list(m.state_dict())
    optimizer = torch.optim.SGD(m.parameters(), 1.0)
    assert gk.convert(m) is m
    close(m(X), y)
    assert ids == [id(p) for p in m.parameters()] and names == list(m.state_dict())
    assert type(m.shared) is gk.nn.GRU and m.shared is m.c[0] and type(m.listed[0]) is gk.nn.LSTM and m.d["z"] is m.c[1]
    assert [type(c) for c in m.cells] == [gk.nn.LSTMCell, gk.nn.GRUCell, gk.nn.RNNCell]
    assert not any(type(v).__module__.startswith("torch.nn.modules.rnn") for v in m.modules())
    w = m.a.weight_hh_l0.detach().clone()
    m(X).sum().backward()
    optimizer.step()
    assert not torch.equal(w, m.a.weight_hh_l0)
    y = m(X)
    gk.convert(m, to="torch")
    close(m(X), y)
    assert types(m) == kinds
    same_snapshot(m, before)


def test_twice_is_once():
    m = gk.convert(gk.convert(Net()))
    kinds = types(m)
    assert types(gk.convert(m)) == kinds
    gk.convert(gk.convert(m, to="torch"), to="torch")
    assert type(m.a) is nn.LSTM


@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"))
def test_the_model_is_the_layer(kind):
    m = getattr(nn, kind)(3, 5)
    x = X if "Cell" not in kind else X[0]
    y, before = m(x), snapshot(m)
    assert gk.convert(m) is m and type(m) is getattr(gk.nn, kind)
    close(m(x), y)
    gk.convert(m, to="torch")
    assert type(m) is getattr(nn, kind)
    same_snapshot(m, before)
    close(m(x), y)


def test_ours_becomes_torchs():
    for m in (
        gk.nn.LSTM(3, 5, proj_size=2, backend="reference"),
        gk.nn.GRU(3, 5),
        gk.nn.RNN(3, 5, nonlinearity="relu"),
    ):
        y, kind = m(X), type(m).__name__
        like = getattr(nn, kind)(3, 5).__dict__
        gk.convert(m, to="torch")
        assert type(m) is getattr(nn, kind) and m.__dict__.keys() == like.keys()
        close(m(X), y)
        close(pickle.loads(pickle.dumps(m))(X), y)


def test_hooks_mode_dtype_and_requires_grad_are_kept():
    m, log = nn.LSTM(3, 5, num_layers=2, dropout=0.3).eval().double(), []
    handle = m.register_forward_hook(lambda *a: log.append("forward"))
    m.register_full_backward_hook(lambda *a: log.append("backward"))
    m.weight_hh_l0.register_hook(lambda g: log.append("weight"))
    m.bias_hh_l0.requires_grad_(False)
    gk.convert(m)(X.double().requires_grad_())[0].sum().backward()
    handle.remove()
    m(X.double())
    assert sorted(log) == ["backward", "forward", "weight"]
    assert not m.training and not m.bias_hh_l0.requires_grad and m.weight_hh_l0.dtype is torch.double


def test_tied_weights():
    m = nn.ModuleList([nn.LSTM(3, 5), nn.LSTM(3, 5)])
    m[1].weight_hh_l0 = m[0].weight_hh_l0
    assert gk.convert(m)[1].weight_hh_l0 is m[0].weight_hh_l0
    assert gk.convert(m, to="torch")[1]._flat_weights[1] is m[0].weight_hh_l0


@pytest.mark.parametrize("name", ("weight_norm", "orthogonal", "spectral_norm"))
def test_parametrized_before_and_freed_after(name):
    m = nn.Sequential(nn.LSTM(3, 5)).eval()
    getattr(parametrizations, name)(m[0], "weight_hh_l0")
    y = m(X)
    gk.convert(m)
    assert isinstance(m[0], gk.nn.LSTM) and type(m[0]).__name__ == "ParametrizedLSTM"
    close(m(X), y)
    close(copy.deepcopy(m)(X), y)
    gk.convert(m, to="torch")
    assert isinstance(m[0], nn.LSTM) and not isinstance(m[0], gk.nn.LSTM)
    close(m(X), y)
    parametrize.remove_parametrizations(gk.convert(m)[0], "weight_hh_l0")
    assert type(m[0]) is gk.nn.LSTM
    close(m(X), y)


def test_parametrized_cell():
    m = parametrizations.weight_norm(nn.GRUCell(3, 5), "weight_hh")
    y = m(X[0])
    close(gk.convert(m)(X[0]), y)
    assert isinstance(m, gk.nn.GRUCell)
    close(gk.convert(m, to="torch")(X[0]), y)


def test_tensors_set_as_attributes():
    """The older weight_norm, DropConnect and the like."""
    m = nn.LSTM(3, 5)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(m, "weight_hh_l0")
    gk.convert(m)
    with torch.no_grad():
        m.weight_hh_l0_g.mul_(2)
    y = m(X)
    close(gk.convert(m, to="torch")(X), y)


def test_subclasses_of_others_are_left_with_one_warning():
    m = nn.Sequential(Doubled(3, 5), Doubled(5, 5), nn.LSTM(5, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gk.convert(m)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "0 (Doubled), 1 (Doubled)" in str(caught[0].message)
    assert [type(v) for v in m] == [Doubled, Doubled, gk.nn.LSTM]
    with pytest.warns(UserWarning, match="the model itself .Doubled."):
        gk.convert(Doubled(3, 5))
    parametrized = parametrizations.weight_norm(Doubled(3, 5), "weight_hh_l0")
    with pytest.warns(UserWarning, match="ParametrizedDoubled"):
        assert isinstance(gk.convert(parametrized), Doubled)


def test_layers_without_a_twin_in_torch_are_left_with_one_warning():
    layers = [
        gk.nn.RNN(3, 5, nonlinearity="sigmoid"),
        gk.nn.GRU(3, 5, reset_after=False),
        gk.nn.Recurrent("lstm", 3, 5),
        gk.nn.RNNCell(3, 5, nonlinearity="sigmoid"),
        gk.nn.GRUCell(3, 5, reset_after=False),
    ]
    m = nn.ModuleList([*layers, gk.nn.LSTM(3, 5)])
    kinds = types(m)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gk.convert(m, to="torch")
    assert len(caught) == 1
    assert all(f"{k} ({type(v).__name__})" in str(caught[0].message) for k, v in enumerate(layers))
    assert types(m)[:-1] == kinds[:-1] and type(m[-1]) is nn.LSTM


def test_nothing_to_do_and_no_warning():
    m = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.convert(gk.convert(m), to="torch")
        gk.convert(nn.LSTM(3, 5))
        gk.convert(gk.nn.LSTM(3, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_layers_are_left_and_converted_back_can_be_quantized():
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.fail("this build of torch cannot quantize")
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 5)), {nn.LSTM})
    before = type(quantized[0])
    assert before is not nn.LSTM and type(gk.convert(quantized)[0]) is before
    back = gk.convert(nn.Sequential(gk.nn.LSTM(3, 5)), to="torch")
    assert type(torch.ao.quantization.quantize_dynamic(back, {nn.LSTM})[0]) is before


def test_wrong_arguments():
    with pytest.raises(ValueError, match="to must be 'gradkernels' or 'torch', got 'jax'"):
        gk.convert(nn.LSTM(3, 5), to="jax")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        gk.convert([nn.LSTM(3, 5)])
    with pytest.raises(TypeError, match="got type"):
        gk.convert(nn.LSTM)


def test_watching_ends_with_the_way_back():
    m = gk.nn.LSTM(3, 5)
    m.probes = [torch.zeros(8, 3, dtype=torch.double, requires_grad=True)]
    gk.convert(m, to="torch")
    assert "probes" not in m.__dict__
    assert gk.convert(m).probes is None


def test_dtype_changed_while_ours():
    m = gk.convert(nn.LSTM(3, 5)).double()
    gk.convert(m, to="torch")
    assert all(w.dtype is torch.double for w in m._flat_weights)
    assert m(X.double())[0].dtype is torch.double


def test_training_goes_the_same_way():
    """The same numbers, step by step, with dropout drawn from torch's generator."""
    curves = []
    for swap in (False, True):
        torch.manual_seed(0)
        rnn = nn.LSTM(3, 8, num_layers=2, dropout=0.3, bidirectional=True)
        m = nn.ModuleDict({"rnn": gk.convert(rnn) if swap else rnn, "out": nn.Linear(16, 2)})
        optimizer, curve = torch.optim.Adam(m.parameters(), 0.01), []
        for _ in range(8):
            loss = (m["out"](m["rnn"](X)[0][-1]) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    close(torch.tensor(curves[0]), torch.tensor(curves[1]))
    assert curves[0][-1] < curves[0][0]
