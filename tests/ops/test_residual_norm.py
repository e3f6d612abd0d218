"""norm(residual + dropout(x)): values and gradients against torch's own operations, errors, edges."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from gradkernels.backends import last
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu
NAMES = ("x", "residual", "weight", "bias")


def theirs(x, residual, weight, bias, kind, eps=1e-5):
    s = x if residual is None else x + residual
    if kind == "layer":
        return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s
    y = F.rms_norm(s, s.shape[-1:], weight, eps)  # which takes no bias
    return (y if bias is None else y + bias), s


def tensors(shape, dtype, given):
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double)
    every = 3 * make(*shape) + 1, make(*shape), 1 + make(shape[-1]) / 4, make(shape[-1])
    return [v.to(dtype).requires_grad_() if name in given else None for name, v in zip(NAMES, every)]


def run(f, args, dtype, seed=2):
    args = [v if v is None else v.detach().to(dtype).requires_grad_() for v in args]
    out = f(*args)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(v.shape, generator=generator, dtype=torch.double).to(v.dtype) for v in out]
    there = [v for v in args if v is not None]
    return {"out": out, "grads": torch.autograd.grad(out, there, grads)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("shape", ((3, 17), (1, 3), (2, 5, 63), (70, 130), (2, 4099)), ids=str)
@pytest.mark.parametrize("given", (NAMES, ("x", "residual"), ("x", "weight"), ("x", "weight", "bias")), ids="+".join)
def test_values_and_gradients(shape, given, kind, dtype, backend):
    args = tensors(shape, dtype, given)
    ours = run(lambda *a: gk.ops.residual_norm(*a, kind=kind, backend=backend), args, dtype)
    assert last() == backend
    peer, truth = (run(lambda *a: theirs(*a, kind), args, d) for d in (dtype, torch.double))
    assert_close_to_truth(ours, peer, truth)


def test_weights_in_float32_beside_16_bits(backend):
    x, residual, weight, bias = tensors((5, 40), torch.bfloat16, NAMES)
    weight, bias = (v.detach().float().requires_grad_() for v in (weight, bias))
    y, _ = gk.ops.residual_norm(x, residual, weight, bias, backend=backend)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    want = F.layer_norm((x + residual).float(), (40,), weight, bias)
    assert (y - want).abs().max() <= 0.01 * want.abs().max()


def test_forward_and_backward_drop_the_same(backend):
    x = torch.randn(6, 50, dtype=torch.double, requires_grad=True)
    _, s = gk.ops.residual_norm(x, None, dropout_p=0.3, backend=backend)
    (g,) = torch.autograd.grad(s.sum(), x)
    assert torch.equal(g != 0, s != 0) and torch.allclose(s, x * g)


def test_checkpointing_drops_the_same(backend):
    x, residual = (torch.randn(6, 50, requires_grad=True) for _ in range(2))
    f = lambda x: gk.ops.residual_norm(x, residual, dropout_p=0.5, backend=backend)[0].square().sum()
    grads = []
    for call in (f, lambda x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(call(x), x)[0])
    assert torch.equal(*grads)


def test_only_the_norm_is_returned_on_request():
    x = torch.randn(3, 4)
    y = gk.ops.residual_norm(x, x, prenorm=False)
    assert torch.equal(y, gk.ops.residual_norm(x, x)[0])


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (2, 0, 4)), ids=str)
def test_nothing_to_do(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    y, s = gk.ops.residual_norm(x, x, weight, backend=backend)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == shape and not weight.grad.any()


def test_nan_stays_in_its_row(backend):
    x = torch.randn(4, 33)
    x[2, 7] = torch.nan
    y, _ = gk.ops.residual_norm(x, None, backend=backend)
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()


def test_the_same_bits_for_any_number_of_threads():
    args = tensors((300, 257), torch.float32, NAMES)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = run(lambda *a: gk.ops.residual_norm(*a), args, torch.float32)
            found.append([*out["out"], *out["grads"]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_samples_of_torch(backend):
    """PyTorch's own sample inputs for layer_norm, those over the last dimension."""
    (info,) = [op for op in op_db if op.name == "nn.functional.layer_norm"]
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        shape, *rest = sample.args
        if len(shape) != 1:
            continue
        weight, bias = (*rest, None, None)[:2]
        eps = sample.kwargs.get("eps", 1e-5)
        y, _ = gk.ops.residual_norm(sample.input, None, weight, bias, eps=eps, backend=backend)
        peer = F.layer_norm(sample.input, shape, weight, bias, eps)
        wide = [v if v is None else v.double() for v in (sample.input, weight, bias)]
        assert_close_to_truth(y, peer, F.layer_norm(wide[0], shape, *wide[1:], eps))
        seen += 1
    assert seen > 2


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"residual": torch.zeros(3, 5)},
            RuntimeError,
            r"residual must have shape \[3, 4\] beside x \[3, 4\], got \[3, 5\]",
        ),
        ({"weight": torch.zeros(3)}, RuntimeError, r"weight must have shape \[4\] beside x \[3, 4\], got \[3\]"),
        ({"bias": torch.zeros(4).double()}, RuntimeError, "bias must have x's dtype torch.float32, got torch.float64"),
        ({"x": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "x must be floating point, got torch.int64"),
        ({"x": torch.tensor(1.0)}, RuntimeError, "x must have at least one dimension"),
        ({"weight": 3.0}, TypeError, "weight must be a tensor or None, got float"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({"kind": "batch"}, ValueError, "kind must be one of layer, rms, got 'batch'"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'"),
        ({"weight": torch.zeros(4, device="meta")}, RuntimeError, "x is on cpu and weight is on meta"),
    ],
)
def test_errors(change, error, text):
    given = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4), "weight": None, "bias": None} | change
    with pytest.raises(error, match=text):
        gk.ops.residual_norm(**given)
