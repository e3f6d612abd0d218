"""The README's table of results, made from a committed report: python -m bench.readme [bench/results/<device>/recurrent.json]

With a report it becomes the one that the README shows; without, the table is made again from the one it shows.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SECTION = re.compile(r"<!-- results: (.*?) -->\n(.*?)<!-- end of results -->\n", re.DOTALL)
COLUMNS = [(cell, mode) for cell in ("lstm", "gru", "rnn_tanh") for mode in ("inference", "training")]
TITLES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}


def cell(row: dict[str, Any] | None) -> str:
    """Ratio and both times of a row; a dash where it was not measured."""
    if row is None or row["error"]:
        return "-"
    theirs, ours = (row["results"][row[key]]["median"] for key in ("peer", "subject"))
    return f"**{theirs / ours:.2f}x** {theirs:.3g} → {ours:.3g}"


def section(report: dict[str, Any], path: Path) -> str:
    """The text between the README's two marks for a report at `path`, relative to the repository."""
    machine, rows = report["machine"], {row["name"]: row for row in report["rows"]}
    shapes = dict.fromkeys(
        (row["T"], row["B"], row["H"]) for row in report["rows"] if row["group"] == "shapes" and row["kind"] == "time"
    )
    versions = f"torch {machine['versions']['torch']}, {machine['capability']}, {machine['threads']} threads"
    lines = [
        f"![how much faster than torch, by row]({path.with_suffix('.png')})",
        "",
        (
            f"One fp32 layer, input as wide as hidden, on {machine['cpu']} ({versions}): how many times faster than "
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
        lines.append(f"| {T}, {B}, {H} | {' | '.join(map(cell, found))} |")
    return "\n".join(lines) + "\n"


def rewritten(readme: str, path: Path | None = None) -> str:
    """The README with its table made again, from the report at `path` or the one it shows now."""
    marked = SECTION.search(readme)
    if marked is None:
        raise ValueError("the README has no <!-- results: PATH --> ... <!-- end of results -->")
    path = Path(marked[1]) if path is None else path.resolve().relative_to(ROOT)
    text = section(json.loads((ROOT / path).read_text()), path)
    mark = f"<!-- results: {path} -->\n{text}<!-- end of results -->\n"
    return readme[: marked.start()] + mark + readme[marked.end() :]


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    README.write_text(rewritten(README.read_text(), path))


if __name__ == "__main__":
    main()
