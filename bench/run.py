"""Measure: every row of a suite, ours beside torch in one process, with the machine's limits taken in the same run.

python bench/run.py recurrent                    all rows (python -m gradkernels bench recurrent does the same)
python bench/run.py recurrent --quick            small shapes, short budgets: does everything work, roughly how fast
python bench/run.py recurrent --filter 'gru .*training' --json out.json
python bench/run.py recurrent --save             and write bench/results/<device>/recurrent.{json,md,png}
python bench/run.py recurrent-gpu --variants     the rows for a GPU, ours by every kind of plan (bench/gpu.sh does all of that, and more)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import apart, cases, machine, table
from bench.agreement import Disagreement, agree
from bench.gpu import suite as gpu
from bench.measure import WAIT, interleaved
from bench.providers import build
from bench.report import SCHEMA, blank, fill, judge, summarize

DEAD = 3  # exit status: the GPU takes nothing more from this process, another one may go on


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("suite", nargs="?", choices=sorted(cases.SUITES), default="recurrent")
    p.add_argument("--quick", action="store_true", help="small shapes and short budgets")
    p.add_argument("--filter", action="append", default=[], metavar="REGEX", help="rows whose name or heading matches")
    p.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="time for a row (3; quick: 0.4)")
    p.add_argument("--repeat", type=int, metavar="N", help="rounds for a row at least (7; quick: 3)")
    p.add_argument(
        "--wait", type=float, default=WAIT, metavar="SHARE", help="of a round, spent waiting for a core (0.02)"
    )
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    p.add_argument("--compile", action="store_true", help="against Python loops with torch.compile too (minutes more)")
    p.add_argument("--backend", help="ours by this backend (the best one that can run)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured; kept up to date row by row")
    p.add_argument("--minutes", type=float, metavar="N", help="begin no row after that")
    p.add_argument("--resume", action="store_true", help="go on with what is in the file of --json")
    gpu.add_arguments(p.add_argument_group("rows for a GPU"))
    p.add_argument("--save", action="store_true", help="write JSON, table and plot into bench/results/<device>/")
    o = p.parse_args(argv)
    o.budget = o.budget or (0.4 if o.quick else 3.0)
    o.repeat = o.repeat or (3 if o.quick else 7)
    return o


def chosen(o: argparse.Namespace) -> list[cases.Case]:
    """The rows that the options ask for."""
    found = cases.SUITES[o.suite]()
    if o.quick:
        found = cases.quick(found)
    if o.filter:
        found = [c for c in found if any(re.search(f, c.name) or re.search(f, c.group) for f in o.filter)]
    if o.compile:
        found = [with_compiled(c) if "loop" in c.providers else c for c in found]
    return [gpu.accompanied(c, o) for c in (replace(c, backend=o.backend) for c in found)]


def with_compiled(case: cases.Case) -> cases.Case:
    """The same row with one more to compare with: the loop whose step torch.compile has made one kernel of."""
    more = (cases.Target("compiled"),)
    return replace(case, providers=(*case.providers, "compiled"), targets=case.targets + more)


def measure(case: cases.Case, o: argparse.Namespace, seen: dict[cases.Case, dict[str, object]]) -> dict[str, Any]:
    """One row: agreement first, then the time, the memory, or the two processes. What goes wrong is in the row's `error`."""
    import gradkernels

    row = blank(case)
    try:
        if case.device != "cpu":
            gpu.measure(row, case, o, seen)
            return row
        row["agreement"] = agree(case, seen)
        if case.kind == "memory":
            fill(row, apart.memory(case, o.threads))
        elif case.kind == "first step":
            fill(row, apart.first_step(case, o.threads, 1 if o.quick else 3))
        elif case.kind == "processes":
            fill(row, apart.processes(case, o.threads, o.budget, 1 if o.quick else 2))
        else:
            providers = {key: build(case, key) for key in case.providers}
            calls = [p.run for p in providers.values()]
            spreads, row["rounds"], row["dropped"] = interleaved(calls, o.budget, o.repeat, o.wait)
            fill(row, dict(zip(providers, spreads)))
            row["algorithm"] = providers[row["peer"]].algorithm()
            providers[row["subject"]].run()
            row["backend"] = gradkernels.backends.last()
    except Disagreement as e:
        row["error"] = f"the numbers disagree, so there is no time: {e}"
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as e:  # one row that cannot run does not take the others along
        row["error"] = f"{type(e).__name__}: {e}"
    return row


def rows(todo: list[cases.Case], o: argparse.Namespace, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measures and judges one after the other; the report holds what there is so far, and names the row under way.

    Ends early when the time is up, or when the GPU takes nothing more from this process.
    """
    seen: dict[cases.Case, dict[str, object]] = {}
    end = time.perf_counter() + 60 * o.minutes if o.minutes else float("inf")
    todo = [c for c in todo if c.name not in {r["name"] for r in report["rows"]}]
    for k, case in enumerate(todo):
        report["not_reached"] = [c.name for c in todo[k:]]
        if time.perf_counter() > end:
            break
        report["running"] = case.name
        save(report, o)
        row = measure(case, o, seen)
        judge(row, case, report["limits"], report["machine"]["has"], report.get("micro"))
        report["rows"].append(row)
        report["summary"] = summarize(report["rows"])
        report["running"], report["not_reached"] = None, report["not_reached"][1:]
        save(report, o)
        yield row
        if case.device != "cpu" and row["error"] and (why := gpu.dead()):
            report["dead"] = why
            break


def save(report: dict[str, Any], o: argparse.Namespace) -> None:
    if o.json:
        write(report, o.json)


def write(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all: an interrupted run leaves the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 1 if a row could not be measured or its numbers disagree; missed targets are no error."""
    o = arguments(argv)
    todo = chosen(o)
    if o.list:
        print("\n".join(c.name for c in todo))
        return 0
    if not todo:
        print("no row matches; --list shows their names", file=sys.stderr)
        return 1
    on_gpu = any(c.device != "cpu" for c in todo)
    if on_gpu and (why := gpu.why_not()):
        print(f"{o.suite} needs a GPU: {why}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    torch.set_num_threads(o.threads)
    view = table.view(sys.stdout)
    view.note("measuring the machine's limits")
    begin, brief = time.perf_counter(), 1.5 if o.quick else 6.0
    options = {k: v for k, v in vars(o).items() if k not in ("json", "save", "list", "micro", "resume")}
    report: dict[str, Any] = {"schema": SCHEMA, "suite": o.suite, "options": options, "rows": [], "summary": []}
    report |= gpu.begin(o) if on_gpu else {"machine": machine.describe(), "limits": machine.limits(brief)}
    if o.resume and o.json and o.json.exists():
        resumed(report, json.loads(o.json.read_text()), todo)
    view.begin(report, todo)
    try:
        for row in rows(todo, o, report):
            view.row(row)
    except KeyboardInterrupt:
        view.note("interrupted; this is what there is")
    if not on_gpu:  # once more: a machine that was slow or fast for a moment would make every share wrong
        first, last = report["limits"], machine.limits(brief)
        report["limits"] = machine.better(first, last)
        report["limits_measured"] = {"before": first, "after": last}
    by_name = {c.name: c for c in todo}
    order = {c.name: k for k, c in enumerate(cases.SUITES[o.suite]())}
    report["rows"].sort(
        key=lambda r: order.get(r["name"], len(order))
    )  # as far as they were measured by several processes
    for row in report["rows"]:
        if row["name"] in by_name:
            judge(row, by_name[row["name"]], report["limits"], report["machine"]["has"], report.get("micro"))
    report["summary"] = summarize(report["rows"])
    report["seconds"] = report.get("seconds", 0.0) + time.perf_counter() - begin
    view.end(report)
    save(report, o)
    if o.save:
        from bench import plot

        folder = Path(__file__).parent / "results" / (gpu.slug if on_gpu else machine.slug)(report["machine"])
        write(report, folder / f"{o.suite}.json")
        for path in plot.render(folder / f"{o.suite}.json"):
            view.note(f"wrote {os.path.relpath(path)}")
    return DEAD if report.get("dead") else 1 if any(row["error"] for row in report["rows"]) else 0


def resumed(report: dict[str, Any], before: dict[str, Any], todo: list[cases.Case]) -> None:
    """Puts what an earlier process measured into the report; a row in which it ended has that as its error.

    Rows in which it timed fewer providers are measured again."""
    wanted = {c.name: set(c.providers) for c in todo}
    enough = lambda r: r["error"] or wanted.get(r["name"], set()) <= {*r["results"], *r.get("absent", {})}
    report["rows"], report["seconds"] = [r for r in before["rows"] if enough(r)], before.get("seconds", 0.0)
    for case in todo:
        if case.name == before.get("running"):
            row = {**blank(case), "error": "the process ended while this row was measured"}
            judge(row, case, {}, [])
            report["rows"].append(row)
    report["summary"] = summarize(report["rows"])


if __name__ == "__main__":
    sys.exit(main())
