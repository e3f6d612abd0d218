"""What doctor says of GPUs, on machines made up for it."""

import json
from types import SimpleNamespace

import pytest
import torch

import gradkernels as gk
from gradkernels import backends

REASONS = {
    "everything runs": {},
    "no Triton": {"triton": "Triton is not installed; pip install triton"},
    "no CUDA kernels": {"cuda": "an old GPU has compute capability 7.5; the kernels need 8.0"},
    "neither": {"triton": "too old", "cuda": "cuda-bindings cannot be imported; pip install cuda-bindings"},
}


@pytest.fixture
def machine(monkeypatch):
    """Two GPUs of which torch knows; where what cannot run, and why, is the test's to say."""
    monkeypatch.setattr(backends, "_chosen", {})
    api = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    api.current_accelerator = lambda *_: torch.device("cuda")
    monkeypatch.setattr(torch, "accelerator", api)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"made up {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))

    def make(reasons, explain=lambda *_: "forward: cluster\n  of 8 blocks"):
        for name in ("triton", "cuda"):
            reason = lambda cell, dtype, device, name=name: reasons.get(name)
            monkeypatch.setattr(backends.load(name), "why_not", lambda *a, f=reason: f(*a) if a else None)
        monkeypatch.setattr(backends.load("cuda"), "explain", explain)

    return make


@pytest.mark.parametrize("name", REASONS)
def test_what_runs_on_each_gpu(name, machine):
    reasons = REASONS[name]
    machine(reasons)
    found, text = gk.doctor.as_dict(), gk.doctor()
    assert json.loads(json.dumps(found)) == found and found["no gpu"] is None
    best = next(n for n in ("cuda", "triton", "reference") if n not in reasons)
    for index, gpu in enumerate(found["gpus"]):
        assert gpu["device"] == f"cuda:{index}" and gpu["capability"] == f"9.{index}" and gpu["used"] == best
        assert gpu["backends"] == {n: reasons.get(n) for n in ("cuda", "triton", "reference")}
        assert f"cuda:{index}: made up {index}, compute capability 9.{index}" in text
        assert (gpu["plan"] is None) == ("cuda" in reasons)
    assert ("      of 8 blocks" in text) == ("cuda" not in reasons)
    assert f"  recurrent layers there take: {best}" in text
    for n, reason in reasons.items():
        assert f"  backend {n:10} cannot run: {reason}" in text
        assert (f"to do: {n}: {reason}" in text) == ("pip install" in reason)
    assert text.count("to do:") == sum("pip install" in r for r in reasons.values())


def test_a_gpu_that_is_lost(machine):
    def explain(*_):
        raise RuntimeError("CUDA_ERROR_DEVICE_LOST")

    machine({}, explain)
    assert "    no plan: CUDA_ERROR_DEVICE_LOST" in gk.doctor()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for version, text in ((None, "this build of torch is for the CPU"), ("13.0", "torch finds none")):
        for name in ("cuda", "hip", "xpu"):
            monkeypatch.setattr(torch.version, name, version if name == "cuda" else None, raising=False)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
        found = gk.doctor.as_dict()
        assert found["gpus"] == [] and found["no gpu"] == text and f"no GPU: {text}" in gk.doctor()
