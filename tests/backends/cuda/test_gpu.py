"""The driver's side on a real GPU: what the stub can only be told is here asked, launched and captured."""

import threading

import pytest
import torch

from gradkernels.backends.cuda import costs, driver, plan
from gradkernels.backends.cuda.arguments import ForwardArgs
from gradkernels.cells import CELLS
from tests import place
from tests.backends.cuda.stub import Tiny, tiny

pytestmark = pytest.mark.gpu


class Adds(Tiny):
    """Every block adds T to its number in acts."""

    def source(self) -> str:
        return """
#include "arguments.cuh"
extern "C" __global__ void run(gk::ForwardArgs p) {
  float *acts = static_cast<float *>(p.acts);
  if (gk::thread() == 0) acts[gk::block()] += p.walk.T;
}
"""


@pytest.fixture(scope="module")
def machine():
    return driver.machine(place.GPU)


def adds(exchange, C, kilobytes=0):
    return tiny(exchange, C, kilobytes, Adds)


def launch(machine, variant, blocks, out):
    arguments = ForwardArgs()
    arguments.walk.T, arguments.acts = 3, out.data_ptr()
    machine.kernel(variant).launch(blocks, arguments)


def test_what_the_gpu_is(machine):
    found = torch.cuda.get_device_properties(place.GPU)
    assert (machine.name, machine.capability) == (found.name, (found.major, found.minor))
    assert machine.multiprocessors == found.multi_processor_count
    assert machine.shared_bytes == found.shared_memory_per_block_optin
    assert machine is driver.machine(torch.device("cuda"))


@pytest.mark.parametrize("exchange", ["cluster", "grid"])
def test_launches_of_every_cluster(machine, exchange):
    """Blocks count as resident, and all of them run: one round of what the driver says, with much shared memory."""
    C = 1
    while C <= machine.max_cluster:
        v = adds(exchange, C, machine.shared_bytes // 1024)
        blocks = machine.kernel(v).resident() * C
        assert 0 < blocks <= machine.multiprocessors, C
        out = torch.zeros(blocks, device=place.GPU)
        launch(machine, v, blocks, out)
        assert (out == 3).all(), C
        C *= 2


def test_more_waiting_blocks_than_resident_are_refused_by_the_driver(machine):
    v = adds("grid", 1, machine.shared_bytes // 1024)
    blocks = machine.kernel(v).resident() + 1
    out = torch.zeros(blocks, device=place.GPU)
    with pytest.raises(RuntimeError, match=f"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE.*launching {blocks} blocks"):
        launch(machine, v, blocks, out)
    assert not out.any()


def test_too_much_shared_memory_is_refused(machine):
    v = adds("cluster", 1, machine.shared_bytes // 1024 + 1)
    with pytest.raises(RuntimeError, match=f"loading 256 threads and {v.shared_bytes} bytes of shared memory"):
        machine.kernel(v)


def test_the_stream_of_the_moment_and_threads_without_a_context(machine):
    """Work is queued behind what its own stream does, also from a thread that torch has not used."""
    v, stream = adds("cluster", 1), torch.cuda.Stream(place.GPU)
    out = torch.zeros(4, device=place.GPU)
    torch.cuda.synchronize(place.GPU)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        launch(machine, v, 4, out)
        assert not stream.query(), "it waits behind the sleep"
    stream.synchronize()
    assert (out == 3).all()
    thread = threading.Thread(target=launch, args=(machine, v, 4, out))
    thread.start()
    thread.join()
    torch.cuda.synchronize(place.GPU)
    assert (out == 6).all()


def test_a_kernel_that_is_first_seen_in_a_capture(machine):
    """It is compiled and loaded beside the graph; the launch is part of it."""
    v, out = adds("grid", 1, 7), torch.zeros(8, device=place.GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(machine, v, 8, out)
    assert not out.any()
    for _ in range(3):
        graph.replay()
    assert (out == 9).all()


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(("H", "B"), [(32, 4), (256, 16), (512, 8), (768, 16), (1024, 16), (2048, 4)])
def test_plans_are_of_kernels_that_compile_and_fit(machine, H, B, which):
    chosen = plan.plan(machine, CELLS["lstm"], "bf16", H, B, which)
    refused = {reason for _, reason in chosen.refused if "compile" in reason}
    assert not refused
    if chosen.variant is None:
        assert chosen.cycles == costs.step(CELLS["lstm"], "bf16", H, B, machine.multiprocessors)
    else:
        kernel = machine.kernel(chosen.variant)
        assert chosen.blocks <= kernel.resident() * chosen.variant.C and kernel.spilled == 0


def test_it_is_explained(machine):
    text = plan.explain(CELLS["gru"], 512, 16, torch.bfloat16, place.GPU)
    assert machine.name in text and "forward: " in text and "backward: " in text
