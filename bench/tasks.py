"""What remembers how far: models trained on the copy and the adding task over growing delays, with seeds.

python -m bench.tasks                   the table, as Markdown
python -m bench.tasks --save            and bench/results/tasks.{json,md}
python -m bench.tasks --seeds 1 --steps 300 --filter copy    a quick look
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench import machine
from gradkernels.progress import Progress
from gradkernels.tasks import adding, copy_memory
from gradkernels.tasks.run import make, train

MODELS = (
    ("rnn_tanh", "default"),
    ("rnn_tanh", "orthogonal"),
    ("lstm", "default"),
    ("lstm", "chrono"),
    ("gru", "default"),
    ("gru", "chrono"),
)
MODELS += (("attention", "default"), ("convolution", "default"))
DELAYS = (10, 30, 100)
TASKS = {
    "copy": lambda delay, seed: copy_memory(32, delay, 5, seed),
    "adding": lambda delay, seed: adding(32, delay, seed),
}
HIDDEN = 64
RESULTS = Path(__file__).parent / "results"


def one(task: str, body: str, init: str, delay: int, seed: int, steps: int) -> dict[str, Any]:
    """A run, as the JSON has it."""
    torch.manual_seed(seed)
    problem = TASKS[task](delay, seed)
    model = make(problem, body, HIDDEN, init)
    found = train(problem, model, steps)
    return {"task": task, "body": body, "init": init, "delay": delay, "seed": seed, **found.as_dict()}


def markdown(report: dict[str, Any]) -> str:
    """A table for each task: the median share of right answers over the seeds, and how many of them solved it."""
    out = ["# What remembers how far", ""]
    about = report["options"]
    intro = (
        f"Models of {HIDDEN} units after {about['steps']} steps of Adam, batches of 32, {about['seeds']} seeds; torch {report['torch']}, "
        f"commit {report['commit']}. Each place: the median share of what had to be remembered that is right, over the last tenth of the "
        "steps; how many seeds had nine tenths right from some step on; and of recurrent layers the steps back to which a thousandth of the "
        "last output's gradient gets in the end."
    )
    out += [intro, ""]
    for task, members in groupby(report["rows"], key=lambda r: r["task"]):
        rows = list(members)
        delays = sorted({r["delay"] for r in rows})
        out += [
            f"## {task.capitalize()}",
            "",
            f"| | {' | '.join(f'delay {d}' for d in delays)} |",
            f"|---|{'---|' * len(delays)}",
        ]
        names = dict.fromkeys((r["body"], r["init"]) for r in rows)
        for body, init in names:
            places = []
            for delay in delays:
                mine = [r for r in rows if (r["body"], r["init"], r["delay"]) == (body, init, delay)]
                if not mine:
                    places.append("-")
                    continue
                solved = sum(r["solved_at"] is not None for r in mine)
                reach = [r["horizon"] for r in mine if r["horizon"] is not None]
                horizon = f", horizon {statistics.median_low(reach)}" if reach else ""
                right = statistics.median(r["right"] for r in mine)
                places.append(f"{right:.0%}, {solved} of {len(mine)}{horizon}")
            out.append(f"| {body}{f', {init}' * (init != 'default')} | {' | '.join(places)} |")
        first = rows[0]
        guess = "12 %" if task == "copy" else "about 20 %"
        out += ["", f"Who remembers nothing has {guess} right; loss {first['trivial']:.3f} at the shortest delay.", ""]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    what, _, usage = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(description=what, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=2, metavar="N")
    p.add_argument("--steps", type=int, default=1000, metavar="N")
    p.add_argument("--filter", default="", metavar="REGEX", help="runs whose 'task body init delay' matches")
    p.add_argument("--save", action="store_true", help="write bench/results/tasks.{json,md}")
    o = p.parse_args(argv)
    todo = [
        (task, body, init, delay, seed)
        for task in TASKS
        for body, init in MODELS
        for delay in DELAYS
        for seed in range(o.seeds)
    ]
    todo = [run for run in todo if re.search(o.filter, " ".join(map(str, run[:4])))]
    if not todo:
        print("no run matches", file=sys.stderr)
        return 1
    report: dict[str, Any] = {
        "options": {"seeds": o.seeds, "steps": o.steps}, "torch": torch.__version__, "commit": (machine.describe()["commit"] or "no commit")[:10],
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "rows": [],
    }  # fmt: skip
    with Progress(["runs"], len(todo)) as progress:
        for run in todo:
            report["rows"].append(one(*run, o.steps))
            progress.advance("runs", 1, f"{' '.join(map(str, run[:4]))}: {report['rows'][-1]['right']:.0%}")
    text = markdown(report)
    print(text)
    if o.save:
        RESULTS.joinpath("tasks.json").write_text(json.dumps(report, indent=1) + "\n")
        RESULTS.joinpath("tasks.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
