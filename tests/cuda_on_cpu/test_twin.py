"""The twin itself: every primitive against numpy, what it calls a fault, and what it says when everybody waits."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.cuda_on_cpu.machine import Fault, Hang, Schedule, Twin

SCHEDULES = [Schedule(), *(Schedule(order, seed) for order in ("random", "priorities") for seed in (1, 2, 3))]
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


class Args(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("taken", "out", "counter")),
        *((n, ctypes.c_int) for n in ("n", "which")),
    ]


@dataclass(frozen=True)
class Small:
    """A kernel of kernels.cuh."""

    struct: str
    threads: int = 32
    C: int = 1
    cooperative: bool = False
    shared_bytes: int = 4096
    arguments: str = "Args"

    def source(self):
        return f'#include "kernels.cuh"\nextern "C" __global__ void run(gk::Args p) {{ gk::{self.struct}::run(p); }}\n'


def launch(small, taken, out, n=0, which=0, blocks=1, schedule=SCHEDULES[0], **machine):
    """Runs it on tensors; `out` is written to. -> the kernel"""
    twin = Twin(**machine)
    twin.schedule = schedule
    kernel = twin.kernel(small)
    counter = torch.zeros(1, dtype=torch.int32)
    kernel.launch(blocks, Args(taken.data_ptr(), out.data_ptr(), counter.data_ptr(), n, which))
    return kernel


@pytest.mark.parametrize("lanes", [1, 2, 16, 31])
def test_shuffles(lanes):
    x, out = torch.randn(32, dtype=torch.float64), torch.empty(3, 32, dtype=torch.float64)
    launch(Small("Shuffles"), x, out, lanes)
    there = torch.arange(32) ^ lanes
    assert torch.equal(out, torch.stack([x[there], x[there].float().double(), there.double()]))


def test_tiles():
    rows, out = torch.randint(1 << 15, (4, 8, 8), dtype=torch.int16), torch.empty(32, 12, dtype=torch.int32)
    launch(Small("Tiles"), rows, out)
    # lane l: of row l // 4 the elements 2 (l % 4) and the next
    fragments = lambda tiles: tiles.contiguous().view(torch.int32).view(-1, 32).T
    four, transposed = fragments(rows), fragments(rows.transpose(1, 2))
    assert torch.equal(out, torch.cat([four[:, :2], four, transposed[:, :2], transposed], 1))


@pytest.mark.parametrize("stride, repeated", [(16, 0), (32, 2), (64, 6), (128, 14), (144, 0), (0, 0)])
def test_bank_conflicts(stride, repeated):
    nothing = torch.empty(1)
    assert launch(Small("Banks"), nothing, nothing, stride).bank_conflicts == repeated


@pytest.mark.parametrize("number", STORED)
def test_mma(number):
    """As good as the number type, and fp32 as good as floats: products of two parts leave out 2^-22."""
    K = 32 // STORED[number].itemsize
    a, out = torch.randn(24, K).to(STORED[number]), torch.empty(16, 8)
    launch(Small(f"Mma<gk::{number}>"), a, out)
    x = a.double().numpy()
    if number == "tf32":  # to nearest, ten bits after the first
        mantissa, exponent = np.frexp(x)
        x = np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa) / 2**11, exponent)
    size = np.abs(x[:16]) @ np.abs(x[16:]).T
    assert (np.abs(out.numpy() - x[:16] @ x[16:].T) <= 2**-21 * size).all()


@pytest.mark.parametrize("number", ["bf16", "fp16"])
def test_stored_as_torch_stores(number):
    dtype = STORED[number]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1]).div(2).float()  # ties
    nearly = torch.cat([between.nextafter(finite[1:]), between.nextafter(finite[:-1])])
    big = torch.tensor([65519.99, 65520.0, 1e30, 3.4e38, torch.inf, torch.nan])
    x = torch.cat([every, between, nearly, big, -big])
    out = torch.empty_like(x)
    launch(Small(f"Convert<gk::{number}>"), x, out, x.numel())
    torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_copies_land_when_they_are_waited_for():
    source, out = torch.arange(1, 4, dtype=torch.int32).repeat_interleave(4), torch.empty(32, 3, 3, dtype=torch.int32)
    launch(Small("Copies"), source, out)
    late = -1  # all bits: NaN
    assert torch.equal(
        out, torch.tensor([[1, late, late], [1, 2, late], [1, 2, 3]], dtype=torch.int32).expand(32, 3, 3)
    )


def sums(groups, blocks, rounds):
    """What the exchanges of kernels.cuh compute in each group of blocks."""
    values = np.arange(blocks).reshape(groups, -1)
    for _ in range(rounds):
        values = np.broadcast_to(values.sum(1, keepdims=True) + 1, values.shape)
    return values.ravel().tolist()


EXCHANGES = [
    Small("Gather", 64, 4),
    Small("Scatter", 64, 4),
    Small("Ring", 64, cooperative=True),
    Small("Talk", 64, cooperative=True),
]
NAMES = [e.struct for e in EXCHANGES]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("small", EXCHANGES, ids=NAMES)
def test_exchange(small, schedule):
    buffers, out = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launch(small, buffers, out, 5, blocks=8, schedule=schedule)
    assert out.tolist() == sums(2 if small.C == 4 else 1, 8, 5)


def test_relay():
    out = torch.empty(32, dtype=torch.int32)
    launch(Small("Relay"), out, out, 3)
    assert out.tolist() == [(i + 3) % 32 for i in range(32)]


@pytest.mark.parametrize("which, said", [
    (0, "the warp is apart: some of its lanes are at kernels.cuh:[0-9]+ shuffle_xor, this one is not .*block_sync"),
    (2, r"kernels.cuh:[0-9]+: no object of that type can be at address 0x[0-9a-f]+ \(block 0 thread 0"),
    (3, "no object of that type can be at address"),
    (4, "is not a multiple of 16 .*copy16_async"),
    (5, "is not a multiple of 16 .*copy16_async"),
    (6, "a thread ends while copies of it are under way"),
    (7, "the source of a copy changed while it was under way"),
    (8, "is not a multiple of 16 .*load_fresh"),
    (9, "bytes 4088 to 4104 are not all of the 4096 of shared memory .*load_tiles"),
    (10, "a signal that is not initialised"),
    (11, "expected again while 16 bytes of it are still to come"),
    (12, "counts to less than 2.20 bytes, not to 1048576"),
    (13, "the memory of block 0, which has ended .block 1 .*push"),
    (14, "the memory of block 0, which has ended|ends while 1 pushes are on their way"),
    (17, "kernels.cuh:[0-9]+: index 7 is outside of the array"),
    (18, "rank 2 in a cluster of 2"),
    (19, "a signal that is not initialised, or was overwritten"),
    (21, "lane 32 of a warp of 32"),
    (22, "bytes 16064 to 16080 are not all of the 4096 of shared memory .*push"),
    (23, "a tf32 as_operand: the tensor core would cut 0.1"),
    (24, "the warp is apart: .*block_sync, this one is not .*signal_wait"),
    (25, "nothing is at address 0x38 .block 0 thread 0 at"),
    (26, "nothing is at address 0x[0-9a-f]+007 .block 0 thread 0"),
    (27, "nothing is at address"),
])  # fmt: skip
def test_faults(which, said):
    out = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(Fault, match=said):
        launch(Small("Wrong", C=2), torch.zeros(16), out, 7, which, blocks=2)


@pytest.mark.parametrize("which, said", [
    (1, ["2 of 64 threads have ended", r"block 1, 31 threads from 0 to 31: waits at kernels.cuh:[0-9]+ block_sync, where 31 of 32 threads are"]),
    (15, [r"block 0, 32 threads .*: waits at kernels.cuh:[0-9]+ signal_wait for parity 0, phases complete 0, bytes to come 16"]),
    (16, ["0 of 64 threads have ended", r"waits at kernels.cuh:[0-9]+ wait_reached for 3, reached is 0"]),
])  # fmt: skip
def test_hangs_say_who_waits_where(which, said):
    with pytest.raises(Hang) as caught:
        launch(Small("Wrong", C=2), torch.zeros(16), torch.zeros(128), 7, which, blocks=2)
    for pattern in said:
        caught.match(pattern)


def test_pushes_land_when_they_are_waited_for():
    out = torch.zeros(2, 2, dtype=torch.int32)
    launch(Small("Wrong", C=2), torch.zeros(16), out, which=20, blocks=2)
    assert out.tolist() == [[-1, 0], [-1, 0]]  # a cluster_sync is no wait: NaN


@pytest.mark.parametrize("released", [True, False])
def test_words_land_when_they_are_released(released):
    words, out = torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch(Small("Wrong", C=2), words, out, int(released), which=28, blocks=2)
    assert out.tolist() == [5 if released else 0]
    assert words[:2].tolist() == [5, 1]  # at the end at the latest


@pytest.mark.parametrize("small", EXCHANGES, ids=NAMES)
def test_more_blocks_than_are_resident(small):
    """Blocks that wait for each other hang when they are not all there; the twin sees it at once. Clusters take turns."""
    buffers, out = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    if small.cooperative:
        with pytest.raises(Hang, match="block 7, 64 threads from 0 to 63: not started: only 7 blocks are resident"):
            launch(small, buffers, out, 5, blocks=8, resident=7)
    else:
        launch(small, buffers, out, 5, blocks=8, resident=7)
        assert out.tolist() == sums(2, 8, 5)
        with pytest.raises(Hang, match="not started: only 0 blocks are resident"):
            launch(small, buffers, out, 5, blocks=8, resident=3)


def test_machine_refuses():
    with pytest.raises(RuntimeError, match="no clusters of 4 blocks"):
        Twin(capability=(8, 0)).kernel(EXCHANGES[0])
    with pytest.raises(RuntimeError, match="a block has 232448"):
        Twin().kernel(Small("Relay", shared_bytes=232449))
    with pytest.raises(RuntimeError, match="of 8 bytes, the kernel takes 32"):
        Twin().kernel(Small("Relay")).launch(1, ctypes.c_double())
    with pytest.raises(Fault, match="no such launch"):
        Twin().kernel(EXCHANGES[0]).launch(3, Args())
    assert Twin(resident=7).kernel(EXCHANGES[0]).resident() == 1 and Twin().kernel(EXCHANGES[2]).resident() == 16


def test_before_sm_90():
    """There a block is a cluster by itself, and what only clusters have does not compile."""
    buffers, out = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launch(Small("Ring", 64), buffers, out, 5, blocks=8, capability=(8, 0))
    assert out.tolist() == sums(1, 8, 5)
    with pytest.raises(RuntimeError, match="Gather. has not been declared|no member named 'Gather'"):
        launch(Small("Gather"), buffers, out, capability=(8, 0))
