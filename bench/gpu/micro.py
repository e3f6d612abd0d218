"""What a step of a recurrent kernel is made of, each part alone: exchange in a cluster, exchange through L2, tensor cores, launches.

python -m bench.gpu.micro                       a line per part
python -m bench.gpu.micro --json micro.json     and everything measured, kept up to date; parts that are in it are not measured again
python -m bench.gpu.micro --quick               fewer sizes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.device import dead, smi
from bench.gpu.kernels import (
    NUMBERS,
    Arguments,
    Part,
    all_gather,
    cluster_barrier,
    empty,
    everywhere,
    expected,
    launch,
    parts,
    tensor_cores,
)

REPEAT = 7
COPIED, WIDE = 2 << 30, 8192  # bytes of a copy, width of large matrices
LOST = 3  # exit status: the GPU takes nothing more from this process, another one may go on


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
        kinds = {
            "small": cluster_barrier(C),
            "whole multiprocessors": all_gather(C, most=16, at_least=machine.shared_bytes),
        }
        found[str(C)] = {kind: room(machine, kernel) for kind, kernel in kinds.items()}
    return {"clusters": found}


def room(machine: Any, kernel: Any) -> int:
    """Clusters at a time; none where the driver refuses even one."""
    try:
        return machine.kernel(kernel).resident()
    except RuntimeError:
        return 0


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


def matrix_product(device: torch.device, number: str) -> dict[str, Any]:
    """GFLOP/s of torch's product of large random matrices: the rate that the large products around a walk can reach."""
    n, dtype = WIDE * 2 // NUMBERS[number].itemsize, NUMBERS[number]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = number == "tf32"
    try:
        each = [events(lambda: torch.mm(a, b, out=out)) for _ in range(REPEAT + 2)][2:]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    us = statistics.median(each)
    return {"us": us, "least": min(each), "most": max(each), "gflops": 2e-3 * n**3 / us}


def copy(device: torch.device) -> dict[str, Any]:
    """GB/s read and written by a copy far beyond the caches."""
    a, b = (torch.full((COPIED,), v, dtype=torch.uint8, device=device) for v in (1, 0))
    each = [events(lambda: b.copy_(a)) for _ in range(REPEAT + 2)][2:]
    us = statistics.median(each)
    return {"us": us, "least": min(each), "most": max(each), "gbs": 2e-3 * COPIED / us}


def clock(machine: Any, device: torch.device) -> dict[str, Any]:
    """Megahertz of the multiprocessors while tensor cores work, as nvidia-smi reads them."""
    part = tensor_cores("bf16", 8, 4, 8, machine.multiprocessors)
    run = launch(machine, part, device)
    brief = events(lambda: run(part.rounds))
    run(int(part.rounds * min(1e5, 3e6 / brief)))  # three seconds
    said = [smi("clocks.sm").get("clocks.sm", "") for _ in range(3)]
    torch.cuda.synchronize(device)
    found = [float(text.split()[0]) for text in said if text.endswith("MHz")]
    if not found:
        raise RuntimeError("nvidia-smi does not say")
    return {"mhz": statistics.median(found)}


Job = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def jobs(machine: Any, device: torch.device, quick: bool) -> Iterator[Job]:
    """Every measurement: what tells it from the others, and how it is taken."""
    yield {"what": "clusters at a time"}, lambda: active(machine)
    yield {"what": "launch"}, lambda: launches(machine, device)
    yield {"what": "clock under load"}, lambda: clock(machine, device)
    for part in parts(machine, quick):
        yield part.key, lambda part=part: measure(machine, part, device)
    for C in (c for c in (8, 16) if c <= machine.max_cluster and not quick):
        for bytes in (256, 2048):
            key = {"what": "all-gather in all clusters", "C": C, "bytes": bytes}
            yield key, lambda C=C, bytes=bytes: measure(machine, everywhere(machine, C, bytes), device)
    yield {"what": "copy by torch"}, lambda: copy(device)
    for number in NUMBERS:
        key = {"what": "product of large matrices by torch", "number": number}
        yield key, lambda number=number: matrix_product(device, number)
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
    if "mhz" in found:
        return f"{key['what']:28} {sizes:64} {found['mhz']:.0f} MHz"
    more = [f"{found['us']:8.3f} us"]
    more += [f"{found['most'] - found['least']:.3f} apart"] if "most" in found else []
    more += [f"{found['gflops'] / 1e3:.1f} TFLOP/s"] if "gflops" in found else []
    more += [f"{found['gbs']:,.0f} GB/s"] if "gbs" in found else []
    more += (
        [f"{found['host_us']:.2f} us of the host, {found['graph_us']:.2f} us in a graph"] if "host_us" in found else []
    )
    return f"{key['what']:28} {sizes:64} {', '.join(more)}"


def take(
    todo: Iterator[Job],
    report: dict[str, Any],
    save: Callable[[], object],
    say: Callable[[str], object],
    dead: Callable[[], str | None] = lambda: None,
) -> bool:
    """Measures what the report lacks, one after the other; what fails is said in its record. False: the GPU was lost on the way.

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
        except (RuntimeError, ValueError, OSError, Wrong) as e:
            record["error"] = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        save()
        say(said(record))
        if record["error"] and dead():
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--quick", action="store_true")
    o = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu.micro needs a CUDA device and a torch built for CUDA", file=sys.stderr)
        return 2
    report = everything(o.quick, o.json, lambda text: print(text, flush=True))
    return LOST if report["lost"] else 1 if any(r["error"] for r in report["records"]) else 0


def everything(
    quick: bool = False, path: Path | None = None, say: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """The report of the current GPU, kept in a file if one is named; what is in there is not measured again.

    RuntimeError where CUDA kernels cannot run, with the reason."""
    from gradkernels.backends.cuda import driver

    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def save() -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(part, path)

    machine = driver.machine(device)
    report["machine"] = {k: getattr(machine, k) for k in ("name", "multiprocessors", "max_cluster", "shared_bytes")}
    report["lost"] = not take(jobs(machine, device, quick), report, save, say, dead)
    return report


if __name__ == "__main__":
    sys.exit(main())
