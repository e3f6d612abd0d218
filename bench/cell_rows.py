"""The rows of the family of cells, and who runs them: ours, the loop that people write, our plain cell, and ours without recompute.

Dims: T steps, B batch, I = H input features, H units, G gates, `periods` of groups of units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.cases import MODES, Case, Target

if TYPE_CHECKING:
    from bench.providers import Provider
    from gradkernels.cells import Cell

BATCH, ONE = (128, 32, 256), (128, 1, 256)  # T, B, H
LONG = (20000, 1, 256)
WINDOW = 128  # of steps that are computed again: about the root of 20000
# steps of a long sequence that are held against torch's: some windows, and one that is not full
COMPARED = 3 * WINDOW + 1
OWN = "leaky"  # the README's
# torch's, and those of the suite `recurrent`
ELSEWHERE = ("lstm", "gru", "rnn_tanh", "rnn_relu", "gru_reset_before", "rnn_sigmoid")
PLAIN = {1: "rnn_tanh", 2: "gru", 3: "gru"}  # by gates: what a cell that is not named below is held against; else lstm
NEAR = 1 / 1.25  # of the plain cell's speed, where it is asked


@dataclass(frozen=True)
class CellRow(Case):
    """A row; `cell` is a name of gradkernels.cells, or that of the README's."""

    zoneout: float = 0.0
    variational: float = 0.0
    skip: int = 0
    heads: int = 1
    periods: tuple[int, ...] = ()
    recompute: int = 0
    plain: str = ""  # the cell of `ours_plain`
    drawn: bool = True  # False: training with the masks' means, which can be compared

    @property
    def name(self) -> str:
        more = [
            f"zoneout {self.zoneout:g}" * bool(self.zoneout),
            f"variational {self.variational:g}" * bool(self.variational),
            f"skip {self.skip}" * bool(self.skip),
            f"{self.heads} heads" * (self.heads > 1),
            f"periods {','.join(map(str, self.periods))}" * bool(self.periods),
            f"recompute {self.recompute}" * bool(self.recompute),
            {"memory": "peak memory", "first step": "first step"}.get(self.kind, ""),
        ]
        return " ".join([self.cell, f"{self.T},{self.B},{self.H}", self.mode, *filter(None, more)])

    def definition(self) -> Cell:
        if self.cell == OWN:
            from bench.own_cell import leaky

            return leaky
        from gradkernels import cells

        return cells.get(self.cell)

    def flops(self) -> int:
        """Of the matrix products: none with the state where a cell has none; of a group only those of its own steps. What is
        computed again is not counted: it is a way, and not what is asked for."""
        c = self.definition()
        total = 0
        for width, units, steps in self.groups():
            total += steps * self.B * 2 * c.G * units * (width + (units // self.heads if c.recurrent else 0))
        return total * (3 if self.mode == "training" else 1)

    def groups(self) -> list[tuple[int, int, int]]:
        """Inputs, units and steps of each group; one group where there are no periods."""
        if not self.periods:
            return [(self.H, self.H, self.T)]
        units = self.H // len(self.periods)
        return [(self.H + units * sum(q > p for q in self.periods), units, -(-self.T // p)) for p in self.periods]

    def exact(self) -> CellRow:
        """With means for masks; of a long sequence the first steps."""
        return replace(self, drawn=False, T=min(self.T, COMPARED))


def cell_rows() -> list[Case]:
    """Every row for the CPU. A cell that comes to the registry has rows without being named here."""
    from gradkernels.cells import CELLS

    found: list[Case] = []

    def add(
        group: str, cell: str, plain: str = "", near: float | None = None, gates: float = 1.0, one: bool = False, **more
    ) -> None:
        """Both modes, with a batch and perhaps for one sequence. gates: of this cell, over those of the plain one."""
        beside = [Target("ours_plain", near, scale=gates)] if plain else []
        providers = ("ours", "loop", *(["ours_plain"] if plain else []))
        found.extend(
            CellRow(group, cell, mode, *shape, providers=providers, targets=(Target("loop", 4.0), *beside), plain=plain, **more)
            for shape in ([BATCH, ONE] if one else [BATCH])
            for mode in MODES
        )  # fmt: skip

    add("LSTMs", "lstm_layer_norm", "lstm", NEAR, one=True)
    add("LSTMs", "lstm_peephole", "lstm", NEAR, one=True)
    add("LSTMs", "lstm_no_forget", "lstm", gates=3 / 4)
    add("LSTMs", "lstm_coupled", "lstm", gates=3 / 4)
    add("LSTMs", "slstm", "lstm", one=True)
    add("other cells", "gru_layer_norm", "gru", one=True)
    add("other cells", "mgu", "gru", gates=2 / 3)
    add("other cells", "indrnn", "rnn_tanh")
    add("other cells", "rnn_modrelu", "rnn_tanh")
    add("other cells", "rnn_additive", "rnn_tanh")
    listed = {*ELSEWHERE, *(case.cell for case in found)}
    for c in CELLS.values():
        if c.name not in listed:
            plain = PLAIN.get(c.G, "lstm")
            add("other cells", c.name, plain, gates=c.G / CELLS[plain].G)
    add("inside the step", "lstm", "lstm", NEAR, one=True, zoneout=0.1)
    add("inside the step", "lstm", "lstm", variational=0.25)
    # not of a GRU: both of its paths from one h to the next have weights near 1, and numbers grow by 1.2 a step
    add("inside the step", "lstm", "lstm", NEAR, one=True, skip=8)
    add("inside the step", "lstm", "lstm", one=True, heads=4)
    add("inside the step", "gru", "gru", periods=(1, 2, 4, 8))
    add("a cell of your own", OWN, "lstm", 1 / 1.3, gates=1 / 4)
    first = ("ours", "ours_cold", "loop")
    against = tuple(Target(key) for key in first[1:])
    found.append(CellRow("first step", OWN, "training", *BATCH, "first step", providers=first, targets=against))
    for cell in ("lstm", "gru"):
        row = CellRow(
            "long sequences", cell, "training", *LONG, recompute=WINDOW, providers=("ours", "torch", "ours_whole")
        )
        targets = (Target("torch", 1.0), Target("ours_whole"))
        found += [
            replace(row, kind="memory", targets=targets),
            replace(row, targets=(Target("torch"), Target("ours_whole"))),
        ]
    return found


def ours(case: CellRow) -> nn.Module:
    """Our layer, parameters of the cell moved away from their first values, at which what is wrong with one could be hidden."""
    import gradkernels as gk

    torch.manual_seed(0)
    cell = case.cell if case.cell != OWN else case.definition()
    if case.periods:
        return gk.nn.MultiScaleRNN(cell, case.H, case.H, periods=case.periods, backend=case.backend)
    options = {k: getattr(case, k) for k in ("zoneout", "variational", "skip", "heads", "recompute")}
    layer = gk.nn.Recurrent(cell, case.H, case.H, backend=case.backend, **options)
    with torch.no_grad():
        for text, _, _ in case.definition().params:
            getattr(layer, f"{text}_l0").sub_(torch.rand(case.H).mul_(0.1))
    return layer


def build(case: CellRow, key: str, dtype: torch.dtype | None = None) -> Provider:
    """One provider of a row; all but the plain cell hold the same weights, and all see the same input."""
    from bench.cell_loops import Loop, Scales
    from bench.providers import Provider, layer

    if key == "ours_plain":
        case = CellRow(case.group, case.plain, case.mode, case.T, case.B, case.H, case.kind, backend=case.backend)
    module = ours(replace(case, recompute=0) if key == "ours_whole" else case)
    if key in ("loop", "compiled"):
        module = (Scales if case.periods else Loop)(module, case, key == "compiled")
    elif key == "torch":
        weights, module = module.state_dict(), layer(case)
        module.load_state_dict(weights)
    x = torch.randn(case.T, case.B, case.H, generator=torch.Generator().manual_seed(2))
    rounded = getattr(torch, case.dtype)
    module.to(rounded).to(dtype or rounded)
    module.train(case.mode == "training" and case.drawn)
    return Provider(key, module, module, x.to(rounded).to(dtype or rounded), case)
