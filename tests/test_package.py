"""The package as a whole: what importing costs and offers, and what doctor says."""

import json
import subprocess
import sys

import pytest
import torch

import gradkernels as gk
from gradkernels import backends


@pytest.fixture
def broken(monkeypatch):
    """A machine on which the compiled kernels cannot run."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends.load("cpu"), "why_not", lambda *_: "no compiler here")


def test_doctor_says_why_not_and_what_to_do(broken):
    text, found = gk.doctor(), gk.doctor.as_dict()
    assert "cannot run: no compiler here" in text and "apt install g++" in text
    assert found["backends"]["cpu"] == "no compiler here" and found["used on the CPU"] == "reference"
    assert found["compiled module"] is None


def test_doctor_on_this_machine():
    text, found = gk.doctor(), gk.doctor.as_dict()
    assert json.loads(json.dumps(found)) == found
    for part in (gk.__version__, torch.__version__, torch.backends.cpu.get_cpu_capability()):
        assert part in text
    assert (found["used on the CPU"] == "cpu") == (gk.backends()["cpu"] is None)


def test_the_package_is_light_and_its_attributes_are_there():
    """Importing registers the operators and takes a small part of what torch itself takes; the rest comes when asked for."""
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import gradkernels as gk, sys
print((time.perf_counter() - middle) / (middle - start), "gradkernels.nn" in sys.modules, hasattr(torch.ops.gradkernels, "recurrent_forward"))
assert callable(gk.convert) and callable(gk.backends) and callable(gk.doctor) and gk.nn.LSTM and gk.cell and gk.cells.CELLS
assert set(gk.__all__) <= set(dir(gk))
try:
    gk.nothing
except AttributeError as e:
    print(e)
"""
    best = min(run(code) for _ in range(3))
    assert best < 0.25


def run(code):
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    share, early, registered, *error = out.stdout.split()
    assert (
        (early, registered) == ("False", "True") and "has no attribute 'nothing'" in " ".join(error) and not out.stderr
    )
    return float(share)
