"""Draw a report: ratios to torch by cell and mode, with the line of equality and what is asked of each row.

python bench/plot.py bench/results/*/recurrent.json     beside each: recurrent.md, recurrent.png, recurrent_more.png
python bench/plot.py --format svg report.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.cases import TITLES
from bench.table import markdown

INK, FAINT, GRID = "#1b1f24", "#6b7480", "#e4e7eb"
AHEAD = {"inference": "#8cc5e3", "training": "#1a5c99"}
BEHIND = {"inference": "#f2b8a0", "training": "#c8553d"}  # below 1
ASKED = "#f0a202"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "savefig.facecolor": "white",
}
WIDE = 12.5  # inches
BAR, BETWEEN = 0.2, 0.55  # inches per bar; space between labels, in bars
AXIS = 0.25  # inches of an axis beyond its bars

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What is drawn of one row: how many times as good as its peer, and what is asked of it."""

    label: str
    mode: str
    value: float
    asked: float | None


@dataclass(frozen=True)
class Panel:
    title: str
    bars: list[Bar]

    def inches(self) -> float:
        return BAR * (len(self.bars) + BETWEEN * len({b.label for b in self.bars})) + AXIS

    def names(self) -> float:
        """Inches that its labels need."""
        return 0.2 + 0.068 * max(len(b.label) for b in self.bars)


def bars(rows: Sequence[Row], label: Callable[[Row], str], against: str | None = None) -> list[Bar]:
    """A bar for every row that was held against that provider; None: its peer."""
    found = []
    for row in rows:
        for ratio in row["ratios"]:
            if ratio["against"] == (against or row["peer"]):
                mode = "training" if row["mode"] == "training" else "inference"
                found.append(Bar(label(row), mode, ratio["value"], ratio["at_least"]))
    return found


def shape(row: Row) -> str:
    return f"{row['T']}, {row['B']}, {row['H']}"


def special(row: Row) -> str:
    """What is out of the ordinary, or else the shape."""
    parts = [
        {"packed": "packed", "ragged": "lengths="}.get(row["layout"], ""),
        f"projection {row['proj_size']}" * bool(row["proj_size"]),
        f"{row['layers']} layers" * (row["layers"] > 1),
        "both ways" * row["bidirectional"],
        f"{shape(row)} bf16" * (row["dtype"] == "bfloat16"),
    ]
    return ", ".join(filter(None, parts)) or shape(row)


def with_cell(row: Row) -> str:
    return f"{TITLES[row['cell']]}  {special(row)}"


def draw(ax: Axes, panel: Panel, low: float, high: float, wide: float) -> None:
    """Bars from 1.0: to the right where ours is ahead. low, high: ends of the axis, the same for neighbours; wide: its inches."""
    text = (high / low) ** (0.47 / wide)  # what a number takes of the axis, as a factor
    y, ticks, names = 0.0, [], []
    for label, members in groupby(panel.bars, key=lambda b: b.label):
        start = y
        for bar in members:
            tones = AHEAD if bar.value >= 1 else BEHIND
            ax.barh(y, bar.value - 1, left=1, height=0.88, color=tones[bar.mode], linewidth=0, zorder=2)
            end = max(bar.value, 1.0)
            if bar.asked is not None:
                where = ([bar.asked, bar.asked], [y - 0.44, y + 0.44])
                ax.plot(*where, color="white", linewidth=4, zorder=4, solid_capstyle="butt")
                ax.plot(*where, color=ASKED, linewidth=2.2, zorder=5, solid_capstyle="butt")
                if bar.asked <= end * text:
                    end = max(end, bar.asked)
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
            number = f"{bar.value:,.{2 if bar.value < 10 else 1 if bar.value < 100 else 0}f}x"
            ax.annotate(number, (end, y), fontsize=7.8, color=INK, zorder=6, **place)
            y += 1
        ticks.append((start + y - 1) / 2)
        names.append(label)
        y += BETWEEN
    ax.axvline(1, color=INK, linewidth=1.0, zorder=3)
    ax.set_xscale("log", base=2)
    ax.set_xlim(low, high)
    marks = [m for m in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= m <= high]
    if len(marks) < 3:
        marks = [m for m in (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5) if low <= m <= high]
    ax.set_xticks(marks, [f"{m:g}x" for m in marks], fontsize=8)
    ax.minorticks_off()
    ax.set_yticks(ticks, names, fontsize=8.6)
    ax.set_ylim(y - BETWEEN - 0.35, -0.65)
    ax.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def ends(found: Sequence[Bar]) -> tuple[float, float]:
    """An axis that holds every bar and every target, with room for the numbers."""
    values = [1.0, *(b.value for b in found), *(b.asked for b in found if b.asked is not None)]
    low, high = min(values), max(values)
    return (low / 1.08 if low < 1 else 0.96), max(high**1.22 * 1.12, 1.3)


def compose(lines: Sequence[Sequence[Panel]], title: str, subtitle: str, apart: Sequence[int] = ()) -> Figure | None:
    """A figure of lines of panels. The panels of a line share their axis, but for those lines that are listed in `apart`.

    Empty panels and lines are left out.
    """
    apart_of = {id(p) for k in apart for p in lines[k]}
    kept = [line for line in ([p for p in line if p.bars] for line in lines) if line]
    if not kept:
        return None
    gap, top, bottom, left = 0.62, 1.34, 0.4, 0.15
    total = sum(max(p.inches() for p in line) for line in kept) + gap * (len(kept) - 1) + top + bottom
    figure = plt.figure(figsize=(WIDE, total), dpi=160)
    edge = total - top
    for line in kept:
        named, slot = max(p.names() for p in line), (WIDE - left) / len(line)
        wide = slot - named - 0.25
        for k, panel in enumerate(line):
            own = panel.inches()
            low, high = ends(panel.bars if id(panel) in apart_of else [bar for p in line for bar in p.bars])
            box = ((left + k * slot + named) / WIDE, (edge - own) / total, wide / WIDE, own / total)
            place = ((left + k * slot + 0.08) / WIDE, (edge + 0.1) / total)
            figure.text(*place, panel.title, fontsize=10.5, fontweight="bold", va="bottom")
            draw(figure.add_axes(box), panel, low, high, wide)
        edge -= max(p.inches() for p in line) + gap
    figure.text(0.2 / WIDE, 1 - 0.34 / total, title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.2 / WIDE, 1 - 0.7 / total, subtitle, fontsize=9, color=FAINT, va="center", linespacing=1.45)
    found = [bar for line in kept for p in line for bar in p.bars]
    keys: list[Any] = [
        Patch(color=tone, label=mode) for mode, tone in AHEAD.items() if any(b.mode == mode for b in found)
    ]
    if any(b.value < 1 for b in found):
        keys.append(Patch(color=BEHIND["training"], label="below 1"))
    if any(b.asked is not None for b in found):
        keys.append(
            Line2D([], [], color=ASKED, marker="|", markersize=10, linestyle="", markeredgewidth=2.2, label="asked")
        )
    figure.legend(
        handles=keys,
        loc="upper right",
        bbox_to_anchor=(1 - 0.1 / WIDE, 1 - 0.16 / total),
        ncols=len(keys),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.4,
    )
    return figure


def drawable(report: dict[str, Any]) -> list[Row]:
    """Rows that have a ratio."""
    return [r for r in report["rows"] if not r["error"] and r["ratio"] is not None]


def of(rows: Sequence[Row], group: str, cell: str | None = None) -> list[Row]:
    return [r for r in rows if r["group"] == group and cell in (None, r["cell"])]


def where(report: dict[str, Any]) -> str:
    """The machine in a line."""
    m = report["machine"]
    commit = (m["commit"] or "")[:10] + (" + changes" if m["dirty"] else "")
    return f"{m['cpu']}, {m['cores']} cores, {m['capability']}  ·  torch {m['versions']['torch']}  ·  {commit}  ·  {m['date'][:10]}"


CELLS = ("lstm", "gru", "rnn_tanh")


def speed(report: dict[str, Any]) -> Figure | None:
    """The times that most people ask for."""
    rows = [r for r in drawable(report) if r["kind"] == "time"]
    lines = [
        [Panel(f"{TITLES[c]}, fp32", bars(of(rows, "shapes", c), shape)) for c in CELLS],
        [Panel(f"{TITLES[c]}, bf16", bars(of(rows, "bf16", c), shape)) for c in CELLS],
        [
            Panel("Ragged, 2,289 of 4,096 tokens", bars(of(rows, "packed and ragged"), with_cell)),
            Panel("Stacked and projected", bars(of(rows, "stacked"), with_cell)),
            Panel("Cells torch lacks, against a loop", bars(of(rows, "cells torch has not"), with_cell)),
        ],
    ]
    note = "Times as fast as torch, taken side by side. Labels are T, B, H: steps, batch, units. Asked: the target of the row."
    return compose(
        lines, "Recurrent layers on the CPU: gradkernels against torch", f"{note}\n{where(report)}", apart=(2,)
    )


def rest(report: dict[str, Any]) -> Figure | None:
    """Everything else: bf16 against fp32, one step, taps, two processes, memory."""
    rows = drawable(report)
    steps = of(rows, "one step")
    layers, alone = [r for r in steps if r["subject"] == "ours"], [r for r in steps if r["subject"] == "ours_cell"]
    one = bars(layers, lambda r: f"layer / nn.LSTM, {r['H']}")
    one += bars(layers, lambda r: f"layer / nn.LSTMCell, {r['H']}", "cell")
    one += bars(alone, lambda r: f"cell / nn.LSTMCell, {r['H']}")
    lines = [
        [Panel(f"{TITLES[c]}, bf16 against our fp32", bars(of(rows, "bf16", c), shape, "ours_fp32")) for c in CELLS],
        [
            Panel("One step, a module call", one),
            Panel("Training in two processes at once", bars(of(rows, "two processes"), with_cell)),
            Panel("Gradient taps on, against off", bars(of(rows, "gradient taps"), with_cell)),
        ],
        [Panel(f"{TITLES[c]}, peak memory of training", bars(of(rows, "peak memory", c), special)) for c in CELLS],
    ]
    note = "Times as fast as torch; for memory, torch's peak over ours (above layer and input): 2x is half the memory."
    return compose(lines, "Precision, small calls, company and memory", f"{note}\n{where(report)}", apart=(1,))


def with_more(row: Row) -> str:
    """Shape, and what a row of bench/layers.py has besides."""
    more = [
        "bf16" * (row["dtype"] == "bfloat16"),
        f"dropout {row['dropout']:g}" * bool(row["dropout"]),
        f"{row['taps']} taps" * bool(row["taps"]),
    ]
    return ", ".join([shape(row), *filter(None, more)])


def layers(report: dict[str, Any]) -> Figure | None:
    """Attention, norms, convolution: time, and memory."""
    rows = drawable(report)
    memory = of(rows, "peak memory")
    lines = [
        [
            Panel("Causal attention", bars(of(rows, "attention"), with_more)),
            Panel("The whole attention block", bars(of(rows, "blocks"), with_more)),
        ],
        [
            Panel("Residual + norm", bars(of(rows, "residual norm"), with_more)),
            Panel("Dilated causal convolution", bars(of(rows, "convolution"), with_more)),
        ],
        [
            Panel("LayerNorm alone", bars(of(rows, "layer norm"), with_more)),
            Panel("Peak memory of training", bars(memory, lambda r: f"{r['cell']}  {with_more(r)}")),
        ],
    ]
    note = "Times as fast as torch, taken side by side; of memory, torch's peak over ours. Labels are T, B, width."
    return compose(lines, "Attention, norms and convolution on the CPU", f"{note}\n{where(report)}", apart=(0, 1, 2))


def with_options(row: Row) -> str:
    """Cell, what a row of bench/cell_rows.py has besides, and the shape."""
    more = [
        f"zoneout {row['zoneout']:g}" * bool(row["zoneout"]),
        f"variational {row['variational']:g}" * bool(row["variational"]),
        f"skip {row['skip']}" * bool(row["skip"]),
        f"{row['heads']} heads" * (row["heads"] > 1),
        f"{len(row['periods'])} time scales" * bool(row["periods"]),
    ]
    title = TITLES.get(row["cell"], row["cell"].replace("_", " "))
    return ", ".join([f"{title}  {shape(row)}", *filter(None, more)])


def cells(report: dict[str, Any]) -> Figure | None:
    """The family of cells: against the loop, against the plain cell; long sequences, and the first step."""
    rows = drawable(report)
    family = [r for group in ("LSTMs", "other cells", "inside the step", "a cell of your own") for r in of(rows, group)]
    long = of(rows, "long sequences")
    time, memory = [r for r in long if r["kind"] == "time"], [r for r in long if r["kind"] == "memory"]
    first = of(rows, "first step")
    found: list[Bar] = []
    for kind, members in (("time", time), ("memory", memory)):
        found += bars(members, lambda r, kind=kind: f"{TITLES[r['cell']]}, {kind} / torch")
        found += bars(members, lambda r, kind=kind: f"{TITLES[r['cell']]}, {kind} / all kept", "ours_whole")
    lines = [
        [
            Panel("Against the Python loop", bars(family, with_options, "loop")),
            Panel("Against our plain LSTM, GRU or RNN, per gate", bars(family, with_options, "ours_plain")),
        ],
        [
            Panel("20,000 steps, one state in 128 kept", found),
            Panel(
                "First step of a new cell, compiled before",
                bars(first, lambda r: "against compiling it", "ours_cold")
                + bars(first, lambda r: "against the Python loop", "loop"),
            ),
        ],
    ]
    note = "Times as fast, taken side by side; of memory, the other's peak over ours. Labels have T, B, H: steps, batch, units."
    return compose(lines, "The family of cells on the CPU", f"{note}\n{where(report)}", apart=(0, 1))


def figures(report: dict[str, Any]) -> list[Figure | None]:
    """The pictures of a report; None where it has nothing for one."""
    if report["suite"] == "layers":
        return [layers(report)]
    if report["suite"] == "cells":
        return [cells(report)]
    if report["machine"]["device"] != "cpu":
        from bench.gpu import panels

        return panels.figures(report)
    return [speed(report), rest(report)]


def render(path: Path, form: str = "png") -> list[Path]:
    """Writes pictures and the Markdown page beside a report; returns what was written.

    Reasons for short rows are read from reasons.json beside it: a table from patterns of rows' names to sentences.
    """
    report = json.loads(path.read_text())
    written = []
    with plt.rc_context(STYLE):
        for figure, name in zip(figures(report), (path.stem, f"{path.stem}_more")):
            if figure is not None:
                target = path.with_name(f"{name}.{form}")
                figure.savefig(target)
                plt.close(figure)
                written.append(target)
    reasons = path.with_name("reasons.json")
    page = path.with_suffix(".md")
    known = json.loads(reasons.read_text()) if reasons.exists() else None
    page.write_text(markdown(report, known, [p.name for p in written]))
    return [page, *written]


def main(argv: Sequence[str] | None = None) -> int:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    p.add_argument("--format", choices=("png", "svg", "pdf"), default="png")
    o = p.parse_args(argv)
    for path in o.reports:
        for written in render(path, o.format):
            print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
