"""The GPU a run was made on, how calls are timed there, and what they hold of its memory."""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import machine
from bench.cases import Case
from bench.layers import Layer
from bench.measure import Plan, Spread

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32", "fp32": "float32"}  # as rows name them
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
)
MIB = 1 << 20


def why_not() -> str | None:
    """The reason why nothing can be measured on a GPU here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def smi(query: str = QUERY) -> dict[str, str]:
    """What nvidia-smi reads of the current GPU; nothing where it does not run. It sets nothing."""
    which = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    line = ["nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        said = subprocess.run(line, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(query.split(","), (v.strip() for v in said.strip().split(","))))


def version(package: str) -> str | None:
    """Of an installed distribution."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def nvrtc() -> str | None:
    from gradkernels.backends.cuda import nvrtc

    return None if nvrtc.why_not() else ".".join(map(str, nvrtc.version()))


def describe() -> dict[str, Any]:
    """As machine.describe, of a GPU."""
    found = machine.describe()
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    found["device"] = "cuda"
    found["gpu"] = {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_mib": p.total_memory // MIB,
        "l2_mib": p.L2_cache_size / MIB,
        "smi": smi(),
    }
    cudnn = torch.backends.cudnn.version()
    found["versions"] |= {
        "cuda": torch.version.cuda,
        "cudnn": cudnn and f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "triton": version("triton"),
        "nvrtc": nvrtc(),
        "cuda_bindings": version("cuda-bindings"),
        "driver": found["gpu"]["smi"].get("driver_version"),
    }
    return found


def slug(there: dict[str, Any]) -> str:
    """Folder of bench/results for this GPU: 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", there["gpu"]["name"].lower()).strip("-")


def limits(micro: dict[str, Any]) -> dict[str, Any]:
    """Rates of large products and of copying, as machine.limits has them, from a report of micro.py."""
    from bench.gpu.floor import records

    found: dict[str, Any] = {"waited": 0.0}
    for number, name in DTYPES.items():
        for r in records(micro, "product of large matrices by torch", number=number):
            found[name] = {"gflops": r["gflops"], "by": "torch.mm", "all": {"torch.mm": r["gflops"]}}
    for r in records(micro, "copy by torch"):
        found["copy"] = {"gbs": r["gbs"], "by": "copy_ of 2 GiB"}
    return found


class Events:
    """Times calls by events on the stream, each after something else has filled the caches, as the rest of a model would.

    Writing that also gives the host time to queue the call: what is timed is the device, unless the host is the slower by far.
    """

    tick = 0.0  # every call is timed by itself: events tell half a microsecond

    def __init__(self) -> None:
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.other = torch.empty(2 * max(p.L2_cache_size, 16 * MIB), dtype=torch.uint8, device="cuda")

    def settle(self) -> None:
        torch.cuda.synchronize()

    def samples(self, call: Callable[[], object], plan: Plan) -> list[float]:
        """Milliseconds of a call, `plan.samples` times."""
        for _ in range(min(plan.lead, 3)):
            call()
        marks = []
        for _ in range(plan.samples):
            self.other.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]


def memory(case: Case) -> dict[str, Spread]:
    """Peak MiB that three training steps of each provider hold in torch's allocator above layer and input, after a tiny layer's."""
    from bench.providers import build

    more = {} if isinstance(case, Layer) else {"H": 8, "proj_size": 4 if case.proj_size else 0}
    tiny = replace(case, T=2, B=2, **more)
    found = {}
    for key in case.providers:
        build(tiny, key).run()
        provider = build(case, key)
        if isinstance(case, Layer):
            provider.run()  # the outputs' gradient is drawn
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            provider.run()
        torch.cuda.synchronize()
        found[key] = Spread.of([(torch.cuda.max_memory_allocated() - before) / MIB])
        del provider
    return found


def dead() -> str | None:
    """Why the GPU takes nothing more from this process after an error, or None."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what a run on this GPU has in common, as JSON; 2 where there is none."""
    p = argparse.ArgumentParser(description="The GPU, the driver and the versions of everything.")
    p.add_argument("--slug", action="store_true", help="the name of its folder alone")
    o = p.parse_args(argv)
    if why := why_not():
        print(why, file=sys.stderr)
        return 2
    if o.slug:
        print(slug({"gpu": {"name": torch.cuda.get_device_name()}}))
        return 0
    print(json.dumps(describe(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
