"""The layers of a Transformer beside torch's: gradients by name, containers, masks, hooks, and where torch errs."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
D = 12


def twins(kind, dtype=torch.float32, recompute=False, **kwargs):
    how = {"dim_feedforward": 20, "dropout": 0.0, **kwargs}
    theirs = getattr(nn, kind)(D, 3, **how)
    for name, v in theirs.named_parameters():
        if v.dim() == 1:  # torch begins with zeros and ones
            nn.init.normal_(v, 1.0 if "norm" in name and "weight" in name else 0.0, 0.5)
    ours = getattr(gk.nn, kind)(D, 3, **how, recompute=recompute).to(dtype)
    ours.load_state_dict(theirs.to(dtype).state_dict(), strict=True)
    return ours, theirs


def with_gradients(module, inputs, **call):
    inputs = [v.detach().requires_grad_() for v in inputs]
    out = module(*inputs, **call)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double).to(out)
    names, parameters = zip(*module.named_parameters())
    grads = torch.autograd.grad(out, [*inputs, *parameters], gradient)
    return {"out": out, **dict(zip((*(f"input {n}" for n in range(len(inputs))), *names), grads, strict=True))}


def double(v):
    return v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v


def compare(ours, theirs, inputs, **call):
    inputs, call = tree_map_only(torch.Tensor, lambda v: v.to(place.device), (list(inputs), call))
    ours, theirs = ours.to(place.device), theirs.to(place.device)
    truth = copy.deepcopy(theirs).double()
    in_double = with_gradients(truth, map(double, inputs), **{k: double(v) for k, v in call.items()})
    assert_close_to_truth(with_gradients(ours, inputs, **call), with_gradients(theirs, inputs, **call), in_double)


def causal(T, kind=torch.bool):
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return mask if kind is torch.bool else torch.zeros(T, T).masked_fill(mask, -torch.inf)


def drawn(kind, seed):
    """Constructor, inputs and masks of a random call."""
    pick = random.Random(seed)
    B, T, M = pick.choice((1, 3)), pick.choice((3, 17, 63)), pick.choice((2, 17, 127))
    activations = ("relu", "gelu", F.silu, nn.GELU(approximate="tanh"), nn.ReLU(), nn.Tanh())
    kwargs = {k: pick.random() < 0.5 for k in ("norm_first", "batch_first", "bias", "recompute")}
    kwargs["activation"] = pick.choice(activations)
    inputs = [torch.randn(B, n, D) for n in ((T, M) if "Decoder" in kind else (T,))]
    call = {}
    for side, n in (("src" if "Encoder" in kind else "tgt", T), *([("memory", M)] if "Decoder" in kind else [])):
        float_masks = pick.random() < 0.5
        if side != "memory" and pick.random() < 0.6:
            call[f"{side}_mask"] = causal(T, torch.float if float_masks else torch.bool)
            hint = "is_causal" if side == "src" else "tgt_is_causal"
            call[hint] = pick.random() < 0.5
        elif pick.random() < 0.5:
            mask = torch.rand(T, n) < 0.3
            mask[:, :2] = False
            call[f"{side}_mask"] = torch.randn(T, n).masked_fill(mask, -torch.inf) if float_masks else mask
        if pick.random() < 0.5:
            padding = torch.arange(n) >= torch.randint(2, n + 1, (B, 1))
            call[f"{side}_key_padding_mask"] = (
                torch.zeros(B, n).masked_fill(padding, -torch.inf) if float_masks else padding
            )
    if not kwargs["batch_first"]:
        inputs = [v.transpose(0, 1) for v in inputs]
    if B == 1 and pick.random() < 0.5:
        inputs = [v.squeeze(0 if kwargs["batch_first"] else 1) for v in inputs]
        call = {k: v[0] if "padding" in k else v for k, v in call.items()}
    return kwargs, inputs, call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_random_configurations(seed, kind, best):
    torch.manual_seed(seed)
    kwargs, inputs, call = drawn(kind, seed)
    compare(*twins(kind, **kwargs), inputs, **call)


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_size_in_use(kind, best):
    """Widths, lengths and weights as models have them."""
    how = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
    theirs, ours = (getattr(m, kind)(256, 4, 1024, **how) for m in (nn, gk.nn))
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(2, n, 256) for n in ((300, 211) if "Decoder" in kind else (300,))]
    name = "src" if "Encoder" in kind else "tgt"
    call = {f"{name}_mask": causal(300), f"{name}_key_padding_mask": torch.arange(300) >= torch.tensor([[300], [190]])}
    compare(ours, theirs, inputs, **call)


@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype, norm_first, best):
    inputs = [torch.randn(9, 2, D, dtype=dtype) for _ in range(1 + ("Decoder" in kind))]
    compare(*twins(kind, dtype, norm_first=norm_first), inputs)


@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("activation", ("relu", "gelu"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whatever_is_made_again(kind, activation, norm_first):
    """With dropout everywhere, to second order."""
    found, ours = [], None
    for recompute in (True, False):
        ours, _ = twins(kind, torch.double, recompute, dropout=0.3, activation=activation, norm_first=norm_first)
        ours.load_state_dict(found[0][0] if found else ours.state_dict())
        torch.manual_seed(1)
        inputs = [torch.randn(6, 2, D, dtype=torch.double, requires_grad=True) for _ in range(1 + ("Decoder" in kind))]
        out, leaves = ours(*inputs), [*inputs, *ours.parameters()]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(v.square().sum() for v in first), leaves)
        found.append((ours.state_dict(), out, *first, *second))
    for n, (a, b) in enumerate(zip(found[0][1:], found[1][1:])):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_its_modules(kind):
    ours, theirs = twins(kind, dropout=0.4)
    inputs = [torch.randn(6, 2, D) for _ in range(1 + ("Decoder" in kind))]
    assert not torch.equal(ours(*inputs), ours(*inputs))
    for p in (ours, theirs):
        p.eval()
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    ours.dropout1.train()  # as those do who draw samples of a trained model
    assert not torch.equal(ours(*inputs), ours(*inputs))
    ours.dropout1.p = 0.0
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))


def test_dropout_drops_its_share():
    layer = gk.nn.TransformerEncoderLayer(64, 1, 64, dropout=0.25, norm_first=True)
    nn.init.zeros_(layer.linear2.weight), nn.init.zeros_(layer.linear2.bias)
    nn.init.zeros_(layer.self_attn.out_proj.weight), nn.init.ones_(layer.self_attn.out_proj.bias)
    x = torch.randn(100, 1, 64)
    added = layer(x) - x
    assert 0.23 < (added.abs() < 1e-6).float().mean() < 0.27
    torch.testing.assert_close(
        added[added.abs() > 1e-6], torch.tensor(1 / 0.75).expand(int((added.abs() > 1e-6).sum()))
    )


# ---------------------------------------------------------------- what others do to a layer


@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("part", ("norm1", "dropout1", "self_attn", "linear1", "dropout", "linear2", "norm2"))
def test_hooks_of_every_part_run(part, norm_first):
    ours, theirs = twins("TransformerEncoderLayer", norm_first=norm_first)
    seen = []
    getattr(ours, part).register_forward_hook(lambda module, args, out: seen.append(module))
    getattr(ours, part).register_full_backward_hook(lambda *_: seen.append("backward"))
    compare(ours, theirs, [torch.randn(5, 2, D)])
    assert seen == [getattr(ours, part), "backward"]


def test_hooks_of_everybody_run():
    ours, seen = twins("TransformerEncoderLayer")[0], []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    try:
        ours(torch.randn(5, 2, D))
    finally:
        handle.remove()
    assert {"LayerNorm", "Dropout", "Linear", "MultiheadAttention", "TransformerEncoderLayer"} <= set(seen)


def test_parts_put_in_the_place_of_others():
    def change(layer):
        layer.norm1 = nn.Identity()
        layer.norm2 = nn.RMSNorm(D, eps=1e-5)
        layer.linear1 = nn.Sequential(nn.Linear(D, 7), nn.Linear(7, 20))
        layer.dropout2 = nn.Identity()
        return layer

    ours, theirs = map(change, twins("TransformerEncoderLayer", norm_first=True))
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, [torch.randn(5, 2, D)])


def test_a_norm_of_another_shape_is_an_error_in_the_words_of_torch():
    raised = []
    for layer in twins("TransformerEncoderLayer"):
        layer.norm1 = nn.LayerNorm((2, D + 1))
        with pytest.raises(RuntimeError) as caught:
            layer(torch.zeros(5, 2, D))
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


def test_parametrized_parts():
    ours, theirs = twins("TransformerEncoderLayer")
    for layer in (ours, theirs):
        nn.utils.parametrizations.weight_norm(layer.linear1)
        nn.utils.parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, D)
    torch.testing.assert_close(ours(x), theirs(x))


# ---------------------------------------------------------------- containers, and where torch errs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Support for mismatched")
@pytest.mark.parametrize("fast", (True, False), ids=("evaluated", "trained"))
@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
def test_encoder(norm_first, fast):
    """In evaluation torch's container makes a nested tensor of the tokens that are no padding, where norm_first is not set."""
    how = {"dim_feedforward": 20, "dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    kwargs = {"enable_nested_tensor": not norm_first, "norm": nn.LayerNorm(16)}
    ours = nn.TransformerEncoder(gk.nn.TransformerEncoderLayer(16, 4, **how), 2, **kwargs).train(not fast)
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, **how), 2, **kwargs).train(not fast)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[9], [4], [7]])
    for call in (
        {},
        {"src_key_padding_mask": padding},
        {"mask": causal(9)},
        {"mask": causal(9), "src_key_padding_mask": padding},
    ):
        with torch.set_grad_enabled(not fast):
            got, want = ours(x, **call), theirs(x, **call)
        assert got.shape == x.shape
        torch.testing.assert_close(got, want)
        if not fast:
            torch.testing.assert_close(
                *(torch.autograd.grad(v.sum(), list(m.parameters())) for v, m in ((got, ours), (want, theirs)))
            )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", (0, 3), ids=("one-full", "none-full"))
def test_an_encoders_output_has_the_length_of_its_input(padded):
    """Also where every sequence ends in padding; and what is no padding is the same in training and evaluation."""
    layer = gk.nn.TransformerEncoderLayer(16, 4, 20, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9 - padded], [4]])
    trained = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
    assert evaluated.shape == x.shape
    torch.testing.assert_close(evaluated[~padding], trained[~padding])
    assert bool((evaluated[padding] == 0).all())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", (True, False), ids=("pre", "post"))
def test_nested_tensors(norm_first):
    ours, theirs = twins("TransformerEncoderLayer", norm_first=norm_first, batch_first=True)
    parts = [torch.randn(n, D, requires_grad=True) for n in (4, 1, 7)]
    out = ours(torch.nested.as_nested_tensor(parts))
    each = [theirs(v.unsqueeze(0)).squeeze(0) for v in parts]
    torch.testing.assert_close(list(out.unbind()), each)
    got, want = (torch.autograd.grad(sum(v.square().sum() for v in vs), parts) for vs in (out.unbind(), each))
    torch.testing.assert_close(got, want)
    seen = []
    ours.self_attn.register_forward_hook(lambda *_: seen.append("attention"))
    torch.testing.assert_close(list(ours(torch.nested.as_nested_tensor(parts)).unbind()), each)
    assert seen == ["attention"]
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours(torch.nested.as_nested_tensor(parts), src_mask=causal(4))


def test_a_sequence_of_nothing_but_padding():
    """Torch's fast path makes NaN of it."""
    ours, theirs = twins("TransformerEncoderLayer", batch_first=True, activation="gelu")
    x, padding = torch.randn(2, 5, D), torch.tensor([[False] * 5, [True] * 5])
    theirs, even = nn.TransformerEncoderLayer(D, 2, 20, batch_first=True).eval(), torch.no_grad()
    with even:
        assert theirs(x, src_key_padding_mask=padding)[1].isnan().all()  # if this fails, torch has mended it
        evaluated = ours.eval()(x, src_key_padding_mask=padding)
    trained = ours.train()(x, src_key_padding_mask=padding)
    assert trained.isfinite().all()
    torch.testing.assert_close(evaluated, trained)
    trained.sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_gelu_is_the_one_that_was_given():
    """Torch's fast path takes the exact one for any."""
    layer = gk.nn.TransformerEncoderLayer(D, 2, 20, 0.0, nn.GELU(approximate="tanh"), batch_first=True)
    nn.init.normal_(layer.linear1.weight)
    x = 3 * torch.randn(2, 5, D)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer.train()(x))


def test_the_hint_is_an_error_without_a_mask_in_evaluation_too():
    ours, _ = twins("TransformerEncoderLayer", batch_first=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask"):
        ours.eval()(torch.randn(2, 5, D), is_causal=True)


def test_decoder_and_whole_transformer():
    how = {
        "d_model": 16,
        "nhead": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dim_feedforward": 20,
        "dropout": 0.0,
    }
    theirs = nn.Transformer(**how, batch_first=True)
    ours = gk.convert(copy.deepcopy(theirs))
    assert type(ours.decoder.layers[0]) is gk.nn.TransformerDecoderLayer
    src, tgt, mask = torch.randn(2, 7, 16), torch.randn(2, 5, 16), causal(5)
    call = {"tgt_mask": mask, "memory_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [3]])}
    compare(ours, theirs, [src, tgt], **call)


@pytest.mark.parametrize(
    "call",
    [
        {"src_mask": torch.zeros(4, 4)},
        {"src_mask": torch.zeros(5, 5).long()},
        {"src_key_padding_mask": torch.zeros(2, 5).long()},
        {"src_mask": torch.zeros(1, 1, 5, 5)},
    ],
    ids=lambda call: " ".join(f"{k}{list(v.shape)}{v.dtype}" for k, v in call.items()),
)
def test_in_the_words_of_torch(call):
    raised = []
    for layer in twins("TransformerEncoderLayer", batch_first=True):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            layer(torch.zeros(2, 5, D), **call)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_wrong_construction_in_the_words_of_torch():
    for kind in KINDS:
        raised = []
        for make in (getattr(nn, kind), getattr(gk.nn, kind)):
            with pytest.raises((AssertionError, RuntimeError)) as caught:
                make(D, 5) if kind == KINDS[0] else make(D, 3, activation="sigmoid")
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]
