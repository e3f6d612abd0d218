"""What watching costs: `python -m bench.flow [--json FILE]` times training steps with and without a monitor, interleaved.

Every step is recorded. A timed call is 128 steps, the period in which a monitor looks at everything once.

Dims: T steps, B batch, H hidden units and inputs, L layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import gradkernels as gk
from bench.machine import describe
from bench.measure import Disturbed, interleaved

PERIOD = 128
AT_MOST = 0.03  # of a step of 3 ms or longer


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    H: int
    L: int = 1

    def __str__(self) -> str:
        return f"{self.cell} {self.T},{self.B},{self.H}" + f" {self.L} layers" * (self.L > 1)


CASES = [
    Case("LSTM", 128, 1, 384),
    Case("LSTM", 64, 32, 96),
    Case("LSTM", 128, 32, 128, 2),
    Case("LSTM", 100, 16, 64, 4),
    Case("GRU", 128, 16, 128, 2),
    Case("RNN", 256, 16, 128, 2),
]


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.recurrent = getattr(gk.nn, case.cell)(case.H, case.H, num_layers=case.L)
        self.head = nn.Linear(case.H, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, B, H] -> [B, 16]
        return self.head(self.recurrent(x)[0][-1])


def steps(case: Case, watched: bool) -> tuple[Callable[[], None], gk.flow.Monitor | None]:
    """A period of training steps, and the monitor."""
    torch.manual_seed(0)
    model = Model(case)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.randn(case.T, case.B, case.H)
    monitor = gk.flow.watch(model) if watched else None

    def run() -> None:
        for _ in range(PERIOD):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return run, monitor


def measure(case: Case, budget: float) -> dict[str, Any]:
    """Milliseconds of a step, by itself and watched, and what it costs."""
    (plain, _), (watched, monitor) = steps(case, False), steps(case, True)
    spreads, counted, dropped = interleaved([plain, watched], budget)
    assert monitor is not None and monitor.history
    alone, seen = ({k: v / PERIOD for k, v in asdict(s).items() if k != "samples"} for s in spreads)
    cost = seen["median"] / alone["median"] - 1
    good = None if alone["median"] < 3 else cost <= AT_MOST
    return {
        "case": str(case),
        "alone": alone,
        "watched": seen,
        "cost": cost,
        "rounds": counted,
        "dropped": dropped,
        "within": good,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flow", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows there, with machine and versions")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each row")
    args = parser.parse_args(arguments)
    rows = []
    print(f"{'':28} {'alone':>9} {'watched':>9} {'cost':>8}   at most {AT_MOST:.0%} from 3 ms on")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gk.flow.FlowWarning)
        for case in CASES:
            try:
                row = measure(case, args.budget)
            except Disturbed as e:
                print(f"{case!s:28} {e}")
                continue
            rows.append(row)
            word = {None: "", True: "holds", False: "falls short"}[row["within"]]
            alone, watched = row["alone"]["median"], row["watched"]["median"]
            print(
                f"{row['case']:28} {alone:6.3f} ms {watched:6.3f} ms {(watched - alone) * 1e3:5.0f} us {row['cost']:6.1%}  {word}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": describe(), "rows": rows}, file, indent=1)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
