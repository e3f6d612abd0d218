"""Residual, attention and Transformer blocks: what enters, what leaves, and which path it took, against autograd."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkernels as gk

D = 8


@pytest.fixture(autouse=True)
def no_alerts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        yield


def norm10(v):
    return v.norm().log10().item()


def share(residual, sublayer):
    return (residual.norm() ** 2 / (residual.norm() ** 2 + sublayer.norm() ** 2)).item()


def measured(model, run, name):
    with gk.flow.watch(model) as monitor:
        run().square().sum().backward()
    return monitor.history[-1].blocks[name]


@pytest.mark.parametrize("norm", ("pre", "post"))
@pytest.mark.parametrize("kind", ("residual", "attention"))
def test_block(kind, norm):
    if kind == "residual":
        block = gk.nn.ResidualBlock(nn.Linear(D, D), D, dropout=0.0, norm=norm)
    else:
        block = gk.nn.AttentionBlock(D, 2, dropout=0.0, norm=norm)
    block = block.double()
    x = torch.randn(3, 5, D, dtype=torch.double, requires_grad=True)
    got = measured(block, lambda: block(x), type(block).__name__)
    # the same, with the two uses of x told apart
    y, here, there = block(x).detach().requires_grad_(), *(x.detach().requires_grad_() for _ in range(2))
    y.square().sum().backward()
    sublayer = block.sublayer if kind == "residual" else lambda v: block.sublayer(v, v, v, need_weights=False)[0]
    normed = lambda v: F.layer_norm(v, (D,), block.weight, block.bias)
    out = here + sublayer(normed(there)) if norm == "pre" else normed(here + sublayer(there))
    torch.testing.assert_close(out, y)
    out.square().sum().backward()
    assert got.exit == pytest.approx(norm10(y.grad))
    assert got.entrance == pytest.approx(norm10(here.grad + there.grad))
    assert got.residual_share == pytest.approx(share(here.grad, there.grad))
    assert 0.1 < got.residual_share < 1


@pytest.mark.parametrize("norm", ("pre", "post"))
def test_attention_block_written_out(norm):
    """Causal and padded, its products and its softmax in torch operations."""
    block, x = gk.nn.AttentionBlock(D, 2, dropout=0.0, norm=norm, causal=True).double(), torch.randn(3, 5, D).double()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    got = measured(block, lambda: block(x, padding), "AttentionBlock")
    hidden, attn = torch.ones(5, 5, dtype=torch.bool).triu(1) | padding[:, None, None], block.sublayer

    def attend(v):
        qkv = F.linear(v, attn.in_proj_weight, attn.in_proj_bias).view(3, 5, 3, 2, D // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (D // 2) ** 0.5).masked_fill(hidden, -math.inf).softmax(-1)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    here, there = (x.clone().requires_grad_() for _ in range(2))
    normed = lambda v: F.layer_norm(v, (D,), block.weight, block.bias)
    out = here + attend(normed(there)) if norm == "pre" else normed(here + attend(there))
    out.square().sum().backward()
    assert got.exit == pytest.approx(norm10(2 * out))
    assert got.entrance == pytest.approx(norm10(here.grad + there.grad))
    assert got.residual_share == pytest.approx(share(here.grad, there.grad))


@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("home", (nn, gk.nn), ids=("torch", "ours"))
def test_encoder_layer(home, norm_first):
    layer = home.TransformerEncoderLayer(D, 2, 16, dropout=0.0, norm_first=norm_first, dtype=torch.double)
    x = torch.randn(5, 3, D, dtype=torch.double, requires_grad=True)
    got = measured(layer, lambda: layer(x), "TransformerEncoderLayer")
    reference = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, norm_first=norm_first, dtype=torch.double)
    reference.load_state_dict(layer.state_dict())
    y, here, there = reference(x).detach().requires_grad_(), *(x.detach().requires_grad_() for _ in range(2))
    y.square().sum().backward()
    attend = lambda v: reference.self_attn(v, v, v, need_weights=False)[0]
    if norm_first:  # past every sublayer: the gradient of the exit
        v = here + attend(reference.norm1(there))
        residual = y.grad
        out = v + reference._ff_block(reference.norm2(v))
        out.square().sum().backward()
        sublayers = here.grad + there.grad - residual
    else:  # past attention
        v = reference.norm1(here + attend(there))
        reference.norm2(v + reference._ff_block(v)).square().sum().backward()
        residual, sublayers = here.grad, there.grad
    assert got.exit == pytest.approx(norm10(y.grad))
    assert got.entrance == pytest.approx(norm10(here.grad + there.grad))
    assert got.residual_share == pytest.approx(share(residual, sublayers))


def test_decoder_layer_and_a_stack():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16), 2, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoderLayer(D, 2, 16, norm_first=True)

        def forward(self, x):
            return self.decoder(x, self.encoder(x))

    model, x = Model(), torch.randn(5, 3, D)
    with gk.flow.watch(model) as monitor:
        model(x).square().sum().backward()
        monitor.step()
        model.eval()
        with torch.no_grad():
            model(x)
    (record,) = monitor.history
    assert list(record.blocks) == ["encoder.layers.0", "encoder.layers.1", "decoder"]
    assert all(math.isfinite(b.entrance) and 0 < b.residual_share < 1 for b in record.blocks.values())
    # what leaves the first layer of the stack is what enters the second
    assert record.blocks["encoder.layers.0"].exit == pytest.approx(record.blocks["encoder.layers.1"].entrance)


@pytest.mark.parametrize("norm", ("pre", "post"))
def test_compiled_and_checkpointed(norm):
    block = gk.nn.ResidualBlock(nn.Linear(D, D), D, dropout=0.0, norm=norm)
    x = torch.randn(3, 5, D)
    plain = measured(block, lambda: block(x), "ResidualBlock")
    again = measured(block, lambda: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False), "ResidualBlock")
    torch._dynamo.reset()
    with gk.flow.watch(block) as monitor:
        torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled = monitor.history[-1].blocks["ResidualBlock"]
    for found in (again, compiled):
        assert found.entrance == pytest.approx(plain.entrance, abs=1e-5)
        assert found.residual_share == pytest.approx(plain.residual_share, rel=1e-5)


def test_writing_in_place_into_what_a_block_returns():
    block = gk.nn.ResidualBlock(nn.Linear(D, D), D, dropout=0.0)
    x = torch.randn(3, D)
    want = torch.autograd.grad((block(x) * 2).relu().sum(), block.sublayer.weight)[0]
    with gk.flow.watch(block) as monitor:
        y = block(x)
        y *= 2
        F.relu(y, inplace=True).sum().backward()
    assert torch.equal(block.sublayer.weight.grad, want) and monitor.history[-1].blocks


def test_keyword_arguments_and_a_block_called_twice():
    block = gk.nn.ResidualBlock(nn.Linear(D, D), D, dropout=0.0)
    x = torch.randn(4, D)
    whole = measured(block, lambda: block(input=x), "ResidualBlock")
    parts = measured(block, lambda: torch.cat([block(x[:1]), block(input=x[1:])]), "ResidualBlock")
    assert parts.entrance == pytest.approx(whole.entrance, abs=1e-5)
    assert parts.residual_share == pytest.approx(whole.residual_share, rel=1e-5)
