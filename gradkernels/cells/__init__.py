"""Recurrent cells: one text each, from which every backend gets forward, backward and tangent."""

from . import gru, lstm, rnn
from .derive import Cell, cell

__all__ = ["CELLS", "Cell", "cell", "get"]

CELLS: dict[str, Cell] = {
    f.__name__: cell(f)
    for f in (lstm.lstm, gru.gru, gru.gru_reset_before, rnn.rnn_tanh, rnn.rnn_relu, rnn.rnn_sigmoid)
}


def get(name: "str | Cell") -> Cell:
    """The cell of this name; a Cell is handed back as it is. ValueError lists the registry."""
    if isinstance(name, Cell):
        return name
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}; cells are {', '.join(CELLS)}, or a Cell made by gradkernels.cells.cell")
    return CELLS[name]
