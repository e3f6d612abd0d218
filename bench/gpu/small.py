"""A few small layers by every kind of plan, forward and backward: what compute-sanitizer runs. python -m bench.gpu.small"""

from __future__ import annotations

import itertools
import sys

import torch

from bench.cases import Case
from bench.providers import build

PICKS = ("exchange=cluster,N=8", "exchange=grid,N=8", "kind=step")


def main() -> int:
    """Runs them all; 1 if one of them could not."""
    failed = 0
    for pick, (cell, dtype) in itertools.product(PICKS, (("lstm", "bfloat16"), ("gru_reset_before", "float32"))):
        case = Case("small", cell, "training", 3, 11, 72, dtype=dtype, device="cuda", layout="ragged", tokens=25)
        try:
            build(case, f"ours:{pick}").run()
            torch.cuda.synchronize()
            print(f"{case.name} by {pick}: ran", flush=True)
        except (RuntimeError, ValueError) as e:
            failed += 1
            print(f"{case.name} by {pick}: {type(e).__name__}: {str(e).partition(chr(10))[0]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
