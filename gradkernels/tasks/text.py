"""Characters of the Python standard library's own sources, and a model that predicts the next one.

The text is on every machine that runs Python, and it is a long-range task: brackets close and blocks end many characters
after they were opened.
"""

from __future__ import annotations

import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# The line end and printable ASCII, everything else read as "?": the same numbering on every Python.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
_CODES = bytes(VOCABULARY.find(chr(c)) if chr(c) in VOCABULARY else VOCABULARY.index("?") for c in range(256))
# One file in so many is kept for validation, by a hash of its name: a new Python version moves no file across.
_HELD_OUT = 16


def encode(text: str) -> Tensor:
    """The characters of `text` as uint8 indices into VOCABULARY, [len(text)]; tabs are widened first.

    >>> encode("a b").tolist()
    [66, 1, 67]
    """
    codes = text.expandtabs(4).encode("ascii", "replace").translate(_CODES)
    return torch.frombuffer(bytearray(codes), dtype=torch.uint8) if codes else torch.empty(0, dtype=torch.uint8)


def decode(codes: Tensor) -> str:
    """The text of indices into VOCABULARY.

    >>> decode(encode("if x:"))
    'if x:'
    """
    return "".join(VOCABULARY[code] for code in codes.tolist())


def source_files() -> list[Path]:
    """The top-level modules of the running Python's standard library, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)
    if not files:
        raise RuntimeError(f"no sources of the standard library in {folder}")
    return files


@dataclass(frozen=True)
class Characters:
    """Text cut into `batch` contiguous streams; `batches` walks them `length` characters at a time."""

    train: Tensor  # uint8 [N]
    validation: Tensor  # uint8 [M]
    batch: int
    length: int

    def batches(self, split: str = "train") -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (inputs, targets) of int64 [length, batch]: each row of a batch goes on where it ended in the one before,
        so a recurrent state may be carried over. Endless for "train", which begins again; one pass for "validation".
        """
        if split not in ("train", "validation"):
            raise ValueError(f'split must be "train" or "validation", got {split!r}')
        text = self.train if split == "train" else self.validation
        rows = (len(text) - 1) // self.batch
        if rows < self.length:
            raise ValueError(f"{len(text)} characters are too few for {self.batch} streams of {self.length}")
        inputs = text[: rows * self.batch].view(self.batch, rows).t()
        targets = text[1 : rows * self.batch + 1].view(self.batch, rows).t()
        while True:
            for start in range(0, rows - self.length + 1, self.length):
                piece = slice(start, start + self.length)
                yield inputs[piece].long().contiguous(), targets[piece].long().contiguous()
            if split == "validation":
                return


def characters(batch: int = 32, length: int = 128, seed: int = 0) -> Characters:
    """Read the standard library's sources: validation files apart, training files in an order drawn from `seed`.

    >>> data = characters(batch=4, length=16)
    >>> inputs, targets = next(data.batches())
    >>> inputs.shape, bool((inputs[1:] == targets[:-1]).all())
    (torch.Size([16, 4]), True)
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    train: list[Tensor] = []
    validation: list[Tensor] = []
    for path in source_files():
        codes = encode(path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n"))
        (train if zlib.crc32(path.name.encode()) % _HELD_OUT else validation).append(codes)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Characters(torch.cat([train[i] for i in order.tolist()]), torch.cat(validation), batch, length)


class CharacterModel(nn.Module):
    """embedding -> stacked recurrent layers -> linear, over torch's own layers.

    >>> logits, state = CharacterModel("gru", hidden=8)(torch.zeros(5, 2, dtype=torch.long))
    >>> logits.shape, state.shape
    (torch.Size([5, 2, 96]), torch.Size([2, 2, 8]))
    """

    def __init__(self, cell: str = "lstm", hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        if cell not in kinds:
            raise ValueError(f"cell must be one of {', '.join(kinds)}, got {cell!r}")
        self.embedding = nn.Embedding(len(VOCABULARY), hidden)
        self.recurrent = kinds[cell](hidden, hidden, layers)
        self.head = nn.Linear(hidden, len(VOCABULARY))

    def forward(self, tokens, state=None):  # tokens [T, B] -> logits [T, B, len(VOCABULARY)], state
        outputs, state = self.recurrent(self.embedding(tokens), state)
        return self.head(outputs), state

    @torch.no_grad()
    def sample(self, prompt: str, count: int, temperature: float = 0.6, seed: int = 0) -> str:
        """`prompt` and `count` more characters, each drawn from the model's distribution sharpened by `temperature`."""
        generator = torch.Generator().manual_seed(seed)
        codes = encode(prompt).long()[:, None]
        drawn, state = [], None
        for _ in range(count):
            logits, state = self(codes, state)
            codes = torch.multinomial((logits[-1] / temperature).softmax(-1), 1, generator=generator)
            drawn.append(codes[0])
        return prompt + decode(torch.cat(drawn)) if drawn else prompt
