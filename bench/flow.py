"""What watching costs: a training step with a monitor beside the same step without, every step recorded.

python -m bench.flow                      all rows
python -m bench.flow --filter 'GRU|RNN' --budget 60 --json out.json
python -m bench.flow --save               and bench/results/<device>/flow.{json,md}

Two models that are alike take turns of some twenty milliseconds, so that a machine that grows slower does so for both, and turns side by
side are compared. In 128 steps a monitor looks at everything once and makes records once: turns with that in them are kinds of their own,
each kind counts by its median, as often as it comes. Then the other model is watched: what one of them owes to its place in memory is in
the mean of both once with either sign, and half their difference is that luck.

Dims: T steps, B batch, H hidden units and inputs, L layers.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import gradkernels as gk
from bench import machine
from bench.measure import WAIT, Disturbed, Spread, wait_share, waited, warm
from bench.run import write

Array = NDArray[np.floating]

PERIOD = 128
TURN = 0.02  # seconds, about
AT_MOST, FROM = 0.03, 3.0  # of a step of so many milliseconds or more
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    body: str
    T: int
    B: int
    H: int
    L: int = 1

    def __str__(self) -> str:
        return f"{self.body} {self.T},{self.B},{self.H}" + f" {self.L} layers" * (self.L > 1)


CASES = [
    Case("LSTM", 128, 1, 384),
    Case("LSTM", 64, 32, 96),
    Case("LSTM", 128, 32, 128, 2),
    Case("LSTM", 100, 16, 64, 4),
    Case("GRU", 128, 16, 128, 2),
    Case("RNN", 256, 16, 128, 2),
    Case("AttentionBlock", 128, 8, 128, 2),
]


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        if case.body == "AttentionBlock":
            self.body: nn.Module = nn.Sequential(*(gk.nn.AttentionBlock(case.H, 4) for _ in range(case.L)))
        else:
            self.body = getattr(gk.nn, case.body)(case.H, case.H, case.L)
        self.head = nn.Linear(case.H, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, B, H], or [B, T, H] for attention -> [B, 16]
        y = self.body(x)
        return self.head(y[0][-1] if isinstance(y, tuple) else y[:, -1])


class Training:
    """A model of a case, and its training step."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        rows = (case.B, case.T) if case.body == "AttentionBlock" else (case.T, case.B)
        self.model, self.x = Model(case), torch.randn(*rows, case.H)
        # slow, so that a model is after minutes about what it was
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()


@dataclass(frozen=True)
class Turn:
    """A few steps of the watched model and as many of the other beside them, milliseconds of a step."""

    watched: int  # which of the two models
    kind: str  # what a monitor had to do besides: "", "details", "records" or both
    alone: float
    extra: float


class Pair:
    """Two trainings of one case, of which the one and then the other is watched."""

    def __init__(self, case: Case) -> None:
        self.trainings = [Training(case), Training(case)]
        seconds = min(warm(training.step, 0.3) for training in self.trainings)
        self.turn = min(PERIOD // 2, 2 ** max(0, round(math.log2(TURN / seconds))))  # steps

    def time(self, training: Training) -> float:
        """Milliseconds of a step, of a turn."""
        begin = time.perf_counter()
        for _ in range(self.turn):
            training.step()
        return (time.perf_counter() - begin) * 1e3 / self.turn

    def period(self, k: int) -> tuple[list[Turn], int]:
        """The turns of a period in which model k is watched, and how many are left out because threads waited for a core."""
        watched, alone = self.trainings[k], self.trainings[1 - k]
        found, told = [], []
        count = PERIOD // self.turn
        with gk.flow.watch(watched.model, log=[told.append]) as monitor:
            for _ in range(PERIOD):  # past the beginning, when more steps than later are looked at closely
                monitor.step()
            self.time(alone)
            self.time(watched)
            for n in range(count):
                told.clear()
                before, begin = waited(), time.perf_counter()
                spent = {v: self.time(v) for v in ((watched, alone) if n % 2 else (alone, watched))}
                if wait_share(before, waited(), time.perf_counter() - begin) > WAIT:
                    continue
                details = (monitor.step_count - 1) % PERIOD < self.turn  # of the first step and every 128th after it
                kind = " ".join(word for word, done in (("details", details), ("records", told)) if done)
                found.append(Turn(k, kind, spent[alone], spent[watched] - spent[alone]))
        return found, count - len(found)


def measure(case: Case, budget: float) -> dict[str, Any]:
    """Periods for so many seconds, and what follows from them. Disturbed if of one of the models no turn was left."""
    pair, turns, dropped, start = Pair(case), [], 0, time.perf_counter()
    while time.perf_counter() - start < budget:
        for k in (0, 1):
            found, out = pair.period(k)
            turns += found
            dropped += out
    if len({t.watched for t in turns}) < 2:
        raise Disturbed(f"the machine is busy: in each of {dropped} turns threads waited for a core")
    return {"case": str(case), "steps": pair.turn, "dropped": dropped, **judged(turns)}


def typical(kinds: Sequence[Array]) -> Array:
    """The mean of turns [.., n] of several kinds, each at the median of its kind: [..]."""
    return sum(v.shape[-1] * np.median(v, -1) for v in kinds) / sum(v.shape[-1] for v in kinds)


def judged(turns: Sequence[Turn], draws: int = 2000) -> dict[str, Any]:
    """What watching adds to a step, where that is in nine cases of ten by the bootstrap, and whether it is little enough."""
    alone = Spread.of([t.alone for t in turns])
    kinds = {
        (t.watched, t.kind): np.array([u.extra for u in turns if (u.watched, u.kind) == (t.watched, t.kind)])
        for t in turns
    }
    random = np.random.default_rng(0)
    again = typical([random.choice(v, (draws, len(v))) for v in kinds.values()])
    low, high = (np.quantile(again, (0.05, 0.95)) / alone.median).tolist()
    of = [float(typical([v for (k, _), v in kinds.items() if k == which])) for which in (0, 1)]
    met = None
    if alone.median >= FROM:
        met = "holds" if high <= AT_MOST else "falls short" if low > AT_MOST else "open"
    extra = float(typical([*kinds.values()]))
    return {
        "alone": asdict(alone),
        "extra": extra,
        "cost": extra / alone.median,
        "interval": (low, high),
        "luck": (of[1] - of[0]) / 2 / alone.median,
        "met": met,
    }


HEADINGS = ["alone", "watching", "cost", "90 % interval", "luck", "turns", f"at most {AT_MOST:.0%}"]
WIDTHS = [9, 8, 6, 16, 6, 7, 11]


def cells(row: dict[str, Any]) -> list[str]:
    """The columns under HEADINGS."""
    low, high = row["interval"]
    return [
        f"{row['alone']['median']:.2f} ms",
        f"{row['extra'] * 1e3:.0f} us",
        f"{row['cost']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{row['luck']:.1%}",
        f"{row['alone']['samples']}" + f" -{row['dropped']}" * bool(row["dropped"]),
        row["met"] or "",
    ]


def line(name: str, columns: Sequence[str]) -> str:
    return f"{name:28}" + "".join(f"  {c:>{w}}" for c, w in zip(columns, WIDTHS))


def markdown(report: dict[str, Any]) -> str:
    m = report["machine"]
    commit = (m["commit"] or "no commit")[:10] + " and changes not committed" * bool(m["dirty"])
    about = (
        f"Training steps with `gk.flow.watch(model)`, every step recorded, beside the same without; {m['threads']} threads, {m['capability']}, "
        f"torch {m['versions']['torch']}, commit {commit}, {m['date']}. Models that are alike take turns of a few steps; the cost is the median "
        "difference of turns side by side, those in which the monitor makes records or looks at everything apart and as often as they come. "
        "Luck is what one of the models takes more than their mean, by its place in memory: each is watched half of the time. "
        f"At most {AT_MOST:.0%} is asked of steps of {FROM:.0f} ms or longer."
    )
    rows = [f"| {row['case']} | {' | '.join(cells(row))} |" for row in report["rows"]]
    heads = [f"| T, B, H | {' | '.join(HEADINGS)} |", f"|---|{'--:|' * len(HEADINGS)}"]
    return "\n".join([f"# What watching costs on {m['cpu']}", "", about, "", *heads, *rows, ""])


def main(argv: Sequence[str] | None = None) -> int:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--filter", default="", metavar="REGEX", help="rows whose name matches")
    p.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="for each row (30)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, with machine and versions")
    p.add_argument("--save", action="store_true", help="write bench/results/<device>/flow.{json,md}")
    o = p.parse_args(argv)
    todo = [case for case in CASES if re.search(o.filter, str(case))]
    if not todo:
        print("no row matches", file=sys.stderr)
        return 1
    report: dict[str, Any] = {"machine": machine.describe(), "options": {"budget": o.budget}, "rows": []}
    print(line("T, B, H", HEADINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        for case in todo:
            try:
                row = measure(case, o.budget)
            except Disturbed as e:
                print(f"{case!s:28}  {e}")
                continue
            report["rows"].append(row)
            print(line(row["case"], cells(row)), flush=True)
    if o.json:
        write(report, o.json)
    if o.save:
        folder = RESULTS / machine.slug(report["machine"])
        write(report, folder / "flow.json")
        folder.joinpath("flow.md").write_text(markdown(report))
    return 0 if len(report["rows"]) == len(todo) else 1


if __name__ == "__main__":
    sys.exit(main())
