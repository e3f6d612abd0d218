"""The host's side of a kernel over a driver that only says what it was asked: loading, attributes, counts, launches, failures."""

import sys

import pytest
import torch

from gradkernels.backends.cuda import driver, nvrtc
from tests.backends.cuda import stub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stub is a shared library as Linux has it")


@pytest.fixture(scope="module")
def launched():
    """One process that loads and launches three kernels: name -> what the driver was asked."""
    script = """
machine = driver.Machine(0, lambda index: STREAM + index)
say(["machine", machine.name, machine.capability, machine.multiprocessors, machine.shared_bytes, machine.max_cluster])
for variant, blocks in ((tiny("cluster", 16, 200), 32), (tiny("grid", 4), 64), (tiny("grid", 1, 60), 100)):
    calls()
    kernel = machine.kernel(variant)
    say(["load", *(line for line in calls() if line != "cuInit")])  # which NVRTC asks for where it is at work
    say(["resident", kernel.resident(), *calls()])
    assert kernel.resident() and not calls(), "counted once"
    arguments = ForwardArgs()
    arguments.walk.T, arguments.walk.B, arguments.walk.H = 3, 5, 7
    kernel.launch(blocks, arguments)
    say(["launch", *calls()])
    assert machine.kernel(variant) is kernel and not calls()
"""
    said = stub.run(script, CAPABILITY=90, MULTIPROCESSORS=132, SHARED=232448, CLUSTERS=7, BLOCKS=2)
    assert said[0] == ["machine", "Stub 0", [9, 0], 132, 232448, 16]
    names = ("cluster of 16", "grid of clusters of 4", "grid")
    return {n: {key: rest for key, *rest in said[1 + 3 * k : 4 + 3 * k]} for k, n in enumerate(names)}


WRAPPED = (
    ["cuCtxPushCurrent", "cuThreadExchangeStreamCaptureMode relaxed"],
    [
        "cuThreadExchangeStreamCaptureMode back",
        "cuCtxPopCurrent",
    ],
)


@pytest.mark.parametrize(
    ("name", "shared", "allowed"),
    [
        ("cluster of 16", 200 << 10, ["cuFuncSetAttribute attribute14=1"]),
        ("grid of clusters of 4", 0, []),
        ("grid", 60 << 10, []),
    ],
)
def test_loading(launched, name, shared, allowed):
    """At once and whole, in the context of torch, with leave to do so while a stream is captured; limits are raised."""
    before, after = WRAPPED
    assert launched[name]["load"] == [
        *before,
        "cuLibraryLoadData cubin",
        "cuLibraryGetKernel run",
        "cuKernelGetFunction",
        "cuFuncLoad",
        f"cuFuncSetAttribute attribute8={shared}",
        *allowed,
        *after,
    ]


@pytest.mark.parametrize(
    ("name", "count", "call"),
    [
        ("cluster of 16", 7, "ActiveClusters grid=16 block=256 shared=204800 stream=(nil) attribute4=16"),
        ("grid of clusters of 4", 7, "ActiveClusters grid=4 block=256 shared=0 stream=(nil) attribute4=4"),
        ("grid", 264, "ActiveBlocksPerMultiprocessor block=256 shared=61440"),
    ],
)
def test_what_fits_is_the_drivers_count(launched, name, count, call):
    before, after = WRAPPED
    assert launched[name]["resident"] == [count, *before, f"cuOccupancyMax{call}", *after]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cluster of 16", "grid=32 block=256 shared=204800 stream=0x77 attribute4=16"),
        ("grid of clusters of 4", "grid=64 block=256 shared=0 stream=0x77 attribute4=4 attribute2=1"),
        ("grid", "grid=100 block=256 shared=61440 stream=0x77 attribute2=1"),
    ],
)
def test_launch(launched, name, call):
    """Cluster size, all resident where blocks wait for one another, torch's stream, and the arguments' own bytes."""
    launch = f"cuLaunchKernelEx {call} T=3 B=5 H=7"
    assert launched[name]["launch"] == ["cuCtxPushCurrent", launch, "cuCtxPopCurrent"]


def test_launches_of_threads_and_streams_do_not_mix():
    """Every thread fills in a configuration of its own; a stream is the one of the moment."""
    script = """
streams = threading.local()
machine = driver.Machine(1, lambda index: streams.now)
kernel = machine.kernel(tiny("cluster", 2))
def work(k):
    arguments = ForwardArgs()
    for n in range(200):
        streams.now = 0x1000 * k + n % 3
        arguments.walk.T = 10 * k + n % 3
        kernel.launch(2 * k + 2 * (n % 3), arguments)
calls()
threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
for t in threads: t.start()
for t in threads: t.join()
say(sorted(set(calls("cuLaunchKernelEx"))))
"""
    (said,) = stub.run(script)
    assert said == sorted(
        f"cuLaunchKernelEx grid={2 * k + 2 * n} block=256 shared=0 stream={0x1000 * k + n:#x} attribute4=2 T={10 * k + n} B=0 H=0"
        for k in range(1, 5)
        for n in range(3)
    )


def test_a_context_that_is_current_stays_and_a_kernel_is_compiled_once_by_many_threads():
    script = """
machine = driver.Machine(0, lambda index: STREAM)
found = [None] * 6
def work(k): found[k] = machine.kernel(tiny("cluster", 1))
threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
for t in threads: t.start()
for t in threads: t.join()
say([len(set(map(id, found))), len(calls("cuLibraryLoadData"))])
with machine.setting_up():
    calls()
    found[0].launch(1, ForwardArgs())
    say(calls())
"""
    once, current = stub.run(script)
    assert once == [1, 1]
    assert current == ["cuLaunchKernelEx grid=1 block=256 shared=0 stream=0x77 T=0 B=0 H=0"]


def test_failures_say_what_was_asked_for():
    """Loading, limits, counts and launches that are refused; the next attempt, when it works, works."""
    script = """
machine = driver.Machine(0, lambda index: STREAM)
variant = tiny("cluster", 16, 200)
def attempt(fail, f):
    os.environ["STUB_FAIL"] = fail
    try:
        f()
        say("no error")
    except RuntimeError as e:
        say(str(e))
    os.environ["STUB_FAIL"] = ""
attempt("cuLibraryLoadData=2", lambda: machine.kernel(variant))
attempt("cuFuncSetAttribute=1", lambda: machine.kernel(variant))
kernel = machine.kernel(variant)
attempt("cuOccupancyMaxActiveClusters=912", kernel.resident)
say(kernel.resident())
attempt("cuLaunchKernelEx=720", lambda: kernel.launch(32, ForwardArgs()))
kernel.launch(32, ForwardArgs())
assert not int(driver.bindings().cuCtxGetCurrent()[1]), "a context is left behind"
"""
    memory, limit, count, resident, launch = stub.run(script)
    asked = "256 threads and 204800 bytes of shared memory in clusters of 16 (Tiny("
    assert memory.startswith(f"CUDA_ERROR_OUT_OF_MEMORY (out of memory), loading {asked}")
    assert limit.startswith(f"CUDA_ERROR_INVALID_VALUE (the stub was told so), loading {asked}")
    assert count.startswith(f"CUDA_ERROR_INVALID_CLUSTER_SIZE (the stub was told so), counting what fits of {asked}")
    assert resident == 8
    assert launch.startswith(
        f"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE (the stub was told so), launching 32 blocks of {asked}"
    )
    assert launch.endswith("on Stub 0")


def test_generations_and_old_drivers():
    """How large clusters may be, and whether the driver can be told to load."""
    script = """
for capability, version in ((80, 12020), (89, 13000), (90, 12030), (100, 13000), (120, 13000)):
    os.environ["STUB_CAPABILITY"], os.environ["STUB_VERSION"] = str(capability), str(version)
    machine = driver.Machine(0, lambda index: STREAM)
    machine.kernel(tiny("grid", 1))
    say([capability, machine.max_cluster, len(calls("cuFuncLoad"))])
"""
    assert stub.run(script) == [[80, 1, 0], [89, 1, 1], [90, 16, 0], [100, 16, 1], [120, 8, 1]]


# ---------------------------------------------------------------- why it cannot run


def test_where_it_cannot_run(monkeypatch):
    assert "it runs on NVIDIA GPUs, not on cpu" in driver.why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert driver.why_not() == "this build of torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.why_not(torch.device("cuda", 0)) == "torch finds no CUDA device"
    with pytest.raises(RuntimeError, match="CUDA kernels cannot run on cuda:7: torch finds no CUDA device"):
        driver.machine(torch.device("cuda", 7))


def test_gpus_that_are_too_old_or_too_new():
    assert driver.refused("Tesla T4", (7, 5)) == "Tesla T4 has compute capability 7.5; the kernels need 8.0"
    reason = driver.refused("Tomorrow", (31, 0))
    assert "does not know Tomorrow, sm_310; pip install --upgrade nvidia-cuda-nvrtc" in reason
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        assert driver.refused("", capability) is None


def test_without_the_packages(monkeypatch):
    """What to install is in the reason."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    for f in (nvrtc.bindings, driver.bindings, driver._why_not):
        f.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    reason = driver.why_not(torch.device("cuda", 0))
    assert "cuda-bindings cannot be imported" in reason and nvrtc.INSTALL in reason
    for f in (nvrtc.bindings, driver.bindings, driver._why_not):
        f.cache_clear()
