"""MultiheadAttention and AttentionBlock beside torch's: values, gradients by name, masks, errors, and where torch errs."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

import gradkernels as gk
from gradkernels.backends import last
from tests import place
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("one_thread")


def twins(*args, dtype=torch.float32, **kwargs):
    theirs = nn.MultiheadAttention(*args, **kwargs)
    for name, v in theirs.named_parameters():
        if "bias" in name and v.dim() == 1:
            nn.init.normal_(v)  # torch begins with zero
    theirs = theirs.to(dtype)
    ours = gk.nn.MultiheadAttention(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def with_gradients(module, inputs, **call):
    """Output, weights and the gradient of every input and parameter, by name."""
    inputs = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    masks = {
        k: v.detach().requires_grad_() for k, v in call.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    out, weights = module(*inputs.values(), **{**call, **masks})
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(out)
    loss = (out * gradient).sum() + (0 if weights is None else weights.square().sum())
    leaves = {**inputs, **masks, **dict(module.named_parameters())}
    return {"out": out, "weights": weights, **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))}


def in_double(tree):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tree.items()}


def compare(ours, theirs, inputs, **call):
    inputs, call = tree_map_only(torch.Tensor, lambda v: v.to(place.device), (inputs, call))
    ours, theirs = ours.to(place.device), theirs.to(place.device)
    truth = copy.deepcopy(theirs).double()
    found = with_gradients(ours, inputs, **call), with_gradients(theirs, inputs, **call)
    assert_close_to_truth(*found, with_gradients(truth, in_double(inputs), **in_double(call)))


def drawn(seed):
    """A configuration, its inputs and masks."""
    pick = random.Random(seed)
    H, D = pick.choice(((1, 8), (2, 3), (3, 5), (4, 16)))
    B, L, S = pick.choice((1, 3)), pick.choice((1, 3, 17, 63)), pick.choice((2, 3, 17, 127))
    kdim, vdim = pick.choice(((None, None), (None, None), (6, 10)))
    kwargs = {"kdim": kdim, "vdim": vdim, "bias": pick.random() < 0.7, "batch_first": pick.random() < 0.5}
    kwargs |= {"add_bias_kv": pick.random() < 0.3, "add_zero_attn": pick.random() < 0.3}
    E, batched = H * D, pick.random() < 0.8
    same = pick.choice(("none", "key", "all")) if kdim is None else "none"
    S = L = max(L, 2) if same == "all" else S
    query, key, value = torch.randn(B, L, E), torch.randn(B, S, kdim or E), torch.randn(B, S, vdim or E)
    inputs = {"query": query, "key": key, "value": value}
    if not kwargs["batch_first"]:
        inputs = {k: v.transpose(0, 1) for k, v in inputs.items()}  # and so not contiguous
    kind = pick.choice(("none", "bool", "float"))
    call = {"need_weights": pick.random() < 0.4, "average_attn_weights": pick.random() < 0.5}
    if kind != "none":
        mask = torch.rand((L, S) if pick.random() < 0.5 else (B * H, L, S)) < 0.3
        mask[..., :2] = False  # of one key all that has a gradient is its value
        call["attn_mask"] = mask if kind == "bool" else torch.randn(mask.shape).masked_fill(mask, -torch.inf)
    if pick.random() < 0.5:
        padding = torch.arange(S) >= torch.randint(2, S + 1, (B, 1))
        call["key_padding_mask"] = torch.zeros(B, S).masked_fill(padding, -torch.inf) if kind == "float" else padding
    if not batched:
        inputs = {k: v.select(0 if kwargs["batch_first"] else 1, 0) for k, v in inputs.items()}
        for k, v in call.items():
            if k == "key_padding_mask":
                call[k] = v[0]
            elif k == "attn_mask" and v.dim() == 3:
                call[k] = v[:H]
    return (E, H), kwargs, inputs, call, same


@pytest.mark.parametrize("seed", range(60))
def test_random_configurations(seed, best):
    torch.manual_seed(seed)
    args, kwargs, inputs, call, same = drawn(seed)
    ours, theirs = twins(*args, **kwargs)
    shared = {"none": ("query", "key", "value"), "key": ("query", "key", "key"), "all": ("query",) * 3}[same]

    class Shared(nn.Module):
        """Passes the same tensor more than once."""

        def __init__(self, attn):
            super().__init__()
            self.attn = attn

        def forward(self, *given, **call):
            given = dict(zip(dict.fromkeys(shared), given))
            return self.attn(*(given[k] for k in shared), **call)

    compare(Shared(ours), Shared(theirs), {k: inputs[k] for k in dict.fromkeys(shared)}, **call)


def test_one_key():
    """Its weight is 1 whatever it is like, and it has a gradient of rounding errors where torch has zero."""
    ours, theirs = twins(8, 2)
    q, k = torch.randn(3, 2, 8), torch.randn(1, 2, 8)
    found = [
        with_gradients(module, {"query": q, "key": k, "value": k + 1}, need_weights=False) for module in (ours, theirs)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("need_weights", (False, True), ids=("kernel", "weights"))
def test_dtypes(dtype, need_weights):
    ours, theirs = twins(32, 4, dtype=dtype, batch_first=True)
    x = torch.randn(2, 33, 32).to(dtype)
    mask = torch.ones(33, 33, dtype=torch.bool).triu(1)
    compare(ours, theirs, {"query": x, "key": x + 1, "value": x - 1}, attn_mask=mask, need_weights=need_weights)


@pytest.mark.parametrize("padding", (False, True), ids=("", "padding"))
@pytest.mark.parametrize("need_weights", (False, True), ids=("kernel", "weights"))
@pytest.mark.parametrize("L, S", ((17, 17), (3, 17), (17, 3)))
def test_is_causal_is_a_hint(L, S, need_weights, padding, best):
    ours, theirs = twins(8, 2, batch_first=True)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    q, k = torch.randn(2, L, 8), torch.randn(2, S, 8)
    call = {"attn_mask": mask, "need_weights": need_weights, "is_causal": True}
    if padding:
        call["key_padding_mask"] = torch.arange(S) >= torch.tensor([[S], [max(S - 2, 1)]])
    compare(ours, theirs, {"query": q, "key": k, "value": k + 1}, **call)


def test_the_hint_spares_the_mask():
    """Where it is given, a mask of any values is not read, as by torch."""
    ours, theirs = twins(8, 2)
    x, mask = torch.randn(5, 2, 8), torch.zeros(5, 5)
    call = {"attn_mask": mask, "need_weights": False, "is_causal": True}
    compare(
        ours,
        theirs,
        {"query": x, "key": x, "value": x},
        **{k: v for k, v in call.items() if k != "attn_mask"} | {"attn_mask": mask > 0},
    )
    got = ours(x, x, x, **call)[0]
    want = ours(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), need_weights=False)[0]
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- where torch errs


@pytest.fixture
def blind():
    """The last sequence of two is nothing but padding."""
    ours, theirs = twins(8, 2, batch_first=True)
    return ours.eval(), theirs.eval(), torch.randn(2, 5, 8), torch.tensor([[False] * 5, [True] * 5])


def test_queries_that_see_nothing(blind):
    ours, theirs, x, padding = blind
    with torch.no_grad():
        theirs_fast = theirs(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    assert theirs_fast[1].isnan().all()  # if this fails, torch has mended its fast path
    for need_weights in (False, True):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
            torch.testing.assert_close(out[1], ours.out_proj.bias.expand(5, 8))
            torch.testing.assert_close(out[0], theirs_fast[0])
            assert weights is None or bool((weights[1] == 0).all())


def test_gradients_of_queries_that_see_nothing(blind):
    ours, _, x, padding = blind
    for need_weights in (False, True):
        v = x.clone().requires_grad_()
        out, weights = ours(v, v, v, key_padding_mask=padding, need_weights=need_weights)
        (out.square().sum() + (0 if weights is None else weights.sum())).backward()
        assert v.grad[0].abs().sum() > 0 and bool((v.grad[1] == 0).all())
        assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_the_hint_means_the_same_in_evaluation():
    """Torch's fast path does not know it, and shows every query everything."""
    ours, theirs = twins(8, 2, batch_first=True)
    x, mask = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        theirs.eval()(x, x, x, need_weights=False, is_causal=True)
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            ours.eval()(x, x, x, need_weights=False, is_causal=True)
        got = ours(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]
        want = theirs.train()(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(got, want)


def test_further_keys_are_seen_with_the_hint_too():
    """Torch's kernel puts bias_k beyond the diagonal, and so hides it when told that the mask is causal."""
    ours, _ = twins(8, 2, add_bias_kv=True, add_zero_attn=True)
    x, mask = torch.randn(5, 2, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    by_hint, by_mask = (ours(x, x, x, attn_mask=mask, need_weights=False, is_causal=hint)[0] for hint in (True, False))
    assert torch.equal(by_hint, by_mask)


# ---------------------------------------------------------------- dropout, width, nesting


def test_dropout_while_training():
    ours, theirs = twins(16, 2, dropout=0.3, batch_first=True)
    x = torch.randn(2, 200, 16)
    weights = ours(x, x, x, average_attn_weights=False)[1]
    assert 0.28 < (weights == 0).float().mean() < 0.32
    torch.manual_seed(3)
    first = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], first)
    means = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(200)]).mean(0)
    torch.testing.assert_close(means, ours.eval()(x, x, x)[0], atol=0.05, rtol=0.05)
    torch.testing.assert_close(ours(x, x, x)[0], theirs.eval()(x, x, x)[0])


def test_heads_wider_than_the_kernel():
    ours, theirs = twins(300, 1, batch_first=True)
    x = torch.randn(1, 7, 300)
    compare(ours, theirs, {"query": x, "key": x, "value": x}, need_weights=False)


def test_the_kernel_runs():
    ours, _ = twins(8, 2)
    x = torch.randn(3, 1, 8)
    gk.ops.attention(*[torch.randn(1, 1, 2, 4)] * 3, backend="reference")
    assert last() == "reference"
    ours(x, x, x, need_weights=False)
    assert last() == "cpu"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    ours, theirs = twins(8, 2, batch_first=True)
    parts = [torch.randn(n, 8, requires_grad=True) for n in (3, 1, 5)]
    x = torch.nested.as_nested_tensor(parts)
    out, weights = ours(x, x, x, need_weights=False)
    assert weights is None and out.is_nested
    with torch.no_grad():
        fast = theirs.eval()(x, x, x, need_weights=False)[0]
    each = [ours(v, v, v, need_weights=False)[0] for v in parts]
    for got, want, torchs in zip(out.unbind(), each, fast.unbind()):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got, torchs)
    leaves = [*parts, *ours.parameters()]
    got = torch.autograd.grad(sum(v.square().sum() for v in out.unbind()), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(sum(v.square().sum() for v in each), leaves))
    with pytest.raises(AssertionError, match="without masks"):
        ours(x, x, x)
    with pytest.raises(AssertionError, match="no add_bias_kv"):
        gk.nn.MultiheadAttention(8, 2, add_bias_kv=True)(x, x, x, need_weights=False)


# ---------------------------------------------------------------- errors


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no-grad"))
@pytest.mark.parametrize(
    "kwargs, q, k, v, call",
    [
        ({}, (5,), (5, 8), (5, 8), {}),
        ({}, (5, 2, 8), (5, 8), (5, 2, 8), {}),
        ({}, (5, 8), (5, 2, 8), (5, 8), {}),
        ({}, (5, 2, 6), (5, 2, 8), (5, 2, 8), {}),
        ({}, (5, 2, 8), (5, 2, 8), (4, 2, 8), {}),
        ({"batch_first": True}, (2, 5, 8), (2, 5, 8), (2, 4, 8), {}),
        ({"kdim": 6}, (5, 2, 8), (5, 2, 6), (4, 2, 8), {}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"attn_mask": zeros(5, 5)}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"attn_mask": zeros(2, 5, 3)}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"attn_mask": zeros(5)}),
        ({}, (5, 8), (3, 8), (3, 8), {"attn_mask": zeros(3, 5, 3)}),
        ({}, (5, 8), (3, 8), (3, 8), {"attn_mask": zeros()}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"key_padding_mask": zeros(3)}),
        ({}, (5, 8), (3, 8), (3, 8), {"key_padding_mask": zeros(2, 3)}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"attn_mask": zeros(5, 3).long()}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"key_padding_mask": zeros(2, 3).int()}),
        ({}, (5, 2, 8), (3, 2, 8), (3, 2, 8), {"is_causal": True}),
    ],
    ids=str,
)
def test_in_the_words_of_torch(kwargs, q, k, v, call, grad):
    ours, theirs = twins(8, 2, **kwargs)
    raised = []
    with torch.set_grad_enabled(grad):
        for module in (theirs, ours):
            with pytest.raises((AssertionError, RuntimeError)) as caught:
                module(zeros(*q), zeros(*k), zeros(*v), **call)
            raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("change", ({"num_heads": 3}, {"num_heads": 0}, {"embed_dim": 0}), ids=str)
def test_wrong_construction(change):
    raised = []
    for make in (nn.MultiheadAttention, gk.nn.MultiheadAttention):
        with pytest.raises((AssertionError, ValueError)) as caught:
            make(**{"embed_dim": 8, "num_heads": 2, **change})
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize(
    "q, k, v, call, error, text",
    [
        ((5, 2, 8), (3, 1, 8), (3, 1, 8), {}, RuntimeError, r"key must have 2 sequences.*\[1, 3, 8\]"),
        ((5, 2, 8), (3, 2, 6), (3, 2, 6), {}, RuntimeError, r"key must have 2 sequences.* 8 features.*\[2, 3, 6\]"),
        ((5, 2, 8), (3, 2, 8), (3, 2, 8), {"key_padding_mask": zeros(3, 2)}, AssertionError, r"\(2, 3\), got \(3, 2\)"),
    ],
)
def test_wrong_calls_that_torch_finds_later(q, k, v, call, error, text):
    ours, theirs = twins(8, 2)
    with pytest.raises(error, match=text):
        ours(zeros(*q), zeros(*k), zeros(*v), **call)
    with pytest.raises((AssertionError, RuntimeError)):
        theirs(zeros(*q), zeros(*k), zeros(*v), **call)


def test_masks_of_two_dtypes_with_torchs_warning():
    ours, theirs = twins(8, 2)
    x, call = (
        torch.randn(5, 2, 8),
        {"attn_mask": torch.randn(5, 5), "key_padding_mask": torch.arange(5) > torch.tensor([[4], [2]])},
    )
    found = []
    for module in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(module(x, x, x, **call)[0])
        assert [str(w.message) for w in caught][:1] == [
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead."
        ]
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------- the block


def plain_block(block, x, padding=None):
    def norm(v):
        if block.norm_kind == "rms":
            return F.rms_norm(v, v.shape[-1:], block.weight, block.eps)
        return F.layer_norm(v, v.shape[-1:], block.weight, block.bias, block.eps)

    def attn(v):
        theirs, T = block.theirs, v.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1) if block.causal else None
        return theirs(v, v, v, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]

    return x + attn(norm(x)) if block.norm == "pre" else norm(x + attn(x))


@pytest.mark.parametrize("recompute", (True, False), ids=("again", "kept"))
@pytest.mark.parametrize("causal", (True, False), ids=("causal", ""))
@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("norm", ("pre", "post"))
def test_block(norm, kind, causal, recompute):
    block = gk.nn.AttentionBlock(12, 3, 0.2, norm, causal, norm_kind=kind, recompute=recompute)
    for v in block.parameters():
        nn.init.normal_(v, std=0.5)
    block.eval()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(block.sublayer.state_dict())
    x, padding, found = torch.randn(2, 17, 12), torch.arange(17) >= torch.tensor([[17], [9]]), []
    for dtype, run in ((torch.float32, block), (torch.float32, None), (torch.float64, None)):
        block.to(dtype)
        block.__dict__["theirs"] = theirs.to(dtype)
        v = x.to(dtype).requires_grad_()
        out = (run or (lambda *given: plain_block(block, *given)))(v, padding)
        names = dict((block if run else theirs).named_parameters())
        names = {n.removeprefix("sublayer."): p for n, p in names.items()}
        names |= {"norm weight": block.weight} | ({} if block.bias is None else {"norm bias": block.bias})
        names = {k: p for k, p in names.items() if k not in ("weight", "bias")}
        grads = torch.autograd.grad(out.square().sum(), [v, *names.values()])
        found.append({"out": out, **dict(zip(("x", *names), grads, strict=True))})
    assert_close_to_truth(*found)


@pytest.mark.parametrize("norm", ("pre", "post"))
def test_block_has_the_same_bits_whatever_is_kept(norm):
    found = []
    for recompute in (True, False):
        torch.manual_seed(0)
        block = gk.nn.AttentionBlock(16, 2, 0.3, norm, causal=True, recompute=recompute)
        x = torch.randn(2, 9, 16, requires_grad=True)
        out = block(x)
        first = torch.autograd.grad(out.square().sum(), (x, *block.parameters()), create_graph=True)
        found.append(
            (out, *first, *torch.autograd.grad(sum(v.square().sum() for v in first), (x, *block.parameters())))
        )
    for n, (a, b) in enumerate(zip(*found)):
        assert torch.equal(a, b), n


def test_hooks_of_a_block_s_attention_run():
    block, called = gk.nn.AttentionBlock(8, 2, causal=True), []
    block.sublayer.register_forward_hook(lambda *_: called.append(1))
    block(torch.randn(2, 5, 8))
    assert called == [1]


def test_block_without_a_batch_and_what_it_drops():
    block, x = gk.nn.AttentionBlock(16, 2, dropout=0.5, causal=True), torch.randn(30, 16)
    torch.manual_seed(0)
    first = block(x)
    torch.manual_seed(0)
    assert torch.equal(block(x), first)
    assert 0.4 < ((first - x) == 0).float().mean() < 0.6
    padding = torch.arange(30) > 20
    torch.testing.assert_close(block.eval()(x, padding), block(x.unsqueeze(0), padding.unsqueeze(0))[0])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"num_heads": 3}, "num_heads must divide d_model, got 3 and 8"),
        ({"num_heads": 0}, "num_heads must divide"),
        ({"d_model": 300, "num_heads": 1}, "heads must be at most 256 wide"),
        ({"norm": "in"}, "norm must be 'pre' or 'post'"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_wrong_blocks(change, text):
    with pytest.raises(ValueError, match=text):
        gk.nn.AttentionBlock(**{"d_model": 8, "num_heads": 2, **change})


@pytest.mark.parametrize(
    "x, padding, text",
    [
        (zeros(2, 5, 6), None, r"input must be \[B, T, 8\] or \[T, 8\], got \[2, 5, 6\]"),
        (zeros(1, 2, 5, 8), None, r"got \[1, 2, 5, 8\]"),
        (zeros(2, 5, 8), zeros(5, 2) > 0, r"key_padding_mask must be \[2, 5\] beside input \[2, 5, 8\], got \[5, 2\]"),
    ],
)
def test_wrong_calls_of_a_block(x, padding, text):
    with pytest.raises(RuntimeError, match=text):
        gk.nn.AttentionBlock(8, 2)(x, padding)


def test_wrong_mask_of_a_block():
    with pytest.raises(TypeError, match="key_padding_mask must be bool or floating point, got torch.int64"):
        gk.nn.AttentionBlock(8, 2)(zeros(2, 5, 8), zeros(2, 5).long())
