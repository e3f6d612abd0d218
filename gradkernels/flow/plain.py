"""Numbers as JSON knows them."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """Tensors and arrays as nested lists, and None for whatever is not finite.

    >>> import torch
    >>> plain({"a": torch.tensor([1.0, torch.inf]), "b": 2, "c": None})
    {'a': [1.0, None], 'b': 2, 'c': None}
    """
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
