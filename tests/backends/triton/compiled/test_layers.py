"""The kernels without a recurrence: residual norm and causal convolution compile for every architecture, registers and what
spills, nothing twice, and what is launched.

Dtypes, sizes and architectures take turns, and others by each version of Triton.
"""

import itertools

import pytest
import torch
import triton

from gradkernels.backends.triton import causal_conv1d, residual_norm
from tests.backends.triton.compiled import offline
from tests.backends.triton.compiled.calls import DTYPES

ARCHITECTURES = (80, 90, 100)
# Bytes of a thread; and in the longest rows, and where an address is needed for every value.
SPILLED, SPILLED_LARGE = 64, 144
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
shift = 1 if triton.__version__ < "3.7" else 0


@pytest.fixture(autouse=True)
def apart(monkeypatch, request):
    """Every test has GPUs of its own, since Triton keeps by device what it has loaded."""
    monkeypatch.setattr(offline.Driver, "get_current_device", lambda gpu: f"{gpu.architecture} {request.node.name}")


def norm(M, N, number="bf16", p=0.1, residual=True, affine=True, rms=False, eps=1e-5):
    zeros = lambda *shape: torch.zeros(shape, dtype=DTYPES[number])
    x, weight = zeros(M, N), zeros(N) if affine else None
    r, seed = zeros(M, N) if residual else None, torch.tensor([3]) if p else None
    given, how = (x, r, weight, weight, seed), (p, eps, rms)
    out = residual_norm.forward(*given, *how)
    residual_norm.backward((x, x), given, out, (True, residual, affine, affine, False), *how)


def convolution(B, T, C, O, K, number="bf16", dilation=4):
    zeros = lambda *shape: torch.zeros(shape, dtype=DTYPES[number])
    given = zeros(B, T, C), zeros(O, C, K), zeros(O)
    out = causal_conv1d.forward(*given, dilation)
    causal_conv1d.backward(out, given, out, (True,) * 3, dilation)


def check(driver, most):
    for kernel in driver.kernels:
        registers, spilled = kernel.resources
        what = f"{kernel.name}: {registers} registers, {spilled} B spilled, {kernel.shared} B shared"
        print(what)
        assert registers <= 255 and spilled <= most and kernel.shared <= offline.SHARED[driver.architecture], what


# ---------------------------------------------------------------- residual norm

LENGTHS = (64, 130, 1024, 8192, 32768, 40000)
KINDS = [dict(zip(("residual", "affine", "rms"), values)) for values in itertools.product((True, False), repeat=3)]
NORMS = [
    pytest.param(
        N, number, ARCHITECTURES[(n + m + shift) % 3], KINDS[(2 * n + 3 * m + shift) % 8], (0.1, 0.0)[(n + m // 2) % 2],
        id=f"{N}-{number}",
    )
    for n, N in enumerate(LENGTHS)
    for m, number in enumerate(("bf16", "fp32", "fp64"))
]  # fmt: skip


@pytest.mark.parametrize("N, number, architecture, kind, p", NORMS)
def test_norm_compiles(N, number, architecture, kind, p):
    with offline.gpu(architecture) as driver:
        norm(512, N, number, p, **kind)
    check(driver, SPILLED_LARGE if N == 32768 else SPILLED)
    # so that as many programs stay on a multiprocessor as it is given; rows that begin anywhere take some more
    (backward,) = (k for k in driver.kernels if k.name == "norm_backward")
    assert number == "fp64" or backward.resources[0] <= (144 if N == 130 else 128)


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("N", [1024, 40000])
def test_norm_compiles_for_another_vendor(architecture, N):
    with offline.gpu(architecture) as driver:
        norm(512, N, "fp16")
    assert {k.name for k in driver.kernels} >= {"norm_forward", "norm_backward", "add_runs"}
    for kernel in driver.kernels:
        assert kernel.binary[:4] == b"\x7fELF" and kernel.shared <= offline.SHARED[architecture]


def test_norm_keeps_a_row_where_it_was_loaded():
    """No tile goes through shared memory forward, nor does one that is read again: loads are as wide as they get."""
    with offline.gpu(90) as driver:
        norm(512, 1024)
    forward = next(text for text in driver.ptx if "norm_forward" in text)
    backward = next(text for text in driver.ptx if "norm_backward" in text)
    assert forward.count("ld.global.v4") + forward.count(".v4.b32 {") >= 4 and "st.shared.v4" not in forward
    assert "cp.async.cg" in backward and "ld.local" not in forward + backward


def test_norm_launches():
    """One forward; one backward, with one more to add up sums for the weights, and one more before where rows are long."""
    names = {}
    with offline.gpu(90) as driver:
        for N, affine in ((512, True), (512, False), (40000, True)):
            driver.launches.clear()
            norm(64, N, affine=affine)
            names[N, affine] = [one.name for one in driver.launches]
    assert names[512, True] == ["norm_forward", "norm_backward", "add_runs"]
    assert names[512, False] == ["norm_forward", "norm_backward"]
    assert names[40000, True] == ["norm_forward", "norm_tilts", "norm_backward", "add_runs"]


def test_norm_has_runs_for_all_multiprocessors():
    """Four programs for each of 132 where there are rows for them; a run for each row tile where there are not."""
    with offline.gpu(90) as driver:
        for M in (1, 7, 64, 10_000):
            norm(M, 1024)
    grids = [one.grid[:2] for one in driver.launches if one.name == "norm_backward"]
    assert grids[:3] == [(1, 1), (7, 1), (64, 1)] and 396 < grids[3][0] <= 528


def test_norm_compiles_nothing_twice():
    """For other rows, another probability, another epsilon."""
    with offline.gpu(90) as driver:
        norm(300, 512)
        before = len(driver.kernels)
        for M, p, eps in ((301, 0.1, 1e-5), (2000, 0.7, 1e-5), (512, 1.0, 1e-6), (3001, 1e-12, 1.0)):
            norm(M, 512, p=p, eps=eps)
    assert len(driver.kernels) == before == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_of_one_compile(architecture):
    """Triton takes an argument of 1 for a constant."""
    with offline.gpu(architecture) as driver:
        norm(7, 1, "fp32")
        norm(1, 3, rms=True)
        convolution(1, 1, 1, 1, 1, "fp16")
    check(driver, SPILLED)
    assert len(driver.kernels) == 9


# ---------------------------------------------------------------- causal convolution

SIZES = {"wide": (8, 2048, 256, 256, 2), "narrow": (2, 500, 64, 64, 3), "odd": (2, 100, 33, 50, 3)}
CONVOLUTIONS = [
    pytest.param(size, number, ARCHITECTURES[(n + m + shift) % 3], id=f"{size}-{number}")
    for n, size in enumerate(SIZES)
    for m, number in enumerate(("bf16", "tf32", "fp32", "fp64"))
]


@pytest.mark.parametrize("size, number, architecture", CONVOLUTIONS)
def test_convolution_compiles(size, number, architecture, monkeypatch):
    monkeypatch.setattr("gradkernels.backends.triton.launch.tf32", lambda: number == "tf32")
    with offline.gpu(architecture) as driver:
        convolution(*SIZES[size], number)
    assert {k.name for k in driver.kernels} == {"conv_taps", "conv_weights"}
    check(driver, SPILLED_LARGE if size == "odd" else SPILLED)
    if number in ("bf16", "tf32") and size == "wide":
        assert all(PRODUCTS[architecture] in text for text in driver.ptx)


@pytest.mark.parametrize("architecture", ["gfx942", "gfx1100"])
def test_convolution_compiles_for_another_vendor(architecture):
    with offline.gpu(architecture) as driver:
        convolution(1, 64, 32, 32, 2, "fp16")
    for kernel in driver.kernels:
        assert kernel.binary[:4] == b"\x7fELF" and kernel.shared <= offline.SHARED[architecture]


def test_convolution_launches():
    """One forward, two backward; the weights' in so many runs of tokens that all multiprocessors have work."""
    with offline.gpu(90) as driver:
        convolution(*SIZES["wide"])
    assert [one.name for one in driver.launches] == ["conv_taps", "conv_taps", "conv_weights"]
    tiles, taps, runs = driver.launches[2].grid
    assert taps == 2 and 132 - tiles * taps < tiles * taps * runs < 132 + tiles * taps


def test_convolution_compiles_nothing_twice():
    """For other tokens, other taps, another dilation."""
    B, T, C, O, K = SIZES["wide"]
    with offline.gpu(90) as driver:
        convolution(B, T, C, O, K)
        before = len(driver.kernels)
        for other in ((B, 2001, C, O, K, "bf16", 1), (B + 3, T, C, O, 1, "bf16", 128), (B, T, C, O, 5, "bf16", 4000)):
            convolution(*other)
    assert len(driver.kernels) == before == 3
