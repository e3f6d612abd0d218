"""Attention: values and gradients against scores written out, torch's own samples, edges and errors."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import gradkernels as gk
from gradkernels.backends import last
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu


@dataclass(frozen=True)
class Case:
    B: int = 2
    Hq: int = 2
    Hk: int = 2
    Tq: int = 5
    Tk: int = 5
    D: int = 8
    E: int = 8
    causal: bool = False
    window: tuple | None = None
    bias: tuple = ()  # its shape
    slopes: tuple = ()
    hidden: bool = False  # some keys
    layout: str = field(default="bhtd")

    def __str__(self):
        words = [f"{self.B}x{self.Hq}/{self.Hk}x{self.Tq}/{self.Tk}x{self.D}/{self.E}"]
        words += [k for k in ("causal", "hidden") if getattr(self, k)] + [f"window{self.window}"] * bool(self.window)
        words += [f"{k}{getattr(self, k)}" for k in ("bias", "slopes") if getattr(self, k)]
        return "-".join([*words, *([self.layout] if self.layout != "bhtd" else [])])

    def tensors(self, dtype):
        generator = torch.Generator().manual_seed(1)
        make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double).to(dtype)

        def heads(H, T, D):
            v = make(self.B, T, H, D).transpose(1, 2)
            return (v.contiguous() if self.layout == "bhtd" else v).requires_grad_()

        out = {"q": heads(self.Hq, self.Tq, self.D), "k": heads(self.Hk, self.Tk, self.D)}
        out["v"] = heads(self.Hk, self.Tk, self.E)
        if self.bias:
            out["bias"] = make(*self.bias).requires_grad_()
        return out

    def options(self):
        generator = torch.Generator().manual_seed(2)
        out = {"causal": self.causal, "window": self.window}
        if self.slopes:
            out["alibi_slopes"] = torch.rand(*self.slopes, generator=generator)
        if self.hidden:
            out["key_mask"] = torch.rand(self.B, self.Tk, generator=generator) > 0.4
            out["key_mask"][-1] = False  # a sequence of which nothing can be seen
        return out


def written_out(q, k, v, bias=None, *, causal=False, window=None, alibi_slopes=None, key_mask=None):
    """The definition by hand -> out, lse."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s, (Tq, Tk) = (q @ k.mT) / math.sqrt(q.shape[-1]), (q.shape[2], k.shape[2])
    i, j = torch.arange(Tq).unsqueeze(1) + Tk - Tq, torch.arange(Tk)
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        s = s - torch.atleast_2d(alibi_slopes).to(s.dtype)[:, :, None, None] * (i - j).abs()
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        left, right = window
        seen = seen & (j >= i - (Tk if left is None else left)) & (j <= i + (Tk if right is None else right))
    seen = seen.expand(q.shape[0], 1, Tq, Tk)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    s = s.masked_fill(~seen, -torch.inf)
    some = seen.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(some, s, 0.0), -1).masked_fill(~some, 0.0)
    return weights @ v, s.logsumexp(-1)


CASES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(causal=True, Tq=70, Tk=70, D=17, E=33),
    Case(B=1, Hq=4, Hk=2, Tq=3, Tk=131, causal=True, layout="bthd"),
    Case(B=1, Tq=130, Tk=65, causal=True),  # the first queries see nothing
    Case(Tq=150, Tk=190, window=(20, 3), D=5),
    Case(Tq=65, Tk=65, window=(None, 0), E=16, layout="bthd"),
    Case(B=3, Hq=6, Hk=1, Tq=9, Tk=64, hidden=True),
    Case(Tq=7, Tk=9, bias=(2, 7, 9)),
    Case(Tq=66, Tk=9, bias=(2, 1, 66, 1), causal=True),
    Case(Tq=66, Tk=67, slopes=(2,), causal=True),
    Case(Tq=6, Tk=7, slopes=(2, 2), hidden=True, bias=(9 - 2,)),
]
every = pytest.mark.parametrize("case", CASES, ids=str)


def run(f, case, dtype, like=None):
    t = {k: v.detach().to(dtype).requires_grad_() for k, v in case.tensors(like or dtype).items()}
    out = f(**t, **case.options())
    seen = torch.isfinite(out[1])
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(v.shape, generator=generator, dtype=torch.double).to(v.dtype) for v in out]
    loss = [out[0], out[1].masked_fill(~seen, 0.0)]
    return {"out": list(out), "grads": dict(zip(t, torch.autograd.grad(loss, list(t.values()), grads)))}


@every
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_values_and_gradients(case, dtype, backend):
    ours = run(lambda **t: gk.ops.attention(**t, backend=backend, return_lse=True), case, dtype)
    assert last() == backend
    peer, truth = (run(lambda **t: written_out(**t), case, d, dtype) for d in (dtype, torch.double))
    peer["out"][1] = peer["out"][1].to(ours["out"][1].dtype)
    assert_close_to_truth(ours, peer, truth)


@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window": (1, 2)}), ids=str)
def test_sequences_one_after_the_other(options, backend):
    """As one by one; an empty one among them."""
    cu_q, cu_k = torch.tensor([0, 3, 3, 73, 80], dtype=torch.int32), torch.tensor([0, 5, 9, 80, 80], dtype=torch.int32)
    q, k, v = (torch.randn(80, h, 8, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    got = gk.ops.attention(q, k, v, cu_seqlens=(cu_q, cu_k), backend=backend, return_lse=True, **options)
    parts = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        one = (t[m:n].transpose(0, 1).unsqueeze(0) for t, m, n in ((q, a, b), (k, c, d), (v, c, d)))
        parts.append([o.squeeze(0) for o in gk.ops.attention(*one, backend="reference", return_lse=True, **options)])
    out, lse = torch.cat([o.transpose(0, 1) for o, _ in parts]), torch.cat([m for _, m in parts], 1)
    assert_close_to_truth(got, (out, lse), (out, lse))
    d = torch.randn_like(out)
    grads = [torch.autograd.grad(o, (q, k, v), d) for o in (got[0], out)]
    assert_close_to_truth(grads[0], grads[1], grads[1])


def test_dropout_drops_what_the_reference_drops(backend):
    q, k, v = (torch.randn(2, 3, t, 16, dtype=torch.double, requires_grad=True) for t in (70, 90, 90))
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(7)
        out = gk.ops.attention(q, k, v, causal=True, dropout_p=0.35, backend=name)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert_close_to_truth(found[0], found[1], found[1])


def test_dropout_of_16_bits(backend):
    """An odd number of queries: sums over them go by pairs."""
    q, k, v = (torch.randn(1, 2, 71, 16).bfloat16().requires_grad_() for _ in range(3))
    found = []
    for dtype in (torch.bfloat16, torch.double):
        t = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        torch.manual_seed(7)
        out = gk.ops.attention(*t, dropout_p=0.35, backend=backend if dtype == torch.bfloat16 else "reference")
        found.append([out, *torch.autograd.grad(out.sum(), t)])
    for got, want in zip(*found):
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("threads", (1, 3, 16))
def test_the_same_bits_for_any_number_of_threads(threads):
    """With few heads, threads share one; the sums stay in one order."""
    q, k, v = (torch.randn(1, 2, 300, 24, requires_grad=True) for _ in range(3))
    found, before = [], torch.get_num_threads()
    try:
        for n in (2, threads):
            torch.set_num_threads(n)
            torch.manual_seed(7)
            out = gk.ops.attention(q, k, v, causal=True, dropout_p=0.1)
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_what_is_hidden_does_not_matter(backend):
    q, k, v = (torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[:, :, 69], v[:, :, 69] = 1e20, -1e20
    mask = torch.ones(1, 70, dtype=torch.bool)
    mask[0, 69] = False
    found = []
    for hidden in ({"key_mask": mask}, {"bias": mask}, {}):
        n = 70 if hidden else 69
        out = gk.ops.attention(q, k[:, :, :n], v[:, :, :n], backend=backend, **hidden)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert_close_to_truth(found[0], found[2], found[2])
    assert_close_to_truth(found[1], found[2], found[2])


def test_large_scores_do_not_overflow(backend):
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    out = gk.ops.attention(1e3 * q, 1e3 * k, v, backend=backend)
    want = F.scaled_dot_product_attention(1e3 * q.double(), 1e3 * k.double(), v.double())
    peer = F.scaled_dot_product_attention(1e3 * q, 1e3 * k, v)
    assert_close_to_truth(out, peer, want)


def test_samples_of_torch(backend):
    """PyTorch's own sample inputs for scaled_dot_product_attention, but those that drop at random."""
    (info,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    seen = 0
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        (k, v, *mask), options = sample.args, dict(sample.kwargs)
        q, mask = sample.input, options.pop("attn_mask", mask[0] if mask else None)
        if q.dim() != 4 or options.get("dropout_p") or q.shape[:2] != k.shape[:2]:
            continue
        causal = options.pop("is_causal", False)
        if causal and q.shape[2] != k.shape[2]:
            continue  # aligned at the end here, at the start there
        options.pop("enable_gqa", None), options.pop("dropout_p", None)
        out = gk.ops.attention(q, k, v, causal, mask, backend=backend, **options)
        wide = mask.double() if mask is not None and mask.is_floating_point() else mask
        peer, truth = (
            F.scaled_dot_product_attention(*t, attn_mask=m, is_causal=causal, **options)
            for t, m in (((q, k, v), mask), ((q.double(), k.double(), v.double()), wide))
        )
        assert_close_to_truth(out, peer, truth)
        seen += 1
    assert seen > 2


@pytest.mark.parametrize("B, Tq, Tk", ((0, 3, 3), (2, 0, 3), (2, 3, 0)))
def test_nothing_to_do(B, Tq, Tk, backend):
    q, k, v = (torch.randn(B, 2, t, 4, requires_grad=True) for t in (Tq, Tk, Tk))
    out = gk.ops.attention(q, k, v, backend=backend)
    assert out.shape == (B, 2, Tq, 4) and not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"q": ones(2, 3, 4)}, RuntimeError, r"must have 4 dimensions, got q \[2, 3, 4\], k \[2, 2, 5, 8\]"),
        ({"q": ones(2, 2, 5, 7)}, RuntimeError, r"same last dimension, got q \[2, 2, 5, 7\], k \[2, 2, 5, 8\]"),
        ({"q": ones(2, 3, 5, 8)}, RuntimeError, "heads of q must be a multiple"),
        ({"v": ones(2, 2, 6, 8)}, RuntimeError, r"agree in batch.* v \[2, 2, 6, 8\]"),
        ({"k": ones(2, 2, 5, 8).double()}, RuntimeError, "same dtype, got torch.float32, torch.float64"),
        ({"q": ones(2, 2, 5, 8, dtype=torch.long)}, TypeError, "q must be floating point, got torch.int64"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"bias": ones(3, 5)}, RuntimeError, r"bias must be broadcastable to \[2, 2, 5, 5\], got \[3, 5\]"),
        ({"bias": ones(5, 5, dtype=torch.long)}, TypeError, "bias must be floating point or bool"),
        ({"key_mask": ones(2, 4, dtype=torch.bool)}, RuntimeError, r"key_mask must be \[2, 5\], got \[2, 4\]"),
        ({"key_mask": ones(2, 5)}, TypeError, "key_mask must be bool"),
        ({"alibi_slopes": ones(3)}, RuntimeError, r"alibi_slopes must be \[2\] or \[2, 2\], got \[3\]"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1"),
        ({"window": (-2, 0)}, ValueError, "window must not be negative, got -2 to the left"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'"),
        ({"k": ones(2, 2, 5, 8, device="meta")}, RuntimeError, "q is on cpu and k is on meta"),
    ],
)
def test_errors(change, error, text):
    given = {"q": ones(2, 2, 5, 8), "k": ones(2, 2, 5, 8), "v": ones(2, 2, 5, 8)} | change
    with pytest.raises(error, match=text):
        gk.ops.attention(**given)


@pytest.mark.parametrize("cu", ([0, 3], [1, 5], [0, 4, 3, 5], []), ids=str)
def test_errors_of_cu_seqlens(cu):
    q = torch.ones(5, 2, 8)
    with pytest.raises(RuntimeError, match="cu_seqlens must grow from 0 to the 5 tokens of q"):
        gk.ops.attention(q, q, q, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
