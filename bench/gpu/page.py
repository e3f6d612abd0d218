"""What table.py says of rows measured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.providers import label
from bench.report import number

GROUPS = {
    "cudnn persistent": "Where cuDNN keeps the weights on the chip: fp16, one layer, one direction, round sizes",
    "cudnn standard": "Where it does not, against torch.nn; bf16 then against torch.nn in fp16",
    "ragged on a gpu": "8,192 of 16,384 tokens: PackedSequence, and padded input with lengths; then against our own padded batch",
    "batches": "Other batches",
    "fp32": "Exact fp32",
    "attention on a gpu": "Attention, 16,384 tokens and a width of 2,048, against SDPA; then against its backends by name, and others",
    "attention with dropout on a gpu": "The same with dropout",
    "norms on a gpu": "norm(residual + dropout(x)) of 67 million values, against torch's operations; an RMSNorm returns the sum too",
    "convolution on a gpu": "Dilated causal convolution, channels last, against conv1d of a padded input with channels first",
    "blocks on a gpu": "x + dropout(attention(norm(x))), projections included, against torch's layers, eager and compiled",
    "loops": "Against a Python loop whose step torch.compile has made one kernel of",
}
PACE = "TFLOP/s or GB/s"
LAYERS = """\
Median of calls taken side by side in one process, first to third quartile beside it; milliseconds by events on the stream, the caches
full of something else before each call; or MiB of torch's allocator for peak memory. Backward is that alone, of a graph that is kept.
The floor is the products at the rate of this run, for attention that of a kernel which makes the same products of tiles and
nothing else, or the bytes that have to be read and written at the bandwidth of a copy in this run, whichever takes longer."""
READING = """\
Median of calls taken side by side in one process, first to third quartile beside it; milliseconds by events on the stream, the caches
full of something else before each call, the input projection included; or MiB of torch's allocator for peak memory. The floor is the large
matrix products at the rate of this run, and for every step the cheapest form of which only tensor cores, exchange and barrier are counted,
from the parts measured in this run. Between training calls the weights count as changed, as an optimizer changes them."""


def reading(report: dict[str, Any]) -> str:
    """How the page is to be read."""
    return LAYERS if report["suite"] == "layers-gpu" else READING


def pace(row: dict[str, Any]) -> str:
    """'1.95 (1.21)': microseconds a step, and those of the floor; of other layers '412 TFLOP/s' or '3,900 GB/s'."""
    if "taps" in row:
        if row.get("gbs"):
            return f"{number(row['gbs'])} GB/s"
        return f"{number(row['gflops'] / 1e3)} TFLOP/s" if row.get("gflops") else ""
    floor = row.get("floor_us")
    return number(row.get("step_us")) + (f" ({number(floor)})" if floor else "")


def head(report: dict[str, Any]) -> list[str]:
    """The GPU, the versions, and the limits."""
    m, limits, gpu, v = report["machine"], report["limits"], report["machine"]["gpu"], report["machine"]["versions"]
    commit = (m["commit"] or "no commit")[:10] + (" and changes not committed" if m["dirty"] else "")
    rates = [
        f"{name} {number(limit['gflops'] / 1e3)} TFLOP/s" for name, limit in limits.items() if "gflops" in (limit or {})
    ]
    rates += [f"copy {number(limits['copy']['gbs'])} GB/s"] if "copy" in limits else []
    clusters = next((r["found"]["clusters"] for r in report["micro"]["records"] if "clusters" in r["found"]), {})
    room = ", ".join(f"{n['whole multiprocessors']} of {C}" for C, n in clusters.items())
    clock = gpu["smi"].get("clocks.max.sm", "unknown")
    machine = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, {number(gpu['l2_mib'])} MiB of L2"
    libraries = (
        f"torch {v['torch']}, cuDNN {v['cudnn']}, Triton {v['triton']}, NVRTC {v['nvrtc']}, driver {v['driver']}"
    )
    return [
        f"{machine}, clock at most {clock}; {m['cpu']}, {m['cores']} cores; {m['system']}",
        f"gradkernels {v['gradkernels']} at {commit}; {libraries}, Python {v['python']}; {m['date']}",
        f"limits of this run, by torch: {', '.join(rates) or 'none measured'}"
        + "".join(f"; {name} not measured: {why}" for name, why in limits.get("missing", {}).items())
        + (f"; clusters at a time: {room}" if room else ""),
    ]


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """By which plan ours ran, who was to be timed along and could not be, and whose numbers are further off than ours may be."""
    found = [f"* {r['name']}: {r['plan']}" for r in rows if r.get("plan")]
    absent: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        for key, why in r.get("absent", {}).items():
            absent.setdefault((key, why), []).append(r["name"])
    for (key, why), names in absent.items():  # what is missing everywhere is said once
        who = names[0] if len(names) == 1 else f"{len(names)} rows from {names[0]} on"
        found.append(f"* {who}, not timed: {label(key)}, {why}")
    found += [f"* {r['name']}, {label(k)} is less exact: {why}" for r in rows for k, why in r.get("looser", {}).items()]
    return ["How ours ran:", "", *found, ""] if found else []
