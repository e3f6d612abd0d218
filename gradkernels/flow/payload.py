"""What a page of gradient flow is given: snapshots of monitors, thinned to what a screen can show and packed row by row."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
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


def payload(source: Any, seen: Mapping[str, Sequence[int]] | None = None, most: int = MOST) -> dict[str, Any]:
    """The JSON of a page, in which long rows of numbers are packed, and left out as far as the page has them.

    `seen` are the last training step and the last step of a spectrum that a page has, by run. What it has not is nearly nothing of
    the whole, second by second. The last spectra are sent again: they may have been taken one matrix at a time.
    """
    seen = seen or {}
    runs = [_run(name, one, seen.get(name, (-1, -1)), most) for name, one in snapshots(source).items()]
    return {"runs": runs}


def last(snapshot: Snapshot) -> list[int]:
    """What a page has seen that has all of a snapshot."""
    spectra = snapshot.get("spectra") or ()
    return [snapshot["steps"][-1] if snapshot["steps"] else -1, spectra[-1]["step"] if spectra else -1]


def pack(row: Iterable[float | None] | None) -> str | None:
    """Little-endian float32 in base64, NaN where there is nothing."""
    return None if row is None else base64.b64encode(np.array(row, dtype="<f4").tobytes()).decode()


def thin(ordinals: Sequence[int], numbers: int, most: int) -> list[int]:
    """Indices of what a page shows of things that make up `numbers` numbers: all, or those whose ordinal a power of two divides.

    The last is always there. As time goes on what is shown is a part of what was shown before, so that nothing has to be sent twice.
    """
    found, stride = list(range(len(ordinals))), 1
    while len(found) > 2 and len(found) * numbers > most * len(ordinals):
        stride *= 2
        found = [i for i, n in enumerate(ordinals) if n % stride == 0 or i == len(ordinals) - 1]
    return found


def _run(name: str, snapshot: Snapshot, seen: Sequence[int], most: int) -> dict[str, Any]:
    after, after_spectrum = seen
    steps, every = snapshot["steps"], max(1, snapshot.get("every") or 1)
    every_row = (row for layer in snapshot["layers"] for kind in ROWS for rows in layer[kind].values() for row in rows)
    # Steps are counted from 1. Some things are measured at every 16th recorded step only: powers of two keep those.
    chosen = thin([(step - 1) // every for step in steps], sum(len(row) for row in every_row if row), most)
    new = [i for i in chosen if steps[i] > after]
    run = {key: value for key, value in snapshot.items() if key not in PER_STEP}
    run |= {"name": name, "steps": [steps[i] for i in chosen], "recorded": len(steps), "have": len(chosen) - len(new)}
    for part, fields in PER_STEP.items():
        run[part] = [
            dict(entry) | {field: [entry[field][i] for i in chosen] for field in fields if field in entry}
            for entry in snapshot.get(part, ())
        ]
    for layer in run["layers"]:
        for kind in ROWS:
            layer[kind] = {signal: [pack(rows[i]) for i in new] for signal, rows in layer[kind].items()}
    return run | _spectra(snapshot.get("spectra") or (), after_spectrum, most)


def _spectra(spectra: Sequence[Mapping[str, Any]], after: int, most: int) -> dict[str, Any]:
    steps = sorted({record["step"] for record in spectra})
    shown = [steps[i] for i in thin(range(len(steps)), sum(3 * len(record["eigenvalues"]) for record in spectra), most)]
    new = [record for record in spectra if record["step"] >= after and record["step"] in shown]
    flat = {
        "eigenvalues": lambda record: [part for value in record["eigenvalues"] for part in value],
        "singular_values": lambda record: record["singular_values"],
    }
    return {
        "spectra": [dict(record) | {key: pack(values(record)) for key, values in flat.items()} for record in new],
        "spectrum_steps": shown,
    }
