"""The gradient flow of a training run as one html file that needs no network and no server."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from gradkernels.flow.payload import payload

# In this order they are one script: later ones use what earlier ones define.
SCRIPTS = (
    "dom",
    "scale",
    "data",
    "chart",
    "heatmap",
    "views",
    "spectrum",
    "compare",
    "alerts",
    "network",
    "lessons",
    "main",
)


def report(monitor: Any, path: str | Path, *, comparison: Any = None) -> Path:
    """Write what a monitor has seen as a page: one file, opened from disk, which asks nothing of any network.

    The page shows the norms of the gradient per time step and training step of every layer, how far back they reach,
    saturation of gates, residual and attention blocks, parameters, spectra of recurrent matrices, alerts, and lessons
    to try things out on.

    Args:
        monitor: a monitor (:func:`gradkernels.flow.watch`), its ``snapshot()``, or a mapping from names to either, which puts
            several runs side by side.
        path: the file to write; what was there is replaced.
        comparison: what :func:`gradkernels.flow.compare` returned, or its ``to_dict()``, to be shown too.

    Returns:
        The path that was written.

    Raises:
        TypeError: `monitor` or `comparison` is something else.
        OSError: the file cannot be written.

    A training run has more steps than a screen has pixels: of very long ones every second, fourth, ... step is shown, and the
    page says so.

    >>> import tempfile
    >>> nothing = {"format": 1, "model": "Model", "every": 1, "step": 0, "steps": [], "layers": []}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report(nothing, f"{folder}/flow.html").read_text()[:15]
    '<!doctype html>'
    """
    path = Path(path)
    text = page(payload(monitor) | {"comparison": as_json(comparison)})
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the report cannot be written to {path}: there is no folder {path.parent}")
    path.write_text(text, encoding="utf-8")
    return path


def as_json(comparison: Any) -> Mapping[str, Any] | None:
    """A comparison as a page is given it."""
    if callable(getattr(comparison, "to_dict", None)):
        comparison = comparison.to_dict()
    if comparison is not None and not isinstance(comparison, Mapping):
        raise TypeError(f"comparison: expected what gk.flow.compare returns, got {type(comparison).__name__}")
    return comparison


def page(data: Mapping[str, Any], connect: bool = False) -> str:
    """The html around `data`; `connect` lets its script ask the server that it came from, and nothing else, for more."""
    document, style, script = _parts()
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    if connect:
        policy += "; connect-src 'self'"
    parts = {
        "policy": policy,
        "style": f"<style>{style}</style>",
        # In JSON this is the same string, and no data can end the element or begin a comment in it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": f"<script>{script}</script>",
    }
    for name, text in parts.items():
        before, mark, rest = document.partition(f"<!-- {name} -->")
        assert mark, name
        document = before + text + rest
    return document


@functools.cache
def _parts() -> tuple[str, str, str]:
    folder = resources.files("gradkernels.flow") / "page"
    document, style = ((folder / name).read_text(encoding="utf-8") for name in ("index.html", "style.css"))
    scripts = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return document, style, f'"use strict";\n(() => {{\n{scripts}}})();\n'


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
