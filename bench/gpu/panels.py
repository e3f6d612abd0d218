"""Pictures of rows measured on a GPU, of plot.py's panels."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bench.cases import TITLES
from bench.plot import Bar, Panel, Row, bars, compose, drawable, of, special

MODE = {"backward": "training"}  # has its colour
OTHERS = ("residual norm", "residual rms norm", "layer norm", "causal conv")


def titled(row: Row) -> str:
    """'GRU 16, 768 bf16': what a row is, but for its mode; the number of steps where it is another than usual."""
    number = "tf32" if row["tf32"] else row["dtype"].replace("bfloat", "bf").replace("float", "fp")
    odd = special({**row, "dtype": "float32"})  # rows, or what else is out of the ordinary
    steps = f", {row['T']} steps" * (row["T"] != 1024)
    more = "" if odd == f"{row['T']}, {row['B']}, {row['H']}" else f", {odd}"
    return f"{TITLES[row['cell']]} {row['B']}, {row['H']} {number}{more}{steps}"


def floors(rows: list[Row]) -> list[Bar]:
    """The floor over our time."""
    found = [r for r in rows if r["share"] is not None]
    return [Bar(titled(r), r["mode"], r["share"], None) for r in found]


def where(report: dict[str, Any]) -> str:
    m = report["machine"]
    v, commit = m["versions"], (m["commit"] or "")[:10] + (" + changes" if m["dirty"] else "")
    return f"{m['gpu']['name']}  ·  torch {v['torch']}, cuDNN {v['cudnn']}  ·  {commit}  ·  {m['date'][:10]}"


def layered(row: Row) -> str:
    """'2048 of 64, bf16, full': what a row of layer_rows.py is, but for its operation and mode."""
    number = "tf32" if row["tf32"] else row["dtype"].replace("bfloat", "bf").replace("float", "fp")
    if row["cell"].startswith("attention"):
        size = f"{row['T']}, heads of {row['H'] // row['heads']}"
    elif row["taps"]:
        size = f"{row['T']}, {row['H']} wide, {row['taps']} taps, {row['dilation']} apart"
    else:
        size = f"{row['cell'].replace('residual ', '')}, {row['H']} wide"
    more = [
        number * (number != "bf16"),
        "full" * (not row["causal"]),
        f"dropout {row['dropout']:g}" * bool(row["dropout"]),
    ]
    return ", ".join([size, *filter(None, more)])


def layers(report: dict[str, Any]) -> list[Figure | None]:
    """Against SDPA's fastest backend, torch's operations and torch.compile; and our share of the floor."""
    order = lambda r: (r["cell"], r["H"] // r["heads"], r["dtype"], not r["causal"], r["dropout"], r["T"])
    rows = sorted(drawable(report), key=order)
    timed = [{**r, "mode": MODE.get(r["mode"], r["mode"])} for r in rows if r["kind"] == "time"]
    panel = lambda title, group, against=None: Panel(title, bars(of(timed, group), layered, against))
    heads = lambda D: [r for r in of(timed, "attention on a gpu") if r["H"] // r["heads"] == D]
    speed = [
        [Panel(f"Attention, heads of {D}, against SDPA's fastest", bars(heads(D), layered, "best")) for D in (64, 128)],
        [
            panel("With dropout, against SDPA's fastest", "attention with dropout on a gpu", "best"),
            panel("The whole block, against torch.compile", "blocks on a gpu", "torch_compile"),
        ],
        [
            panel("Residual + norm, against eager torch", "norms on a gpu"),
            panel("Residual + norm, against torch.compile", "norms on a gpu", "torch_compile"),
        ],
        [panel("Dilated causal convolution", "convolution on a gpu")],
    ]
    shares = lambda *cells: [
        Bar(layered(r), r["mode"], r["share"], None) for r in timed if r["cell"] in cells and r["share"]
    ]
    memory = [r for r in rows if r["kind"] == "memory"]
    rest = [
        [
            Panel("The floor over our time, attention", shares("attention")),
            Panel("The floor over our time, the others", shares(*OTHERS)),
        ],
        [
            Panel(
                "Peak memory of training",
                bars(memory, lambda r: layered(r) if r["cell"] in OTHERS else f"{r['cell']}, {layered(r)}"),
            )
        ],
    ]
    note = "Times as fast, taken side by side. Dark: backward, in blocks forward and backward. Labels: tokens of a sequence, or width; bf16."
    title = "Attention, norms and convolution on the GPU"
    floor = f"The floor: bench/gpu/layer_rows.py.\n{where(report)}"
    return [
        compose(speed, title, f"{note}\n{where(report)}", apart=range(4)),
        compose(rest, "Floors and memory", floor, apart=range(2)),
    ]


def figures(report: dict[str, Any]) -> list[Figure | None]:
    """Against torch; and everything else."""
    if report["suite"] == "layers-gpu":
        return layers(report)
    rows = drawable(report)
    timed, others = [r for r in rows if r["kind"] == "time"], [r for r in rows if r["kind"] == "memory"]
    panel = lambda title, group, against=None: Panel(title, bars(of(timed, group), titled, against))
    speed = [
        [panel("Where cuDNN is persistent", "cudnn persistent"), panel("Other batches", "batches")],
        [panel("Where it is not", "cudnn standard"), panel("Ragged, half of the tokens", "ragged on a gpu")],
        [panel("Exact fp32", "fp32"), panel("Against a loop of compiled steps", "loops")],
    ]
    plain = [r for r in timed if r["group"] in ("cudnn persistent", "cudnn standard", "batches")]
    rest = [
        [Panel("The floor over our time", floors(plain)), Panel("Peak memory of training", bars(others, titled))],
        [
            panel("bf16 against torch's fp16", "cudnn standard", "torch_fp16"),
            panel("Gradient taps on, against off", "gradient taps"),
        ],
    ]
    note = "Times as fast as torch, taken side by side, input projection included. Labels: batch, units; 1024 steps unless said."
    title = "Recurrent layers on the GPU: gradkernels against torch"
    return [
        compose(speed, title, f"{note}\n{where(report)}", apart=range(3)),
        compose(rest, "Floor, memory and taps", f"The floor: bench/gpu/floor.py.\n{where(report)}", apart=range(2)),
    ]
