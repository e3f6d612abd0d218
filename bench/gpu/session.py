"""Everything that is to be measured on a GPU: the machine, the parts of a step, tests, sanitizer, rows.

Each section is a process of its own with a time limit: one that hangs or takes the GPU down is ended, and the next goes on with
what is left. Everything printed and everything measured is in the folder, up to date at any moment; a second call goes on there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT

SECTIONS = {
    "micro": 0.2,
    "tests": 0.3,
    "sanitizer": 0.1,
    "rows": 0.5,
    "layers": 1.0,
}  # share of all the time; of what is left for those of SUITES, of which the last that was asked for has it all
SUITES = {"rows": "recurrent-gpu", "layers": "layers-gpu"}
GRACE = 5.0  # seconds between asking a process to end and ending it
QUIET = 100.0  # seconds without a word after which a process hangs
RESTARTS = 12
AGAIN = 3  # exit status of run.py and micro.py: the GPU takes nothing more from that process
END = 8.0  # seconds kept for the tables


@dataclass(frozen=True)
class Outcome:
    section: str
    seconds: float
    said: str  # fine | failed, and how
    ended: bool  # by us


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(prog="bench/gpu.sh", description=what, epilog=usage)
    p.add_argument("folder", nargs="?", type=Path, help="where to (bench/results/<GPU>)")
    p.add_argument("--minutes", type=float, default=8.7, metavar="N", help="for everything (8.7)")
    p.add_argument(
        "--only", action="append", choices=sorted(SECTIONS), default=[], help="this section; may be given again"
    )
    p.add_argument("--quick", action="store_true", help="fewer parts, and rows with short budgets")
    p.add_argument("--filter", action="append", default=[], metavar="REGEX", help="rows whose name or heading matches")
    p.add_argument("--variants", action="store_true", help="ours by every kind of plan or tile in every row")
    p.add_argument(
        "--try",
        action="append",
        default=[],
        dest="tries",
        metavar="PICK",
        help="and by this one: exchange=grid,C=8; forward.BM=64,forward.warps=4",
    )
    p.add_argument("--anew", action="store_true", help="measure again what the folder already holds")
    return p.parse_args(argv)


def run(section: str, command: Sequence[str], seconds: float, folder: Path, quiet: float = QUIET) -> Outcome:
    """A process, its words here and in the folder's log; ended after so many seconds, or so many without a word."""
    begin = heard = time.monotonic()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    reason = ""
    with open(folder / "session.log", "ab") as log, selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        log.write(f"\n== {section}: {' '.join(map(str, command))}\n".encode())
        while True:
            now = time.monotonic()
            if not reason and (now > begin + seconds or now > heard + quiet):
                reason = f"ended after {now - begin:.0f} s" + (
                    ", without a word in the last of them" if now > heard + quiet else ""
                )
                os.killpg(child.pid, signal.SIGTERM)
                ended = now
            elif reason and now > ended + GRACE:
                os.killpg(child.pid, signal.SIGKILL)
                break
            if ready.select(0.2):
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    break
                heard = time.monotonic()
                log.write(data)
                log.flush()
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
    try:
        status = child.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:  # it has closed its output, and stays
        os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
    said = reason or (
        "fine" if status == 0 else f"exit status {status}" if status > 0 else signal.Signals(-status).name
    )
    return Outcome(section, time.monotonic() - begin, said, bool(reason))


def tests(seconds: float, folder: Path) -> Outcome:
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: the tests are left out", flush=True)
        return Outcome("tests", 0.0, "pytest is not installed", False)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-rf",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    return run("tests", command, seconds, folder)


def sanitizer(seconds: float, folder: Path) -> list[Outcome]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: left out", flush=True)
        return [Outcome("sanitizer", 0.0, "compute-sanitizer is not installed", False)]
    found = []
    for check in ("memcheck", "racecheck"):
        options = ["--tool", check, "--error-exitcode", "9"]
        command = [tool, *options, sys.executable, "-m", "bench.gpu.small"]
        found.append(run(f"sanitizer-{check}", command, seconds / 2, folder))
    return found


def lost(done: Outcome, path: Path) -> bool:
    """Whether a process has ended before it was through: by us, by a signal, for want of a GPU, or in the middle of a row."""
    if done.ended or done.said == f"exit status {AGAIN}" or done.said.startswith("SIG"):
        return True
    return path.exists() and json.loads(path.read_text()).get("running") is not None


def again(
    section: str, command: Sequence[str], end: float, folder: Path, path: Path, timed: bool = False
) -> list[Outcome]:
    """By as many processes as it takes: each goes on where the one before was lost.

    path: what it writes; timed: tell it how many minutes it has."""
    found: list[Outcome] = []
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left < 10:
            break
        more = ["--minutes", str(max(left - 20, 1) / 60)] if timed else []
        done = run(section, [*command, *more], left, folder)
        found.append(done)
        if not lost(done, path):
            break
    return found


def micro(o: argparse.Namespace, end: float, folder: Path) -> list[Outcome]:
    path = folder / "micro.json"
    command = [sys.executable, "-m", "bench.gpu.micro", "--json", str(path), *["--quick"] * o.quick]
    return again("micro", command, end, folder, path)


def rows(o: argparse.Namespace, end: float, folder: Path, section: str = "rows") -> list[Outcome]:
    path = folder / f"{SUITES[section]}.json"
    files = ["--json", str(path), *(["--micro", str(folder / "micro.json")] if section == "rows" else [])]
    command = [sys.executable, "bench/run.py", SUITES[section], "--resume", *files]
    command += ["--budget", "0.4" if o.quick else "1.0", "--repeat", "3"]
    command += ["--variants"] * o.variants + ["--quick"] * o.quick
    for name, values in (("--filter", o.filter), ("--try", o.tries)):
        command += [word for value in values for word in (name, value)]
    return again(section, command, end, folder, path, timed=True)


def tables(folder: Path) -> None:
    """Pages and pictures of what the folder holds."""
    from bench import table

    for path in (folder / f"{suite}.json" for suite in SUITES.values()):
        if not path.exists():
            continue
        report = json.loads(path.read_text())
        pictures: list[str] = []
        if importlib.util.find_spec("matplotlib") is not None:
            from bench import plot

            pictures = [p.name for p in plot.render(path)]
        else:
            path.with_suffix(".md").write_text(table.markdown(report))
        print(f"{len(report['rows'])} rows in {path.with_suffix('.md')}{' and ' * bool(pictures)}{', '.join(pictures)}")
        for name in report.get("not_reached", []):
            print(f"not reached: {name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a section failed, 2 if there is no GPU."""
    o = arguments(argv)
    begin = time.monotonic()
    end = begin + 60 * o.minutes - END
    there = subprocess.run(
        [sys.executable, "-m", "bench.gpu.device", "--slug"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if there.returncode:
        print(
            f"bench/gpu.sh needs a GPU: {(there.stderr.strip() or 'no reason given').splitlines()[-1]}", file=sys.stderr
        )
        return 2
    folder = (o.folder or ROOT / "bench" / "results" / there.stdout.split()[-1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if o.anew:
        measured = [f"{SUITES[section]}.json" for section in o.only or SUITES if section in SUITES]
        for name in ("micro.json", *measured):
            (folder / name).unlink(missing_ok=True)
    chosen = o.only or list(SECTIONS)
    done = [run("environment", [sys.executable, "-m", "bench.gpu.device"], 60, folder)]
    for section, share in SECTIONS.items():
        if section not in chosen:
            continue
        seconds = min(end - time.monotonic(), share * 60 * o.minutes)
        if section in SUITES:
            last = section == [s for s in SUITES if s in chosen][-1]
            seconds = (end - time.monotonic()) * (1 if last else share)
        if seconds < 10:
            done.append(Outcome(section, 0.0, "no time left", False))
            continue
        print(f"\n== {section}, {seconds:.0f} s at most", flush=True)
        if section == "micro":
            done += micro(o, time.monotonic() + seconds, folder)
        elif section == "tests":
            done.append(tests(seconds, folder))
        elif section == "sanitizer":
            done += sanitizer(seconds, folder)
        else:
            done += rows(o, time.monotonic() + seconds, folder, section)
    print("\n== tables", flush=True)
    if (folder / "micro.json").exists():
        run("constants", [sys.executable, "-m", "bench.gpu.floor", str(folder / "micro.json")], 30, folder)
    tables(folder)
    outcome: list[dict[str, Any]] = [vars(d) for d in done]
    (folder / "session.json").write_text(json.dumps(outcome, indent=1) + "\n")
    for d in done:
        print(f"{d.section:20} {d.seconds:6.0f} s  {d.said}")
    print(f"{time.monotonic() - begin:.0f} s in all; everything is in {folder}")
    absent = ("pytest is not installed", "compute-sanitizer is not installed", "no time left")
    return 0 if all(d.said == "fine" or d.said in absent for d in done) else 1


if __name__ == "__main__":
    sys.exit(main())
