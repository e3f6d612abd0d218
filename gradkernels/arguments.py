"""What the command lines of the package share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

import gradkernels as gk

# Initial weights by name: what becomes of a layer for sequences of a length.
INITS: dict[str, Callable[[nn.Module, int], object]] = {
    "default": lambda module, length: None,
    "orthogonal": lambda module, length: gk.init.orthogonal_(module),
    "identity": lambda module, length: gk.init.identity_(module),
    "forget": lambda module, length: gk.init.forget_bias_(module, 3.0),
    "chrono": lambda module, length: gk.init.chrono_(module, max(2, length)),
}


def nowhere(**files: str | None) -> str | None:
    """Which of these options names a file in a folder that is not there, before the work that would fill it; None if none does."""
    lost = ((option, Path(file).parent) for option, file in files.items() if file and not Path(file).parent.is_dir())
    return next((f"--{option}: there is no folder {folder}" for option, folder in lost), None)


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
