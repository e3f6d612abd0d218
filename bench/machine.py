"""The machine a run was made on: its name, its versions, and how fast it multiplies matrices and copies memory at best."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import wait_share, waited, warm

ROOT = Path(__file__).resolve().parent.parent
PRODUCTS = [(1024, 1024, 1024), (2048, 2048, 1024), (4096, 1024, 256), (4096, 1024, 1024)]  # m, n, k
COPIED = 256  # MiB, beyond the caches
FLAGS = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "amx": ("amx_tile",), "avx512": ("avx512f",), "avx2": ("avx2",)}


def cpu() -> dict[str, Any]:
    """Name, family and instruction sets, as the kernel tells them; elsewhere what `platform` knows."""
    found: dict[str, Any] = {"name": platform.processor() or platform.machine(), "family": None, "has": []}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return found
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found["name"] = fields.get("model name", found["name"])
    if "cpu family" in fields:
        found["family"] = f"family {fields['cpu family']} model {fields.get('model', '?')}"
    found["has"] = [name for name, any_of in FLAGS.items() if flags & set(any_of)]
    return found


def describe() -> dict[str, Any]:
    """Device, threads, versions and commit: what every row of this run has in common."""
    import gradkernels

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (FileNotFoundError, subprocess.CalledProcessError):
            return None  # an unpacked archive has no history

    config = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)", config)
    onednn = re.search(r"MKL-DNN v(\S+)", config)
    status = git("status", "--porcelain", "--untracked-files=no")
    found = cpu()
    return {
        "device": "cpu",
        "cpu": found["name"],
        "cpu_family": found["family"],
        "has": found["has"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gradkernels": getattr(gradkernels, "__version__", None),
            "mkl": mkl[1] if mkl else None,
            "onednn": onednn[1] if onednn else None,
        },
        "capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {name: why or "ready" for name, why in gradkernels.backends().items()},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def slug(machine: dict[str, Any]) -> str:
    """Folder of bench/results for this device: 'amd-epyc-family-26-model-2-avx512-2-cores'."""
    words = [machine["cpu"], machine["cpu_family"] or "", machine["capability"], f"{machine['cores']} cores"]
    text = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*?hz", " ", " ".join(words).lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def products(dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]]:
    """Ways that torch has to multiply [m, k] by [n, k]^T. MKL uses half the vector units of an AMD CPU, so oneDNN is asked too."""
    own = "MKL" if dtype == torch.float32 and torch.backends.mkl.is_available() else "torch"
    found: dict[str, Any] = {f"torch.mm ({own})": lambda a, w: lambda: torch.mm(a, w.t())}
    ops = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise"):
        found["oneDNN linear"] = lambda a, w: lambda: ops._linear_pointwise(a, w, None, "none", [], "")
        if hasattr(ops, "_reorder_linear_weight"):

            def packed(a, w):
                w = ops._reorder_linear_weight(w, a.shape[0])
                return lambda: ops._linear_pointwise(a, w, None, "none", [], "")

            found["oneDNN linear, weights packed"] = packed
    return found


def matmul_rate(dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """GFLOP/s of the fastest product: over several sizes and over every way torch has, each named with its own best."""
    rates: dict[str, float] = {}
    ways = products(dtype)
    each = seconds / (len(ways) * len(PRODUCTS))
    with torch.no_grad():
        for m, n, k in PRODUCTS:
            a, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            for name, make in ways.items():
                rates[name] = max(rates.get(name, 0.0), 2e-9 * m * n * k / warm(make(a, w), each, 4))
    by = max(rates, key=rates.__getitem__)
    return {"gflops": rates[by], "by": by, "all": rates}


def copy_rate(seconds: float) -> dict[str, Any]:
    """GB/s read and written by torch's copy of a tensor beyond the caches."""
    size = COPIED << 20
    a, b = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return {"gbs": 2e-9 * size / warm(lambda: b.copy_(a), seconds, 4), "by": f"copy_ of {COPIED} MiB"}


def limits(seconds: float = 6.0) -> dict[str, Any]:
    """The best this machine does: float32 and bfloat16 products, and copying; and how far other work was in the way."""
    before, begin = waited(), time.perf_counter()
    found = {
        "float32": matmul_rate(torch.float32, seconds / 3),
        "bfloat16": matmul_rate(torch.bfloat16, seconds / 3),
        "copy": copy_rate(seconds / 3),
    }
    return {**found, "waited": wait_share(before, waited(), time.perf_counter() - begin)}


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of the limits, the higher of each: a limit is what the machine can do, not what it did at some moment."""
    found = {
        k: max(one[k], other[k], key=lambda limit: limit.get("gflops", limit.get("gbs"))) for k in one if k != "waited"
    }
    return {**found, "waited": max(one["waited"], other["waited"])}
