"""What is measured: every row is a dataclass, and so is what is asked of it. Rows for a GPU are in gpu/rows.py.

Dims: T steps, B batch, I = H input features, H hidden units, R = proj_size or H, G gates.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

SHAPES = [(128, 1, 256), (128, 32, 256), (128, 64, 512), (64, 32, 1024), (512, 16, 128)]  # T, B, H
BF16 = [(128, 32, 256), (128, 64, 512), (64, 32, 1024)]
TOKENS = 2289  # of the 128 x 32 = 4096 places of the ragged rows
MODES = ("inference", "training")
TITLES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn_tanh": "RNN",
    "gru_reset_before": "original GRU",
    "rnn_sigmoid": "sigmoid RNN",
    "lstm_layer_norm": "LayerNorm LSTM",
    "lstm_peephole": "peephole LSTM",
    "lstm_no_forget": "LSTM of 1997",
    "lstm_coupled": "coupled LSTM",
    "slstm": "sLSTM",
    "gru_layer_norm": "LayerNorm GRU",
    "mgu": "minimal gated unit",
    "indrnn": "IndRNN",
    "rnn_modrelu": "modReLU RNN",
    "rnn_additive": "additive RNN",
    "leaky": "README's cell",
}


@dataclass(frozen=True)
class Target:
    """What is asked of a row: `against`'s median over ours, times `scale`, is to be at least `at_least`.

    against "limit" asks for our share of the rate at which this machine multiplies matrices, measured in the same run; on a GPU of
    the floor that gpu/floor.py makes of what was measured there. "rate" asks for so many TFLOP/s, "best" is the fastest backend of SDPA.
    at_least None asks for nothing: the ratio is printed. needs: only asked of a CPU with this instruction set.
    """

    against: str
    at_least: float | None = None
    scale: float = 1.0
    needs: str | None = None


@dataclass(frozen=True)
class Case:
    """One row. `providers[0]` is what is judged, `providers[1]` its peer, further ones are timed along."""

    group: str  # heading in the table
    cell: str  # a name of gradkernels.cells
    mode: str  # inference: no_grad. training: forward and backward into x and every parameter. step: no_grad, states passed in
    T: int
    B: int
    H: int
    kind: str = "time"  # time | memory | processes | first step
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    layout: str = "padded"  # padded | packed | ragged
    tokens: int | None = None  # sum of the lengths when the layout has any
    backend: str | None = None  # as in gradkernels.ops.recurrent
    device: str = "cpu"  # of torch
    tf32: bool = False  # whether float32 is multiplied with 10 bits of mantissa, where the device can
    providers: tuple[str, ...] = ("ours", "torch")
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """Unique, and what --filter looks at: 'lstm 128,32,256 training', then whatever is out of the ordinary."""
        more = [
            self.dtype.replace("float", "fp").replace("bfp", "bf") * (self.dtype != "float32"),
            "tf32" * self.tf32,
            "fp32" * (self.device != "cpu" and self.dtype == "float32" and not self.tf32),
            f"{self.layers} layers" * (self.layers > 1),
            "bidirectional" * self.bidirectional,
            f"proj {self.proj_size}" * bool(self.proj_size),
            self.layout * (self.layout != "padded"),
            "one step" * (self.mode == "step"),
            "probe" * ("ours_unwatched" in self.providers),
            "cell module" * (self.providers[0] == "ours_cell"),
            "loop" * (self.providers[1:2] == ("compiled",)),
            {"memory": "peak memory", "processes": "two processes"}.get(self.kind, ""),
        ]
        what = "inference" if self.mode == "step" else self.mode
        return " ".join([self.cell, f"{self.T},{self.B},{self.H}", what, *filter(None, more)])

    @property
    def variant(self) -> str:
        """The name without cell, shape and mode."""
        return " ".join(self.name.split(" ")[3:])

    def lengths(self) -> list[int] | None:
        """Steps of every row of a ragged batch, in no order; fixed, the longest is T, their sum is `tokens`."""
        if self.tokens is None:
            return None
        draw = random.Random(0)
        found = [self.T, *(draw.randint(1, self.T) for _ in range(self.B - 1))]
        while (over := sum(found) - self.tokens) != 0:
            k = draw.randrange(1, self.B)
            found[k] = min(self.T, max(1, found[k] - (1 if over > 0 else -1)))
        return found

    def flops(self) -> int:
        """Operations in the matrix products: what is left is pointwise, and a few percent of this.

        2 G H (I + R) for every token, layer and direction, plus 2 H R for a projection; training has twice that again.
        """
        from gradkernels import cells

        G, H, R, directions = cells.get(self.cell).G, self.H, self.proj_size or self.H, 1 + self.bidirectional
        tokens = self.tokens if self.layout != "padded" and self.tokens is not None else self.T * self.B
        token = 0
        for layer in range(self.layers):
            features = R * directions if layer else H
            token += directions * (2 * G * H * (features + R) + (2 * H * R if self.proj_size else 0))
        return tokens * token * (3 if self.mode == "training" else 1)

    def bytes(self) -> int:
        """That have to be read and written, where memory is the limit; 0: products are."""
        return 0

    def exact(self) -> Case:
        """The row without what is random in it, which cannot be compared."""
        return self

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> Case:
        from bench.cell_rows import CellRow
        from bench.layers import Layer

        lists = {k: tuple(v) for k, v in d.items() if isinstance(v, (list, tuple))}
        targets = tuple(Target(**t) for t in d["targets"])
        kind = Layer if "taps" in d else CellRow if "zoneout" in d else Case
        return kind(**{**d, **lists, "targets": targets})


def asked(cell: str, mode: str, B: int, H: int) -> tuple[Target, ...]:
    """What is asked of a plain fp32 layer."""
    if cell == "lstm":
        share = (Target("limit", 0.95),) if H >= 256 and B >= 32 else ()
        return (Target("torch", 2.5 if B == 1 else 1.05), *share)
    if cell == "gru":
        large = {"inference": 5.0, "training": 14.0} if B == 1 else {"inference": 2.2, "training": 2.0}
        return (Target("torch", large[mode]),)
    return (Target("torch", 10.0 if B == 1 and mode == "training" else 2.0),)


def recurrent() -> list[Case]:
    """Every recurrent row for the CPU."""
    found = [
        Case("shapes", cell, mode, *shape, targets=asked(cell, mode, *shape[1:]))
        for cell in ("lstm", "gru", "rnn_tanh")
        for shape in SHAPES
        for mode in MODES
    ]
    found += [
        Case(
            "bf16",
            cell,
            mode,
            *shape,
            dtype="bfloat16",
            providers=("ours", "torch", "ours_fp32"),
            targets=(Target("torch"), Target("ours_fp32", 1.8, needs="bf16")),
        )
        for cell in ("lstm", "gru", "rnn_tanh")
        for shape in BF16
        for mode in MODES
    ]
    # as many tokens a second as the padded batch, but for a tenth: narrow steps at the end use the tile less well
    proportional = Target("ours_padded", 0.9, scale=TOKENS / 4096)
    packed = {("lstm", "inference"): 2.4, ("lstm", "training"): 3.3}
    for layout, padded in (("packed", proportional), ("ragged", Target("ours_padded", 1.0))):
        found += [
            Case(
                "packed and ragged",
                cell,
                mode,
                128,
                32,
                256,
                layout=layout,
                tokens=TOKENS,
                providers=("ours", "torch", "ours_padded"),
                targets=(Target("torch", packed.get((cell, mode)) if layout == "packed" else None), padded),
            )
            for cell in ("lstm", "gru")
            for mode in MODES
        ]
    deep = {"layers": 2, "bidirectional": True}
    for cell, more in (("lstm", {"proj_size": 128}), ("lstm", {"layers": 2}), ("lstm", deep), ("gru", deep)):
        found += [Case("stacked", cell, mode, 128, 32, 256, targets=(Target("torch", 1.3),), **more) for mode in MODES]
    for cell in ("gru_reset_before", "rnn_sigmoid"):
        found += [
            Case("cells torch has not", cell, mode, *shape, providers=("ours", "loop"), targets=(Target("loop", 4.0),))
            for shape in SHAPES[:2]
            for mode in MODES
        ]
    for H in (64, 256):
        both = (Target("torch", 2.0), Target("cell", 1.0))
        found.append(Case("one step", "lstm", "step", 1, 1, H, providers=("ours", "torch", "cell"), targets=both))
        found.append(
            Case("one step", "lstm", "step", 1, 1, H, providers=("ours_cell", "cell"), targets=(Target("cell"),))
        )
    found += [
        Case(
            "gradient taps",
            cell,
            "training",
            *shape,
            providers=("ours", "ours_unwatched"),
            targets=(Target("ours_unwatched", round(1 / 1.03, 3)),),
        )
        for cell in ("lstm", "gru")
        for shape in SHAPES[:2]
    ]
    no_more = (Target("torch", 1.0),)
    trained = [
        c for c in found if c.mode == "training" and c.group in ("shapes", "bf16", "packed and ragged", "stacked")
    ]
    found += [
        replace(c, group="peak memory", kind="memory", providers=("ours", "torch"), targets=no_more) for c in trained
    ]
    found += [
        Case("two processes", cell, "training", *shape, kind="processes", targets=no_more)
        for cell, shape in (("lstm", SHAPES[0]), ("lstm", SHAPES[1]), ("gru", SHAPES[1]))
    ]
    return found


def quick(found: list[Case]) -> list[Case]:
    """The rows that show every part of the harness and take little time: no large shapes, memory of plain cells alone."""
    narrow = lambda c: c.H <= 512 or c.cell.startswith("attention") and c.T <= 2048
    small = [c for c in found if c.T * c.B * c.H**2 <= 128 * 32 * 256**2 or c.device != "cpu" and narrow(c)]
    return [
        c
        for c in small
        if c.kind == "time" or (c.H == 256 and c.dtype == "float32" and c.layout == "padded" and c.layers == 1)
    ]


def recurrent_gpu() -> list[Case]:
    """Every recurrent row for a GPU."""
    from bench.gpu.rows import recurrent_gpu

    return recurrent_gpu()


def layers() -> list[Case]:
    """Every row of attention, residual + norm and convolution for the CPU."""
    from bench.layers import layers

    return layers()


def cell_rows() -> list[Case]:
    """Every row of the family of cells for the CPU."""
    from bench.cell_rows import cell_rows

    return cell_rows()


def layers_gpu() -> list[Case]:
    """Every row of attention, residual + norm and convolution for a GPU."""
    from bench.gpu.layer_rows import layers_gpu

    return layers_gpu()


SUITES = {
    "recurrent": recurrent,
    "recurrent-gpu": recurrent_gpu,
    "layers": layers,
    "layers-gpu": layers_gpu,
    "cells": cell_rows,
}
