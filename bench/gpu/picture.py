"""Draw how the recurrent matrix is kept by a cluster, and by clusters joined through L2: python -m bench.gpu.picture [FILE]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FILE = Path(__file__).with_name("residencies.png")
INK, FAINT, RULE = "#1b1f24", "#57606a", "#c9d1d9"
HUES = ["#1a5c99", "#c8553d", "#2e8b6f", "#8a5fb0"]
MEMORY = "#f0a202"


def tone(hue: str, share: float) -> tuple[float, ...]:
    """The colour, mixed with white: 0 is white."""
    return tuple(1 - share * (1 - v) for v in matplotlib.colors.to_rgb(hue))


def box(ax: Axes, x: float, y: float, w: float, h: float, colour: object, edge: str = "none") -> None:
    style = "round,pad=0,rounding_size=0.09"
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour, edgecolor=edge, linewidth=1.2, zorder=2)
    )


def arrow(ax: Axes, a: tuple[float, float], b: tuple[float, float], colour: str, both: bool = False) -> None:
    style = "<|-|>" if both else "-|>"
    ax.add_patch(
        FancyArrowPatch(
            a, b, arrowstyle=style, mutation_scale=9, color=colour, linewidth=1.4, shrinkA=0, shrinkB=0, zorder=4
        )
    )


def text(ax: Axes, x: float, y: float, words: str, size: float = 8.6, colour: str = INK, **more) -> None:
    more = {"ha": "center", "va": "center", "linespacing": 1.35, "zorder": 5, **more}
    ax.text(x, y, words, fontsize=size, color=colour, **more)


def matrix(ax: Axes, rows: int, columns: int) -> None:
    """The matrix at the left, a colour for every row of blocks, a tone for every column."""
    w, h = 2.3 / columns, 3.6 / rows
    for r in range(rows):
        for c in range(columns):
            colour = tone(HUES[r], 0.85 - 0.5 * c / max(1, columns - 1) * (columns > 1))
            ax.add_patch(
                Rectangle((0.45 + c * w, 4.1 - (r + 1) * h), w, h, facecolor=colour, edgecolor="white", linewidth=1.5)
            )
    text(ax, 1.6, 4.32, "recurrent matrix", 9, weight="bold")
    text(ax, 1.6, 0.32, "H columns: the state", 8, FAINT)
    text(ax, 0.22, 2.3, "G·H rows: gates of the units", 8, FAINT, rotation=90)


def cluster(ax: Axes) -> None:
    matrix(ax, 4, 1)
    for k, hue in enumerate(HUES):
        y = 3.28 - 0.9 * k
        text(ax, 1.6, y + 0.37, "its units,\nevery column", 8, "white")
        box(ax, 3.5, y, 1.55, 0.74, tone(hue, 0.18), hue)
        text(ax, 4.27, y + 0.37, f"block {('0', '1', '2', '15')[k]}\nproduct, then cells", 8)
        arrow(ax, (2.8, y + 0.37), (3.46, y + 0.37), hue)
        arrow(ax, (5.1, y + 0.37), (5.72, y + 0.37), hue, both=True)
    text(ax, 4.27, 1.36, "⋮", 9, FAINT)
    box(ax, 5.76, 0.58, 0.5, 3.44, tone(MEMORY, 0.35), MEMORY)
    text(ax, 6.01, 2.3, "distributed shared memory", 8.4, rotation=90)
    text(
        ax, 6.45, 2.3, "New states are pushed\ninto every block;\neach counts the bytes\nthat arrive.\n\nTwo buffers, and\nno barrier between\nblocks.\n\n"
        "Backward: partial sums\nof dh, each to the\nowner of the unit.", 8.2, ha="left",
    )  # fmt: skip


def grid(ax: Axes) -> None:
    matrix(ax, 3, 4)
    for k, hue in enumerate(HUES[:3]):
        y = 2.96 - 1.2 * k
        box(ax, 3.5, y, 2.35, 1.08, tone(hue, 0.1), hue)
        text(ax, 4.67, y + 0.9, f"cluster {('0', '1', '31')[k]}", 8, FAINT)
        for c in range(4):
            box(ax, 3.62 + 0.54 * c, y + 0.13, 0.48, 0.6, tone(hue, 0.85 - 0.5 * c / 3))
            text(ax, 3.86 + 0.54 * c, y + 0.43, "¼", 9, "white" if c < 3 else INK)
        arrow(ax, (2.8, y + 0.54), (3.46, y + 0.54), hue)
        arrow(ax, (5.9, y + 0.54), (6.5, y + 0.54), hue, both=True)
    text(ax, 4.67, 1.66, "⋮", 9, FAINT)
    box(ax, 6.54, 0.58, 0.5, 3.44, tone(MEMORY, 0.35), MEMORY)
    text(ax, 6.79, 2.3, "state in L2", 8.4, rotation=90)
    text(
        ax, 7.2, 2.3, "A block hears its\nquarter of the state;\nsums meet in the cluster;\nnew states go to L2.\n\nEvery word comes with\nthe turn it is of:\n"
        "no fence, no counter.\n\nBackward: gradients of\ngates through L2, dh\nsummed in the cluster.", 8.2, ha="left",
    )  # fmt: skip


def draw() -> Figure:
    with plt.rc_context({"font.family": "DejaVu Sans"}):
        figure = plt.figure(figsize=(14.6, 5.0), dpi=120, facecolor="white")
        panels = (
            (cluster, 0.008, 8.35, "One cluster is a team", "each cluster takes rows of the batch by itself"),
            (grid, 0.492, 9.2, "Clusters joined through L2", "all blocks of the launch are resident"),
        )
        for k, (what, left, wide, title, subtitle) in enumerate(panels):
            ax = figure.add_axes((left, 0.0, 0.476 if k == 0 else 0.504, 1.0))
            ax.set_xlim(0, wide)
            ax.set_ylim(0, 5.35)
            ax.axis("off")
            ax.text(0.1, 5.0, title, fontsize=13, fontweight="bold", color=INK, va="center")
            ax.text(
                0.1,
                4.68,
                f"the weights stay where they are multiplied; {subtitle}",
                fontsize=9,
                color=FAINT,
                va="center",
            )
            what(ax)
        figure.add_artist(plt.Line2D([0.486, 0.486], [0.06, 0.94], color=RULE, linewidth=1))
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    target = Path(argv[0]) if argv else FILE
    figure = draw()
    figure.savefig(target)
    plt.close(figure)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
