"""Which backend takes a call: the order for each kind of device, what a name asks for, and what importing costs."""

import subprocess
import sys

import pytest
import torch

import gradkernels as gk
from gradkernels import backends
from gradkernels.backends import choose

LSTM = gk.cells.get("lstm")


@pytest.fixture
def machine(monkeypatch):
    """A machine on which backends refuse what the test says; `asked` notes who was asked about which device."""
    monkeypatch.setattr(backends, "_chosen", {})
    refused, asked = {}, []

    def why_not(name):
        def answer(cell=None, dtype=None, device=None):
            asked.append((name, str(device)))
            for key in ((name, device), (name, dtype), name):
                if key in refused:
                    return refused[key]
            return None

        return answer

    for name in ("cpu", "triton", "cuda"):
        monkeypatch.setattr(backends.load(name), "why_not", why_not(name))
    return refused, asked


def chosen(device, dtype=torch.float32, backend=None, cell=LSTM):
    return choose(backend, cell, dtype, torch.device(device)).__name__.rpartition(".")[2]


@pytest.mark.parametrize(
    ("device", "order"),
    [
        ("cpu", ["cpu", "reference"]),
        ("cuda:0", ["cuda", "triton", "reference"]),
        ("xpu:0", ["triton", "reference"]),
        ("mps", ["triton", "reference"]),
    ],
)
def test_the_first_that_can(device, order, machine, monkeypatch):
    refused, asked = machine
    for k, name in enumerate(order):
        monkeypatch.setattr(backends, "_chosen", {})
        assert chosen(device) == name
        assert [n for n, _ in asked] == order[: k + 1][: len(order) - 1]  # nobody else; the reference runs everywhere
        refused[name], asked[:] = "not here", []


def test_each_device_and_dtype_has_its_own(machine):
    refused, asked = machine
    refused["cuda", torch.device("cuda:1")] = "it is an old one"
    refused["cuda", torch.float64] = "no kernels"
    for _ in range(2):
        assert chosen("cuda:0") == "cuda" and chosen("cuda:1") == "triton"
        assert chosen("cuda:0", torch.float64) == "triton"
    assert len(asked) == 5  # remembered: cuda; cuda, triton; cuda, triton


def test_a_backend_that_was_named_runs_or_says_why(machine):
    refused, _ = machine
    refused["cuda"] = "this build of torch has no CUDA"
    text = r"backend 'cuda' cannot run lstm in torch.float32 on cuda:0: this build of torch has no CUDA"
    for _ in range(2):  # nothing is remembered of a refusal
        with pytest.raises(RuntimeError, match=text):
            chosen("cuda:0", backend="cuda")
    del refused["cuda"]
    assert chosen("cuda:0", backend="cuda") == "cuda"
    assert chosen("cuda:0", backend="triton") == "triton" and chosen("cuda:0", backend="reference") == "reference"
    with pytest.raises(ValueError, match="unknown backend 'gpu'; there are reference, cpu, triton, cuda"):
        chosen("cuda:0", backend="gpu")


def test_a_cell_of_ones_own(machine):
    """It is asked about by itself, whatever its name."""
    refused, _ = machine

    @gk.cell
    def lstm(x, r, s):  # the name of another cell, on purpose
        return tanh(x[0] + r[0])  # noqa: F821

    assert chosen("cpu") == "cpu"
    refused["cpu"] = "there is no compiler"
    assert chosen("cpu", cell=lstm) == "reference" and chosen("cpu") == "cpu"
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run lstm .* there is no compiler"):
        chosen("cpu", cell=lstm, backend="cpu")


def test_clipping_is_for_those_that_can(machine, monkeypatch):
    for name, clips in (("cuda", False), ("triton", True)):
        monkeypatch.setattr(backends.load(name), "CLIPS", clips)
    clip = lambda backend: choose(backend, LSTM, torch.float32, torch.device("cuda:0"), clip=True).__name__
    assert clip(None).endswith("triton") and chosen("cuda:0") == "cuda"
    with pytest.raises(RuntimeError, match="cannot run lstm .*: its backward does not clip"):
        clip("cuda")


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_tensors_of_the_cpu_are_refused_with_a_reason(name):
    x, w = torch.zeros(2, 1, 4), torch.zeros(4, 4)
    if backends.load(name).why_not(None, None, x.device) is None:  # Triton's interpreter takes them
        assert name == "triton"
    else:
        with pytest.raises(
            RuntimeError, match=f"backend '{name}' cannot run rnn_tanh in torch.float32 on cpu: it runs on"
        ):
            gk.ops.recurrent(x, w, cell="rnn_tanh", backend=name)
    gk.ops.recurrent(x, w, cell="rnn_tanh")
    assert backends.last() in ("cpu", "reference")


ABSENT = """
import sys
for name in ("triton", "cuda"):
    sys.modules[name] = None  # importing it fails
import torch, gradkernels as gk
layer = gk.nn.LSTM(3, 5)
layer(torch.zeros(2, 1, 3))[0].sum().backward()
assert not any(name in sys.modules for name in ("gradkernels.backends.triton", "gradkernels.backends.cuda"))
table = gk.backends()
assert table["reference"] is None and table["triton"] and table["cuda"], table
for name in ("triton", "cuda"):
    try:
        gk.nn.LSTM(3, 5, backend=name)(torch.zeros(2, 1, 3))
    except RuntimeError as e:
        print(e)
gk.doctor()
"""


def test_without_triton_and_cuda_bindings():
    """Importing needs neither, nor are their backends loaded by calls that do not go there."""
    out = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert len(lines) == 2 and all("cannot run lstm" in line for line in lines), out.stdout
