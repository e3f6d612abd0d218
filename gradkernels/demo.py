"""python -m gradkernels demo: one character model trained with torch and with gradkernels, step by step side by side.

Three copies of one model start from the same weights and see the same characters: torch's; torch's again, with the rows
of every batch in the opposite order; and ours, made by `gk.convert`. The second does the same mathematics as the first
and differs in nothing but the order of its fp32 sums. Training amplifies such a difference from step to step, so what it
has grown to by step n is the yardstick for ours: at most FACTOR times the largest difference seen up to then, plus FLOOR
units in the last place of the first loss for the steps at which both happen to round alike. (Where a run passes through
an unstable stretch, two such orders of torch's own sums come to differ by 7 in how far they have strayed. A wrong
gradient shows in the first steps, where what is allowed is some 1e-5.)

Ours is watched while it trains, and in the end asked how far back the gradient of a single character gets.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import gradkernels as gk
from gradkernels import backends
from gradkernels.arguments import nowhere, positive
from gradkernels.progress import Progress
from gradkernels.tasks import CharacterModel, Trainer, characters
from gradkernels.tasks.trainer import evaluate

FACTOR = 32
FLOOR = 32
TURN = 5  # steps that one trainer takes before the next one does
MOST_STEPS, SECONDS = 200, 60  # unless --steps says otherwise: as many as fit the seconds, all three together
NAMES = ("torch", "gradkernels", "torch, rows reversed")
MEMORY_STEPS = 3
VALIDATION_BATCHES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="the recurrent layers (lstm)")
    parser.add_argument(
        "--steps", type=positive, help=f"training steps (as many as {SECONDS} s allow, at most {MOST_STEPS})"
    )
    parser.add_argument("--hidden", type=positive, default=256, help="width of embedding and layers (%(default)s)")
    parser.add_argument("--batch", type=positive, default=32, help="streams of text in a batch (%(default)s)")
    parser.add_argument("--length", type=positive, default=128, help="characters per step and stream (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, file order and sample (%(default)s)")
    parser.add_argument("--threads", type=positive, help="torch.set_num_threads (torch's own choice)")
    parser.add_argument("--backend", choices=backends.NAMES, help="of the converted layers (the best there is)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, progress going to stderr")
    parser.add_argument("--plot", metavar="FILE", help="draw the loss curves and their difference (needs matplotlib)")
    parser.add_argument(
        "--html", metavar="FILE", default="flow.html", help="the report of the gradient flow (%(default)s)"
    )
    parser.add_argument("--memory-of", choices=NAMES[:2], help=argparse.SUPPRESS)


def build(args: argparse.Namespace, name: str) -> CharacterModel:
    """The model that `name` trains: the same weights for the same seed."""
    torch.manual_seed(args.seed)
    model = CharacterModel(args.cell, args.hidden)
    if name == "gradkernels":
        gk.convert(model)
        model.recurrent.backend = args.backend
    return model


def rows_reversed(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for inputs, targets in batches:
        yield inputs.flip(1), targets.flip(1)


def compare(base: list[float], ours: list[float], control: list[float]) -> dict[str, Any]:
    """Whether two loss curves agree at every step, by the yardstick of the third."""
    noise, bounds = 0.0, []
    for theirs, also in zip(base, control):
        noise = max(noise, abs(theirs - also))
        bounds.append(FACTOR * noise + FLOOR * torch.finfo(torch.float32).eps * abs(base[0]))
    differences = [abs(a - b) for a, b in zip(base, ours, strict=True)]
    finite = all(map(math.isfinite, (*base, *ours, *control)))
    worst = max(range(len(base)), key=differences.__getitem__) if finite else 0
    # Every comparison with NaN is false: a loss that is not a number never agrees.
    disagree = [step for step, (d, b) in enumerate(zip(differences, bounds)) if not d <= b]
    return {
        "agree": finite and not disagree,
        "largest_difference": differences[worst],
        "at_step": worst + 1,
        "bound_there": bounds[worst],
        "first_beyond_bound": disagree[0] + 1 if disagree else None,
        "bounds": bounds,
    }


def peak_bytes() -> int:
    """The largest resident memory this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what a process was before exec, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(args: argparse.Namespace, name: str) -> int:
    """By how many bytes a few training steps raise the peak resident memory of a process with model and data ready."""
    trainer = Trainer(build(args, name), characters(args.batch, args.length, args.seed).batches())
    before = peak_bytes()
    trainer.run(MEMORY_STEPS)
    return peak_bytes() - before


def memory_in_own_process(args: argparse.Namespace, name: str) -> int:
    options = {"memory-of": name, "cell": args.cell, "hidden": args.hidden, "batch": args.batch, "length": args.length}
    options |= {"seed": args.seed, "threads": torch.get_num_threads()} | (
        {"backend": args.backend} if args.backend else {}
    )
    command = [sys.executable, "-m", "gradkernels", "demo", *(f"--{key}={value}" for key, value in options.items())]
    root = str(Path(gk.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    return json.loads(done.stdout)["peak_memory_bytes"]


def reach(model: CharacterModel, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, int | None]:
    """By layer: so many steps before the last character does its loss still have a thousandth of its gradient. (The loss of
    training has a part at every step, and so a short way to each.)"""
    inputs, targets = next(batches)
    with gk.flow.watch(model) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)  # what is asked is said in the end
        F.cross_entropy(model(inputs)[0][-1], targets[-1]).backward()
        return {name: monitor.horizon(name) for name in monitor.layers}


def train(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Trainer], gk.flow.Monitor]:
    """All three, TURN steps each in turns, so that whatever else the machine does meets them alike; and what ours was seen to do."""
    trainers = {}
    data = characters(args.batch, args.length, args.seed)
    for name in NAMES:
        batches = data.batches()
        trainers[name] = Trainer(build(args, name), rows_reversed(batches) if name == NAMES[2] else batches)
    alerts: list[gk.flow.Alert] = []  # for the report: warnings would come between the lines of progress
    monitor = gk.flow.watch(trainers["gradkernels"].model, every=TURN, on_alert=alerts.append)
    with progress:
        done, begin = 0, time.monotonic()
        while done < progress.total:
            count = min(TURN, progress.total - done)
            for name, trainer in trainers.items():
                trainer.run(count)
                rate = args.batch * args.length * count / sum(trainer.seconds[-count:])
                progress.advance(name, count, f"loss {trainer.losses[-1]:.4f}  {rate:9,.0f} characters/s")
            done += count
            if args.steps is None:
                fit = int(SECONDS / (time.monotonic() - begin) * done) // TURN * TURN
                progress.total = min(MOST_STEPS, max(2 * TURN, done, fit))
    return trainers, monitor


def measure(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train, compare, and gather everything that is reported."""
    trainers, monitor = train(args, progress)
    with monitor:
        if args.html:
            gk.flow.report(monitor, args.html)
        alerts = [str(alert) for alert in monitor.alerts]
    steps = progress.total
    ran = model_backend(trainers["gradkernels"].model)
    base, ours, control = (trainers[name].losses for name in NAMES)
    # First calls pay for thread pools, packed weights and caches that are cold.
    warm = min(TURN, steps // 3)
    validation = characters(args.batch, args.length, args.seed)
    results: dict[str, Any] = {}
    for name in NAMES[:2]:
        trainer = trainers[name]
        median = statistics.median(trainer.seconds[warm:])
        batches = validation.batches("validation")
        results[name] = {
            "characters_per_second": args.batch * args.length / median,
            "median_step_seconds": median,
            "final_loss": trainer.losses[-1],
            "validation_loss": evaluate(trainer.model, batches, VALIDATION_BATCHES),
            "peak_memory_bytes": memory_in_own_process(args, name),
            "losses": trainer.losses,
        }
    return {
        "settings": {k: getattr(args, k) for k in ("cell", "hidden", "batch", "length", "seed")}
        | {"layers": 2, "steps": steps, "threads": torch.get_num_threads(), "backend": ran},
        "versions": {"gradkernels": gk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "results": results,
        "ratio": results["torch"]["median_step_seconds"] / results["gradkernels"]["median_step_seconds"],
        "agreement": compare(base, ours, control) | {"control_losses": control},
        "horizon": reach(trainers["gradkernels"].model, validation.batches("validation")),
        "alerts": alerts,
        "html": args.html or None,
        "sample": trainers["gradkernels"].model.eval().sample("def ", 400, seed=args.seed),
    }


def model_backend(model: CharacterModel) -> str | None:
    """The backend that runs the model's recurrent layers."""
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    return backends.last()


def report(found: dict[str, Any]) -> str:
    """The table and the sample that close a run."""
    s, both, agreement = found["settings"], found["results"], found["agreement"]
    theirs, ours = both["torch"], both["gradkernels"]
    memory = [r["peak_memory_bytes"] / 2**20 for r in (theirs, ours)]
    rows = [
        ("", "torch", "gradkernels", "ratio"),
        (
            "characters per second",
            *(f"{r['characters_per_second']:,.0f}" for r in (theirs, ours)),
            f"{found['ratio']:.2f}x",
        ),
        ("median step, ms", *(f"{r['median_step_seconds'] * 1e3:.1f}" for r in (theirs, ours)), ""),
        ("peak memory of training, MB", *(f"{m:.0f}" for m in memory), f"{memory[1] / max(memory[0], 1e-9):.2f}x"),
        (f"training loss, step {s['steps']}", *(f"{r['final_loss']:.6f}" for r in (theirs, ours)), ""),
        ("validation loss", *(f"{r['validation_loss']:.6f}" for r in (theirs, ours)), ""),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join((row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:])))) for row in rows]
    table = "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))
    if agreement["agree"]:
        verdict = "The loss curves agree at every step."
    else:
        verdict = f"THE LOSS CURVES DIVERGE, first at step {agreement['first_beyond_bound']}."
    distances = " and ".join(f"{horizon} ({layer})" for layer, horizon in found["horizon"].items())
    page = (
        f"\nThe gradient flow of the whole training, to be opened in a browser: {found['html']}"
        if found["html"]
        else ""
    )
    alerts = "".join(f"\n{alert}" for alert in found["alerts"])
    return f"""
{table}

{verdict} Largest difference {agreement["largest_difference"]:.1e}, at step {agreement["at_step"]};
allowed there: {agreement["bound_there"]:.1e}, from what reversing the rows of each batch does to torch's own losses.
Speed: medians over turns of {TURN} steps, the first turn left out.
Memory: how far {MEMORY_STEPS} training steps raise the peak of a process of their own.

A thousandth of the gradient of one character's loss gets back {distances} of {s["length"] - 1} steps.{alerts}{page}

What the converted model writes after {s["steps"]} steps:

{textwrap.indent(found["sample"], "    ")}"""


def plot(found: dict[str, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = {name: found["results"][name]["losses"] for name in NAMES[:2]}
    steps = range(1, len(losses["torch"]) + 1)
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained")
    for name, style in zip(NAMES, ("-", "--")):
        above.plot(steps, losses[name], style, label=name)
    above.set_ylabel("training loss")
    above.legend()
    # On a logarithmic axis a difference of exactly zero is simply absent.
    below.semilogy(steps, found["agreement"]["bounds"], "k:", label="allowed")
    for label, other in (("gradkernels", losses["gradkernels"]), (NAMES[2], found["agreement"]["control_losses"])):
        below.semilogy(steps, [abs(a - b) or math.nan for a, b in zip(losses["torch"], other)], label=label)
    below.set_ylabel("difference from torch")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(file, dpi=120)


def run(args: argparse.Namespace) -> int:
    """The demo; 0 when the loss curves agree, else 1."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps({"peak_memory_bytes": memory_of(args, args.memory_of)}))
        return 0
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    if lost := nowhere(html=args.html, plot=args.plot):
        print(lost, file=sys.stderr)
        return 2
    out = sys.stderr if args.json else sys.stdout
    print(
        f"Two {args.cell.upper()} layers of {args.hidden} units on the standard library's sources, {args.batch} x "
        f"{args.length} characters a step, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        file=out,
    )
    missing = backends.backends()["cpu"]
    if missing and args.backend is None:
        print(f"The compiled backend cannot run, so the slow reference does: {missing}", file=out)
    found = measure(args, Progress(NAMES, args.steps or MOST_STEPS, out))
    if args.plot:
        plot(found, args.plot)
    print(json.dumps(found) if args.json else report(found))
    return 0 if found["agreement"]["agree"] else 1
