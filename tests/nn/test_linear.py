"""Linear maps inside of layers: the same numbers by either way, and torch's own way wherever ours has no place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradkernels as gk
from gradkernels import backends
from gradkernels.backends import cpu
from gradkernels.nn.linear import MANY, applied, linear
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu


@pytest.fixture(params=(True, False), ids=("ours", "torch"))
def ours(request, monkeypatch):
    """Whether this machine's products are taken to be slow."""
    monkeypatch.setattr(cpu, "outruns_mkl", lambda: request.param)
    monkeypatch.setattr(backends._thread, "last", None, raising=False)
    return request.param


def tensors(*shape, out=33, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=generator, dtype=torch.double).to(dtype).requires_grad_()
    return [new(*shape), new(out, shape[-1]), new(out) if bias else None]


def results(function, values, dtype):
    values = [v if v is None else v.detach().to(dtype).requires_grad_() for v in values]
    y = function(*values)
    there = [v for v in values if v is not None]
    random = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return (y,), dict(zip("xwb", torch.autograd.grad(y, there, random.to(dtype))))


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("shape", ((MANY, 17), (3, 50, 64), (2, 3, 40, 1), (1, 1000, 129)), ids=str)
def test_numbers(ours, shape, bias):
    given = tensors(*shape, bias=bias)
    got = results(linear, given, torch.float32)
    compiled = cpu.why_not() is None
    assert backends.last() == (("cpu" if compiled else "reference") if ours else None)
    assert_close_to_truth(got, results(F.linear, given, torch.float32), results(F.linear, given, torch.double))


@pytest.mark.parametrize(
    "given",
    (
        tensors(MANY - 1, 8),
        tensors(MANY, 8, dtype=torch.double),
        tensors(MANY, 8, dtype=torch.bfloat16),
        tensors(2, 0, 8),
    ),
    ids=("few tokens", "double", "bfloat16", "no tokens"),
)
def test_torch_has_the_others(ours, given):
    assert torch.equal(linear(*given), F.linear(*given)) and backends.last() is None


def test_graphs_autocast_and_transforms_are_torch_s(ours):
    x, w, b = tensors(MANY, 8)
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x, w, b), F.linear(x, w, b))
    assert torch.equal(
        torch.vmap(linear, (None, 0, 0))(x, w.unsqueeze(1), b.unsqueeze(1)), F.linear(x, w, b).t().unsqueeze(2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    assert backends.last() is None


def test_errors_are_torch_s(ours):
    x, w, _ = tensors(MANY, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, w[:, 1:])


def test_derivatives_beyond_the_first(ours):
    x, w, b = tensors(MANY, 3, out=2)

    def second(function):
        slopes = torch.autograd.grad(function(x, w, b).sin().sum(), (x, w, b), create_graph=True)
        return torch.autograd.grad(sum(v.square().sum() for v in slopes), (x, w, b))

    for got, want in zip(second(linear), second(F.linear)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        pushed = torch.autograd.forward_ad.unpack_dual(linear(moving, w, b)).tangent
    assert torch.allclose(pushed, F.linear(torch.ones_like(x), w), atol=1e-5)


def test_hooks_of_a_map_are_called(ours):
    heard, layer = [], gk.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer.linear2.register_forward_hook(lambda *_: heard.append("linear2"))
    layer.self_attn.out_proj.register_forward_hook(lambda *_: heard.append("out_proj"))
    layer(torch.randn(2, MANY, 16))
    assert heard == ["out_proj", "linear2"]


def test_of_a_module(ours):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(MANY, 5)
    for kind in (nn.Linear, Twice):
        module = kind(5, 4)
        assert torch.allclose(applied(module, x), module(x), atol=1e-5)
