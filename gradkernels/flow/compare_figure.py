"""A comparison as a figure of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gradkernels.flow.compare import Comparison


def draw(found: Comparison, signal: str, path: str | Path | None) -> Any:
    """One panel per length: log10 of the norm over time, the loss at the right; the range of seeds as a band, theory dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("a figure needs matplotlib: pip install matplotlib") from e
    lengths = found.lengths
    figure = Figure(figsize=(1.5 + 3.4 * len(lengths) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    colours = {name: f"C{k % 10}" for k, name in enumerate(found.models)}
    styles = {name: "-" if k < 10 else "--" for k, name in enumerate(found.models)}
    for panel, length in zip(panels, lengths):
        steps = np.arange(1, length + 1)
        for c in found.curves:
            if (c.length, c.signal) == (length, signal):
                clean = [np.where(np.isfinite(v), v, np.nan) for v in (c.log10, c.low, c.high)]
                panel.plot(steps, clean[0], styles[c.model], color=colours[c.model], label=c.model, lw=1.6)
                panel.fill_between(steps, clean[1], clean[2], color=colours[c.model], alpha=0.15, lw=0)
        for line in found.lines:
            if (line.length, line.signal) == (length, signal):
                panel.plot(steps, line.log10, ":", color=colours.get(line.model or "", "0.4"), label=line.name, lw=1.2)
        panel.set_title(f"{length} steps", fontsize=10)
        panel.set_xlabel("time step")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"log$_{{10}}$ ‖∂L/∂{signal}$_t$‖")
    figure.suptitle(found.title)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
