"""LayerNorm, ResidualBlock and CausalConv1d against torch's own modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import module_db

import gradkernels as gk
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu


def both(ours, theirs, x, dtype=torch.float32):
    """Output and gradients by name of ours, of theirs, and of theirs in float64, from the same parameters."""
    theirs = theirs.to(dtype)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    found = []
    for module, d in ((ours, dtype), (theirs, dtype), (truth, torch.double)):
        v = x.detach().to(d).requires_grad_()
        out = module(v)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.double).to(d)
        names, parameters = zip(*module.named_parameters()) if list(module.parameters()) else ((), ())
        found.append({"out": out, **dict(zip(("input", *names), torch.autograd.grad(out, (v, *parameters), grad)))})
    assert_close_to_truth(*found)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "shape, kwargs",
    [((5, 7), {}), ((2, 3, 17), {"eps": 1e-3}), ((4, 3, 5), {"bias": False}), ((4, 9), {"elementwise_affine": False})],
    ids=str,
)
def test_layer_norm(shape, kwargs, dtype):
    for wide in (shape[-1:], shape[-2:]):
        theirs = nn.LayerNorm(wide, **kwargs)
        for v in theirs.parameters():
            nn.init.normal_(v)
        both(gk.nn.LayerNorm(wide, **kwargs), theirs, 3 * torch.randn(shape) + 1, dtype)


def test_layer_norm_in_the_words_of_torch():
    messages = []
    for module in (nn.LayerNorm((3, 4)), gk.nn.LayerNorm((3, 4))):
        with pytest.raises(RuntimeError) as raised:
            module(torch.randn(2, 4, 3))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_module_info_of_layer_norm():
    """PyTorch's own cases."""
    (info,) = [m for m in module_db if m.module_cls is nn.LayerNorm]
    for case in info.module_inputs_func(info, "cpu", torch.float32, True, True):
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        both(gk.nn.LayerNorm(*args, **kwargs), nn.LayerNorm(*args, **kwargs), case.forward_input.args[0])


@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("norm", ("pre", "post"))
def test_residual_block(norm, kind):
    block = gk.nn.ResidualBlock(nn.Linear(6, 6), 6, dropout=0.0, norm=norm, norm_kind=kind).double()
    for v in block.parameters():
        nn.init.normal_(v)
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)

    def plain(x):
        def normed(v):
            if kind == "rms":
                return F.rms_norm(v, (6,), block.weight, 1e-5)
            return F.layer_norm(v, (6,), block.weight, block.bias)

        return x + block.sublayer(normed(x)) if norm == "pre" else normed(x + block.sublayer(x))

    grads = [torch.autograd.grad(f(x).square().sum(), (x, *block.parameters())) for f in (block, plain)]
    assert_close_to_truth([block(x), *grads[0]], [plain(x), *grads[1]], [plain(x), *grads[1]])


def test_residual_block_drops_while_training():
    block = gk.nn.ResidualBlock(nn.Identity(), 50, dropout=0.5)
    x = torch.randn(20, 50)
    assert torch.equal(block.eval()(x), block(x))
    branch = block.train()(x) - x
    assert 0.4 < (branch.abs() < 1e-6).float().mean() < 0.6


def test_residual_block_around_a_recurrent_layer_with_lengths():
    block = gk.nn.ResidualBlock(gk.nn.LSTM(6, 6), 6, dropout=0.1)
    y = block(torch.randn(5, 3, 6, requires_grad=True), lengths=torch.tensor([5, 2, 0]))
    y.sum().backward()
    assert y.shape == (5, 3, 6) and all(v.grad is not None for v in block.parameters())


@pytest.mark.parametrize(
    "change, text",
    [({"norm": "in"}, "norm must be"), ({"norm_kind": "batch"}, "norm_kind"), ({"dropout": 2}, "dropout")],
)
def test_residual_block_errors(change, text):
    with pytest.raises(ValueError, match=text):
        gk.nn.ResidualBlock(nn.Identity(), 4, **change)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("K, dilation, bias", ((2, 1, True), (3, 4, True), (2, 16, False), (1, 1, True)))
def test_causal_conv1d(K, dilation, bias, dtype):
    class Theirs(nn.Conv1d):
        def forward(self, x):
            return super().forward(F.pad(x.mT, ((K - 1) * dilation, 0))).mT

    theirs = Theirs(5, 7, K, dilation=dilation, bias=bias)
    both(gk.nn.CausalConv1d(5, 7, K, dilation, bias), theirs, torch.randn(2, 20, 5), dtype)


def test_causal_conv1d_without_a_batch():
    conv, x = gk.nn.CausalConv1d(3, 4, 2), torch.randn(6, 3)
    assert torch.equal(conv(x), conv(x.unsqueeze(0))[0])


@pytest.mark.parametrize("sizes", ([1] * 9, [4, 5], [2, 0, 7]), ids=str)
def test_steps_give_the_same_numbers(sizes):
    conv, x = gk.nn.CausalConv1d(3, 4, 3, dilation=2).double(), torch.randn(2, 9, 3, dtype=torch.double)
    past, parts = None, []
    for part in x.split(sizes, 1):
        y, past = conv.step(part, past)
        parts.append(y)
    got, want = torch.cat(parts, 1), conv(x)
    assert_close_to_truth(got, want, want)


def test_causal_conv1d_errors():
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        gk.nn.CausalConv1d(3, 4, 2, dilation=0)
    with pytest.raises(RuntimeError, match=r"past must be \[2, 1, 3\] beside input \[2, 4, 3\], got \[2, 2, 3\]"):
        gk.nn.CausalConv1d(3, 4, 2).step(torch.zeros(2, 4, 3), torch.zeros(2, 2, 3))
