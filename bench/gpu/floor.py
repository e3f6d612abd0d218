"""What a step costs at least, from what was measured of its parts; and the planner's constants, measured.

python -m bench.gpu.floor micro.json      constants to put into gradkernels/backends/cuda/costs.py, and what a step then costs

The floor of a row is the time of its large matrix products at the rate that torch reaches here, and for every step the cheapest
of the planner's own forms, where nothing costs but tensor cores, weights read again, and the exchange with its barrier. What a
kernel adds is missing on purpose: cells, block barriers, sums of partial products, the latency of a chain of products.

Dims: T steps, B batch, H units, G gates.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.cases import Case
from gradkernels import cells
from gradkernels.backends.cuda import costs, plan

NUMBERS = {"bfloat16": "bf16", "float16": "fp16"}
NOTHING = {"block": 0.0, "gate": 0.0, "chain": 0.0, "l2_latency": 0.0}  # what a floor leaves out
CHAIN = 4  # dependent products that a step waits for, about


def records(report: dict[str, Any], what: str, **key: Any) -> list[dict[str, Any]]:
    """What was found of a part, by the sizes that are named; with those sizes."""
    return [
        {**r["key"], **r["found"]}
        for r in report["records"]
        if r["error"] is None and r["key"]["what"] == what and all(r["key"].get(k) == v for k, v in key.items())
    ]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a, b of the least squares of y = a + b x; a alone where there is but one x."""
    n, mean = len(points), [sum(p[k] for p in points) / len(points) for k in (0, 1)]
    spread = sum((x - mean[0]) ** 2 for x, _ in points)
    slope = sum((x - mean[0]) * (y - mean[1]) for x, y in points) / spread if n > 1 and spread else 0.0
    return mean[1] - slope * mean[0], slope


def constants(report: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Fields of costs.Machine that the report knows, each with where it is from."""
    found: dict[str, tuple[float, str]] = {}
    (clock,) = [r["mhz"] * 1e6 for r in records(report, "clock under load")] or [costs.MACHINE.clock]
    cycles = lambda us: us * 1e-6 * clock
    if records(report, "clock under load"):
        found["clock"] = clock, "clock under load"
    for r in records(report, "products", number="bf16", threads=256):
        found["mma"] = cycles(r["us"]) * costs.QUARTERS / (r["products"] * 8), "products of eight warps"
    for r in records(report, "products", number="bf16", threads=32):
        found["chain"] = CHAIN * cycles(r["us"]) / r["products"], f"{CHAIN} dependent products and their loads"
    for r in records(report, "weights from L2"):
        found["l2"] = r["bytes"] / cycles(r["us"]), "weights from L2, all multiprocessors"
    if barriers := records(report, "grid barrier"):
        r = max(barriers, key=lambda r: r["blocks"])
        found["barrier"] = cycles(r["us"]), f"grid barrier of {r['blocks']} blocks"
    if words := records(report, "words through L2"):
        blocks = max(r["blocks"] for r in words)
        a, _ = line([(2 * r["bytes"] * r["sources"], cycles(r["us"])) for r in words if r["blocks"] == blocks])
        found["told"] = max(0.0, a), f"words through L2 between {blocks} blocks, hardly any"
    if pushes := records(report, "all-gather"):
        C = max(r["C"] for r in pushes)
        a, b = line([(C * r["bytes"], cycles(r["us"])) for r in pushes if r["C"] == C and r["blocks"] == C])
        found["neighbour_latency"] = max(0.0, a), f"all-gather in a cluster of {C}, no bytes"
        if b > 0:
            found["neighbour"] = 1 / b, f"all-gather in a cluster of {C}, bytes that a block receives"
    for r in records(report, "launch"):
        found["launch"] = cycles(max(r["host_us"], r["us"])), "launch of an empty kernel, the host or the device"
    for r in records(report, "product of large matrices by torch", number="bf16"):
        found["library"] = r["gflops"] * 1e9 / 2 / clock, "bf16 product of large matrices, of the whole GPU"
        found["library"] = found["library"][0] / report["machine"]["multiprocessors"], "bf16 product of large matrices"
    return found


def machine(report: dict[str, Any]) -> costs.Machine:
    """The planner's constants, as far as they were measured; the others as they are."""
    return replace(costs.MACHINE, **{name: value for name, (value, _) in constants(report).items()})


def step(report: dict[str, Any], cell: str, number: str, H: int, B: int, which: str, floor: bool = True) -> float:
    """Microseconds of the cheapest form, or with everything that the planner counts.

    A GPU's `multiprocessors`, `max_cluster` and `shared_bytes` are in the report."""
    m, here = machine(report), report["machine"]
    m = replace(m, **NOTHING) if floor else m
    it, full = cells.get(cell), here["multiprocessors"]
    best = costs.step(it, number, H, B, full, m)
    for c in plan._candidates(it, number, H, which, False, here["max_cluster"], full, here["shared_bytes"]):
        rounds = math.ceil(B / (c.variant.N * max(1, full // c.team)))
        best = min(best, rounds * costs.tile(c.variant, which, m))
    return costs.microseconds(best, m)


def number(case: Case) -> str:
    return NUMBERS.get(case.dtype) or ("tf32" if case.tf32 else "fp32")


def floor(case: Case, report: dict[str, Any], gflops: float) -> float | None:
    """Milliseconds of a row at least; None where there is no model: fp64, projections.

    gflops: what torch reaches in the dtype. Directions may run side by side, layers may not, and rows that have ended cost nothing.
    """
    if case.dtype == "float64" or case.kind != "time" or case.proj_size:
        return None
    lengths = case.lengths() or [case.T] * case.B
    rows = [sum(n > t for n in lengths) for t in range(case.T)]
    ways = ("forward", "backward")[: 1 + (case.mode == "training")]
    steps = {n: sum(step(report, case.cell, number(case), case.H, n, way) for way in ways) for n in set(rows) - {0}}
    walk = sum(steps.get(n, 0.0) for n in rows) * case.layers
    # the products of the steps themselves, in each direction of time
    walked = 2 * cells.get(case.cell).G * case.H**2 * sum(rows) * case.layers * (1 + case.bidirectional) * len(ways)
    return walk / 1e3 + (case.flops() - walked) / gflops / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    report = json.loads(Path(argv[0]).read_text())
    measured = constants(report)
    print(f"# {report['machine']['name']}: for MACHINE in gradkernels/backends/cuda/costs.py")
    for name, old in asdict(costs.MACHINE).items():
        value, of = measured.get(name, (old, "not measured: as it was"))
        print(f"    {name}: float = {value:.4g}  # {of}; was {old:.4g}")
    print("\n# microseconds a step: floor / by these constants, forward and backward")
    for cell, H, B in (("lstm", 256, 16), ("lstm", 512, 16), ("lstm", 768, 16), ("gru", 768, 16), ("lstm", 1024, 64)):
        pairs = (
            f"{step(report, cell, 'bf16', H, B, w):.2f} / {step(report, cell, 'bf16', H, B, w, False):.2f}"
            for w in plan.WALKS
        )
        print(f"# {cell:5} H {H:5} B {B:3}: {', '.join(pairs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
