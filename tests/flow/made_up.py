"""Snapshots of training runs that never were, with a form that is known; and where a Chromium is."""

from __future__ import annotations

import importlib.util
import shutil

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser that pages are tested in, if there is one and something to drive it by."""
    if importlib.util.find_spec("playwright") is None:
        return None
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def row(T, i, rate, reverse=False):
    """log10 norms that lose `rate` decades a step going back, a little less in every training step."""
    norms = [-1.0 - 0.01 * i - rate * k for k in range(T)]
    norms = [None if v < -44 else round(v, 4) for v in norms]
    return norms if reverse else norms[::-1]


def layer(name="encoder.l0", steps=5, T=7, rate=0.5, direction="forward", gates=("i", "f"), **other):
    reverse = direction == "reverse"
    given = {
        "name": name,
        "module": name.split(".")[0],
        "kind": "recurrent",
        "cell": "lstm",
        "layer": 0,
        "direction": direction,
        "signals": {s: [row(T, i + k, rate, reverse) for i in range(steps)] for k, s in enumerate("hcx")},
        # measured at some steps only
        "saturation": {g: [[0.25] * T if i % 4 == 0 else None for i in range(steps)] for g in gates},
        "horizon": [min(T - 1, int(3 / rate)) for _ in range(steps)],
        "decay": [rate] * steps,
    }
    return given | other


def spectrum(step, name="encoder.l0.i", size=0.5):
    return {
        "name": name,
        "step": step,
        "eigenvalues": [[size, 0.0], [0.0, size / 2], [0.0, -size / 2]],
        "radius": size,
        "norm": 1.5 * size,
        "singular_values": [1.5 * size, size, 0.1],
    }


def alert(kind="vanishing", step=1, time_step=3, message="It vanishes.", **other):
    given = {"kind": kind, "layer": "encoder.l0", "direction": "forward", "step": step, "time_step": time_step}
    return given | {"value": -4.0, "threshold": -3.0, "message": message, "advice": "Open the gates."} | other


def snapshot(steps=5, every=1, layers=None, **other):
    number = [1 + every * i for i in range(steps)]
    given = {
        "format": 1,
        "model": "Model",
        "versions": {"torch": "2.13.0", "gradkernels": "0.1.0"},
        "every": every,
        "step": number[-1] if number else 0,
        "steps": number,
        "layers": [layer(steps=steps)] if layers is None else layers,
        "blocks": [],
        "parameters": [],
        "spectra": [],
        "alerts": [],
        "clip_rate": None,
        "nonfinite": None,
    }
    return given | other


class Run:
    """A monitor whose training goes on when it is told to, and which counts how often it is looked at."""

    def __init__(self, steps=3, **other):
        self.steps, self.other, self.looks = steps, other, 0

    def snapshot(self):
        self.looks += 1
        return snapshot(self.steps, **self.other)
