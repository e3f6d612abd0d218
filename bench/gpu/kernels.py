"""The kernels of micro.cuh with their sizes, as a Machine compiles and launches them; and what each must come back with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from gradkernels.cells import CELLS, Cell

SOURCE = Path(__file__).with_name("micro.cuh")
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
MOST = 4096  # bytes that a block can send to another in a round


class Arguments(ctypes.Structure):
    """MicroArgs of micro.cuh."""

    _fields_ = (
        ("rounds", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("sources", ctypes.c_int),
        ("arrivals", ctypes.c_void_p),
        ("exchange", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Micro:
    """One compiled kernel of micro.cuh, as a Machine takes it."""

    template: str  # without the namespace
    threads: int
    C: int = 1
    cooperative: bool = False
    shared_bytes: int = 0
    cell: Cell = CELLS["rnn_tanh"]  # whose text the headers hold; none of these kernels looks at it

    arguments: ClassVar[str] = "MicroArgs"

    def source(self) -> str:
        return (
            SOURCE.read_text(encoding="utf-8") + f"using Kernel = gk::{self.template};\n"
            f'static_assert(Kernel::SHARED_BYTES <= {self.shared_bytes}, "more shared memory than is asked for");\n'
            f'extern "C" __global__ void __launch_bounds__({self.threads}, 1) run(gk::MicroArgs p) {{ Kernel::run(p); }}\n'
        )


def empty(warps: int = 1) -> Micro:
    return Micro(f"Empty<{warps}>", 32 * warps)


def cluster_barrier(C: int, warps: int = 8) -> Micro:
    return Micro(f"ClusterBarrier<{C}, {warps}>", 32 * warps, C)


def ping_pong(C: int) -> Micro:
    return Micro(f"PingPong<{C}>", 32, C, shared_bytes=32)


def all_gather(C: int, warps: int = 8, most: int = MOST, at_least: int = 0) -> Micro:
    """at_least: shared memory to ask for, so that a block has its multiprocessor to itself."""
    return Micro(f"AllGather<{C}, {warps}, {most}>", 32 * warps, C, shared_bytes=max(2 * C * most + 16, at_least))


def grid_exchange(warps: int = 8) -> Micro:
    return Micro(f"GridExchange<{warps}>", 32 * warps, cooperative=True)


def words(warps: int = 8) -> Micro:
    return Micro(f"Words<{warps}>", 32 * warps, cooperative=True)


def stream(warps: int = 8) -> Micro:
    return Micro(f"Stream<{warps}>", 32 * warps)


def products(number: str, warps: int, M: int, K: int) -> Micro:
    return Micro(f"Products<gk::{number}, {warps}, {M}, {K}>", 32 * warps, shared_bytes=8 * (K * 32 + 16))


@dataclass(frozen=True)
class Part:
    """A kernel with its sizes. `exchange`: bytes of memory in L2 that it needs, and what every word of them holds."""

    what: str
    kernel: Micro
    blocks: int
    rounds: int
    bytes: int = 0
    sources: int = 0
    exchange: int = 16
    word: int = 0
    number: str = ""
    products: int = 0  # of the tensor core in a round, by every warp

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the other parts of a report."""
        found = {
            "what": self.what,
            "C": self.kernel.C,
            "blocks": self.blocks,
            "threads": self.kernel.threads,
            "bytes": self.bytes,
            "sources": self.sources,
            "number": self.number,
            "products": self.products,
        }
        return {k: v for k, v in found.items() if v}


ONES = {"bf16": 0x3F803F80, "fp16": 0x3C003C00, "tf32": 0x3F800000, "fp32": 0x3F800000}  # a word of ones


def tensor_cores(number: str, warps: int, M: int, K: int, blocks: int, rounds: int = 4000) -> Part:
    """M x K products a round of [16 x 32 bytes] by [32 bytes x 8], operands of the first in registers."""
    kernel = products(number, warps, M, K)
    return Part(
        "products", kernel, blocks, rounds, exchange=M * K * 512, word=ONES[number], number=number, products=M * K
    )


def exchanged(blocks: int, bytes: int = 0, sources: int = 0, warps: int = 8, rounds: int = 1000) -> Part:
    what = "exchange through L2" if bytes else "grid barrier"
    return Part(what, grid_exchange(warps), blocks, rounds, bytes, sources, exchange=max(16, 2 * blocks * bytes))


def told(blocks: int, bytes: int, sources: int, warps: int = 8, rounds: int = 1000) -> Part:
    return Part("words through L2", words(warps), blocks, rounds, bytes, sources, exchange=4 * blocks * bytes)


def parts(machine: Any, quick: bool = False) -> Iterator[Part]:
    """All of them for a machine, those that the model of the floor cannot do without first."""
    full = machine.multiprocessors
    sizes = [c for c in (8, 16) if c <= machine.max_cluster]
    for C in sizes:
        yield Part("cluster barrier", cluster_barrier(C), C, 1000)
        for rank in [1] if quick else [1, C // 2, C - 1]:
            yield Part("push and back", ping_pong(C), C, 1000, sources=rank)
        for bytes in (256, 2048) if quick else (256, 1024, 2048, 4096):
            yield Part("all-gather", all_gather(C), C, 1000, bytes)
    for blocks in dict.fromkeys(min(n, full) for n in (32, 64, 128, full)):
        yield exchanged(blocks)
        for bytes in (16, 256):
            yield told(blocks, bytes, blocks)
        for bytes in (512,) if quick else (128, 512):
            for sources in (blocks,) if quick else (blocks, blocks // 8):
                yield exchanged(blocks, bytes, sources)
    for number, dtype in NUMBERS.items():
        yield tensor_cores(
            number, 8, 8 // dtype.itemsize, 8, full
        )  # as many registers of weights as fit beside the rest
    yield tensor_cores("bf16", 1, 1, 16, 1)
    sweep = 16 * 4 * 256  # bytes: what eight warps read at once
    yield Part("weights from L2", stream(), full, 1000, 4 * sweep, exchange=full * 4 * sweep)
    if quick:
        return
    for warps, M in ((4, 4), (16, 2)):
        yield tensor_cores("bf16", warps, M, 8, full)


def everywhere(machine: Any, C: int, bytes: int) -> Part:
    """The all-gather in as many clusters as run at a time, a multiprocessor to each block: do they share a network?"""
    kernel = all_gather(C, at_least=machine.shared_bytes)
    return Part("all-gather", kernel, machine.kernel(kernel).resident() * C, 1000, bytes)


def launch(machine: Any, part: Part, device: torch.device) -> Callable[[int], torch.Tensor]:
    """run(rounds) -> what each thread saw last [blocks, threads]; a launch and nothing more, memory is there before."""
    kernel = machine.kernel(part.kernel)
    exchange = torch.full((part.exchange // 4,), part.word, dtype=torch.int32, device=device)
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.zeros(part.blocks, part.kernel.threads, dtype=torch.int32, device=device)

    def run(rounds: int) -> torch.Tensor:
        arrivals.zero_()
        if part.what == "words through L2":
            exchange.zero_()  # turns of the launch before would be heard
        pointers = (t.data_ptr() for t in (arrivals, exchange, out))
        kernel.launch(part.blocks, Arguments(rounds, part.bytes, part.sources, *pointers))
        return out

    return run


def expected(part: Part, rounds: int) -> torch.Tensor:
    """What launch's run gives where nothing is lost. [blocks, threads]"""
    found = torch.full((part.blocks, part.kernel.threads), rounds, dtype=torch.int32)
    rank = torch.arange(part.blocks) % part.kernel.C
    if part.what == "push and back":
        found[:, :] = 0
        found[rank == 0, 0] = 2 * rounds
        found[rank == part.sources, 0] = 2 * rounds - 1
    elif part.what == "products":
        found[:] = rounds * part.products * (32 // NUMBERS[part.number].itemsize)
        found //= int(part.kernel.template.split(", ")[2])  # M: they are sums along the contraction
    elif part.what == "weights from L2":
        found[:] = 0
    return found
