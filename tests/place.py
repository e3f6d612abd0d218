"""Where the running test computes: the backends and devices there are, and makers of tensors that are on its device.

A test that takes `backend` runs once for every backend on every device that it can run on; the fixture says here on which.
Numbers are drawn on the CPU, so that they are the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import os

import pytest
import torch

from gradkernels.backends import load

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else None
# CI builds the compiled backends: there their absence is a failure, not fewer tests.
REQUIRED = os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1"

device = CPU  # of the test that is running


def why_not(name: str, where: torch.device, dtype: torch.dtype | None = None) -> str | None:
    return load(name).why_not(None, dtype, where)


def places() -> list[tuple[str, torch.device]]:
    """Every backend with a device that it can run on."""
    every = [(name, CPU) for name in ("reference", "cpu")]
    every += [(name, GPU) for name in ("reference", "triton", "cuda") if GPU is not None]
    return [(name, where) for name, where in every if REQUIRED or why_not(name, where) is None]


def param(where: torch.device, value: object, name: str):
    """A parameter of a fixture; on a GPU it is marked so."""
    if where is CPU:
        return pytest.param(value, id=name)
    return pytest.param(value, id=f"{name}-on-{where.type}", marks=pytest.mark.gpu)


@contextlib.contextmanager
def tf32(allowed: bool):
    """cuDNN's setting, and so ours. torch.testing, once imported, forbids setting torch.backends.cudnn.allow_tf32."""
    before = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(allowed)
    try:
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(before)


@contextlib.contextmanager
def at(where: torch.device):
    """The makers of tensors make them there; on a GPU float32 is float32, for cuDNN's layers and so for ours."""
    global device
    if where is CPU:
        yield
        return
    device = where
    try:
        with tf32(False):
            yield
    finally:
        device = CPU


def _here(make):
    @functools.wraps(make)
    def made(*args, requires_grad=False, **kwargs):
        return make(*args, **kwargs).to(device).requires_grad_(requires_grad)

    return made


randn, rand, zeros, ones, full, arange, tensor, randint = map(
    _here, (torch.randn, torch.rand, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.randint)
)
