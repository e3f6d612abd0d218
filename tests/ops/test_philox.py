"""Random words by place: the published answers, the share of zeros, and the same factors in the kernels."""

import math

import pytest
import torch

import gradkernels as gk
from gradkernels.backends.reference.philox import factors, words

pytestmark = pytest.mark.cpu


def test_published_words():
    """Of Random123's known answers, those that a place can name: counter and key zero."""
    got = words(torch.tensor([0]), torch.tensor(0), torch.arange(4))
    assert got.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def plain(seed, row, column):
    """Philox in Python's own integers."""
    x, k = [column // 4, row & 0xFFFFFFFF, row >> 32, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x[column % 4]


@pytest.mark.parametrize("seed", (1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF))
def test_words_of_far_places(seed):
    rows = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40])
    columns = torch.tensor([0, 3, 4, 1023, 2**20 + 1])
    got = words(torch.tensor([seed]), rows, columns).tolist()
    assert got == [plain(seed, int(r), int(c)) for r, c in zip(rows, columns)]


def test_the_share_of_zeros_is_binomial():
    for p in (0.1, 0.5, 0.93):
        f = factors(torch.tensor([17]), p, torch.arange(500).unsqueeze(1), torch.arange(401), torch.double)
        dropped = (f == 0).double().mean().item()
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / f.numel())
        assert f.max().item() == pytest.approx(1 / (1 - p), rel=1e-15)


@pytest.mark.parametrize("N", (1, 5, 31, 32, 33, 130))
def test_kernels_drop_what_the_reference_drops(N, backend):
    x = torch.randn(7, 3, N)
    torch.manual_seed(3)
    _, s = gk.ops.residual_norm(x, None, dropout_p=0.4, backend=backend)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    kept = factors(seed, 0.4, torch.arange(21).reshape(7, 3, 1), torch.arange(N), x.dtype)
    assert torch.equal(s, x * kept)


def test_everything_and_nothing(backend):
    x, residual = torch.randn(4, 9), torch.randn(4, 9)
    assert torch.equal(gk.ops.residual_norm(x, residual, dropout_p=1.0, backend=backend)[1], residual)
    before = torch.get_rng_state()
    gk.ops.residual_norm(x, residual, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
