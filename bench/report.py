"""From measurements to verdicts: ratios, shares of the limit, targets met or not. Plain dictionaries throughout, as the JSON has them.

A report: schema, suite, options, machine, limits (of this run), rows, summary. A row: name, the fields of its case, unit, results by
provider (median, min, q1, q3, samples), rounds and dropped, backend, algorithm (the peer's), agreement, error, gflop, gflops, share,
gbs, limit_ms, ratio (to the peer), ratios (what each target asks, what was found, met or not), met.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.cases import Case
from bench.measure import Spread, geometric_mean
from bench.providers import label

SCHEMA = 1
MEANS = {"lstm": 1.5, "gru": 3.0}  # geometric means over the plain fp32 shapes, inference and training


def number(value: float | None) -> str:
    """Three significant digits, never in exponent form."""
    if value is None:
        return ""
    for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def blank(case: Case) -> dict[str, Any]:
    """A row before anything is known."""
    fields = {k: v for k, v in case.as_dict().items() if k not in ("targets", "providers")}
    return {
        "name": case.name,
        **fields,
        "I": case.H,
        "unit": "MiB" if case.kind == "memory" else "ms",
        "subject": case.providers[0],
        "peer": case.providers[1],
        "results": {},
        "rounds": None,
        "dropped": None,
        "algorithm": None,
        "agreement": None,
        "error": None,
        **({} if case.device == "cpu" else {"absent": {}, "looser": {}, "plan": None}),
    }


def fill(row: dict[str, Any], results: dict[str, Spread]) -> None:
    """Puts measurements into a row."""
    row["results"] = {key: {"label": label(key), **asdict(spread)} for key, spread in results.items()}


def judge(
    row: dict[str, Any], case: Case, limits: dict[str, Any], has: list[str], micro: dict[str, Any] | None = None
) -> None:
    """Adds what follows from the measurements: rate, share of the limit, ratios, targets. has: the CPU's instruction sets.

    micro: what gpu/micro.py reports; on a GPU the limit is the floor that gpu/floor.py makes of it.
    """
    row.update(gflop=None, gflops=None, gbs=None, share=None, limit_ms=None, ratio=None, ratios=[], met=None)
    if row["error"] or not row["results"]:
        return
    ours = row["results"][row["subject"]]["median"]
    if case.device != "cpu":
        from bench.gpu import suite

        row.update(suite.measures(row, case, limits, micro))
    elif case.kind == "time" and case.mode != "step":
        row["gflop"], gigabytes = case.flops() / 1e9, case.bytes() / 1e9
        row["gflops"] = row["gflop"] / ours * 1e3
        row["gbs"] = gigabytes / ours * 1e3
        products, copies = row["gflop"] / limits[case.dtype]["gflops"], gigabytes / limits["copy"]["gbs"]
        row["limit_ms"] = max(products, copies) * 1e3
        row["share"] = row["limit_ms"] / ours
    for target in case.targets:
        if target.against in row.get("absent", {}) or (target.against == "limit" and row["share"] is None):
            continue
        if target.against == "limit":
            value = row["share"]
        elif target.against == "rate":
            value = row["gflops"] / 1e3
        else:
            value = row["results"][target.against]["median"] * target.scale / ours
        asked = None if target.needs is not None and target.needs not in has else target.at_least
        met = None if asked is None else value >= asked
        row["ratios"].append({**asdict(target), "at_least": asked, "value": value, "met": met})
    row["ratio"] = next((r["value"] for r in row["ratios"] if r["against"] == row["peer"]), None)
    verdicts = [r["met"] for r in row["ratios"] if r["met"] is not None]
    row["met"] = all(verdicts) if verdicts else None


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the plain fp32 shapes of a cell, as far as they were measured."""
    found = []
    for cell, target in MEANS.items():
        ratios = [r["ratio"] for r in rows if r["group"] == "shapes" and r["cell"] == cell and r["ratio"] is not None]
        if ratios:
            mean = geometric_mean(ratios)
            found.append({"cell": cell, "rows": len(ratios), "ratio": mean, "at_least": target, "met": mean >= target})
    return found


def short(row: dict[str, Any]) -> list[str]:
    """Which targets of a row are missed, in words."""
    return [
        f"{r['value']:.0%} of the limit, {r['at_least']:.0%} asked"
        if r["against"] == "limit"
        else f"{r['value']:.0f} TFLOP/s, {r['at_least']:.0f} asked"
        if r["against"] == "rate"
        else f"{r['value']:.2f}x {label(r['against'])}, {r['at_least']:.2f}x asked"
        for r in row["ratios"]
        if r["met"] is False
    ]
