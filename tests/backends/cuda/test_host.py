"""A call of the backend from tensors to launches, over the stub of a driver: all that a GPU is not needed for."""

import re
import sys

import pytest

from tests.backends.cuda import stub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stub is a shared library as Linux has it")

# Tensors are on the CPU, and stay what torch.empty makes of them: the stub launches nothing.
CALLS = """
from gradkernels.backends import cuda
from gradkernels.backends.cuda import nvrtc, plan

def compile_nothing():
    said = "Used 99 registers; 0 bytes spill stores, 0 bytes spill loads"
    nvrtc.compile = lambda *_: nvrtc.Compiled(b"\\177ELF", said)

def gpu():
    machine = driver.Machine(0, lambda index: STREAM)
    driver.machine = lambda device: machine
    return machine

def forward(H, B, T=3, dtype=torch.bfloat16):
    cell = CELLS["lstm"]
    GH = cell.G * H
    x, w_ih, w_hh, b = (torch.randn(*shape).to(dtype) for shape in ((T, B, 5), (GH, 5), (GH, H), (GH,)))
    state = [torch.zeros(B, H, dtype=dtype) for _ in range(cell.S)]
    return x, w_ih, w_hh, state, cuda.forward(cell, x, w_ih, b, w_hh, b, None, state, None, None, False, 2)

def backward(H, B, T=3):
    x, w_ih, w_hh, state, saved = forward(H, B, T)
    calls()
    grads = [torch.ones_like(saved[0]), None, None, None]
    return cuda.backward(
        CELLS["lstm"], grads, x, w_ih, w_hh, None, [*saved[:2], saved[-1]], state, None, None, False, [*[True] * 5, False], False, False
    )

def describe(p):
    v = p.variant
    return [p.kind, p.blocks, p.team] + ([0, 0, 0] if v is None else [v.C, v.threads, v.shared_bytes])
"""


def launches(lines):
    """(blocks, threads, shared bytes, attributes, T B H) of each."""
    form = r"cuLaunchKernelEx grid=(\d+) block=(\d+) shared=(\d+) stream=0x77((?: attribute\d+=\d+)*) T=(\d+) B=(\d+) H=(\d+)"
    found = [re.fullmatch(form, line) for line in lines if line.startswith("cuLaunchKernelEx")]
    assert all(found), lines
    return [(int(m[1]), int(m[2]), int(m[3]), m[4].split(), tuple(map(int, m.groups()[4:]))) for m in found]


@pytest.mark.slow
def test_one_launch_as_the_plan_says():
    """A cluster with its size, a grid that is cooperative; one launch a call, on torch's stream, of no more blocks than fit."""
    script = f"""{CALLS}
for capability, H, B in ((90, 40, 12), (90, 512, 12), (90, 1024, 4), (80, 320, 12)):
    os.environ["STUB_CAPABILITY"] = str(capability)
    if H > 100:
        compile_nothing()  # larger ones take the compiler long
    machine = gpu()
    for which, run in (("forward", forward), ("backward", backward)):
        run(H, B)
        p = plan.plan(machine, CELLS["lstm"], "bf16", H, B, which)
        say([capability, H, B, describe(p), calls()])
"""
    kinds = set()
    for capability, H, B, (kind, blocks, team, C, threads, shared), lines in stub.run(script, CLUSTERS=15):
        kinds.add((capability, kind))
        attributes = [f"attribute4={C}"] * (C > 1) + ["attribute2=1"] * (kind == "grid")
        assert launches(lines)[-1] == (blocks, threads, shared, attributes, (3, B, H))
        assert len(launches(lines)) <= 2, "forward, before backward, too"
        assert blocks % team == 0 and blocks <= (15 * C if C > 1 else 132)
    assert kinds >= {(90, "cluster"), (90, "grid"), (80, "grid")}


@pytest.mark.slow
def test_what_is_refused_is_not_launched():
    """The next plan is taken, in the end step by step; where nothing is left, the error says what was asked for."""
    script = f"""{CALLS}
compile_nothing()
def case(H, B, **settings):
    for key, value in settings.items():
        os.environ["STUB_" + key] = value
    machine = gpu()
    calls()
    error = ""
    try:
        forward(H, B)
    except RuntimeError as e:
        error = str(e)
    p = plan.plan(machine, CELLS["lstm"], "bf16", H, B, "forward")
    for key in settings:
        del os.environ["STUB_" + key]
    say([describe(p), calls("cuLaunchKernelEx"), [list(r) for r in p.refused], error])
case(512, 4, CLUSTERS="0", BLOCKS="0")
case(512, 4, FAIL="cuOccupancyMaxActiveClusters=912")
case(2048, 4, MULTIPROCESSORS="40")
case(512, 4, FAIL="cuLaunchKernelEx=720")
case(512, 4, FAIL="cuLibraryLoadData=2")
"""
    nowhere, no_clusters, small, refused, memory = stub.run(script)

    (kind, *_), lines, reasons, error = nowhere
    assert kind == "step" and len(launches(lines)) == 3 and not error, "a kernel for each of three steps"
    assert sum("wait for one another, and 0 run at the same time" in reason for _, reason in reasons) >= 2

    (kind, blocks, _, C, *_), lines, reasons, error = no_clusters
    assert (kind, C) == ("grid", 1) and blocks <= 132 and not error
    assert launches(lines)[0][3] == ["attribute2=1"]
    assert any("cluster of 16" in what and "CUDA_ERROR_INVALID_CLUSTER_SIZE" in reason for what, reason in reasons)

    (kind, blocks, *_), lines, _, error = small
    assert (
        not error and (kind == "step" or blocks <= 40) and all(n <= 40 or kind == "step" for n, *_ in launches(lines))
    )

    (kind, blocks, _, C, threads, shared), _, _, error = refused
    asked = f"launching {blocks} blocks of {threads} threads and {shared} bytes of shared memory"
    assert error.startswith(f"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE (the stub was told so), {asked}")
    assert "The plan was: " in error

    (kind, *_), lines, reasons, error = memory
    assert kind == "step" and not lines and any("CUDA_ERROR_OUT_OF_MEMORY" in reason for _, reason in reasons)
    assert error.startswith("CUDA_ERROR_OUT_OF_MEMORY (out of memory), loading 256 threads")
