"""norm(residual + dropout(x)) of the kernels: values and gradients by name, the reference's masks bit for bit, long rows."""

import itertools

import pytest
import torch

import gradkernels as gk
from gradkernels.backends import reference, triton  # noqa: F401 - the packages
from gradkernels.backends.reference import residual_norm as definition
from gradkernels.backends.triton import residual_norm as kernels
from tests.close import assert_close_to_truth

NAMES = ("x", "residual", "weight", "bias")
EVERY = [NAMES, NAMES[:2], ("x", "weight"), ("x", "weight", "bias"), ("x",)]
SHAPES = [(3, 17), (1, 1), (2, 5, 63), (130, 3), (40, 127), (3, 2, 128)]
# each row length meets each set of inputs, and dtype, norm and dropout take turns
CASES = [
    pytest.param(shape, given, kind, p, dtype, id=f"{shape}-{'+'.join(given)}-{kind}-{p}-{dtype}".replace("torch.", ""))
    for n, (shape, given) in enumerate(itertools.product(SHAPES, EVERY))
    for kind, p, dtype in [
        (("layer", "rms")[n % 2], (0.0, 0.3)[n // 2 % 2], (torch.float64, torch.float32, torch.float16)[n % 3]),
        (("rms", "layer")[n % 2], (0.3, 0.0)[n // 2 % 2], (torch.float32, torch.float16, torch.float64)[n % 3]),
    ]
]


def tensors(shape, dtype, given):
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double)
    every = 3 * make(*shape) + 1, make(*shape), 1 + make(shape[-1]) / 4, make(shape[-1])
    return [v.to(dtype).requires_grad_() if name in given else None for name, v in zip(NAMES, every)]


def run(args, dtype, kind, p, backend):
    args = [v if v is None else v.detach().to(dtype).requires_grad_() for v in args]
    torch.manual_seed(3)  # of dropout
    y, s = gk.ops.residual_norm(*args, p, kind=kind, backend=backend)
    assert gk.backends.last() == backend
    out = {"y": y, "sum": s}
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(v.shape, generator=generator, dtype=torch.double).to(dtype) for v in out.values()]
    there = {name: v for name, v in zip(NAMES, args) if v is not None}
    return out, dict(zip(there, torch.autograd.grad(list(out.values()), list(there.values()), grads)))


@pytest.mark.parametrize("shape, given, kind, p, dtype", CASES)
def test_values_and_gradients(shape, given, kind, p, dtype):
    args = tensors(shape, dtype, given)
    ours, theirs = (run(args, dtype, kind, p, backend) for backend in ("triton", "reference"))
    assert_close_to_truth(ours, theirs, run(args, torch.float64, kind, p, "reference"))
