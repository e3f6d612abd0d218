"""Reports for people: a live table on a terminal (with rich), aligned plain lines when piped, Markdown for the repository."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any, TextIO

from bench.cases import Case
from bench.gpu import page
from bench.providers import label
from bench.report import number, short

HEADINGS = ["ours", "q1 - q3", "peer", "ratio", "asked", "GFLOP/s", "of limit", "rounds", "met"]
SUITES = {"recurrent": "Recurrent layers", "layers": "Attention, norms and convolution", "cells": "The family of cells"}
ON_GPU = [{"GFLOP/s": "us a step (floor)", "of limit": "of floor"}.get(h, h) for h in HEADINGS]
WIDTHS = [9, 17, 9, 7, 11, 17, 8, 8, 4]
GROUPS = {
    "shapes": "Plain layers, fp32: one layer, input = hidden, against torch.nn",
    "bf16": "bf16, against torch.nn in bf16; then against our own fp32",
    "packed and ragged": "2,289 of 4,096 tokens: PackedSequence, and padded input with lengths; then against our own padded batch",
    "stacked": "Projection, more layers, both directions, against torch.nn",
    "cells torch has not": "Cells that torch lacks, against the Python loop that users write",
    "one step": "One step of one row, a module call without gradients, against nn.LSTM; then against nn.LSTMCell",
    "gradient taps": "Training with gradient taps on, against ours with them off",
    "residual norm": "norm(residual + dropout(x)), against torch's operations; no dropout in its time unless the row says so",
    "layer norm": "A LayerNorm alone, against torch's",
    "attention": "Causal attention, against scaled_dot_product_attention",
    "blocks": "x + dropout(attention(norm(x))), projections included, against torch's layers",
    "convolution": "Dilated causal convolution, tokens last but one, against conv1d of a padded input with channels first",
    "LSTMs": "Variants of the LSTM, against the Python loop; then against our plain LSTM, per gate",
    "other cells": "Other cells, against the Python loop; then against our plain GRU or RNN, per gate",
    "inside the step": "Zoneout, recurrent dropout, skips and groups on slow clocks, against the Python loop; then against our plain cell",
    "a cell of your own": "The README's cell, against the Python loop; then against our LSTM, per gate",
    "first step": "From the definition of that cell to the end of its first training step, fresh processes: its kernel compiled before, and now",
    "long sequences": "20,000 steps of one sequence, states of one step in 128 kept: peak memory and time of training, against torch; then against ours with all kept",
    "peak memory": "Peak memory of training above layer and input, fresh processes, against torch",
    **page.GROUPS,
    "two processes": "Two processes training at once on the same cores, the slower of the two, against two of torch",
}


def on_gpu(rows: Sequence[dict[str, Any]]) -> bool:
    return any(r.get("device", "cpu") != "cpu" for r in rows)


def headings(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not on_gpu(rows):
        return HEADINGS
    return [page.PACE if h == ON_GPU[5] and "taps" in rows[0] else h for h in ON_GPU]


def grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by heading, each where its first row is: what is asked most of may be measured first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def extras(row: dict[str, Any]) -> str:
    """What else a row was held against: '1.92x gradkernels, fp32'."""
    others = [r for r in row["ratios"] if r["against"] not in (row["peer"], "limit", "rate")]
    return ", ".join(
        f"{r['value']:.2f}x {label(r['against'])}" + (f" ({r['at_least']:.2f}x asked)" if r["at_least"] else "")
        for r in others
    )


def asked(row: dict[str, Any]) -> str:
    """'1.05x 95%'"""
    found = {r["against"]: r["at_least"] for r in row["ratios"]}
    share = f"{found['limit']:.0%}" if found.get("limit") else ""
    rate = f"{found['rate']:.0f} TFLOP/s" if found.get("rate") else ""
    return " ".join(filter(None, [times(found.get(row["peer"])), share, rate]))


def pace(row: dict[str, Any]) -> str:
    """GFLOP/s, or where memory is the limit '31.2 GB/s'."""
    return f"{number(row['gbs'])} GB/s" if row.get("gbs") else number(row["gflops"])


def verdict(row: dict[str, Any]) -> str:
    return {None: "", True: "yes", False: "no"}[row["met"]]


def cells(row: dict[str, Any]) -> list[str]:
    """The columns under `headings`."""
    ours, peer = row["results"][row["subject"]], row["results"][row["peer"]]
    single = ours["samples"] == 1
    rounds = "" if row["rounds"] is None else f"{row['rounds']}" + (f" -{row['dropped']}" if row["dropped"] else "")
    return [
        number(ours["median"]),
        "" if single else f"{number(ours['q1'])} - {number(ours['q3'])}",
        number(peer["median"]),
        times(row["ratio"]),
        asked(row),
        page.pace(row) if on_gpu([row]) else pace(row),
        "" if row["share"] is None else f"{row['share']:.0%}",
        rounds,
        verdict(row),
    ]


def head(report: dict[str, Any]) -> list[str]:
    """The machine, the versions, and the limits."""
    if report["machine"]["device"] != "cpu":
        return page.head(report)
    m, limits = report["machine"], report["limits"]
    v = m["versions"]
    commit = (m["commit"] or "no commit")[:10] + (" and changes not committed" if m["dirty"] else "")
    rest = "; ".join(f"{name} {number(r)}" for name, r in sorted(limits["float32"]["all"].items()) if r)
    family = f" ({m['cpu_family']})" if m["cpu_family"] else ""
    machine = f"{m['cpu']}{family}, {m['cores']} cores, {m['threads']} threads, {m['capability']}; {m['system']}"
    libraries = f"torch {v['torch']}, MKL {v['mkl']}, oneDNN {v['onednn']}, Python {v['python']}"
    fp32 = f"fp32 products {number(limits['float32']['gflops'])} GFLOP/s ({rest})"
    busy = f" (busy machine: threads waited {limits['waited']:.0%} of that time)" if limits["waited"] > 0.05 else ""
    bf16 = f"bf16 {number(limits['bfloat16']['gflops'])} GFLOP/s ({limits['bfloat16']['by']})"
    return [
        machine,
        f"gradkernels {v['gradkernels']} at {commit}; {libraries}; {m['date']}",
        f"limits of this run: {fp32}, {bf16}, copy {number(limits['copy']['gbs'])} GB/s{busy}",
    ]


def foot(report: dict[str, Any]) -> list[str]:
    """Geometric means, how many targets are met, which rows are short, and how to read it all."""
    found = [
        f"{s['cell'].upper()} fp32, geometric mean of {s['rows']} rows: {s['ratio']:.2f}x, {s['at_least']:.1f}x asked: "
        f"{'met' if s['met'] else 'short'}"
        for s in report["summary"]
    ]
    judged = [r for r in report["rows"] if r.get("met") is not None]
    if judged:
        found.append(f"{sum(r['met'] for r in judged)} of {len(judged)} rows meet everything asked of them")
    if report.get("not_reached"):
        found.append(f"not reached: {', '.join(report['not_reached'])}")
    return found


READING = """\
Median of calls taken side by side in one process, first to third quartile beside it; milliseconds, or MiB for peak memory.
GFLOP/s count the matrix products alone; the limit is the fastest product torch makes on this machine in this run, by MKL or oneDNN,
whichever is faster, and for norms its copy. Rounds in which threads waited for a core more than 2 % of the time are left out and counted after the minus.
Between training calls the weights count as changed, as an optimizer changes them."""


class Plain:
    """Aligned lines, each when its row is done."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.group, self.width, self.done, self.total = out, "", 0, 0, 0

    def note(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def begin(self, report: dict[str, Any], todo: Sequence[Case]) -> None:
        self.width, self.total = max(len(c.name) for c in todo), len(todo)
        for line in head(report):
            self.note(line)

    def line(self, name: str, columns: Sequence[str]) -> str:
        return f"{name:<{self.width}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(columns, WIDTHS))

    def row(self, row: dict[str, Any]) -> None:
        self.done += 1
        if row["group"] != self.group:
            self.group = row["group"]
            self.note(f"\n{GROUPS.get(self.group, self.group)}")
            self.note(self.line(f"{row['unit']}  (row {self.done} of {self.total})", headings([row])))
        if row["error"]:
            self.note(f"{row['name']:<{self.width}}  {row['error']}")
        else:
            more = extras(row)
            self.note(self.line(row["name"], cells(row)) + (f"  {more}" if more else ""))

    def end(self, report: dict[str, Any]) -> None:
        self.note("")
        for line in foot(report):
            self.note(line)
        self.note(f"{report['seconds']:.0f} s")


class Live:
    """A progress bar while it runs, rows as they come, tables with colours at the end."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=out, highlight=False)
        parts = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        # refreshed between rows only: a thread that draws would be in the way of what is measured
        self.progress = Progress(*parts, console=self.console, transient=True, auto_refresh=False)
        self.todo: list[Case] = []

    def note(self, text: str) -> None:
        self.console.print(text, style="dim")

    def begin(self, report: dict[str, Any], todo: Sequence[Case]) -> None:
        for line in head(report):
            self.note(line)
        self.todo = list(todo)
        self.task = self.progress.add_task(todo[0].name, total=len(todo))
        self.progress.start()
        self.progress.refresh()

    def row(self, row: dict[str, Any]) -> None:
        done = next(k for k, c in enumerate(self.todo) if c.name == row["name"]) + 1
        following = self.todo[done].name if done < len(self.todo) else "limits once more"
        said = row["error"] or f"{times(row['ratio'])} {row['results'][row['peer']]['label']}"
        self.progress.console.print(f"{row['name']}: {said}", style="red" if row["error"] else "dim")
        self.progress.update(self.task, completed=done, description=following, refresh=True)

    def end(self, report: dict[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        self.progress.stop()
        for group, rows in grouped(report["rows"]).items():
            more = any(extras(r) for r in rows if not r["error"])
            table = Table(title=GROUPS.get(group, group), title_justify="left", title_style="bold", box=None)
            table.add_column(rows[0]["unit"])
            for heading in headings(rows):
                table.add_column(heading, justify="right", no_wrap=True)
            if more:
                table.add_column("also")
            for row in rows:
                if row["error"]:
                    table.add_row(Text(row["name"], style="red"), Text(row["error"], style="red"))
                    continue
                columns: list[Any] = cells(row)
                style = {True: "green", False: "red"}.get(row["met"], "")
                columns[3], columns[-1] = Text(columns[3], style=f"bold {style}"), Text(columns[-1], style=style)
                table.add_row(row["name"], *columns, *([extras(row)] if more else []))
            self.console.print(table)
            self.console.print()
        for line in foot(report):
            self.console.print(line)
        self.note(f"{report['seconds']:.0f} s")


def view(out: TextIO) -> Plain | Live:
    """Live on a terminal where rich is installed, else plain lines."""
    return Live(out) if out.isatty() and importlib.util.find_spec("rich") else Plain(out)


def markdown(report: dict[str, Any], reasons: dict[str, str] | None = None, pictures: Sequence[str] = ()) -> str:
    """The whole report as a page. reasons: why a row is short, by a pattern of its name; a short row without one is said to have none."""
    gpu = report["machine"].get("gpu")
    out = [
        f"# {SUITES[report['suite'].removesuffix('-gpu')]} on {gpu['name'] if gpu else report['machine']['cpu']}",
        "",
    ]
    for picture in pictures:
        out += [f"![ratios of every row]({picture})", ""]
    out += [*(f"* {line}" for line in [*head(report), *foot(report)]), "", page.reading(report) if gpu else READING, ""]
    for group, rows in grouped(report["rows"]).items():
        more = any(extras(r) for r in rows if not r["error"])
        titles = [rows[0]["unit"], *headings(rows), *(["also"] if more else [])]
        out += [
            f"## {GROUPS.get(group, group)}",
            "",
            f"| {' | '.join(titles)} |",
            f"|---|{'--:|' * len(HEADINGS)}{'---|' * more}",
        ]
        for row in rows:
            if row["error"]:
                columns = [row["error"].replace("|", "/").replace("\n", " ")] + [""] * (len(titles) - 2)
            else:
                columns = cells(row)
                columns[3] = f"**{columns[3]}**"
                columns += [extras(row)] if more else []
            out.append(f"| {row['name']} | {' | '.join(columns)} |")
        out.append("")
        peers = sorted({f"{r['results'][r['peer']]['label']}: {r['algorithm']}" for r in rows if r.get("algorithm")})
        if peers and not any(r["peer"].startswith("ours") for r in rows):
            out += [f"The peer's algorithm: {'; '.join(peers)}.", ""]
        out += page.notes(rows)
    missed = [r for r in report["rows"] if r.get("met") is False]
    if missed:
        out += ["## Rows that are short, and why", ""]
        for row in missed:
            known = (why for pattern, why in (reasons or {}).items() if re.fullmatch(pattern, row["name"]))
            why = next(known, "no reason given yet")
            out.append(f"* **{row['name']}**: {'; '.join(short(row))}. {why[0].upper()}{why[1:]}.")
        out.append("")
    return "\n".join(out)
