"""What a page of gradient flow is given: snapshots of monitors, thinned to what a screen can show and packed row by row."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMAT = 1
# Numbers per run in one page: more than a screen has pixels for, some five megabytes of text.
MOST = 1_000_000
PER_STEP = {
    "layers": ("horizon", "decay"),
    "blocks": ("entrance", "exit", "residual_share"),
    "parameters": ("norm", "grad", "update_ratio"),
}
ROWS = ("signals", "saturation")

Snapshot = Mapping[str, Any]


def snapshots(source: Any) -> dict[str, Snapshot]:
    """The snapshot of every run in `source`: a monitor, a snapshot, or a mapping from names to either."""
    if callable(getattr(source, "snapshot", None)):
        source = source.snapshot()
    if not isinstance(source, Mapping):
        raise TypeError(f"expected a monitor, its snapshot or a mapping of names to them, got {type(source).__name__}")
    if "format" in source:
        if source["format"] != FORMAT:
            raise ValueError(f"this version reads snapshots of format {FORMAT}, got format {source['format']!r}")
        return {source.get("model", "model"): source}
    if not source:
        raise ValueError("expected at least one monitor, got an empty mapping")
    return {str(name): snapshot for name, one in source.items() for snapshot in snapshots(one).values()}


def payload(source: Any, after: Mapping[str, int] | None = None, most: int = MOST) -> dict[str, Any]:
    """The JSON of a page, in which rows of norms are packed; of steps up to `after[run]` only what is not a row.

    Rows make up nearly all of it, and the page of a live view has those of earlier steps already.
    """
    after = after or {}
    return {"runs": [_run(name, s, after.get(name, -1), most) for name, s in snapshots(source).items()]}


def pack(row: list[float | None] | None) -> str | None:
    """Little-endian float32 in base64, NaN where there is nothing."""
    return None if row is None else base64.b64encode(np.array(row, dtype="<f4").tobytes()).decode()


def kept(snapshot: Snapshot, most: int) -> list[int]:
    """The indices of the steps that a page shows: all of them, or those whose turn a power of two divides, and the last.

    What is kept as training goes on is so a part of what was kept before, and no row has to be sent twice.
    """
    steps, every = snapshot["steps"], max(1, snapshot.get("every") or 1)
    numbers = sum(
        len(row)
        for layer in snapshot["layers"]
        for kind in ROWS
        for rows in layer[kind].values()
        for row in rows
        if row
    )
    found, stride = list(range(len(steps))), 1
    while len(found) > 2 and len(found) * numbers > most * len(steps):
        stride *= 2
        found = [i for i, step in enumerate(steps) if step // every % stride == 0 or i == len(steps) - 1]
    return found


def _run(name: str, snapshot: Snapshot, after: int, most: int) -> dict[str, Any]:
    chosen = kept(snapshot, most)
    new = [i for i in chosen if snapshot["steps"][i] > after]
    run = {key: value for key, value in snapshot.items() if key not in PER_STEP}
    run |= {
        "name": name,
        "steps": [snapshot["steps"][i] for i in chosen],
        "recorded": len(snapshot["steps"]),
        "have": len(chosen) - len(new),
    }
    for part, fields in PER_STEP.items():
        run[part] = [
            dict(entry) | {field: [entry[field][i] for i in chosen] for field in fields if field in entry}
            for entry in snapshot.get(part, ())
        ]
    for layer in run["layers"]:
        for kind in ROWS:
            layer[kind] = {signal: [pack(rows[i]) for i in new] for signal, rows in layer[kind].items()}
    return run
