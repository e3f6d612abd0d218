"""Every test of a kernel takes `backend` and runs on each backend that can run here, on each device; see place.py.

Marks: `gpu` is set where the device is one; `cpu` keeps a test on the CPU; `float64` leaves out backends that do not compute in
it, as does a parameter torch.float64. Where there is no GPU there are no tests of one, rather than skipped ones.
"""

import pytest
import torch

import gradkernels.flow  # noqa: F401 - or pytest, collecting doctests file by file, puts modules in the place of functions there
from gradkernels.backends import backends, choose
from gradkernels.cells import CELLS
from tests import place
from tests.flow.made_up import chromium

collect_ignore = [] if place.GPU else ["nn/test_gpu.py"]
collect_ignore += [] if chromium() else ["flow/test_report_page.py"]


def pytest_collection_modifyitems(config, items):
    """Drops what is about the CPU elsewhere, and what a backend does not compute."""

    def wanted(item):
        given = item.callspec.params if hasattr(item, "callspec") else {}
        name, where = None, given.get("best", place.CPU)
        if isinstance(given.get("backend"), tuple):
            name, where = given["backend"]
        if item.get_closest_marker("cpu") and where is not place.CPU:
            return False
        wide = item.get_closest_marker("float64") or torch.float64 in given.values()
        return not (wide and name and place.why_not(name, where, torch.float64))

    def turn(item):
        """Tests of a GPU in the order of what they can find, should time be short."""
        if not item.get_closest_marker("gpu"):
            return 0
        given = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        name = given[0] if isinstance(given, tuple) else given
        return 1 if item.path.name == "test_gpu.py" else {"cuda": 2, None: 3, "triton": 4}.get(name, 5)

    every = list(items)
    items[:] = sorted(filter(wanted, every), key=turn)
    if left_out := set(every) - set(items):
        config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(params=[place.param(where, (name, where), name) for name, where in place.places()])
def backend(request):
    """Name of a backend; `gradkernels.backends.last()` tells which one really ran."""
    name, where = request.param
    reason = place.why_not(name, where)
    if reason is not None:
        pytest.fail(f"GRADKERNELS_REQUIRE_COMPILED=1, but {name} cannot run: {reason}")
    with place.at(where):
        yield name


@pytest.fixture(params=[place.param(where, where, "best") for where in (place.CPU, place.GPU) if where is not None])
def best(request):
    """The backend that is taken when none is named: what a graph holds is an operator, whichever backend that runs."""
    with place.at(request.param):
        yield choose(None, CELLS["lstm"], torch.float32, request.param).__name__.rpartition(".")[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_report_header():
    found = [f"backend {name}: {'runs' if reason is None else reason}" for name, reason in backends().items()]
    return [*found, f"pages: {chromium() or 'not tested: no Chromium, or no playwright, is installed'}"]
