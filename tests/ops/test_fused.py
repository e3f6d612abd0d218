"""What holds for every operation with kernels of its own: derivatives of any order, transforms, graphs."""

import io
from dataclasses import dataclass, field

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export

import gradkernels as gk
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu


@dataclass(frozen=True)
class Case:
    op: str
    shapes: tuple
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self):
        return "-".join([self.op, *(str(k) for k in self.options)])

    def tensors(self, dtype=torch.double):
        generator = torch.Generator().manual_seed(1)
        make = lambda shape: torch.randn(shape, generator=generator, dtype=torch.double).to(dtype)
        return [make(shape).requires_grad_() for shape in self.shapes]

    def call(self, backend=None):
        """With the same dropout at every call."""

        def f(*tensors):
            if "dropout_p" in self.options:
                torch.manual_seed(3)
            return getattr(gk.ops, self.op)(*tensors, backend=backend, **self.options)

        return f


HEADS = ((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 3))
CASES = [
    Case("residual_norm", ((3, 5), (3, 5), (5,), (5,))),
    Case("residual_norm", ((3, 5), (3, 5), (5,), (5,)), {"dropout_p": 0.3, "kind": "rms"}),
    Case("attention", HEADS, {"return_lse": True}),
    Case("attention", HEADS, {"causal": True, "dropout_p": 0.3}),
    Case("attention", HEADS, {"window": (2, 1), "alibi_slopes": torch.tensor([0.5, 0.25])}),
    Case("causal_conv1d", ((2, 5, 3), (2, 3, 2), (2,)), {"dilation": 2}),
]
every = pytest.mark.parametrize("case", CASES, ids=str)
quiet = pytest.mark.parametrize("case", [c for c in CASES if "dropout_p" not in c.options], ids=str)


def first(out):
    return out[0] if isinstance(out, tuple) else out


@every
@pytest.mark.slow
def test_derivatives(case, backend):
    t, f = case.tensors(), case.call(backend)
    assert gradcheck(f, t, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, t, check_fwd_over_rev=True)


@every
def test_only_what_is_wanted(case, backend):
    """Each gradient by itself is the one that comes with the others."""
    t, f = case.tensors(), case.call(backend)
    total = lambda out: sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    whole = torch.autograd.grad(total(f(*t)), t)
    for k in range(len(t)):
        alone = [v.detach().requires_grad_(k == i) for i, v in enumerate(t)]
        (g,) = torch.autograd.grad(total(f(*alone)), alone[k])
        assert_close_to_truth(g, whole[k], whole[k])


@quiet
def test_vmap(case, backend):
    t, f = [v.detach() for v in case.tensors()], case.call(backend)
    for moved in ({0}, set(range(len(t))), {1}):
        dims = tuple(0 if k in moved else None for k in range(len(t)))
        stacked = [torch.stack([v, 2 * v, -v]) if k in moved else v for k, v in enumerate(t)]
        got = torch.vmap(f, dims)(*stacked)
        each = [f(*[v[i] if k in moved else v for k, v in enumerate(stacked)]) for i in range(3)]
        want = [torch.stack(o) for o in zip(*each)] if isinstance(each[0], tuple) else torch.stack(each)
        got = list(got) if isinstance(got, tuple) else got
        assert_close_to_truth(got, want, want)


@quiet
def test_per_sample_gradients(case, backend):
    t, f = [v.detach() for v in case.tensors()], case.call(backend)
    loss = lambda *v: first(f(*v)).square().sum()
    stacked = torch.stack([t[0], 2 * t[0]])
    got = torch.vmap(torch.func.grad(loss), (0, *[None] * (len(t) - 1)))(stacked, *t[1:])
    want = torch.stack([torch.func.grad(loss)(v, *t[1:]) for v in stacked])
    assert_close_to_truth(got, want, want)


@pytest.mark.parametrize("op", ("residual_norm", "attention"))
def test_vmap_and_randomness(op):
    case = next(c for c in CASES if c.op == op)
    t = [v.detach() for v in case.tensors()]
    f = lambda v: first(getattr(gk.ops, op)(v, *t[1:3], dropout_p=0.5))
    stacked = torch.stack([t[0]] * 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(stacked)
    same, different = (torch.vmap(f, randomness=r)(stacked) for r in ("same", "different"))
    assert all(torch.equal(same[0], v) for v in same[1:])
    assert not all(torch.equal(different[0], v) for v in different[1:])


@every
def test_operators(case, backend):
    """torch's own checks of a registered operator: schema, fakes, derivative, AOT with dynamic shapes."""
    forward = getattr(torch.ops.gradkernels, f"{case.op}_forward").default
    seed = [torch.tensor([5])] if "dropout_p" in case.options else [None]
    t = case.tensors(torch.float32)
    p = case.options.get("dropout_p", 0.0)
    if case.op == "residual_norm":
        args = (*t, *seed, p, 1e-5, case.options.get("kind") == "rms", backend)
    elif case.op == "attention":
        slopes = case.options.get("alibi_slopes")
        slopes = slopes if slopes is None else slopes.unsqueeze(0)
        left, right = case.options.get("window", (-1, -1))
        args = (
            *t,
            None,
            slopes,
            None,
            None,
            None,
            *seed,
            case.options.get("causal", False),
            left,
            right,
            p,
            0.5,
            backend,
        )
    else:
        args = (*t, case.options["dilation"], backend)
    torch.library.opcheck(forward, args)


@every
def test_compile(case, backend):
    torch._dynamo.reset()
    t = case.tensors(torch.float32)
    f = lambda *v: getattr(gk.ops, case.op)(*v, backend=backend, **case.options)
    total = lambda out: sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)))
    found = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        out = call(*t)
        found.append((out, torch.autograd.grad(total(out), t)))
    assert_close_to_truth(found[1], found[0], found[0])


@quiet
def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, x):
            return getattr(gk.ops, case.op)(x, *rest, **case.options)

    x, *rest = [v.detach() for v in case.tensors(torch.float32)]
    if case.op == "residual_norm":
        x, rest = torch.randn(6, 5), [None, *rest[1:]]
    many = torch.cat([x, x, x]) if case.op != "attention" else torch.cat([x, x, x], 2)
    dim = {2: Dim("queries")} if case.op == "attention" else {0: Dim("rows")}
    if "alibi_slopes" in case.options:
        dim, many = {}, x
    program = export(Module(), (x,), dynamic_shapes=(dim,) if dim else None)
    data = io.BytesIO()
    torch.export.save(program, data)
    data.seek(0)
    got, want = torch.export.load(data).module()(many), Module()(many)
    assert_close_to_truth(got, want, want)


@pytest.mark.parametrize("op", ("residual_norm", "attention", "causal_conv1d"))
def test_autocast(op):
    case = next(c for c in CASES if c.op == op)
    t = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = getattr(gk.ops, op)(*t[:3])
    out = first(out)
    assert out.dtype == (torch.float32 if op == "residual_norm" else torch.bfloat16)
    assert torch.autograd.grad(out.float().sum(), t[0])[0].dtype == torch.float32
