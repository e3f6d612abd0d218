"""The operators called directly: every argument that does not fit is refused by name, before a kernel reads it."""

import pytest
import torch

pytestmark = pytest.mark.cpu

FORWARD = {
    "residual_norm": {
        "x": (3, 4),
        "residual": (3, 4),
        "weight": (4,),
        "bias": (4,),
        "seed": torch.tensor([5]),
        "p": 0.25,
        "eps": 1e-5,
        "rms": False,
    },
    "attention": {
        "q": (2, 4, 3, 8),
        "k": (2, 2, 5, 8),
        "v": (2, 2, 5, 6),
        "bias": (1, 4, 1, 5),
        "slopes": (2, 4),
        "cu_q": None,
        "cu_k": None,
        "key_mask": torch.ones(2, 5, dtype=torch.bool),
        "seed": torch.tensor([5]),
        "causal": False,
        "left": -1,
        "right": -1,
        "p": 0.25,
        "scale": 0.5,
    },
    "causal_conv1d": {"x": (2, 7, 3), "weight": (4, 3, 2), "bias": (4,), "dilation": 2},
}
RESULTS = {
    "residual_norm": {"y": (3, 4), "sum": (3, 4), "mean": (3,), "rstd": (3,)},
    "attention": {"out": (2, 4, 3, 6), "lse": (2, 4, 3)},
    "causal_conv1d": {"y": (2, 7, 4)},
}
GRADIENTS = {"residual_norm": ("y", "sum"), "attention": ("out", "lse"), "causal_conv1d": ("y",)}
PACKED = {
    "q": (1, 4, 3, 8),
    "k": (1, 2, 5, 8),
    "v": (1, 2, 5, 6),
    "bias": None,
    "key_mask": None,
    "cu_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    "cu_k": torch.tensor([0, 2, 5], dtype=torch.int32),
}


def filled(given):
    """Tensors of the shapes that stand for them."""
    generator = torch.Generator().manual_seed(1)
    make = lambda v: torch.randn(v, generator=generator) if isinstance(v, tuple) else v
    return {name: make(v) for name, v in given.items()}


def forward(op, backend, **change):
    given = filled(FORWARD[op] | change)
    return getattr(torch.ops.gradkernels, f"{op}_forward")(*given.values(), backend)


def backward(op, backend, **change):
    """`need` and what is named in the operator's schema may be changed."""
    inputs = FORWARD[op] | {k: v for k, v in change.items() if k in FORWARD[op]}
    names = [k for k, v in FORWARD[op].items() if v is None or isinstance(v, (tuple, torch.Tensor))]
    made = filled({f"{k}_": v for k, v in RESULTS[op].items()} | {k: v for k, v in change.items() if k.endswith("_")})
    grads = filled(
        {f"d_{k}": RESULTS[op][k] for k in GRADIENTS[op]} | {k: v for k, v in change.items() if k[:2] == "d_"}
    )
    inputs = filled(inputs)
    tensors = {k: inputs.pop(k) for k in names}
    need = change.get("need", [v is not None and v.is_floating_point() and k != "slopes" for k, v in tensors.items()])
    args = *grads.values(), *tensors.values(), *made.values(), need, *inputs.values(), backend
    return getattr(torch.ops.gradkernels, f"{op}_backward")(*args)


ints, wide = (lambda *shape: torch.zeros(shape, dtype=torch.int64)), (lambda *shape: torch.zeros(shape).double())
cu = lambda *values: torch.tensor(values, dtype=torch.int32)
# of inputs: what is changed, and what is said of it; both operators say it
INPUTS = [
    ("residual_norm", {"x": ()}, "x must have at least one dimension"),
    ("residual_norm", {"x": ints(3, 4)}, "x must be floating point, got torch.int64"),
    ("residual_norm", {"residual": (3, 5)}, r"residual must have shape \[3, 4\] beside x \[3, 4\], got \[3, 5\]"),
    ("residual_norm", {"residual": wide(3, 4)}, "residual must have x's dtype torch.float32, got torch.float64"),
    ("residual_norm", {"weight": (3,)}, r"weight must have shape \[4\] beside x \[3, 4\], got \[3\]"),
    ("residual_norm", {"weight": (4, 1)}, r"weight must have shape \[4\] beside x \[3, 4\], got \[4, 1\]"),
    ("residual_norm", {"weight": torch.zeros(4).half()}, "weight must have x's dtype"),
    ("residual_norm", {"bias": (2,)}, r"bias must have shape \[4\] beside x \[3, 4\], got \[2\]"),
    (
        "residual_norm",
        {"residual": torch.eye(4)[:3].to_sparse()},
        "residual must be dense, got layout torch.sparse_coo",
    ),
    ("residual_norm", {"seed": ints(2)}, r"seed must be int64 \[1\], got torch.int64 \[2\]"),
    ("residual_norm", {"seed": torch.zeros(1)}, r"seed must be int64 \[1\], got torch.float32 \[1\]"),
    ("residual_norm", {"p": 1.5}, "p must be between 0 and 1, got 1.5"),
    ("attention", {"q": (4, 3, 8)}, r"q must have 4 dimensions, got \[4, 3, 8\]"),
    ("attention", {"q": ints(2, 4, 3, 8)}, "q must be floating point, got torch.int64"),
    ("attention", {"q": (2, 3, 3, 8)}, r"heads of q .* multiple .* q \[2, 3, 3, 8\], k \[2, 2, 5, 8\]"),
    ("attention", {"q": (2, 4, 3, 7)}, r"q and k .* last dimension, got q \[2, 4, 3, 7\], k \[2, 2, 5, 8\]"),
    ("attention", {"q": (2, 4, 3, 300), "k": (2, 2, 5, 300)}, "between 1 and 256"),
    (
        "attention",
        {"k": (1, 2, 5, 8), "v": (1, 2, 5, 6)},
        r"k must have the batch of q \[2, 4, 3, 8\], got \[1, 2, 5, 8\]",
    ),
    ("attention", {"k": wide(2, 2, 5, 8)}, "k must have q's dtype torch.float32, got torch.float64"),
    ("attention", {"v": (2, 2, 4, 6)}, r"k and v must agree .* k \[2, 2, 5, 8\], v \[2, 2, 4, 6\]"),
    ("attention", {"v": (2, 2, 5, 0)}, "between 1 and 256"),
    ("attention", {"bias": (4, 1, 5)}, r"bias must have 4 dimensions, .* \[2, 4, 3, 5\], got \[4, 1, 5\]"),
    ("attention", {"bias": (1, 4, 2, 5)}, r"bias .* broadcastable to \[2, 4, 3, 5\], got \[1, 4, 2, 5\]"),
    ("attention", {"bias": torch.ones(1, 1, 3, 5, dtype=torch.bool)}, "bias must be floating point, got torch.bool"),
    ("attention", {"slopes": (4,)}, r"slopes must be \[2 or 1, 4\] beside q \[2, 4, 3, 8\], got \[4\]"),
    ("attention", {"slopes": (2, 3)}, r"slopes must be \[2 or 1, 4\] beside q \[2, 4, 3, 8\], got \[2, 3\]"),
    ("attention", {"slopes": ints(2, 4)}, "slopes must be floating point, got torch.int64"),
    ("attention", {"key_mask": torch.ones(2, 4).bool()}, r"key_mask must have shape \[2, 5\] .* got \[2, 4\]"),
    ("attention", {"key_mask": torch.ones(2, 5)}, "key_mask must be bool"),
    ("attention", {"seed": ints(0)}, r"seed must be int64 \[1\], got torch.int64 \[0\]"),
    ("attention", {"p": -0.5}, "p must be between 0 and 1, got -0.5"),
    ("attention", {"cu_q": cu(0, 3)}, r"cu_q and cu_k must both be \[n \+ 1\], got cu_q \[2\], cu_k None"),
    ("attention", {"cu_q": cu(0, 3), "cu_k": cu(0, 5)}, r"cu_q goes with a batch of one, .* got q \[2, 4, 3, 8\]"),
    ("attention", PACKED | {"cu_q": cu(0, 3)}, r"got cu_q \[2\], cu_k \[3\]"),
    ("attention", PACKED | {"cu_q": cu(0, 1, 4)}, r"cu_q must grow from 0 to the 3 tokens of q, got \[0, 1, 4\]"),
    ("attention", PACKED | {"cu_k": cu(0, 7, 5)}, r"cu_k must grow from 0 to the 5 tokens of k, got \[0, 7, 5\]"),
    ("attention", PACKED | {"cu_k": cu(0, 2, 5).long()}, "cu_k must be int32, got torch.int64"),
    ("causal_conv1d", {"x": (7, 3)}, r"x must be \[B, T, C\], got \[7, 3\]"),
    ("causal_conv1d", {"x": ints(2, 7, 3)}, "x must be floating point, got torch.int64"),
    ("causal_conv1d", {"weight": (4, 5, 2)}, r"weight must be \[O, 3, K\] beside x \[2, 7, 3\], got \[4, 5, 2\]"),
    ("causal_conv1d", {"weight": (4, 3, 0)}, r"weight must be \[O, 3, K\] beside x \[2, 7, 3\], got \[4, 3, 0\]"),
    ("causal_conv1d", {"weight": wide(4, 3, 2)}, "weight must have x's dtype torch.float32, got torch.float64"),
    ("causal_conv1d", {"bias": (3,)}, r"bias must be \[4\] beside weight \[4, 3, 2\], got \[3\]"),
    ("causal_conv1d", {"dilation": 0}, "dilation must be at least 1, got 0"),
]
# of backward alone
BACKWARD = [
    *((op, {f"d_{k}": RESULTS[op][k][:-1]}, rf"d_{k} must have shape \[.*\] beside [xq] \[.*, got \[")
      for op in FORWARD for k in GRADIENTS[op]),
    *((op, {f"d_{k}": wide(*RESULTS[op][k])}, f"d_{k} must have the dtype torch.float32 .* got torch.float64")
      for op in FORWARD for k in GRADIENTS[op]),
    *((op, {f"{k}_": (1, *RESULTS[op][k])}, rf"{k}_ must have shape \[.*\] beside [xq] \[.*, got \[1, ")
      for op, k in (("residual_norm", "sum"), ("residual_norm", "mean"), ("residual_norm", "rstd"), ("attention", "out"), ("attention", "lse"))),
    ("residual_norm", {"rstd_": torch.ones(3).half()}, "rstd_ must have the dtype torch.float32 .* got torch.float16"),
    *((op, {f"d_{k}": None for k in GRADIENTS[op]}, f"{op}_backward needs a gradient: d_{GRADIENTS[op][0]}") for op in FORWARD),
    *((op, {"need": [True]}, "need must be [0-9] flags, for [xq], .*, got 1") for op in FORWARD),
    ("residual_norm", {"need": [True] * 5}, "need asks for the gradient of seed, which has none: seed is torch.int64"),
    ("causal_conv1d", {"bias": None, "need": [True] * 3}, "need asks for the gradient of bias, which has none: bias is None"),
]  # fmt: skip
IDS = lambda v: v if isinstance(v, str) and v in FORWARD else "+".join(v) if isinstance(v, dict) else ""


@pytest.mark.parametrize("op", FORWARD)
def test_what_fits_is_taken(op, backend):
    """Or the tests below would prove nothing."""
    forward(op, backend), backward(op, backend)
    if op == "attention":
        rows = {"out_": (1, 4, 3, 6), "lse_": (1, 4, 3), "d_out": (1, 4, 3, 6), "d_lse": (1, 4, 3)}
        forward(op, backend, **PACKED), backward(op, backend, **PACKED, **rows)


@pytest.mark.parametrize("call", (forward, backward), ids=("forward", "backward"))
@pytest.mark.parametrize("op, change, text", INPUTS, ids=IDS)
def test_inputs_that_do_not_fit(op, change, text, call, backend):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=text):
        call(op, backend, **change)


@pytest.mark.parametrize("op, change, text", BACKWARD, ids=IDS)
def test_backward_of_what_does_not_fit(op, change, text, backend):
    with pytest.raises(RuntimeError, match=text):
        backward(op, backend, **change)


@pytest.mark.parametrize("op, name", [("residual_norm", "x"), ("attention", "q"), ("causal_conv1d", "weight")])
def test_what_may_not_be_left_out(op, name, backend):
    for call in (forward, backward):
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got None"):
            call(op, backend, **{name: None})


def test_gradients_in_another_layout(backend):
    with pytest.raises(TypeError, match="d_y must be dense, got layout torch.sparse_coo of shape"):
        backward("causal_conv1d", backend, d_y=torch.ones(2, 7, 4).to_sparse())


def test_saved_tensors_that_a_hook_changed(backend):
    """What hooks make of saved tensors comes to backward past the public function."""
    from gradkernels.ops import residual_norm

    x = torch.randn(6, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v[:1] if v.shape == (6,) else v):
        y = residual_norm(x, None, prenorm=False, backend=backend)
    with pytest.raises(RuntimeError, match=r"mean_ must have shape \[6\] .* got \[1\]"):
        y.sum().backward()


def test_what_was_kept_may_have_any_strides(backend):
    """Statistics and outputs are read by their strides."""
    for op, names in (("residual_norm", ("sum_", "mean_", "rstd_")), ("attention", ("out_", "lse_"))):
        kept = {f"{k}_": v for k, v in filled(RESULTS[op]).items()}
        strided = {k: torch.stack([kept[k], kept[k]], -1)[..., 0] for k in names}
        want, got = backward(op, backend, **kept), backward(op, backend, **kept | strided)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dropout", (False, True), ids=("plain", "dropout"))
@pytest.mark.parametrize("kind", (False, True), ids=("layer", "rms"))
def test_of_the_sum_alone(dropout, kind, backend):
    """Where the norm was not used its statistics are not: they may be anything."""
    change = {"rms": kind} | ({} if dropout else {"seed": None})
    nan = torch.full((3,), torch.nan)
    dsum = torch.randn(3, 4)
    dx, dresidual, dweight, dbias, _ = backward(
        "residual_norm", backend, d_y=None, d_sum=dsum, mean_=nan, rstd_=nan, **change
    )
    factors = dx / dsum
    assert torch.equal(dresidual, dsum) and not dweight.any() and not dbias.any()
    allowed = (0.0, 1 / 0.75) if dropout else (1.0,)
    assert all(min(abs(f - a) for a in allowed) < 1e-6 for f in factors.flatten().tolist())
