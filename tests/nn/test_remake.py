"""What is made again in backward: the same gradients of every order, less memory, and nothing in anybody's way."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from gradkernels.nn import remake
from gradkernels.nn.remake import remade, remaking, rounded

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_thread")]


def chain(x, weight, bias, made=None):
    """Three values, each made of the one before, with views of the second kept by the last."""

    def norm(v):
        if made is not None:
            made.append("norm")
        return F.layer_norm(v, v.shape[-1:])

    def linear(v, w, b):
        if made is not None:
            made.append("linear")
        return F.linear(v, w, b)

    h = remade(linear, remade(norm, x), weight, bias)
    a = remade(F.relu, h)
    q, k, v = a.chunk(3, -1)
    return (q * k + v.square()).sum() + h.tanh().sum()


@pytest.fixture
def leaves():
    return [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((5, 4), (24, 4), (24,))]


def grads(loss, leaves, **kwargs):
    return torch.autograd.grad(loss, leaves, **kwargs)


def test_gradients_of_two_orders(leaves):
    found = []
    for context in (remaking, contextlib.nullcontext):
        with context():
            loss = chain(*leaves)
        first = grads(loss, leaves, create_graph=True)
        found.append((loss, *first, *grads(sum(v.square().sum() for v in first), leaves)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_everything_is_made_again_once(leaves):
    made = []
    with remaking():
        loss = chain(*leaves, made)
    assert made == ["norm", "linear"]
    want = grads(loss, leaves, retain_graph=True)
    assert sorted(made[2:]) == ["linear", "norm"]
    torch.testing.assert_close(grads(loss, leaves), want, rtol=0, atol=0)
    assert len(made) == 6


def test_only_what_is_asked_for(leaves):
    with remaking():
        loss = chain(*leaves)
    want = grads(chain(*leaves), leaves)
    for k in (2, 0, 1):
        assert torch.equal(grads(loss, leaves[k], retain_graph=True)[0], want[k])


def test_nothing_of_it_is_kept(leaves):
    """A thousand columns; the sum and the weights are what remains between forward and backward."""
    x, weight = torch.randn(1000, 10, requires_grad=True), torch.randn(1000, 10, requires_grad=True)
    with remaking():
        h = remade(F.linear, x, weight, None)
        a = remade(F.gelu, h)
        loss = a.square().sum()
    gone = [weakref.ref(v.untyped_storage()) for v in (h, a)]
    del h, a
    gc.collect()
    assert not any(r() for r in gone)
    want = grads(F.gelu(F.linear(x, weight)).square().sum(), (x, weight))
    torch.testing.assert_close(grads(loss, (x, weight)), want, rtol=0, atol=0)


@pytest.mark.parametrize("which", range(3), ids=("input", "weight", "bias"))
def test_changed_in_between(which, leaves):
    with remaking():
        loss = chain(*leaves)
    with torch.no_grad():
        leaves[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changed_inside_what_it_became_is_kept():
    x = torch.randn(6, dtype=torch.double, requires_grad=True)
    with remaking():
        h = remade(torch.Tensor.mul, x, torch.tensor(3.0))
        loss = h.sin_().exp().sum()  # exp keeps its result, sin_ what h was before
    assert torch.equal(grads(loss, x)[0], grads((3 * x).sin().exp().sum(), x)[0])


def test_views_and_inputs_handed_through_are_not_values():
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    for make in (lambda v: v, lambda v: v.T, lambda v: v[1:]):
        with remaking():
            loss = remade(make, x).exp().square().sum()
        assert torch.equal(grads(loss, x)[0], grads(make(x).exp().square().sum(), x)[0])


def test_others_rule_what_is_kept(leaves):
    """Checkpointing and offloading see everything, and are seen through."""
    want = grads(chain(*leaves), leaves)

    def inside(*values):
        with remaking():
            return chain(*values)

    assert all(map(torch.equal, grads(checkpoint(inside, *leaves, use_reentrant=False), leaves), want))
    packed = []
    with saved_tensors_hooks(lambda v: packed.append(v.shape) or v, lambda v: v):
        loss = inside(*leaves)
    assert torch.Size([5, 24]) in packed and all(map(torch.equal, grads(loss, leaves), want))
    with save_on_cpu():
        loss = inside(*leaves)
    assert all(map(torch.equal, grads(loss, leaves), want))
    with remaking():  # and what lies inside is theirs
        loss = checkpoint(chain, *leaves, use_reentrant=False)
    assert all(map(torch.equal, grads(loss, leaves), want))
    by_function = torch.func.grad(inside, argnums=(0, 1, 2))(*leaves)
    torch.testing.assert_close(by_function, want)


def test_one_inside_another_and_errors_leave_nothing(leaves):
    want = grads(chain(*leaves), leaves)
    with remaking():
        h = remade(torch.sin, leaves[0])
        with remaking():
            loss = chain(h, *leaves[1:])
    assert torch.equal(grads(loss, leaves[2])[0], grads(chain(leaves[0].sin(), *leaves[1:]), leaves[2])[0])
    with pytest.raises(ZeroDivisionError), remaking():
        remade(lambda v: v / (1 // 0), leaves[0])
    assert remake._thread.trail is None
    assert all(map(torch.equal, grads(chain(*leaves), leaves), want))


def test_autocast_is_that_of_forward():
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    found = []
    for context in (remaking, contextlib.nullcontext):
        with context(), torch.autocast("cpu", torch.bfloat16):
            h = remade(F.linear, rounded(remade(F.silu, x)), layer.weight, layer.bias)
            assert h.dtype == torch.bfloat16
            loss = (h * h).float().sum()
        found.append(grads(loss, (x, *layer.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# ---------------------------------------------------------------- the layers


def held(run):
    """Most bytes that torch held at a time while it ran, above what there was before, by what the profiler saw of its allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


D, T, B = 64, 128, 2
PLANE = 4 * D * T * B


def deep(make):
    """A stack of four, trained one step; the mask is causal."""
    layers = torch.nn.ModuleList(make() for _ in range(4))
    x, mask = torch.randn(B, T, D), torch.nn.Transformer.generate_square_subsequent_mask(T)

    def run():
        y = x
        for layer in layers:
            y = layer(y) if isinstance(layer, gk.nn.AttentionBlock) else layer(y, mask, is_causal=True)
        y.sum().backward()
        for v in layers.parameters():
            v.grad = None

    run()
    return held(run)


@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("dropout, less, least", [(0.1, 2.6, 4.0), (0.0, 1.04, 1.6)], ids=("dropout", "plain"))
def test_peak_memory_of_training_beside_torch(dropout, less, least, norm_first):
    """Times as much as torch holds: with projections kept, and with them made again."""
    how = {"dropout": dropout, "norm_first": norm_first, "batch_first": True}
    theirs = deep(lambda: torch.nn.TransformerEncoderLayer(D, 4, 4 * D, **how))
    ours = deep(lambda: gk.nn.TransformerEncoderLayer(D, 4, 4 * D, **how))
    again = deep(lambda: gk.nn.TransformerEncoderLayer(D, 4, 4 * D, **how, recompute=True))
    assert ours * less < theirs and again * least < theirs, (theirs / ours, theirs / again)


@pytest.mark.parametrize("recompute, most", [(True, 2.3), (False, 5.3)], ids=("again", "kept"))
def test_planes_per_attention_block(recompute, most):
    """Between forward and backward a block holds the sum and what attention returned; with projections kept, these too."""
    x, peaks = torch.randn(B, T, D), []
    for n in (2, 8):
        blocks = (gk.nn.AttentionBlock(D, 4, 0.1, causal=True, recompute=recompute) for _ in range(n))
        stack = torch.nn.Sequential(*blocks)
        peaks.append(held(lambda stack=stack: stack(x)) / PLANE)
    assert (peaks[1] - peaks[0]) / 6 < most
