"""Recurrent cells: one text each, from which every backend gets forward, backward, tangent and what to keep.

A new cell of the package is one file here and one line in the registry.
"""

from . import gru, lstm, rnn
from .bind import Cell
from .derive import cell

__all__ = ["CELLS", "Cell", "cell", "get"]

CELLS: dict[str, Cell] = {
    f.__name__: cell(f)
    for f in (
        lstm.lstm,
        gru.gru,
        gru.gru_reset_before,
        rnn.rnn_tanh,
        rnn.rnn_relu,
        rnn.rnn_sigmoid,
    )
}


def get(name: str | Cell) -> Cell:
    """The registered cell of this name; a Cell is handed back as it is.

    Raises:
        ValueError: no such cell; the text lists those there are.
        TypeError: neither a name nor a Cell.

    >>> get("lstm")
    Cell(name='lstm', G=4, S=2, P=0, A=4, split=(), second=())
    >>> get("lstn")
    Traceback (most recent call last):
    ValueError: unknown cell 'lstn'; cells are lstm, gru, gru_reset_before, rnn_tanh, rnn_relu, rnn_sigmoid
    """
    if isinstance(name, Cell):
        return name
    if not isinstance(name, str):
        raise TypeError(f"cell must be a name or a Cell, got {type(name).__name__}")
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}; cells are {', '.join(CELLS)}")
    return CELLS[name]
