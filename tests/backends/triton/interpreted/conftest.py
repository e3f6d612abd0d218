"""Here Triton is interpreted, on tensors of the CPU."""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "steps"])
def kind(request, monkeypatch):
    """Which of the two kernels takes every call."""
    from gradkernels.backends.triton import walk

    monkeypatch.setattr(walk, "is_resident", lambda *sizes: request.param == "resident")
    return request.param
