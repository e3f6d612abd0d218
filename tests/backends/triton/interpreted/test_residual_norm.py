"""norm(residual + dropout(x)) of the kernels: values and gradients by name, masks bit for bit, rows of any length."""

import itertools

import pytest
import torch

import gradkernels as gk
from gradkernels.backends.reference import residual_norm as definition
from gradkernels.backends.triton import launch
from gradkernels.backends.triton import residual_norm as kernels
from gradkernels.backends.triton.launch import Limits
from tests.close import assert_close_to_truth
from tests.place import CPU, places

NAMES = ("x", "residual", "weight", "bias")
EVERY = [NAMES, NAMES[:2], ("x", "weight"), ("x", "weight", "bias"), ("x",)]
SHAPES = [(3, 17), (1, 1), (2, 5, 63), (130, 3), (40, 127), (3, 2, 128)]
# every length of a row meets every set of inputs; dtype, norm and dropout take turns
CASES = [
    pytest.param(shape, given, kind, p, dtype, id=f"{shape}-{'+'.join(given)}-{kind}-{p}-{dtype}".replace("torch.", ""))
    for n, (shape, given) in enumerate(itertools.product(SHAPES, EVERY))
    for kind, p, dtype in [
        (("layer", "rms")[n % 2], (0.0, 0.3)[n // 2 % 2], (torch.float64, torch.float32, torch.float16)[n % 3]),
        (("rms", "layer")[n % 2], (0.3, 0.0)[n // 2 % 2], (torch.float32, torch.bfloat16, torch.float64)[n % 3]),
    ]
]


def tensors(shape, dtype, given=NAMES):
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double)
    every = 3 * make(*shape) + 1, make(*shape), 1 + make(shape[-1]) / 4, make(shape[-1])
    return [v.to(dtype).requires_grad_() if name in given else None for name, v in zip(NAMES, every)]


def run(args, dtype, kind="layer", p=0.0, backend="triton"):
    args = [v if v is None else v.detach().to(dtype).requires_grad_() for v in args]
    torch.manual_seed(3)  # of dropout
    y, s = gk.ops.residual_norm(*args, p, kind=kind, backend=backend)
    assert gk.backends.last() == backend
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(v.shape, generator=generator, dtype=torch.double).to(dtype) for v in (y, s)]
    there = {name: v for name, v in zip(NAMES, args) if v is not None}
    return {"y": y, "sum": s}, dict(zip(there, torch.autograd.grad([y, s], list(there.values()), grads)))


def compare(args, dtype, kind="layer", p=0.0):
    """The kernels, and in the same dtype the reference, both against the reference in float64."""
    ours, theirs = (run(args, dtype, kind, p, backend) for backend in ("triton", "reference"))
    assert_close_to_truth(ours, theirs, run(args, torch.float64, kind, p, "reference"))


@pytest.mark.parametrize("shape, given, kind, p, dtype", CASES)
def test_values_and_gradients(shape, given, kind, p, dtype):
    compare(tensors(shape, dtype, given), dtype, kind, p)


@pytest.fixture
def narrow(monkeypatch):
    """Rows of more than 16 values do not stay in registers, and one program at a time walks all rows of its part."""
    monkeypatch.setattr(kernels, "WIDEST", dict.fromkeys(kernels.WIDEST, (16, 16, 16)))
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(launch, "limits", lambda: Limits(64 << 10, 1, False, True))


@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("given", (NAMES, ("x", "weight"), ("x", "bias")), ids="+".join)
@pytest.mark.parametrize("shape, dtype", (((3, 17), torch.float64), ((5, 63), torch.float32), ((2, 48), torch.float16)))
def test_rows_that_do_not_stay_in_registers(shape, dtype, given, p, kind, narrow):
    compare(tensors(shape, dtype, given), dtype, kind, p)


def test_a_row_of_forty_thousand():
    compare(tensors((1, 40_003), torch.float32), torch.float32, p=0.1)


@pytest.mark.parametrize("kind, multiprocessors, shape", (("rms", 1, (71, 130)), ("layer", 600, (129, 513))))
def test_a_program_walks_many_rows(kind, multiprocessors, shape, monkeypatch):
    """On a GPU with one multiprocessor; and on one with many, more programs than their reduction takes at a time."""
    monkeypatch.setattr(launch, "limits", lambda: Limits(64 << 10, multiprocessors, False, True))
    compare(tensors(shape, torch.float32), torch.float32, kind)


@pytest.mark.parametrize("rows", (4, 33))
def test_a_large_mean_costs_no_digits(rows, narrow):
    """Of rows in chunks, whose moments are joined."""
    x = torch.randn(rows, 77) + 3000
    given = [x, None, None, None]
    y, _ = run(given, torch.float32)[0].values()
    truth = torch.nn.functional.layer_norm(x.double(), (77,))
    assert_close_to_truth(y, torch.nn.functional.layer_norm(x, (77,)), truth)


@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 1.0))
@pytest.mark.parametrize("shape", ((7, 50), (3, 128)))
def test_the_mask_of_every_backend(shape, p):
    found = {}
    for backend in ("triton", *(name for name, where in places() if where is CPU)):
        torch.manual_seed(8)
        x = torch.ones(shape, requires_grad=True)
        _, s = gk.ops.residual_norm(x, None, dropout_p=p, backend=backend)
        found[backend] = s, *torch.autograd.grad(s.sum(), x)
    ours = found.pop("triton")
    assert {len(set(v.tolist())) for v in ours[0]} == {2 if 0 < p < 1 else 1}
    for theirs in found.values():
        assert all(map(torch.equal, ours, theirs))


def test_long_rows_drop_what_short_ones_do(narrow):
    x, seed = torch.ones(3, 50), torch.tensor([5])
    _, s, _, _ = kernels.forward(x, None, None, None, seed, 0.4, 1e-5, False)
    assert torch.equal(s, definition.forward(x, None, None, None, seed, 0.4, 1e-5, False)[1])


@pytest.mark.parametrize("given", (NAMES, ("x",)), ids="+".join)
def test_gradcheck(given):
    args = tensors((3, 5), torch.float64, given)
    there = tuple(v for v in args if v is not None)

    def call(*values):
        torch.manual_seed(4)
        left = iter(values)
        return gk.ops.residual_norm(*(None if v is None else next(left) for v in args), 0.3, backend="triton")

    assert torch.autograd.gradcheck(call, there, fast_mode=True)


@pytest.mark.parametrize("grads", ((True, False), (False, True), (False, False)), ids=("norm", "sum", "none"))
@pytest.mark.parametrize("need", ((True,) * 4, (True, False, True, False), (False, True, False, True), (False,) * 4))
@pytest.mark.parametrize("seed", (None, 3), ids=("plain", "dropout"))
def test_some_gradients_of_some_results(grads, need, seed):
    """What the other does not ask for is not computed, and gradients that are not there are zero."""
    args = [*(v.detach() for v in tensors((6, 33), torch.float32)), None if seed is None else torch.tensor([seed])]
    how = 0.0 if seed is None else 0.2, 1e-5, False
    found = []
    for module in (kernels, definition):
        out = module.forward(*args, *how)
        given = [torch.cos(v) if there else None for v, there in zip(out, grads)]
        found.append(module.backward(given, args, out, (*need, False), *how))
    ours, theirs = ([v for v, wanted in zip(got, need) if wanted] for got in found)
    assert [v is not None for v in found[0]] == [*need, False]
    assert_close_to_truth(ours, theirs, theirs)


def test_weights_in_float32_beside_16_bits():
    x, residual, weight, bias = (v.detach() for v in tensors((5, 40), torch.float16))
    found = []
    for backend in ("triton", "reference"):
        wide = [v.float().requires_grad_() for v in (weight, bias)]
        y, _ = gk.ops.residual_norm(x, residual, *wide, backend=backend)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), wide)])
    assert [v.dtype for v in found[0]] == [torch.float16, torch.float32, torch.float32]
    assert_close_to_truth(found[0], found[1], found[1])


def test_tensors_of_any_layout():
    """Turned around, expanded, every other one."""
    x, residual = torch.randn(33, 6).T, torch.randn(33).expand(6, 33)
    weight, bias = torch.randn(66)[::2], torch.randn(1).expand(33)
    given = [x, residual, weight, bias]
    dense = [v.contiguous() for v in given]
    for a, b in zip(run(given, torch.float32), run(dense, torch.float32)):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_bits_in_every_run(monkeypatch):
    monkeypatch.setattr(launch, "limits", lambda: Limits(64 << 10, 3, False, True))
    args = tensors((50, 130), torch.float32)
    one, two = (run(args, torch.float32, p=0.1) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, two) for k in a)


def test_nan_stays_in_its_row():
    args = tensors((4, 33), torch.float32)
    with torch.no_grad():
        args[0][2, 7] = torch.nan
    out, grads = run(args, torch.float32)
    for v in (out["y"], grads["x"], grads["residual"]):
        assert v[2].isnan().all() and not v[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (2, 0, 4)), ids=str)
def test_nothing_to_do(shape):
    out, grads = run(tensors(shape, torch.float32), torch.float32, p=0.5)
    assert out["y"].shape == out["sum"].shape == grads["x"].shape == shape and not grads["weight"].any()


def test_epsilon_keeps_its_digits_in_float64():
    """Beside a variance that is smaller."""
    x = torch.randn(3, 20, dtype=torch.double) * 1e-4
    compare([x, None, None, None], torch.float64)
