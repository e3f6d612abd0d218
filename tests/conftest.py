"""Every test of a kernel takes `backend` and runs on each backend that can run here."""

import os

import pytest
import torch

from gradkernels.backends import NAMES, backends

TABLE = backends()
# CI builds the compiled backends: there their absence is a failure, not fewer tests.
REQUIRED = os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1"


@pytest.fixture(params=[n for n in NAMES if REQUIRED or TABLE[n] is None])
def backend(request):
    """Name of a backend; `gradkernels.backends.last()` tells which one really ran."""
    if TABLE[request.param] is not None:
        pytest.fail(f"GRADKERNELS_REQUIRE_COMPILED=1, but {request.param} cannot run: {TABLE[request.param]}")
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_report_header():
    return [f"backend {name}: {'runs' if reason is None else reason}" for name, reason in TABLE.items()]
