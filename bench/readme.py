"""The README's tables of results, made from committed reports: python -m bench.readme [bench/results/<device>/recurrent.json ...]

A report given becomes the one that the README shows of its suite; all tables are made again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.tasks import HIDDEN, label, place, places

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SECTION = re.compile(r"<!-- results: (.*?) -->\n(.*?)<!-- end of results -->\n", re.DOTALL)
COLUMNS = [(cell, mode) for cell in ("lstm", "gru", "rnn_tanh") for mode in ("inference", "training")]
TITLES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}

# What a row of the README is called, and the row of the report, without its mode.
LAYERS = {
    "causal attention, 512 tokens, batch 8, 8 heads of 64": "attention 512,8,512 MODE 8 heads",
    "the same, bfloat16": "attention 512,8,512 MODE bf16 8 heads",
    "the same, dropout 0.1": "attention 512,8,512 MODE 8 heads dropout 0.1",
    "causal attention, 2,048 tokens, batch 2, 8 heads of 64": "attention 2048,2,512 MODE 8 heads",
    "attention block of 512, 512 tokens, batch 8: projections, norm and residual path too": "attention block 512,8,512 MODE 8 heads",
    "`norm(residual + dropout(x))`, 4,096 rows of 512, dropout 0.1": "residual norm 512,8,512 MODE dropout 0.1",
    "the same, no dropout": "residual norm 512,8,512 MODE",
    "`LayerNorm` alone, 4,096 rows of 512": "layer norm 512,8,512 MODE",
    "dilated convolution, 2,048 tokens, batch 4, 64 channels, 2 taps": "causal conv 2048,4,64 MODE 2 taps, dilation 16",
    "dilated convolution, 512 tokens, batch 8, 256 channels, 3 taps": "causal conv 512,8,256 MODE 3 taps, dilation 4",
}
CELLS = {
    "LSTM, layer norm inside": "lstm_layer_norm SHAPE training",
    "LSTM, peepholes": "lstm_peephole SHAPE training",
    "sLSTM": "slstm SHAPE training",
    "LSTM, zoneout": "lstm SHAPE training zoneout 0.1",
    "LSTM, 4 heads": "lstm SHAPE training 4 heads",
    "LSTM, skips over 8 steps": "lstm SHAPE training skip 8",
    "GRU, layer norm inside": "gru_layer_norm SHAPE training",
    "GRU, four time scales": "gru SHAPE training periods 1,2,4,8",
    "the README's own cell": "leaky SHAPE training",
}


def ratio(row: dict[str, Any] | None, against: str) -> str:
    """How many times faster than that provider, or a dash."""
    if row is None or row["error"]:
        return "-"
    value = next((r["value"] for r in row["ratios"] if r["against"] == against), None)
    return "-" if value is None else f"{value:.2f}x"


def times(row: dict[str, Any] | None) -> str:
    """Ratio to the peer and both times; a dash where it was not measured."""
    if row is None or row["error"]:
        return "-"
    theirs, ours = (row["results"][row[key]]["median"] for key in ("peer", "subject"))
    return f"**{theirs / ours:.2f}x** {theirs:.3g} → {ours:.3g}"


def on(machine: dict[str, Any]) -> str:
    versions = f"torch {machine['versions']['torch']}, {machine['capability']}, {machine['threads']} threads"
    return f"{machine['cpu']} ({versions})"


def recurrent(report: dict[str, Any], path: Path) -> list[str]:
    rows = {row["name"]: row for row in report["rows"]}
    shapes = dict.fromkeys(
        (row["T"], row["B"], row["H"]) for row in report["rows"] if row["group"] == "shapes" and row["kind"] == "time"
    )
    lines = [
        f"![how much faster than torch, by row]({path.with_suffix('.png')})",
        "",
        (
            f"One fp32 layer, input as wide as hidden, on {on(report['machine'])}: how many times faster than "
            f"`torch.nn`, and the milliseconds of torch → ours, medians of interleaved runs. All rows, with their targets, the "
            f"machine's limits and the reasons of those that fall short, are in [the report]({path.with_suffix('.md')}); "
            "`make bench` measures yours."
        ),
        "",
        "| T, B, H | " + " | ".join(f"{TITLES[c]} {mode}" for c, mode in COLUMNS) + " |",
        "|---|" + "--:|" * len(COLUMNS),
    ]
    for T, B, H in shapes:
        found = (rows.get(f"{c} {T},{B},{H} {mode}") for c, mode in COLUMNS)
        lines.append(f"| {T}, {B}, {H} | {' | '.join(map(times, found))} |")
    return lines


def layers(report: dict[str, Any], path: Path) -> list[str]:
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        f"Attention, norms and convolution, same machine, in float32 unless said; [all rows]({path.with_suffix('.md')}):",
        "",
        "| against torch | inference | training |",
        "|---|--:|--:|",
    ]
    for title, name in LAYERS.items():
        both = (times(rows.get(name.replace("MODE", mode))) for mode in ("inference", "training"))
        lines.append(f"| {title} | {' | '.join(both)} |")
    return lines


def cells(report: dict[str, Any], path: Path) -> list[str]:
    rows = {row["name"]: row for row in report["rows"]}
    lines = [
        (
            "The family of cells, training, same machine, T = 128, H = 256: how many times faster than the Python loop that people write, than that "
            f"loop with its step in `torch.compile`, and than our plain LSTM, GRU or RNN, per gate (1.00x: what is added to a step costs nothing); a dash is not measured; [all rows]({path.with_suffix('.md')}):"
        ),
        "",
        "| | loop, B = 32 | compiled | plain | loop, B = 1 | compiled | plain |",
        "|---|" + "--:|" * 6,
    ]
    for title, name in CELLS.items():
        found = [rows.get(name.replace("SHAPE", shape)) for shape in ("128,32,256", "128,1,256")]
        columns = [ratio(row, key) for row in found for key in ("loop", "compiled", "ours_plain")]
        lines.append(f"| {title} | {' | '.join(columns)} |")
    return lines


def tasks(report: dict[str, Any], path: Path) -> list[str]:
    rows, about = report["rows"], report["options"]
    names = list(dict.fromkeys(row["task"] for row in rows))
    delays = sorted({row["delay"] for row in rows})
    found = {task: places([row for row in rows if row["task"] == task]) for task in names}
    lines = [
        (
            f"Models of {HIDDEN} units after {about['steps']:,} training steps, {about['seeds']} seeds: the median share of right answers, and how many "
            f"seeds solved the task, nine tenths right in every batch to the end; [how it was counted]({path.with_suffix('.md')}):"
        ),
        "",
        "| | " + " | ".join(f"{task} {delay}" for task in names for delay in delays) + " |",
        "|---|" + "--:|" * len(names) * len(delays),
    ]
    for model in dict.fromkeys(model for task in names for model in found[task]):
        columns = [place(found[task].get(model, {}).get(delay, [])) for task in names for delay in delays]
        lines.append(f"| {label(*model)} | {' | '.join(columns)} |")
    return lines


SUITES = {"recurrent": recurrent, "layers": layers, "cells": cells, "tasks": tasks}


def section(report: dict[str, Any], path: Path) -> str:
    """The text between the README's two marks for a report at `path`, relative to the repository."""
    return "\n".join(SUITES[report.get("suite", path.stem)](report, path)) + "\n"


def rewritten(readme: str, given: dict[str, Path] | None = None) -> str:
    """The README with its tables made again, from the reports `given` by their suites or the ones it shows now."""
    if not SECTION.search(readme):
        raise ValueError("the README has no <!-- results: PATH --> ... <!-- end of results -->")

    def again(marked: re.Match[str]) -> str:
        path = Path(marked[1])
        path = (given or {}).get(path.stem, path)
        return (
            f"<!-- results: {path} -->\n{section(json.loads((ROOT / path).read_text()), path)}<!-- end of results -->\n"
        )

    return SECTION.sub(again, readme)


def main() -> None:
    paths = [Path(name).resolve().relative_to(ROOT) for name in sys.argv[1:]]
    README.write_text(rewritten(README.read_text(), {path.stem: path for path in paths}))


if __name__ == "__main__":
    main()
