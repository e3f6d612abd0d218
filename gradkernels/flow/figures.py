"""A monitor's history as matplotlib figures.

Dims: T time steps, N records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradkernels.flow.history import Layer, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradkernels.flow.monitor import Monitor


def rows(monitor: Monitor, layer: str | None, signal: str | None) -> tuple[Layer, str, list[Record]]:
    """The layer and the signal that are meant, and the records that have them."""
    if layer is None:
        if not monitor.layers:
            raise ValueError("no recurrent layer is watched: there is nothing over time to draw")
        layer = next(iter(monitor.layers))
    if layer not in monitor.layers:
        raise KeyError(f"no layer {layer!r} is watched; there are {', '.join(monitor.layers)}")
    known = monitor.layers[layer]
    signal = signal or (known.states or ("x",))[0]
    found = [r for r in monitor.history if layer in r.layers and signal in r.layers[layer].signals]
    if not found:
        raise ValueError(f"{signal} of {layer} has not been measured yet")
    return known, signal, found


def heatmap(monitor: Monitor, layer: str | None = None, signal: str | None = None, ax: Axes | None = None) -> Axes:
    """log10 of ||dL/dh_t|| over time steps (down) and training steps (across), the memory horizon as a line.

    Args:
        monitor: what :func:`watch` returned.
        layer: one of ``monitor.layers``; None is the first.
        signal: "h", "c" or "x"; None is the first of the layer.
        ax: where to draw; None makes a figure.

    Raises:
        KeyError: no such layer. ValueError: nothing has been measured.
    """
    known, signal, found = rows(monitor, layer, signal)
    ax = ax or _axes()
    longest = max(len(r.layers[known.name].signals[signal]) for r in found)
    values = np.full((longest, len(found)), np.nan)
    line = np.full(len(found), np.nan)
    for k, record in enumerate(found):
        flow = record.layers[known.name]
        log10 = flow.signals[signal]
        values[: len(log10), k] = np.where(np.isfinite(log10), log10, np.nan)
        if flow.horizon is not None and flow.reached is not None:
            far = flow.horizon + flow.reached.last
            line[k] = far if known.reverse else len(log10) - 1 - far
    steps = np.array([r.step for r in found], float)
    # a record stands for the steps from it to the next one
    edges = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    mesh = ax.pcolormesh(edges, np.arange(longest + 1), values, cmap="viridis", rasterized=True)
    if np.isfinite(line).any() and (signal in known.states[:1] or not known.states):
        ax.step(edges, np.append(line, line[-1]) + 0.5, where="post", color="white", lw=1, label="memory horizon")
        ax.legend(loc="lower right", facecolor="black", labelcolor="white", framealpha=0.5, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="optimizer step", ylabel="time step", title=f"{known.name}: log10 ||dL/d{signal}$_t$||")
    ax.figure.colorbar(mesh, ax=ax)
    return ax


def profile(
    monitor: Monitor, layer: str | None = None, signal: str | None = None, ax: Axes | None = None, most: int = 6
) -> Axes:
    """||dL/dh_t|| over time, logarithmic, at up to `most` training steps from the first to the last; arguments as for `heatmap`."""
    known, signal, found = rows(monitor, layer, signal)
    ax = ax or _axes()
    chosen = [found[k] for k in sorted({round(v) for v in np.linspace(0, len(found) - 1, most)})]
    from matplotlib import colormaps

    for record, colour in zip(chosen, colormaps["viridis"](np.linspace(0.9, 0.1, len(chosen)))):
        log10 = np.asarray(record.layers[known.name].signals[signal], np.float64)
        ax.semilogy(np.where(np.isfinite(log10), 10.0**log10, np.nan), color=colour, label=f"step {record.step}")
    ax.set(xlabel="time step", ylabel=f"||dL/d{signal}$_t$||", title=known.name)
    ax.legend(fontsize="small")
    return ax


def _axes() -> Axes:
    from matplotlib.figure import Figure  # no pyplot: nothing is kept, no window system is asked for

    figure: Any = Figure(figsize=(7, 4), layout="constrained")
    axes: Axes = figure.add_subplot()
    return axes
