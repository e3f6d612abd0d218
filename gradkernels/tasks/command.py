"""python -m gradkernels tasks copy --cell lstm --delay 100: train on a long-range task and see how far its gradients travel."""

from __future__ import annotations

import argparse
import json
import sys

import torch

import gradkernels as gk
from gradkernels.arguments import INITS, nowhere, positive
from gradkernels.progress import Progress
from gradkernels.tasks import generators
from gradkernels.tasks.generators import Task
from gradkernels.tasks.model import BODIES
from gradkernels.tasks.run import make, processes, train

TASKS = {
    "copy": lambda a: generators.copy_memory(a.batch, a.delay, a.items, a.seed),
    "adding": lambda a: generators.adding(a.batch, a.delay, a.seed),
    "agreement": lambda a: generators.subject_verb(a.batch, a.delay, a.seed),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS, help="what is to be remembered (of characters: see `demo`)")
    bodies = (*BODIES, *gk.cells.CELLS)
    parser.add_argument("--cell", choices=bodies, default="lstm", metavar="NAME", help=f"{', '.join(bodies)} (lstm)")
    parser.add_argument(
        "--delay",
        type=positive,
        default=100,
        help="steps between reading and answering; nouns between, of agreement (%(default)s)",
    )
    parser.add_argument("--items", type=positive, default=10, help="symbols to copy (%(default)s)")
    parser.add_argument("--init", choices=INITS, default="default", help="initial weights (%(default)s)")
    parser.add_argument("--hidden", type=positive, default=64, help="units (%(default)s)")
    parser.add_argument(
        "--batch", type=positive, default=32, help="sequences in a batch, of each process (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=1000, help="training steps (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences (%(default)s)")
    parser.add_argument("--live", action="store_true", help="serve the page of the gradient flow while it trains")
    parser.add_argument("--html", metavar="FILE", help="write that page in the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object, progress going to stderr")


def run(args: argparse.Namespace) -> int:
    """The command; torchrun makes several processes of it, of which the first one speaks."""
    if lost := nowhere(html=args.html):
        print(lost, file=sys.stderr)
        return 2
    try:
        task: Task = TASKS[args.task](args)
        torch.manual_seed(args.seed)
        model = make(task, args.cell, args.hidden, args.init)
    except ValueError as error:
        print(f"tasks {args.task}: {error}", file=sys.stderr)
        return 2
    name = args.cell if args.init == "default" else f"{args.cell}, {args.init}"
    alerts: list[gk.flow.Alert] = []  # said in the end, not between lines of progress
    every = max(1, args.steps // 200)
    with processes() as (rank, count), gk.flow.watch(model, every, on_alert=alerts.append) as monitor:
        server = gk.flow.serve(monitor) if args.live and rank == 0 else None
        if server is not None:
            print(f"live at {server.url}", file=sys.stderr)
        with Progress([name] if rank == 0 else [], args.steps, sys.stderr) as progress:

            def each(step: int, loss: float, right: float) -> None:
                if rank == 0:
                    progress.advance(name, 1, f"loss {loss:.4f}, {right:.0%} right")

            result = train(task, model, args.steps, args.rate, rank=rank, count=count, each=each)
        monitor.sync()
        if rank:
            return 0
        if args.html:
            gk.flow.report(monitor, args.html)
        if args.json:
            said = {"task": args.task, "cell": args.cell, "init": args.init, "delay": args.delay, **result.as_dict()}
            print(json.dumps(said | {"alerts": [alert.to_dict() for alert in alerts]}))
        else:
            print(
                f"{args.task}, {task.steps} steps, {name}: loss {result.loss:.4f} ({task.trivial:.4f} remembering nothing), {result.right:.0%} right"
            )
            if result.horizon is not None:
                print(
                    f"a thousandth of the last answer's gradient gets {result.horizon} of {task.steps - 1} steps back"
                )
            for alert in alerts:
                print(f"\n{alert}")
        if server is not None:
            print("Ctrl-C ends the live page", file=sys.stderr)
            server.wait()
    return 0
