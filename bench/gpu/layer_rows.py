"""The rows of attention, residual + norm and convolution for a GPU, the most telling first; and what a row costs at least.

All rows of attention have 16k tokens and a width of 2048, all norms 2^26 values, so that rows differ in one thing at a time.

Dims: T tokens of a sequence, B sequences, H width, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.cases import Case, Target
from bench.gpu import layer_peers, layer_picks
from bench.layers import Layer

TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS = (64, 128)
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
VALUES = 1 << 26  # of a tensor that is normalised: 128 MiB in bf16, beyond the caches
WAYS = ("inference", "backward")
SQUARE = 2048  # the longest T whose T x T scores the math backend is given time and room for
COPY = {"inference": 0.85, "backward": 0.65}  # share of the copy bandwidth that is asked of norms
TFLOPS = {"inference": 450.0, "backward": 320.0}  # asked at D = 128, T = 4096, causal


def layer(group: str, cell: str, mode: str, T: int, B: int, H: int, **more: Any) -> Layer:
    return Layer(group, cell, mode, T, B, H, **{"device": "cuda", "dtype": "bfloat16", **more})


def attention(T: int, D: int, mode: str, flex: bool = False, **more: Any) -> Layer:
    p, causal = more.get("dropout", 0.0), more.get("causal", True)
    best = None if more.get("dtype") == "float32" else 1.5 if p else 1.0 if D == 64 and T <= 2048 else None
    beside = [key for key in layer_peers.SDPA if key != "sdpa_math" or T <= SQUARE]
    beside += ["flash_attn", *["flex"] * (flex and not p)]
    targets = [Target("torch"), Target("best", best), Target("limit"), *map(Target, beside)]
    if D == 128 and T == 4096 and causal and not p and "dtype" not in more:
        targets.append(Target("rate", TFLOPS[mode]))
    group = "attention with dropout on a gpu" if p else "attention on a gpu"
    return layer(
        group, "attention", mode, T, TOKENS // T, WIDTH, heads=WIDTH // D,
        providers=("ours", "torch", *beside), targets=tuple(targets), **more,
    )  # fmt: skip


def norm(N: int, mode: str, cell: str, **more: Any) -> Layer:
    wanted = COPY[mode] if cell == "residual norm" and more.get("dropout") and "dtype" not in more else None
    beside = ("torch_compile", "flash_attn", *(() if cell == "residual norm" else ("liger",)))
    return layer(
        "norms on a gpu", cell, mode, VALUES // N // 8, 8, N, providers=("ours", "torch", *beside),
        targets=(Target("torch"), Target("limit", wanted), *map(Target, beside)), **more,
    )  # fmt: skip


def convolutions() -> Iterator[Layer]:
    shapes = [(2048, 8, 512, 3, 4), (16384, 1, 128, 2, 64), (4096, 8, 1024, 3, 1), (512, 32, 256, 4, 1)]
    for T, B, H, taps, dilation in shapes:
        for mode in WAYS:
            for more in ({}, {"dtype": "float32", "tf32": True}) if H == 512 else ({},):
                yield layer(
                    "convolution on a gpu", "causal conv", mode, T, B, H, taps=taps, dilation=dilation,
                    targets=(Target("torch"), Target("limit")), **more,
                )  # fmt: skip


def blocks() -> Iterator[Layer]:
    """The whole sublayer."""
    for T, p in ((2048, 0.1), (2048, 0.0), (512, 0.1)):
        for mode in ("inference", "training"):
            yield layer(
                "blocks on a gpu", "attention block", mode, T, TOKENS // T, 1024, heads=16, dropout=p,
                providers=("ours", "torch", "torch_compile"), targets=(Target("torch"), Target("torch_compile")),
            )  # fmt: skip


def memory() -> Iterator[Layer]:
    more = {"kind": "memory", "targets": (Target("torch", 1.0),)}
    yield layer("peak memory", "attention", "training", 16384, 1, 64, dropout=0.1, **more)
    yield layer("peak memory", "attention", "training", 4096, 4, 2048, heads=16, **more)
    yield layer("peak memory", "attention block", "training", 2048, 8, 1024, heads=16, dropout=0.1, **more)
    yield layer("peak memory", "residual norm", "training", 2048, 8, 4096, dropout=0.1, **more)
    yield layer("peak memory", "causal conv", "training", 2048, 8, 512, taps=3, dilation=4, **more)


def layers_gpu() -> list[Case]:
    """Every such row, in the order in which they are measured: what something is asked of, then the others."""
    found: list[Layer] = []
    for T, D in ((512, 64), (2048, 64), (4096, 128)):
        found += [attention(T, D, mode, flex=T > 512) for mode in WAYS]
    found += [attention(2048, D, mode, dropout=0.1) for D in HEADS for mode in WAYS]
    found += [norm(N, mode, "residual norm", dropout=0.1) for N in (4096, 1024) for mode in WAYS]
    found += [*blocks(), *convolutions(), *memory()]
    for N in WIDTHS:
        found += [norm(N, mode, "residual norm", dropout=p) for p in (0.1, 0.0) for mode in WAYS]
    for N in (1024, 4096, 16384):
        found += [norm(N, mode, cell) for cell in ("residual rms norm", "layer norm") for mode in WAYS]
    for T in LENGTHS:
        for D in HEADS:
            found += [attention(T, D, mode, causal=causal) for causal in (True, False) for mode in WAYS]
            found += [attention(T, D, mode, dropout=0.1) for mode in WAYS]
    found += [attention(2048, 64, mode, dtype=dtype) for dtype in ("float16", "float32") for mode in WAYS]
    found += [norm(4096, mode, "residual norm", dropout=0.1, dtype="float32") for mode in WAYS]
    first: dict[str, Case] = {}
    for case in found:
        first.setdefault(case.name, case)
    return list(first.values())


def picked(case: Layer, variants: bool, tries: list[str]) -> list[str]:
    """Keys of ours by other tiles, of those that the row's kernels have."""
    of = layer_picks.kind(case)
    picks = [*(layer_picks.VARIANTS[of] if variants and of else ()), *tries]
    return [f"ours:{pick}" for pick in picks if layer_picks.fits(case, pick)]


# ---------------------------------------------------------------- floors


def rate(case: Layer, limits: dict[str, Any]) -> float | None:
    """GFLOP/s of products at most: for attention those at its head size, where they were measured."""
    name = "tf32" if case.tf32 else case.dtype
    heads = f"{name}, heads of {case.H // case.heads}"
    both = [limits[k]["gflops"] for k in (heads, name)[: 2 if case.cell == "attention" else None] if k in limits]
    return both[0] if both else None


def measures(row: dict[str, Any], case: Layer, limits: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its own time: TFLOP/s or GB/s, the floor, and our share of it.

    The floor is the products at the rate, or the bytes at the copy bandwidth, whichever takes longer."""
    ours, gflop, gigabytes = row["results"][row["subject"]]["median"], case.flops() / 1e9, case.bytes() / 1e9
    found: dict[str, Any] = {"gflop": gflop, "gflops": gflop / ours * 1e3, "gbs": gigabytes / ours * 1e3}
    products, copies = rate(case, limits), limits.get("copy")
    if (gflop and not products) or (gigabytes and not copies) or not (gflop or gigabytes):
        return found
    least = max(gflop / products if gflop else 0.0, gigabytes / copies["gbs"] if gigabytes else 0.0) * 1e3
    return found | {"limit_ms": least, "share": least / ours}


def best(row: dict[str, Any], case: Layer) -> None:
    """Puts the fastest of SDPA's backends into a row of attention, as a provider of its own: what is asked is asked of that."""
    if not any(t.against == "best" for t in case.targets):
        return
    found = {k: r for k, r in row["results"].items() if k in layer_peers.SDPA}
    if not found:
        row["absent"]["best"] = "no backend of SDPA that was timed takes this"
        return
    key = min(found, key=lambda k: found[k]["median"])
    row["results"]["best"] = {**found[key], "label": f"SDPA, the fastest backend: {key.removeprefix('sdpa_')}"}
