"""What a step of a recurrent kernel is made of, each part alone: exchange in a cluster, exchange through L2, tensor cores, launches.

python -m bench.gpu.micro                       a line per part
python -m bench.gpu.micro --json micro.json     and everything measured, kept up to date; parts that are in it are not measured again
python -m bench.gpu.micro --quick               fewer sizes
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from gradkernels.cells import CELLS, Cell

SOURCE = Path(__file__).with_suffix(".cuh")
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
MOST = 4096  # bytes that a block can send to another in a round
REPEAT = 7


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
    for C in sizes:  # all clusters at once: do they share the network?
        most = machine.kernel(all_gather(C, at_least=machine.shared_bytes)).resident() * C
        for bytes in (256, 2048):
            yield Part("all-gather", all_gather(C, at_least=machine.shared_bytes), most, 1000, bytes)


def launch(machine: Any, part: Part, device: torch.device, rounds: int | None = None) -> Callable[[int], torch.Tensor]:
    """run(rounds) -> what each thread saw last [blocks, threads]; a launch and nothing more, memory is there before."""
    kernel = machine.kernel(part.kernel)
    exchange = torch.full((part.exchange // 4,), part.word, dtype=torch.int32, device=device)
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.zeros(part.blocks, part.kernel.threads, dtype=torch.int32, device=device)

    def run(rounds: int) -> torch.Tensor:
        arrivals.zero_()
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


class Wrong(AssertionError):
    """A kernel came back with other numbers than it must: a time of it would mean nothing."""


def events(run: Callable[[], object]) -> float:
    """Microseconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def measure(machine: Any, part: Part, device: torch.device) -> dict[str, Any]:
    """Microseconds of a round: what two more thirds of the rounds cost, over their number."""
    run = launch(machine, part, device)
    short = part.rounds // 3
    got = run(short).cpu()
    if not torch.equal(got, expected(part, short)):
        raise Wrong(f"{int((got != expected(part, short)).sum())} of {got.numel()} threads saw something else")
    pairs = [(events(lambda: run(part.rounds)), events(lambda: run(short))) for _ in range(REPEAT + 1)][1:]
    each = [(long - brief) / (part.rounds - short) for long, brief in pairs]
    found: dict[str, Any] = {"us": statistics.median(each), "least": min(each), "most": max(each)}
    if part.products:
        per_product = 16 * 8 * (32 // NUMBERS[part.number].itemsize) * 2
        found["gflops"] = part.products * part.kernel.threads / 32 * part.blocks * per_product / found["us"] / 1e3
    if part.what == "weights from L2":
        found["gbs"] = part.bytes * part.blocks / found["us"] / 1e3
    return found


def launches(machine: Any, device: torch.device) -> dict[str, Any]:
    """A kernel with nothing to do: microseconds of the host, of the device back to back, and as a node of a CUDA graph."""
    run, n = launch(machine, Part("launch", empty(), machine.multiprocessors, 1), device), 200
    kernel = machine.kernel(empty())
    arguments = Arguments(1, 0, 0, None, None, run(1).data_ptr())

    def many() -> None:
        for _ in range(n):
            kernel.launch(machine.multiprocessors, arguments)

    many()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    many()
    host = (time.perf_counter() - begin) / n * 1e6
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    device_us = statistics.median(events(many) / n for _ in range(REPEAT))
    return {"host_us": host, "us": device_us, "graph_us": statistics.median(events(graph.replay) / n for _ in range(5))}


def active(machine: Any) -> dict[str, Any]:
    """Clusters at a time by the driver's own count: with hardly any shared memory, and with all that a block may have."""
    found = {}
    for C in (c for c in (2, 4, 8, 16) if c <= machine.max_cluster):
        small, large = cluster_barrier(C), all_gather(C, most=16, at_least=machine.shared_bytes)
        found[str(C)] = {
            "small": machine.kernel(small).resident(),
            "whole multiprocessors": machine.kernel(large).resident(),
        }
    return {"clusters": found}


def step_product(device: torch.device, B: int, H: int, G: int, dtype: torch.dtype) -> dict[str, Any]:
    """One step's product by torch, in a graph of many: what a kernel for every step begins with."""
    h, w = (torch.randn(*shape, device=device).to(dtype) for shape in ((B, H), (G * H, H)))
    n = 50

    def many() -> None:
        for _ in range(n):
            torch.mm(h, w.t())

    many()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    return {"us": statistics.median(events(graph.replay) / n for _ in range(REPEAT))}


Job = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def jobs(machine: Any, device: torch.device, quick: bool) -> Iterator[Job]:
    """Every measurement: what tells it from the others, and how it is taken."""
    yield {"what": "clusters at a time"}, lambda: active(machine)
    yield {"what": "launch"}, lambda: launches(machine, device)
    for part in parts(machine, quick):
        yield part.key, lambda part=part: measure(machine, part, device)
    for B, H in ((16, 768),) if quick else ((1, 768), (16, 768), (64, 1024)):
        key = {"what": "product of a step by torch", "B": B, "H": H, "G": 4, "number": "bf16"}
        yield key, lambda B=B, H=H: step_product(device, B, H, 4, torch.bfloat16)


def said(record: dict[str, Any]) -> str:
    """A record as a line."""
    key, found = record["key"], record["found"]
    sizes = ", ".join(f"{k} {v}" for k, v in key.items() if k != "what")
    if record["error"]:
        return f"{key['what']:28} {sizes:64} {record['error']}"
    if "clusters" in found:
        text = "; ".join(f"of {C}: {n['small']} / {n['whole multiprocessors']}" for C, n in found["clusters"].items())
        return f"{key['what']:28} {'(small / with all shared memory)':64} {text}"
    more = [f"{found['us']:8.3f} us"]
    more += [f"{found['most'] - found['least']:.3f} apart"] if "most" in found else []
    more += [f"{found['gflops'] / 1e3:.1f} TFLOP/s"] if "gflops" in found else []
    more += [f"{found['gbs']:,.0f} GB/s"] if "gbs" in found else []
    more += (
        [f"{found['host_us']:.2f} us of the host, {found['graph_us']:.2f} us in a graph"] if "host_us" in found else []
    )
    return f"{key['what']:28} {sizes:64} {', '.join(more)}"


def take(todo: Iterator[Job], report: dict[str, Any], save: Callable[[], None], say: Callable[[str], None]) -> bool:
    """Measures what the report lacks, one after the other; what fails is said in its record. Whether none failed.

    A part during which the process died is in the report as such, and is not tried again.
    """
    records = report.setdefault("records", [])
    seen = [r["key"] for r in records]
    for key, job in todo:
        if key in seen:
            continue
        record: dict[str, Any] = {"key": key, "found": {}, "error": "the process ended while this was measured"}
        records.append(record)
        save()
        try:
            record["found"], record["error"] = job(), None
        except (RuntimeError, ValueError, Wrong) as e:
            record["error"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        save()
        say(said(record))
    return not any(r["error"] for r in records)


def main(argv: Sequence[str] | None = None) -> int:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--quick", action="store_true")
    o = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu.micro needs a CUDA device and a torch built for CUDA", file=sys.stderr)
        return 2
    from gradkernels.backends.cuda import driver

    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = json.loads(o.json.read_text()) if o.json and o.json.exists() else {}

    def save() -> None:
        if o.json:
            o.json.parent.mkdir(parents=True, exist_ok=True)
            part = o.json.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(part, o.json)

    machine = driver.machine(device)
    report["machine"] = {"name": machine.name, "multiprocessors": machine.multiprocessors}
    fine = take(jobs(machine, device, o.quick), report, save, lambda line: print(line, flush=True))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
