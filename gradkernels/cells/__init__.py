"""Recurrent cells: one text each, from which every backend gets forward, backward, tangent and what to keep.

A new cell of the package is one file here and one line in the registry.
"""

import difflib
import types

from . import gru, indrnn, layer_norm, lstm, lstm_variants, mgu, rnn, rnn_variants, slstm, ugrnn
from .bind import Cell
from .derive import cell

__all__ = ["CELLS", "Cell", "cell", "get"]

CELLS: dict[str, Cell] = {
    c.name: c
    for c in (
        cell(lstm.lstm),
        cell(gru.gru),
        cell(gru.gru_reset_before),
        cell(rnn.rnn_tanh),
        cell(rnn.rnn_relu),
        cell(rnn.rnn_sigmoid),
        cell(lstm_variants.lstm_no_forget),
        cell(lstm_variants.lstm_coupled),
        lstm_variants.lstm_peephole,
        layer_norm.lstm_layer_norm,
        layer_norm.gru_layer_norm,
        cell(slstm.slstm),
        cell(mgu.mgu),
        indrnn.indrnn,
        rnn_variants.rnn_modrelu,
        cell(rnn_variants.rnn_additive),
        cell(ugrnn.ugrnn),
    )
}


def get(name: str | Cell) -> Cell:
    """The registered cell of this name; a Cell is handed back as it is.

    Raises:
        ValueError: no such cell; the text lists those there are.
        TypeError: neither a name nor a Cell.

    >>> get("lstm")
    Cell(name='lstm', G=4, S=2, P=0, A=4, split=(), second=())
    >>> get("lstn")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: unknown cell 'lstn'; did you mean lstm? Cells are lstm, gru, gru_reset_before, rnn_tanh, rnn_relu, rnn_sigmoid, ...
    """
    if isinstance(name, Cell):
        return name
    if not isinstance(name, str):
        hint = ": @gk.cell makes a Cell of it" if isinstance(name, types.FunctionType) else ""
        raise TypeError(f"cell must be a name or a Cell, got {type(name).__name__}{hint}")
    if name not in CELLS:
        short = name.lower()
        near = [c for c in CELLS if f"{c}_".startswith(f"{short}_")] or difflib.get_close_matches(short, CELLS, 1)
        hint = f"did you mean {near[0]}? C" if near else "c"
        raise ValueError(f"unknown cell {name!r}; {hint}ells are {', '.join(CELLS)}")
    return CELLS[name]
