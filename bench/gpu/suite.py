"""What rows for a GPU need of run.py: their options, who is timed along, and one row measured."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.agreement import Disagreement, agree
from bench.cases import Case, Target
from bench.gpu import device, layer_peers, layer_rows, peers
from bench.gpu.rows import VARIANTS
from bench.layers import Layer
from bench.measure import interleaved
from bench.providers import Provider, build
from bench.report import fill

slug, why_not, dead = device.slug, device.why_not, device.dead


def add_arguments(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--variants", action="store_true", help=f"ours by every kind of plan too: {', '.join(VARIANTS)}")
    p.add_argument(
        "--try",
        action="append",
        default=[],
        dest="tries",
        metavar="PICK",
        help="and by this one: exchange=cluster,C=8,N=16",
    )
    p.add_argument(
        "--micro", type=Path, metavar="FILE", help="what bench.gpu.micro wrote (measured first where there is none)"
    )


def accompanied(case: Case, o: argparse.Namespace) -> Case:
    """The row with everybody else who is to be timed: other plans of ours, other packages."""
    if case.device == "cpu" or case.kind != "time":
        return case
    if isinstance(case, Layer):
        more = layer_rows.picked(case, o.variants, o.tries)
    else:
        picks = [*(VARIANTS if o.variants else ()), *o.tries]
        more = [*(f"ours:{pick}" for pick in picks), *peers.available(case)]
    targets = tuple(Target(key) for key in more)
    return replace(case, providers=(*case.providers, *more), targets=(*case.targets, *targets))


def begin(o: argparse.Namespace) -> dict[str, Any]:
    """What a report begins with: the machine, its parts and its limits."""
    if o.suite == "layers-gpu":
        from bench.gpu import ceilings

        return {"machine": device.describe(), "limits": ceilings.limits(), "micro": {"machine": {}, "records": []}}
    from bench.gpu import micro

    if o.micro and o.micro.exists():
        report = json.loads(o.micro.read_text())
    else:
        try:
            report = micro.everything(True, o.micro)
        except RuntimeError as e:  # no CUDA kernels here: others may run
            report = {"machine": {}, "records": [], "error": str(e)}
    return {"machine": device.describe(), "limits": device.limits(report), "micro": report}


@contextlib.contextmanager
def products(case: Case) -> Iterator[None]:
    """float32 multiplied as the case has it, by torch and by us."""
    before = torch._C._get_cudnn_allow_tf32(), torch.backends.cuda.matmul.allow_tf32
    torch._C._set_cudnn_allow_tf32(case.tf32)  # the public property refuses where torch.testing was imported
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    try:
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(before[0])
        torch.backends.cuda.matmul.allow_tf32 = before[1]


def along(row: dict[str, Any], case: Case, key: str, seen: dict[Case, dict[str, object]]) -> Provider:
    """One of those who are timed along: built, right, and run once. Any of that may fail.

    Ours has to be as exact as torch by every plan; another package that is not is timed all the same, and the row says so."""
    others = (*peers.PEERS, *layer_peers.OTHERS)
    if key.startswith("ours:") or key in others:
        try:
            agree(replace(case, providers=(key, "loop" if "compiled" in case.providers else "torch")), seen)
        except Disagreement as e:
            if key not in others:
                raise
            row["looser"][key] = str(e)
    provider = build(case, key)
    provider.run()
    torch.cuda.synchronize()
    return provider


def measure(row: dict[str, Any], case: Case, o: argparse.Namespace, seen: dict[Case, dict[str, object]]) -> None:
    """Fills the row. Who is timed along and cannot run is in `absent` with the reason; everybody else must.

    Disagreement, as `agree` raises it; RuntimeError for whatever else goes wrong, be it a compiler's own kind of error."""
    try:
        _measure(row, case, o, seen)
    except (Disagreement, RuntimeError):
        raise
    except Exception as e:
        raise RuntimeError(f"{type(e).__name__}: {e}") from e


def _measure(row: dict[str, Any], case: Case, o: argparse.Namespace, seen: dict[Case, dict[str, object]]) -> None:
    import gradkernels

    with products(case):
        if isinstance(case, Layer):
            torch.compiler.reset()  # after some shapes of one function torch would compile no more of it
        row["agreement"] = agree(case, seen)
        if case.kind == "memory":
            fill(row, device.memory(case))
            return
        found = {key: build(case, key) for key in case.providers[:2]}
        for key in case.providers[2:]:
            try:
                found[key] = along(row, case, key, seen)
            except Exception as e:  # it is in the row, and the others go on
                row["absent"][key] = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                if why := dead():
                    raise RuntimeError(f"after {key}: {why}") from e
        calls = [p.run for p in found.values()]
        spreads, row["rounds"], row["dropped"] = interleaved(calls, o.budget, o.repeat, o.wait, watch=device.Events())
        fill(row, dict(zip(found, spreads)))
        if isinstance(case, Layer):
            layer_rows.best(row, case)
        row["algorithm"] = found[row["peer"]].algorithm() if row["peer"].startswith("torch") else None
        found[row["subject"]].run()
        row["backend"] = gradkernels.backends.last()
        row["plan"] = plan(case) if row["backend"] == "cuda" else None


def plan(case: Case) -> str:
    """How ours runs, in the planner's words."""
    from gradkernels import cells
    from gradkernels.backends.cuda import driver, launch
    from gradkernels.backends.cuda import plan as planner

    machine, number = driver.machine(torch.device(case.device)), launch.number(getattr(torch, case.dtype))
    ways = ("forward", "backward")[: 1 + (case.mode == "training")]
    said = (planner.plan(machine, cells.get(case.cell), number, case.H, case.B, way).why for way in ways)
    return "; ".join(dict.fromkeys(f"{way}: {why}" for way, why in zip(ways, said)))


def measures(row: dict[str, Any], case: Case, limits: dict[str, Any], micro: dict[str, Any] | None) -> dict[str, Any]:
    """What a row says of its own time: operations a second, microseconds a step, the floor and our share of it."""
    if case.kind != "time":
        return {}
    if isinstance(case, Layer):
        return layer_rows.measures(row, case, limits)
    from bench.gpu.floor import floor

    ours = row["results"][row["subject"]]["median"]
    gflop = case.flops() / 1e9
    found: dict[str, Any] = {
        "gflop": gflop,
        "gflops": gflop / ours * 1e3,
        "step_us": ours * 1e3 / case.T,
        "floor_us": None,
    }
    limit = limits.get("tf32" if case.tf32 else case.dtype)
    least = floor(case, micro, limit["gflops"]) if micro and limit else None
    if least:
        found |= {"limit_ms": least, "share": least / ours, "floor_us": least * 1e3 / case.T}
    return found
