"""What is said of a GPU and of its memory, over one that is not there."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.cases import Case
from bench.gpu import device
from tests.bench.made_up import MICRO


@pytest.fixture
def fake(monkeypatch):
    properties = SimpleNamespace(
        name="Example GPU", major=9, minor=0, multi_processor_count=132, total_memory=100 << 30, L2_cache_size=50 << 20, uuid="1-2"
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Example GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    return monkeypatch


def answer(monkeypatch, text):
    asked = []

    def run(line, **_):
        asked.append(line)
        if isinstance(text, Exception):
            raise text
        return SimpleNamespace(stdout=text)

    monkeypatch.setattr(device.subprocess, "run", run)
    return asked


def test_clocks_are_asked_of_this_gpu_and_nothing_is_set(fake):
    asked = answer(fake, "Example GPU, 600.1, 2000 MHz\n")
    assert device.smi("name,driver_version,clocks.max.sm") == {
        "name": "Example GPU", "driver_version": "600.1", "clocks.max.sm": "2000 MHz",
    }  # fmt: skip
    (line,) = asked
    assert line == [
        "nvidia-smi",
        "--id=GPU-1-2",
        "--query-gpu=name,driver_version,clocks.max.sm",
        "--format=csv,noheader",
    ]
    answer(fake, FileNotFoundError("nvidia-smi"))
    assert device.smi() == {}


def test_what_a_run_has_in_common(fake, capsys):
    fake.setattr(device, "smi", lambda: {"driver_version": "600.1"})
    fake.setattr(device, "why_not", lambda: None)
    assert device.main([]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cuda" and found["gpu"]["capability"] == "9.0" and found["gpu"]["l2_mib"] == 50
    assert found["versions"]["cudnn"] == "9.20.0" and found["versions"]["driver"] == "600.1"
    assert {"torch", "triton", "nvrtc", "cuda", "cuda_bindings", "python"} <= set(found["versions"])
    assert device.main(["--slug"]) == 0 and capsys.readouterr().out == "example-gpu\n"


def test_without_a_gpu_the_reason_is_given(fake, capsys):
    fake.setattr(device, "why_not", lambda: "torch finds no CUDA device")
    assert device.main([]) == 2 and "torch finds no CUDA device" in capsys.readouterr().err
    fake.undo()
    fake.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in device.why_not()
    fake.setattr(torch.version, "cuda", "13.0")
    fake.setattr(torch.cuda, "is_available", lambda: False)
    assert device.why_not() == "torch finds no CUDA device"


def test_limits_are_those_of_the_parts():
    found = device.limits(MICRO)
    assert (
        found["bfloat16"]["gflops"] == 600000
        and found["tf32"]["gflops"] == 300000
        and found["float32"]["gflops"] == 50000
    )
    assert found["copy"]["gbs"] == 3000
    assert device.limits({**MICRO, "records": []}) == {"waited": 0.0}


def test_memory_is_the_peak_over_what_was_there_before(fake):
    held = iter([100 << 20, 200 << 20])
    peak = iter([130 << 20, 260 << 20])
    reset = []
    fake.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    fake.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    fake.setattr(torch.cuda, "max_memory_allocated", lambda: next(peak))
    case = Case("g", "gru", "training", 3, 2, 8, kind="memory", backend="reference")
    found = device.memory(replace(case, providers=("ours", "torch")))
    assert {k: s.median for k, s in found.items()} == {"ours": 30.0, "torch": 60.0} and len(reset) == 2


def test_a_lost_gpu_is_noticed(fake):
    assert device.dead() is None

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")

    fake.setattr(torch.cuda, "synchronize", fail)
    assert device.dead() == "CUDA error: an illegal memory access was encountered"
