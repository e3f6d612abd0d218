"""What the package says by itself, and at whose line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# The last is the code that torch.fx makes.
INSIDE = (*(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__)), "<eval_with_key>")


def warn(text: str, kind: type[Warning] = UserWarning) -> None:
    """`warnings.warn` at the innermost line that is neither this package's nor torch's: the user's, however deep the call went."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__", ""), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, kind, frame.f_code.co_filename, frame.f_lineno, module, registry)
