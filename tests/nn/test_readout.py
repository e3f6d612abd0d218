"""AttentionReadout against its formulas written out one sequence at a time."""

from functools import partial

import pytest
import torch
from torch.func import functional_call, jvp, vmap

import gradkernels as gk
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu
KINDS = ("dot", "general", "additive")


def readout(kind, **kwargs):
    return gk.nn.AttentionReadout(5 if kind == "dot" else 3, 5, kind, **kwargs)


def plain(module, query, keys, lengths):
    """query [L, B, .], keys [T, B, .] -> context [L, B, .], weights [B, L, T]."""
    context, weights = [], []
    for b in range(keys.shape[1]):
        n, q, k = int(lengths[b]), query[:, b], keys[:, b]
        if module.kind == "additive":
            hidden = torch.tanh(module.query(q)[:, None] + module.key(k[:n])[None])
            scores = module.score(hidden).squeeze(-1)
        else:
            scores = (module.query(q) if module.kind == "general" else q) @ k[:n].T
        w = scores.softmax(-1)
        context.append(w @ k[:n])
        weights.append(torch.cat([w, w.new_zeros(len(q), len(k) - n)], 1))
    return torch.stack(context, 1), torch.stack(weights)


def with_gradients(module, f, *inputs):
    out = f(*inputs)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(sum(v.square().sum() for v in out), [*inputs, *parameters.values()])
    return {"out": out, **dict(zip(("query", "keys", *parameters), grads, strict=True))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("L, T, lengths", [(1, 7, (7, 0, 3)), (4, 17, (1, 16, 17)), (3, 1, (1, 1, 0))], ids=str)
def test_values_and_gradients(kind, L, T, lengths):
    lengths, found = torch.tensor(lengths), []
    query, keys = torch.randn(L, 3, 5 if kind == "dot" else 3), 2 * torch.randn(T, 3, 5)
    module = readout(kind)
    by_formula = partial(plain, module)
    for dtype, f in ((torch.float32, module), (torch.float32, by_formula), (torch.float64, by_formula)):
        module.to(dtype)
        inputs = [v.to(dtype).requires_grad_() for v in (query, keys)]
        found.append(with_gradients(module, partial(f, lengths=lengths), *inputs))
    assert_close_to_truth(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_each_and_the_batch_first(kind):
    module, lengths = readout(kind), torch.tensor([4, 2])
    query, keys = torch.randn(1, 2, 5 if kind == "dot" else 3), torch.randn(4, 2, 5)
    context, weights = module(query, keys, lengths)
    single = module(query[0], keys, lengths)
    assert torch.equal(single[0], context[0]) and torch.equal(single[1], weights[:, 0])
    first = readout(kind, batch_first=True)
    first.load_state_dict(module.state_dict())
    other = first(query.transpose(0, 1), keys.transpose(0, 1), lengths)
    torch.testing.assert_close(other, (context.transpose(0, 1), weights))


def test_without_lengths_every_key_counts():
    module, query, keys = readout("general"), torch.randn(2, 3), torch.randn(4, 2, 5)
    torch.testing.assert_close(module(query, keys), module(query, keys, torch.tensor([4, 4])))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_and_transforms(kind):
    module, lengths = readout(kind).double(), torch.tensor([3, 0])
    query, keys = torch.randn(2, 5 if kind == "dot" else 3), torch.randn(4, 2, 5)
    query, keys = (v.double().requires_grad_() for v in (query, keys))
    names = [n for n, _ in module.named_parameters()]

    def run(q, k, *weights):
        return functional_call(module, dict(zip(names, weights)), (q, k, lengths))

    leaves = (query, keys, *module.parameters())
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    each = vmap(lambda q, k: module(q, k, lengths))(torch.stack([query, -query]), torch.stack([keys, 2 * keys]))
    for n, (q, k) in enumerate(((query, keys), (-query, 2 * keys))):
        torch.testing.assert_close(tuple(v[n] for v in each), module(q, k, lengths))
    moved = jvp(lambda q: module(q, keys, lengths)[0], (query.detach(),), (torch.ones_like(query),))[1]
    eps = 1e-6
    with torch.no_grad():
        ahead, behind = (module(query + s * eps, keys, lengths)[0] for s in (1, -1))
    torch.testing.assert_close(moved, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_compiled_in_one_graph():
    module, lengths = readout("additive"), torch.tensor([3, 0])
    query, keys = torch.randn(2, 3), torch.randn(4, 2, 5)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(query, keys, lengths), module(query, keys, lengths))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kind": "cosine"}, "kind must be one of dot, general, additive, got 'cosine'"),
        ({"kind": "dot"}, "must be the same for kind 'dot', got 3 and 5"),
        ({"kind": "general", "hidden_dim": 4}, "hidden_dim is of kind 'additive', not of 'general'"),
        ({"kind": "additive", "hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
    ],
)
def test_wrong_construction(change, text):
    with pytest.raises(ValueError, match=text):
        gk.nn.AttentionReadout(3, 5, **change)


@pytest.mark.parametrize(
    "query, keys, lengths, error, text",
    [
        ((2, 4), (4, 2, 5), None, RuntimeError, r"query must have 3 features, got \[2, 1, 4\]"),
        ((2, 3), (4, 2, 6), None, RuntimeError, r"keys must have 5 features, got \[2, 4, 6\]"),
        ((3, 3), (4, 2, 5), None, RuntimeError, r"same B, got \[3, 1, 3\] and \[2, 4, 5\]"),
        ((2, 3), (4, 5), None, RuntimeError, r"keys of three"),
        ((2, 3), (4, 2, 5), torch.tensor([1, 2, 3]), RuntimeError, r"lengths must be \[2\] beside keys \[2, 4, 5\]"),
        ((2, 3), (4, 2, 5), torch.tensor([1, 5]), RuntimeError, "lengths must be from 0 to T = 4, got 5"),
        ((2, 3), (4, 2, 5), torch.tensor([1.0, 2.0]), TypeError, "lengths must be int64, got torch.float32"),
    ],
)
def test_wrong_calls(query, keys, lengths, error, text):
    with pytest.raises(error, match=text):
        readout("general")(torch.zeros(query), torch.zeros(keys), lengths)
