"""convert on norms, attention and the Transformer's layers: the object stays itself, both ways."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gradkernels as gk

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]
PAIRS = [(getattr(nn, k), getattr(gk.nn, k)) for k in ("LayerNorm", "MultiheadAttention")]
PAIRS += [(getattr(nn, k), getattr(gk.nn, k)) for k in ("TransformerEncoderLayer", "TransformerDecoderLayer")]


def whole():
    how = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    return nn.Transformer(8, 2, **how)


def kinds(model):
    return [type(m) for m in model.modules()]


def contents(model):
    """What every module holds, by identity where it has one."""
    return [
        {k: id(v) if isinstance(v, nn.Module) else copy.copy(v) for k, v in m.__dict__.items()} for m in model.modules()
    ]


def close(a, b):
    torch.testing.assert_close(a, b)


def test_a_whole_transformer_and_back():
    model, src, tgt = whole(), torch.randn(2, 7, 8), torch.randn(2, 5, 8)
    y, before, held = model(src, tgt), kinds(model), contents(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert gk.convert(model) is model
    theirs, ours = zip(*PAIRS)
    assert not any(type(m) in theirs for m in model.modules())
    assert sum(type(m) in ours for m in model.modules()) == sum(k in theirs for k in before) == 22
    close(model(src, tgt), y)
    model(src, tgt).square().sum().backward()
    optimizer.step()
    trained = model(src, tgt)
    assert not torch.equal(trained, y)
    once = kinds(model)
    assert kinds(gk.convert(model)) == once
    gk.convert(model, to="torch")
    assert kinds(model) == before
    for now, then in zip(contents(model), held, strict=True):
        assert now.keys() == then.keys()
        assert {k: v for k, v in now.items() if k != "_parameters"} == {
            k: v for k, v in then.items() if k != "_parameters"
        }
    close(model(src, tgt), trained)


@pytest.mark.parametrize("theirs, ours", PAIRS, ids=lambda cls: cls.__module__.split(".")[0])
def test_the_model_is_the_layer(theirs, ours):
    args = (8,) if theirs is nn.LayerNorm else (8, 2)
    model = theirs(*args).eval()
    inputs = [torch.randn(5, 2, 8)] * {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(theirs.__name__, 1)
    y = model(*inputs)
    assert gk.convert(model) is model and type(model) is ours
    close(model(*inputs), y)
    assert type(gk.convert(model, to="torch")) is theirs
    close(model(*inputs), y)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_container_made_before_with_its_fast_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2).eval()
    assert encoder.use_nested_tensor
    x, padding = torch.randn(2, 6, 8), torch.arange(6) >= torch.tensor([[6], [3]])
    with torch.no_grad():
        want = encoder(x, src_key_padding_mask=padding)
        close(gk.convert(encoder)(x, src_key_padding_mask=padding), want)
    encoder(x, src_key_padding_mask=padding).sum().backward()
    with torch.no_grad():
        close(gk.convert(encoder, to="torch")(x, src_key_padding_mask=padding), want)


def test_what_ours_has_more_is_left_behind():
    layer = gk.nn.TransformerEncoderLayer(8, 2, 12, recompute=True)
    gk.convert(layer, to="torch")
    assert kinds(layer) == kinds(nn.TransformerEncoderLayer(8, 2, 12))
    assert layer.__dict__.keys() == nn.TransformerEncoderLayer(8, 2, 12).__dict__.keys()
    assert layer.self_attn.__dict__.keys() == nn.MultiheadAttention(8, 2).__dict__.keys()


def test_a_block_of_ours_stays_whole():
    """Torch has no twin of it, and what is in it is called in ways that torch's has not."""
    model = nn.Sequential(gk.nn.AttentionBlock(8, 2), gk.nn.LayerNorm(8)).eval()
    x = torch.randn(2, 5, 8)
    y = model(x)
    with pytest.warns(UserWarning, match=r"without a twin in torch as they are: 0 \(AttentionBlock\)$"):
        gk.convert(model, to="torch")
    assert type(model[0].sublayer) is gk.nn.MultiheadAttention and type(model[1]) is nn.LayerNorm
    close(model(x), y)


class Scaled(nn.LayerNorm):
    """Somebody's own norm."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnLayer(nn.TransformerEncoderLayer):
    """Somebody's own layer around torch's parts."""

    def forward(self, x):
        return x + self.self_attn(x, x, x, need_weights=False)[0]


def test_subclasses_of_others_are_left_and_their_parts_are_not():
    model = nn.Sequential(Scaled(8), OwnLayer(8, 2, 12, 0.0))
    x = torch.randn(5, 2, 8)
    y = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gk.convert(model)
    assert [str(w.message).partition(": ")[2] for w in caught] == ["0 (Scaled), 1 (OwnLayer)"]
    assert type(model[0]) is Scaled and type(model[1]) is OwnLayer
    assert type(model[1].self_attn) is gk.nn.MultiheadAttention and type(model[1].norm1) is gk.nn.LayerNorm
    close(model(x), y)


def test_parametrized_and_hooked():
    model, seen = nn.TransformerEncoderLayer(8, 2, 12, 0.0), []
    parametrizations.weight_norm(model.self_attn, "in_proj_weight")
    model.norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    x = torch.randn(5, 2, 8)
    y = model(x)
    gk.convert(model)
    assert isinstance(model.self_attn, gk.nn.MultiheadAttention) and type(model.self_attn).__name__.startswith(
        "Parametrized"
    )
    close(model(x), y)
    assert seen == ["norm1"] * 2
    gk.convert(model, to="torch")
    assert not isinstance(model.self_attn, gk.nn.MultiheadAttention)
    parametrize.remove_parametrizations(gk.convert(model).self_attn, "in_proj_weight")
    assert type(model.self_attn) is gk.nn.MultiheadAttention
    close(model(x), y)


def test_a_state_dict_of_either_loads_into_the_other():
    for theirs, ours in PAIRS:
        args = (8,) if theirs is nn.LayerNorm else (8, 2)
        a, b = theirs(*args), ours(*args)
        assert list(a.state_dict()) == list(b.state_dict())
        b.load_state_dict(a.state_dict(), strict=True), a.load_state_dict(b.state_dict(), strict=True)
