"""The recurrent rows for a GPU, the most telling first: a run that ends early has measured from the top.

Dims: T steps, B batch, I = H input features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.cases import MODES, Case, Target

T, B = 1024, 16
HALF = 8192  # tokens of the ragged rows, of 256 x 64 places
VARIANTS = ("exchange=cluster", "exchange=grid", "kind=step", "backend=triton")  # --variants


def both(group: str, cell: str, B: int, H: int, *targets: Target, T: int = T, **more) -> list[Case]:
    """Inference and training of one shape."""
    return [Case(group, cell, mode, T, B, H, targets=targets, device="cuda", **more) for mode in MODES]


def persistent() -> Iterator[Case]:
    """Where cuDNN keeps the weights on the chip: fp16, one layer, one direction, round sizes."""
    for H, at_least in ((768, 1.0), (512, 1.5), (256, 2.0), (128, 2.0), (1024, None)):
        yield from both("cudnn persistent", "lstm", B, H, Target("torch", at_least), dtype="float16")


def elsewhere() -> Iterator[Case]:
    """Where it does not."""
    bf16, fp16 = {"dtype": "bfloat16"}, {"dtype": "float16"}
    same = (Target("torch", 3.0), Target("torch_fp16", 1.0))  # the same time as cuDNN in fp16
    yield from both("cudnn standard", "lstm", B, 768, *same, providers=("ours", "torch", "torch_fp16"), **bf16)
    shapes = [
        ("gru", B, 768, bf16),
        ("gru", B, 256, fp16),
        ("lstm", B, 512, bf16),
        ("lstm", B, 768, {"tf32": True}),
        ("gru", B, 512, {"tf32": True}),
        ("lstm", B, 768, {"layers": 2, **fp16}),
        ("lstm", B, 512, {"bidirectional": True, **fp16}),
        ("lstm", B, 701, fp16),
        ("lstm", 13, 768, fp16),
        ("lstm", B, 768, {"proj_size": 384, **bf16}),
        ("rnn_tanh", B, 768, bf16),
        ("gru", B, 1024, bf16),
        ("lstm", B, 2048, bf16),
    ]
    for cell, rows, H, more in shapes:
        yield from both("cudnn standard", cell, rows, H, Target("torch", 3.0), **more)


def batches() -> Iterator[Case]:
    for cell, rows, H in (
        ("lstm", 1, 512),
        ("lstm", 64, 512),
        ("lstm", 128, 768),
        ("gru", 256, 512),
        ("lstm", 512, 256),
    ):
        yield from both("batches", cell, rows, H, Target("torch"), dtype="bfloat16")


def ragged() -> Iterator[Case]:
    more = {"tokens": HALF, "dtype": "bfloat16"}
    padded = Target("ours_padded", 0.9, scale=HALF / (256 * 64))  # time in proportion to tokens, but for a tenth
    for layout in ("packed", "ragged"):
        for cell in ("lstm", "gru"):
            yield from both(
                "ragged on a gpu", cell, 64, 512, Target("torch", 5.0), padded, T=256, layout=layout,
                providers=("ours", "torch", "ours_padded"), **more,
            )  # fmt: skip


def loops() -> Iterator[Case]:
    """Against the Python loop, each step one kernel by torch.compile."""
    for cell in ("gru_reset_before", "lstm"):
        yield from both("loops", cell, B, 512, Target("compiled"), providers=("ours", "compiled"), dtype="bfloat16")


def exact() -> Iterator[Case]:
    for cell, H in (("lstm", 512), ("gru", 256)):
        yield from both("fp32", cell, B, H, Target("torch"))


def watched() -> Iterator[Case]:
    free = (Target("ours_unwatched", round(1 / 1.03, 3)),)
    for cell, H in (("lstm", 768), ("gru", 512)):
        yield Case(
            "gradient taps", cell, "training", T, B, H, dtype="bfloat16", device="cuda",
            providers=("ours", "ours_unwatched"), targets=free,
        )  # fmt: skip


def recurrent_gpu() -> list[Case]:
    """Every recurrent row for a GPU, in the order in which they are measured."""
    found = [*persistent(), *elsewhere(), *ragged(), *watched()]
    no_more = (Target("torch", 1.0),)
    memory = [
        replace(c, group="peak memory", kind="memory", providers=("ours", "torch"), targets=no_more)
        for c in found
        if c.mode == "training" and c.group in ("cudnn persistent", "cudnn standard") and c.H in (512, 768)
    ]
    return [*found, *memory, *batches(), *exact(), *loops()]
