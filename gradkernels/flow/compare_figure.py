"""A comparison as a figure of matplotlib."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gradkernels.flow.compare import Comparison


def draw(found: Comparison, signal: str, path: str | Path | None) -> Any:
    """One panel per length: log10 of the norm over time, the loss at the right; the range of seeds as a band, theory broken."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as e:
        raise ImportError("a figure needs matplotlib: pip install matplotlib") from e
    lengths, drawn = found.lengths, [line for line in found.lines if line.signal == signal]
    figure = Figure(figsize=(3.3 + 3.4 * len(lengths), 4.2), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    colours = {name: f"C{k % 10}" for k, name in enumerate(found.models)}
    styles: dict[str, Any] = {name: "-" if k < 10 else (0, (5, 1)) for k, name in enumerate(found.models)}
    breaks: dict[str, Any] = dict(zip(dict.fromkeys(line.name for line in drawn), itertools.cycle((":", "--", "-."))))
    for panel, length in zip(panels, lengths):
        steps = np.arange(1, length + 1)
        for c in found.curves:
            if (c.length, c.signal) == (length, signal):
                middle, low, high = (np.where(np.isfinite(v), v, np.nan) for v in (c.log10, c.low, c.high))
                panel.plot(steps, middle, linestyle=styles[c.model], color=colours[c.model], lw=1.6)
                panel.fill_between(steps, low, high, color=colours[c.model], alpha=0.15, lw=0)
        for line in drawn:
            if line.length == length:
                colour = colours.get(line.model or "", "0.4")
                panel.plot(steps, line.log10, linestyle=breaks[line.name], color=colour, lw=1.2)
        panel.set_title(f"{length} steps", fontsize=10)
        panel.set_xlabel("time step")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"log$_{{10}}$ ‖∂L/∂{signal}$_t$‖")
    figure.suptitle(found.title)
    handles = [Line2D([], [], color=colours[m], linestyle=styles[m], label=m) for m in found.models]
    handles += [Line2D([], [], color="0.4", linestyle=style, lw=1.2, label=name) for name, style in breaks.items()]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
