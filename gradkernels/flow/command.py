"""python -m gradkernels flow: small models that have to remember, their gradients watched, as a page and live.

Every model reads the same T symbols, the first of which it has to name after the last. That takes a gradient which travels T - 1
steps back; how far it gets at first, and how that changes, is what the page shows.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradkernels as gk
from gradkernels.arguments import INITS, positive
from gradkernels.cells import CELLS
from gradkernels.progress import Progress

LENGTHS = (10, 50, 100, 200)  # that the untrained layers are compared over
SYMBOLS = 8  # to remember one of; as many others follow it
DEFAULT = (("rnn_tanh", "default"), ("lstm", "default"), ("lstm", "chrono"))


def recurrent(cell: str, init: str, hidden: int, length: int) -> nn.Module:
    """A layer as wide as its input, with its initial weights for sequences of `length`."""
    layer = gk.nn.Recurrent(cell, hidden, hidden)
    INITS[init](layer, length)
    return layer


class Recall(nn.Module):
    """Names the first of the symbols [T, B] that it has read: logits [B, SYMBOLS]."""

    def __init__(self, cell: str, init: str, hidden: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * SYMBOLS, hidden)
        self.recurrent = recurrent(cell, init, hidden, length)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(symbols))[0][-1])


def batches(length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(symbols [T, B], targets [B]) without end: one of the first SYMBOLS, then others."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        symbols = torch.randint(SYMBOLS, 2 * SYMBOLS, (length, batch), generator=generator)
        symbols[0] = torch.randint(SYMBOLS, (batch,), generator=generator)
        yield symbols, symbols[0]


def spec(text: str) -> tuple[str, str]:
    """CELL or CELL:INIT."""
    cell, _, init = text.partition(":")
    init = init or "default"
    if cell not in CELLS:
        raise argparse.ArgumentTypeError(f"no cell {cell!r}; there are {', '.join(CELLS)}")
    if init not in INITS:
        raise argparse.ArgumentTypeError(f"no initialisation {init!r}; there are {', '.join(INITS)}")
    return cell, init


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        type=spec,
        metavar="CELL[:INIT]",
        help=f"models to train side by side (rnn_tanh lstm lstm:chrono); initial weights: {', '.join(INITS)}",
    )
    parser.add_argument("--length", type=positive, default=60, help="symbols in a sequence (%(default)s)")
    parser.add_argument("--hidden", type=positive, default=64, help="units (%(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="sequences in a batch (%(default)s)")
    parser.add_argument("--steps", type=positive, default=300, help="training steps (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and symbols (%(default)s)")
    parser.add_argument("--html", metavar="FILE", default="flow.html", help="the report that is written (%(default)s)")
    parser.add_argument("--live", action="store_true", help="serve the page while the models train, until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="of the live page (a free one)")
    parser.add_argument("--read", metavar="FILE", help="show snapshots that were saved as JSON instead of training")
    parser.add_argument("--json", action="store_true", help="print one JSON object, progress going to stderr")


def train(args: argparse.Namespace, out: TextIO, show: Callable[..., object]) -> dict[str, Any]:
    """What became of each run: its monitor, losses and alerts; `show` is given the monitors before the first step, and a comparison of
    the untrained layers."""
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[], nn.Module]] = {}
    with ExitStack() as stack:
        for cell, init in args.runs or DEFAULT:
            name = cell if init == "default" else f"{cell}:{init}"
            torch.manual_seed(args.seed)
            try:
                model = Recall(cell, init, args.hidden, args.length)
            except ValueError as error:
                raise Refused(f"{name}: {error}") from None
            makers[name] = functools.partial(recurrent, cell, init, args.hidden, args.length)
            alerts: list[gk.flow.Alert] = []
            spectra = max(1, args.steps // 40)
            monitor = stack.enter_context(gk.flow.watch(model, spectra=spectra, on_alert=alerts.append))
            optimizer = torch.optim.Adam(model.parameters(), args.rate)
            found[name] = {"monitor": monitor, "model": model, "optimizer": optimizer, "losses": [], "alerts": alerts}
        monitors = {name: one["monitor"] for name, one in found.items()}
        untrained = gk.flow.compare(
            makers, LENGTHS, input_size=args.hidden, batch=4, signal="h", title="before training"
        )
        show(monitors, untrained)
        print(
            f"Models of {args.hidden} units name the first of {args.length} symbols after the last; "
            f"{args.steps} steps of {args.batch} sequences.",
            file=out,
        )
        try:
            with Progress(found, args.steps, out) as progress:
                for _, (symbols, targets) in zip(range(args.steps), batches(args.length, args.batch, args.seed)):
                    for name, one in found.items():
                        progress.advance(name, 1, f"loss {step(one, symbols, targets):.4f}")
        finally:  # also of a run that is broken off
            gk.flow.report(monitors, args.html, comparison=untrained)
    return found


def step(one: dict[str, Any], symbols: Tensor, targets: Tensor) -> float:
    """Train one of the models on a batch; its loss before."""
    loss = F.cross_entropy(one["model"](symbols), targets)
    one["optimizer"].zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(one["model"].parameters(), 1.0)
    one["optimizer"].step()
    one["losses"].append(loss.item())
    return one["losses"][-1]


def table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """Losses and horizons at both ends of training, and what was noticed."""
    few = max(1, args.steps // 10)
    lines = [f"{'':16}  {'loss':>8}  {'horizon, first step':>20}  {'and last':>8}"]
    for name, run in found.items():
        first, last = (f"{v} of {args.length - 1}" for v in ends(run["monitor"]))
        loss = math.fsum(run["losses"][-few:]) / few
        lines.append(f"{name:16}  {loss:8.4f}  {first:>20}  {last:>8}")
    lines.append(f"{'guessing':16}  {math.log(SYMBOLS):8.4f}")
    lines += [f"\n{name}: {alert}" for name, run in found.items() for alert in run["alerts"]]
    return "\n".join(lines)


def ends(monitor: gk.flow.Monitor) -> tuple[int | None, int | None]:
    """The memory horizon at the first and the last recorded step."""
    (layer,) = monitor.snapshot()["layers"]
    return layer["horizon"][0], layer["horizon"][-1]


class Refused(Exception):
    """What was asked for cannot be done; the text says why."""


def run(args: argparse.Namespace) -> int:
    """Train or read, and write the report; 2 where something cannot be read, written, made or served."""
    out = sys.stderr if args.json else sys.stdout
    server: list[gk.flow.Server] = []

    def show(source: Any, comparison: Any = None) -> None:
        # A path that cannot be written is known before an hour of training.
        gk.flow.report(source, args.html, comparison=comparison)
        if args.live:
            server.append(gk.flow.serve(source, args.port, comparison=comparison))

    try:
        found = read(args, show) if args.read else train(args, out, show)
    except (Refused, OSError) as error:
        print(f"python -m gradkernels flow: {error}", file=sys.stderr)
        return 2
    if found:
        print(f"\n{table(args, found)}\n", file=out)
    said = {"report": args.html} | ({"runs": {name: summary(one) for name, one in found.items()}} if found else {})
    print(json.dumps(said) if args.json else f"The report is in {args.html}.")
    if server:
        print(f"The page stays at {server[0].url} until Ctrl-C.", file=out, flush=True)
        server[0].wait()
    return 0


def read(args: argparse.Namespace, show: Callable[[Any], object]) -> dict[str, Any]:
    """Nothing was trained; `show` is given what was read."""
    text = Path(args.read).read_text(encoding="utf-8")
    try:
        show(json.loads(text))
    except (ValueError, TypeError) as error:
        raise Refused(f"{args.read}: {error}") from None
    return {}


def summary(one: dict[str, Any]) -> dict[str, Any]:
    first, last = ends(one["monitor"])
    alerts = [alert.to_dict() for alert in one["alerts"]]
    return {"losses": one["losses"], "horizon_first": first, "horizon_last": last, "alerts": alerts}
