"""What a monitor sees right now, as a table in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradkernels.flow.numbers import Array

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from gradkernels.flow.monitor import Monitor

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 16


def sparkline(log10: Array, width: int = WIDTH) -> str:
    """Norms over time as bars, from 8 decades below the largest up to it; a dot is less than that, or nothing.

    >>> sparkline(np.array([-np.inf, -20.0, -7.0, -4.0, 0.0]))
    '··▁▄█'
    """
    if not len(log10):
        return ""
    parts = np.array_split(log10, min(width, len(log10)))
    tops = np.array([np.where(np.isfinite(p), p, -np.inf).max() for p in parts])
    if not np.isfinite(tops).any():
        return "·" * len(tops)
    heights = len(BARS) - 1 + np.where(np.isfinite(tops), tops - tops[np.isfinite(tops)].max(), -np.inf)
    return "".join("·" if v < -1 else BARS[max(0, round(float(v)))] for v in heights)


def table(monitor: Monitor) -> Table:
    """A `rich` table: of every layer the norms over time, at the first and the last time step, memory horizon, decay in decades a step, the
    most saturated gate; then the last alerts. It fits 80 columns.

    Raises:
        ImportError: rich is not installed (``pip install gradkernels[demo]``).
    """
    from rich.table import Table

    title = f"{monitor.name}, step {monitor.step_count}"
    made = Table(
        title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    made.add_column("layer", overflow="fold")
    made.add_column("log10 ||dL/dh||", no_wrap=True)
    for name in ("first", "last", "horizon", "decay"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("saturated")
    recent: dict[str, Any] = {}
    saturation: dict[str, Any] = {}
    for record in monitor.kept():
        recent |= record.layers
        saturation |= {name: flow.saturation for name, flow in record.layers.items() if flow.saturation}
    for name, layer in monitor.layers.items():
        flow = recent.get(name)
        if flow is None:
            made.add_row(name, "nothing yet")
            continue
        log10 = flow.signals[(layer.states or ("x",))[0]]
        number = lambda v: f"{v:.1f}" if np.isfinite(v) else "-"
        made.add_row(
            name if layer.kind == "recurrent" else f"{name} (dL/dx)",
            sparkline(log10),
            number(log10[0]),
            number(log10[-1]),
            "-" if flow.horizon is None else f"{flow.horizon} of {len(log10) - 1}",
            "-" if flow.decay is None else f"{round(flow.decay.rate, 3) + 0.0:.3f}",  # of zero no sign
            _worst(saturation.get(name, {})),
        )
    said = monitor._alerts.found[-3:]
    made.caption = "\n".join(alert.message for alert in said) or None
    return made


def _worst(saturation: dict[str, Array]) -> str:
    if not saturation:
        return ""
    gate = max(saturation, key=lambda g: float(saturation[g].mean()))
    return f"{gate} {saturation[gate].mean():.0%}"


def live(monitor: Monitor, **options: Any) -> Live:
    """The table, kept up to date twice a second while training goes on: ``with gk.flow.live(monitor): train()``.

    Options are those of ``rich.live.Live``. Where the output is no terminal, the last table is printed once at the end.
    """
    from rich.live import Live

    return Live(get_renderable=lambda: table(monitor), **{"refresh_per_second": 2, **options})
